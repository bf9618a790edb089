"""Sums and scheduling that make an update fast with XLA on a CPU. Other devices do not need them.

On a CPU, `xla` compiles each layer on its own. Layers of the same shape share a program, and the
temporaries of one layer are freed before the next layer is updated. This module changes how sums
are computed. Where the caller's program contains all layers, it also controls their order.
"""

import math

import tensorflow as tf

from tf_lamb import norms

MIN_ROW = 256  # Minimum number of elements of a row, so that it can use vector instructions.
MAX_PLAIN_SUM = 4096  # Number of elements up to which a plain sum is as fast as a product.
# Number of elements of a layer above which u is recomputed instead of stored. Storing it would need
# newly allocated memory, which takes more time than computing u twice.
RECOMPUTE_ABOVE = 2**22


def tensorflow_sums():
    """Returns a context in which a sum of squares is a single TensorFlow kernel.

    For code that is not compiled with XLA.
    """
    return norms.override_sums(sum_squares=lambda x: 2.0 * tf.nn.l2_loss(x))


def xla_sums():
    """Returns a context in which a tensor is summed as a matrix-vector product with ones.

    XLA for CPUs compiles a plain sum of squares to code that writes the squares to memory and adds
    them without vector instructions. It fuses the squares into a matrix-vector product. For six
    tensors of shape 768 x 3072, a plain sum takes 33 ms and a product 4 ms.
    """
    return norms.override_sums(sum_elements=_row_sum, sum_squares=lambda x: _row_sum(tf.square(x)))


def _row_sum(x):
    """Returns the sum of a tensor, computed row by row."""
    if math.prod(x.shape) > MAX_PLAIN_SUM:
        row = _row_length(x.shape)
        x = tf.linalg.matvec(tf.reshape(x, (-1, row)), tf.ones((row,), x.dtype))
    return tf.reduce_sum(x)


def _row_length(shape):
    """Returns the number of elements of a row, which spans the last axes of a tensor.

    A row spans as few axes as contain at least `MIN_ROW` elements. It spans all axes only if no
    smaller number of axes is a row.
    """
    sizes = [math.prod(shape[axis:]) for axis in reversed(range(len(shape)))]
    rows = [size for size in sizes if size < sizes[-1]] or sizes
    return next((size for size in rows if size >= MIN_ROW), rows[-1])


def depend_on(ratio, x):
    """Returns `x`, with a data dependency on `ratio`.

    In a single program, XLA for CPUs starts all layers before it finishes one, and keeps the
    temporaries of all of them. A layer that depends on the ratio of an earlier layer starts later.

    Args:
        ratio: Float tensor with elements > 0. If one is 0, then -0.0 in `x` becomes 0.0.
        x: Float tensor.
    """
    # x - 0.0 is x, including x = -0.0. The compiler cannot know that the subtrahend is 0.0.
    return x - tf.cast(tf.nn.relu(-tf.reduce_min(ratio)), x.dtype)


class _Recomputing:
    """Mixin for a rule: computes u for the norm and again for the step, instead of storing it."""

    def direction(self, g, x, slots, scalars, plan):
        self.__dict__["_scalars"] = scalars
        return super().direction(g, x, slots, scalars, plan)

    def step(self, g, x, u, slots, rate, plan):
        slots = tuple(depend_on(tf.abs(rate), slot) for slot in slots)
        u = super().direction(g, x, slots, self._scalars, plan)
        return super().step(g, x, u, slots, rate, plan)


def make_recomputing(rule):
    """Returns a rule that recomputes u, for a layer of more than `RECOMPUTE_ABOVE` elements."""
    if rule.rate_inside:
        return rule  # The step is the momentum, which is stored anyway.
    recomputing = object.__new__(type(type(rule).__name__, (_Recomputing, type(rule)), {}))
    recomputing.__dict__.update(rule.__dict__)
    return recomputing
