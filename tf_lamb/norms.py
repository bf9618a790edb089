"""Norms, the trust ratio and the check for finite gradients. Uses only `keras.ops`."""

import contextlib
import contextvars

from keras import ops

NORMS = ("l2", "l1", "linf")
LARGEST_RATIO = 1e30
# The square of a gradient element above this overflows float32.
LARGEST_GRADIENT = 2.0**63
# `is_finite` keeps this factor below the largest float32, so that sums of moments of accepted
# gradients stay finite as well.
HEADROOM = 4.0

# Functions that compute the sum of a tensor and the sum of its squares. `xla_cpu` replaces them on
# a CPU, where another form of the same sum compiles to faster code.
_sum = contextvars.ContextVar("sum", default=ops.sum)
_sum_squares = contextvars.ContextVar("sum_squares", default=None)


@contextlib.contextmanager
def override_sums(*, sum_elements=None, sum_squares=None):
    """Returns a context in which this module computes sums with the given functions.

    Args:
        sum_elements: Function that returns Σx of a tensor, or `None` to leave it unchanged.
        sum_squares: Function that returns Σx² of a tensor, or `None` to leave it unchanged.
    """
    tokens = [
        (variable, variable.set(function))
        for variable, function in ((_sum, sum_elements), (_sum_squares, sum_squares))
        if function is not None
    ]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def sum_squares(x):
    """Returns Σx² of a float32 tensor, a scalar."""
    function = _sum_squares.get()
    return _sum.get()(ops.square(x)) if function is None else function(x)


def sum_scalars(scalars):
    """Returns the sum of a list of scalars, as one reduction.

    A chain of additions would take XLA much longer to compile.
    """
    return ops.sum(ops.stack(scalars))


def is_finite(squares):
    """Returns whether gradients can be used, as a boolean scalar.

    Args:
        squares: Float32 scalar, the sum of squares of all elements. It is infinite or NaN if an
            element is, and infinite if the square of a finite element overflows.
    """
    # `sqrt` acts as a fusion barrier: XLA recomputes a cheap scalar in each loop that reads it.
    return ops.isfinite(ops.sqrt(HEADROOM * squares))


def clip_to_squarable(g):
    """Clips elements to ±2⁶³, so that their squares do not overflow. NaN stays NaN."""
    return ops.where(ops.abs(g) > LARGEST_GRADIENT, ops.sign(g) * LARGEST_GRADIENT, g)


def norm_without_overflow(tensors):
    """Returns the L2 norm of all tensors together, even where the sum of squares overflows.

    The sum of squares and the sum of scaled squares are computed in one pass. In the scaled sum,
    the squares of elements below 1e-7 underflow. It is only used where the plain sum overflows, and
    there the largest element is far above 1e9.

    Args:
        tensors: List of float32 tensors, clipped with `clip_to_squarable`.

    Returns:
        A float32 scalar.
    """
    plain = sum_scalars([sum_squares(x) for x in tensors])
    scaled = sum_scalars([sum_squares(x * 2.0**-40) for x in tensors])
    return ops.where(ops.isfinite(plain), ops.sqrt(plain), 2.0**40 * ops.sqrt(scaled))


def layer_norm(tensors, norm, axes=()):
    """Returns the norm of a layer.

    Args:
        tensors: List of float32 tensors that make up the layer.
        norm: String, one of `NORMS`.
        axes: Tuple of integers. The axes along which a single tensor stacks layers.

    Returns:
        A float32 scalar. With `axes`, a float32 tensor [..., 1, ...] with one norm for each slice,
        or a scalar 0 if the tensor has no elements.
    """
    if axes:
        (x,) = tensors
        if 0 in x.shape:  # There are no slices, or they have no elements.
            return ops.zeros((), x.dtype)
        others = tuple(set(range(len(x.shape))) - set(axes))
        if not others:  # Each element is a layer. Backends disagree on the meaning of axis=().
            return ops.abs(x)
        if norm == "linf":
            return ops.max(ops.abs(x), axis=others, keepdims=True)
        magnitude = ops.square if norm == "l2" else ops.abs
        total = ops.sum(magnitude(x), axis=others, keepdims=True)
        return ops.sqrt(total) if norm == "l2" else total
    if norm == "linf":
        return ops.max(ops.stack([_max_or_zero(ops.abs(x)) for x in tensors]))
    if norm == "l1":
        return sum(_sum.get()(ops.abs(x)) for x in tensors)
    return ops.sqrt(sum(sum_squares(x) for x in tensors))


def _max_or_zero(x):
    return ops.zeros((), x.dtype) if 0 in x.shape else ops.max(x)


def trust_ratio(x_norm, u_norm, bounds=None):
    """Returns ‖x‖ / ‖u‖, or 1 where either norm is zero (arXiv:1904.00962v1, section 3).

    Where a norm overflows float32, the ratio is 0, and the layer is not updated.

    Args:
        x_norm: Float32 tensor, the norm of the weights: a scalar, or [..., 1, ...] with one norm
            for each slice.
        u_norm: Float32 tensor of the same shape, the norm of the update.
        bounds: Pair (low, high) to which the ratio is clipped where neither norm is zero, or
            `None`.

    Returns:
        A float32 tensor of the same shape.
    """
    ratio = ops.divide_no_nan(x_norm, u_norm)
    # η times the ratio must stay finite: an element without a gradient would become ∞·0.
    ratio = ops.where(ops.isfinite(ratio), ops.minimum(ratio, LARGEST_RATIO), 0.0)
    if bounds is not None:
        ratio = ops.clip(ratio, *bounds)
    return ops.where(ops.logical_or(x_norm == 0, u_norm == 0), 1.0, ratio)
