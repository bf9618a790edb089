"""What XLA needs on a CPU to update a model fast; other devices do without it.

On a CPU each layer is a program of its own (`xla`), so that layers of one shape are compiled once,
and a layer's temporaries are freed before the next layer needs memory. What is here changes how a
sum is written, and the order of layers where a user's program holds all of them.
"""

import math

import tensorflow as tf

from tf_lamb import norms

ROW = 256  # elements: long enough to keep vector instructions busy
SMALL = 4096  # elements: a plain sum is as fast
LARGE = 2**22  # elements: u takes fresh memory, which costs more than computing u twice


def outside_programs():
    """Sums of squares in one pass, with one kernel of TensorFlow's: there is nothing to compile."""
    return norms.computed_by(sum_squares=lambda x: 2.0 * tf.nn.l2_loss(x))


def inside_programs():
    """Sums as products with ones, row by row.

    XLA for CPUs writes the terms of a plain sum to memory and adds them without vector
    instructions. It fuses them into a product (33 ms and 4 ms for six tensors of 768 x 3072).
    """
    return norms.computed_by(total=_row_sum, sum_squares=lambda x: _row_sum(tf.square(x)))


def _row_sum(x):
    if math.prod(x.shape) > SMALL:
        row = _row(x.shape)
        x = tf.linalg.matvec(tf.reshape(x, (-1, row)), tf.ones((row,), x.dtype))
    return tf.reduce_sum(x)


def _row(shape):
    """Elements of the fewest last axes that make a row, but not of all axes, if there are two."""
    sizes = [math.prod(shape[axis:]) for axis in reversed(range(len(shape)))]
    parts = [size for size in sizes if size < sizes[-1]] or sizes
    return next((size for size in parts if size >= ROW), parts[-1])


def depend_on(ratio, x):
    """Returns x, with a data dependency on `ratio`, a tensor of floats > 0. At 0, -0.0 becomes 0.0.

    Within one program XLA for CPUs begins all layers before it finishes one, and keeps the
    temporaries of all. A layer that depends on the ratio of an earlier one is begun after it.
    """
    # x - 0.0 is x, also for x = -0.0; the compiler cannot know that the subtrahend is 0.0.
    return x - tf.cast(tf.nn.relu(-tf.reduce_min(ratio)), x.dtype)


class _Recomputing:
    """A rule whose u is computed twice, for the norm and for the step, and is never stored."""

    def direction(self, g, x, slots, scalars, plan):
        self.__dict__["_scalars"] = scalars
        return super().direction(g, x, slots, scalars, plan)

    def step(self, g, x, u, slots, rate, plan):
        slots = tuple(depend_on(tf.abs(rate), slot) for slot in slots)
        u = super().direction(g, x, slots, self._scalars, plan)
        return super().step(g, x, u, slots, rate, plan)


def recomputing(rule):
    """The same rule for a layer of more than `LARGE` elements."""
    if rule.rate_inside:
        return rule  # its step is the momentum, which is stored anyway
    twin = object.__new__(type(type(rule).__name__, (_Recomputing, type(rule)), {}))
    twin.__dict__.update(rule.__dict__)
    return twin
