"""The contents of a checkpoint: weights, slots, the run's counters and its settings."""

import orbit
import tensorflow as tf


class RunState(tf.Module):
    """The counters of a run. Create it in the strategy's scope.

    step: int64, batches used so far: the position in the schedule and in the data, which is a
        function of the seed and this number. (The optimizer's `iterations` counts the updates since
        the slots were zero, for bias correction, and does not count skipped updates.)
    skipped_in_row: int64, updates skipped since the last one that was made.
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
    """The run's settings as text, for a reader of the checkpoint."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def serialize(self):
        """Returns the text."""
        return self.text

    def deserialize(self, string_value):
        """Does nothing: a resumed run keeps the settings that it was started with."""


def make_checkpoint(model, optimizer, state: RunState, settings: str) -> tf.train.Checkpoint:
    """A checkpoint object of everything that a run needs to resume, and its settings."""
    return tf.train.Checkpoint(
        model=model, optimizer=optimizer, state=state, settings=RunConfigText(settings)
    )
