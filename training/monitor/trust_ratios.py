"""Trust ratios and weights of a run, for TensorBoard and the heat map."""

import os

import tensorflow as tf

from tf_lamb.telemetry import TelemetryWriter

FOLDER = "telemetry"  # in a model_dir
MOST_VALUES = 10_000  # of a variable in its histogram


class TrustRatios:
    """Records the optimizer's telemetry after each inner loop; a train action.

    Now and then it writes histograms of the weights, too: on the host that costs as much as a
    checkpoint does.

    Args:
        step: int `tf.Variable`, steps done so far.
        optimizer: made with `telemetry=True`.
        variables: the model's trainable ones.
        model_dir: gets `telemetry/` and `weights/`.
        histogram_every_steps: least number of steps between two histograms of the weights.
    """

    def __init__(self, step, optimizer, variables, model_dir, histogram_every_steps):
        self._step, self._variables, self._every = step, variables, histogram_every_steps
        self._writer = TelemetryWriter(os.path.join(model_dir, FOLDER), optimizer)
        self._events = tf.summary.create_file_writer(os.path.join(model_dir, "weights"))
        self._last = None

    def __call__(self, output):
        """Records the update that was the last of the loop."""
        del output
        step = int(self._step.numpy())
        self._writer.record(step)
        if self._last is None or step // self._every != self._last // self._every:
            self._write_histograms(tf.constant(step, tf.int64))
        self._last = step

    def begin(self):
        """Nothing: what a resumed run records again counts once in the heat map."""

    @tf.function
    def _write_histograms(self, step):
        with self._events.as_default(step=step):
            for variable in self._variables:
                values = tf.reshape(variable.read_value(), [-1])
                every = -(-variable.shape.num_elements() // MOST_VALUES)
                tf.summary.histogram(variable.name.split(":")[0], values[::every])

    def close(self):
        """Writes out what the files still hold."""
        self._writer.close()
        self._events.close()
