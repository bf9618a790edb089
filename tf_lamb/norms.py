"""Norms, trust ratio and clipping: pure functions on `keras.ops`."""

import contextlib
import contextvars

from keras import ops

NORMS = ("l2", "l1", "linf")
LARGEST_RATIO = 1e30
# A gradient element above this has no float32 square.
LARGEST_GRADIENT = 2.0**63
# `is_finite` asks for this much room below the largest float32, so that sums of moments that are
# made of accepted gradients stay finite, too.
HEADROOM = 4.0

# How a sum of all elements, and one of all squares, is computed. A compiler may need another form
# than the plain one: see `xla_cpu`.
_total = contextvars.ContextVar("total", default=ops.sum)
_sum_squares = contextvars.ContextVar("sum_squares", default=None)


@contextlib.contextmanager
def computed_by(*, total=None, sum_squares=None):
    """Within it, `total` computes Σx of a tensor, and `sum_squares` computes Σx²."""
    tokens = [
        (variable, variable.set(function))
        for variable, function in ((_total, total), (_sum_squares, sum_squares))
        if function is not None
    ]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def sum_squares(x):
    """Σx² of a float32 tensor, a scalar."""
    function = _sum_squares.get()
    return _total.get()(ops.square(x)) if function is None else function(x)


def added(scalars):
    """The sum of a list of scalars, as one reduction: a chain of additions is slow to compile."""
    return ops.sum(ops.stack(scalars))


def is_finite(squares):
    """Whether a gradient can be used: a boolean scalar.

    Args:
        squares: float32 scalar, the sum of squares of the elements. It is NaN or infinite where an
            element is, and infinite where the square of a finite element is.
    """
    # `sqrt` acts as a fusion barrier: XLA computes a cheap scalar anew in each loop that reads it.
    return ops.isfinite(ops.sqrt(HEADROOM * squares))


def limited(g):
    """g with elements beyond ±2⁶³ moved there, so that squares stay finite; NaN stays NaN."""
    return ops.where(ops.abs(g) > LARGEST_GRADIENT, ops.sign(g) * LARGEST_GRADIENT, g)


def safe_norm(tensors):
    """‖all tensors end to end‖₂ of limited gradients, a float32 scalar, also where Σx² overflows.

    Both sums are computed in one pass. The scaled one loses elements below 1e-7, and is used only
    where the largest is far above 1e9.
    """
    plain = added([sum_squares(x) for x in tensors])
    scaled = added([sum_squares(x * 2.0**-40) for x in tensors])
    return ops.where(ops.isfinite(plain), ops.sqrt(plain), 2.0**40 * ops.sqrt(scaled))


def layer_norm(tensors, norm, axes=()):
    """‖·‖ of a layer.

    Args:
        tensors: list of float32 tensors that make up the layer.
        norm: "l2", "l1" or "linf".
        axes: axes along which a single tensor stacks layers.

    Returns:
        A float32 scalar; with `axes`, [.., 1, ..] with one norm for each slice, or a scalar 0 for
        a tensor without elements.
    """
    if axes:
        (x,) = tensors
        if 0 in x.shape:  # no slice, or slices without elements
            return ops.zeros((), x.dtype)
        others = tuple(set(range(len(x.shape))) - set(axes))
        if not others:  # each element is a layer; backends disagree on what axis=() means
            return ops.abs(x)
        if norm == "linf":
            return ops.max(ops.abs(x), axis=others, keepdims=True)
        size = ops.square if norm == "l2" else ops.abs
        total = ops.sum(size(x), axis=others, keepdims=True)
        return ops.sqrt(total) if norm == "l2" else total
    if norm == "linf":
        return ops.max(ops.stack([_largest(ops.abs(x)) for x in tensors]))
    if norm == "l1":
        return sum(_total.get()(ops.abs(x)) for x in tensors)
    return ops.sqrt(sum(sum_squares(x) for x in tensors))


def _largest(x):
    return ops.zeros((), x.dtype) if 0 in x.shape else ops.max(x)


def trust_ratio(x_norm, u_norm, bounds=None):
    """‖x‖ / ‖u‖, and 1 where either is zero (arXiv:1904.00962v1, section 3).

    Where a norm exceeds float32 the ratio is 0: the layer is not moved.

    Args:
        x_norm, u_norm: float32 scalars, or [.., 1, ..].
        bounds: (low, high) that the ratio is clipped to where neither norm is zero, or None.
    """
    ratio = ops.divide_no_nan(x_norm, u_norm)
    # η·ratio must stay finite, or an element without a gradient takes ∞·0.
    ratio = ops.where(ops.isfinite(ratio), ops.minimum(ratio, LARGEST_RATIO), 0.0)
    if bounds is not None:
        ratio = ops.clip(ratio, *bounds)
    return ops.where(ops.logical_or(x_norm == 0, u_norm == 0), 1.0, ratio)
