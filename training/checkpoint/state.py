"""What a run is, beside weights and slots, and the checkpoint that holds all of it."""

import orbit
import tensorflow as tf
import tf_keras


class RunState(tf.Module):
    """The counters of a run. Make it under the strategy's scope.

    step: int64, batches used, so also the position in the schedule, and in the data, which is a
        function of the seed and this number. The optimizer's `iterations` counts the updates
        since the slots were zero, for bias correction, and stands still where one is skipped.
    skipped_in_row: int64, updates skipped up to now without one between.
    rate_factor: float32, what the schedule's rate is multiplied by; below 1 after a rollback.
    rollbacks: int64, how often the run went back.
    """

    def __init__(self):
        super().__init__()
        self.step = orbit.utils.create_global_step()
        self.skipped_in_row = _host_variable(0, tf.int64, "skipped_in_row")
        self.rate_factor = _host_variable(1.0, tf.float32, "rate_factor")
        self.rollbacks = _host_variable(0, tf.int64, "rollbacks")


def _host_variable(value, dtype, name):
    """One that the host alone assigns, the same on all replicas."""
    return tf.Variable(value, dtype=dtype, trainable=False, name=name)


class RunSchedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    """A schedule over the steps of the run, times its `rate_factor`.

    The optimizer's own count will not do: it begins anew where a phase resets the slots, and
    stands still where an update is skipped, so that the phases would no longer begin on time.

    Args:
        schedule: `(step) -> rate`.
        state: a `RunState`.
    """

    def __init__(self, schedule, state: RunState):
        self._schedule, self._state = schedule, state

    def __call__(self, step):
        """The rate of the step at hand, whatever `step`: a float32 scalar."""
        del step
        return self._schedule(self._state.step) * self._state.rate_factor

    def get_config(self):
        """What it was made of."""
        factor = float(self._state.rate_factor.numpy())
        return {"schedule": self._schedule, "rate_factor": factor}


class Note(tf.train.experimental.PythonState):
    """A text that a checkpoint holds for whoever finds it: the recipe."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def serialize(self):
        """What is written."""
        return self.text

    def deserialize(self, string_value):
        """Nothing: fields that may change between two starts keep the value of this one."""


def make_checkpoint(model, optimizer, state: RunState, settings: str) -> tf.train.Checkpoint:
    """All that a run needs to go on: weights, slots, schedule, counters; and its settings."""
    return tf.train.Checkpoint(
        model=model, optimizer=optimizer, state=state, settings=Note(settings)
    )
