"""The contents of a checkpoint: weights, slots, the run's counters and its settings."""

import orbit
import tensorflow as tf


class RunState(tf.Module):
    """The counters of a run. Create it in the strategy's scope.

    step: int64, steps done so far, including those whose update was skipped. The learning rate
        and the next batch are functions of it. (The optimizer's `iterations` counts the updates
        since the slots were reset, for bias correction, and excludes skipped updates.)
    skipped_in_row: int64, consecutive updates skipped up to now.
    rate_factor: float32, multiplies the schedule's learning rate; below 1 after a rollback.
    rollbacks: int64, number of rollbacks.
    """

    def __init__(self):
        super().__init__()
        self.step = orbit.utils.create_global_step()
        self.skipped_in_row = _host_variable(0, tf.int64, "skipped_in_row")
        self.rate_factor = _host_variable(1.0, tf.float32, "rate_factor")
        self.rollbacks = _host_variable(0, tf.int64, "rollbacks")


def _host_variable(value, dtype, name):
    """A variable that only the host assigns, with the same value on all replicas."""
    return tf.Variable(value, dtype=dtype, trainable=False, name=name)


class RunConfigText(tf.train.experimental.PythonState):
    """The run's settings as text, stored in the checkpoint for people and tools that read it."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def serialize(self):
        """Returns the text."""
        return self.text

    def deserialize(self, string_value):
        """Does nothing: the text of the current start is kept, not the checkpoint's."""


def make_checkpoint(model, optimizer, state: RunState, settings: str) -> tf.train.Checkpoint:
    """Returns a `tf.train.Checkpoint` of all that a run needs to resume, and its settings."""
    return tf.train.Checkpoint(
        model=model, optimizer=optimizer, state=state, settings=RunConfigText(settings)
    )
