"""The update rules: LAMB and LARS steps for a whole model, as pure functions.

Lists of tensors in, lists of tensors out, written on `keras.ops` alone, so that one text serves
TensorFlow, JAX and torch. Which layer is decayed or adapted comes as tuples of Python `bool`:
it is decided before tracing, and an excluded layer adds nothing to the program.

Arithmetic is float32 whatever the model's dtype (0.999 is 1.0 in bfloat16). Symbols are the
papers': g gradient, x weight, m and v moments, u update, λ weight decay, η learning rate.
"""

import math

from keras import ops


def norm(x):
    """‖x‖₂ over all elements of `x`, a float tensor of any shape: a scalar of its dtype."""
    return ops.sqrt(ops.sum(ops.square(x)))


def trust_ratio(x_norm, u_norm):
    """‖x‖ / ‖u‖, and 1 where either is zero (arXiv:1904.00962v1, section 3)."""
    defined = ops.logical_and(x_norm > 0, u_norm > 0)
    return ops.where(defined, ops.divide_no_nan(x_norm, u_norm), 1.0)


def bias_correction(beta, step):
    """1 - βᵗ as -expm1(t·ln β): the plain power loses 1e-5 of its value to float32 at β=0.999."""
    if beta == 0:
        return 1.0
    return -ops.expm1(step * math.log(beta))


def clip(grads, clipvalue=None, clipnorm=None, global_clipnorm=None):
    """Clips by value, by each layer's norm, or by the norm of all gradients together.

    Args:
        grads: list of float32 tensors, already summed over the replicas.
        clipvalue, clipnorm, global_clipnorm: floats as in every Keras optimizer; at most one set.
    """
    if clipvalue is not None:
        return [ops.clip(g, -clipvalue, clipvalue) for g in grads]
    if clipnorm is not None:
        return [g * (clipnorm / ops.maximum(norm(g), clipnorm)) for g in grads]
    if global_clipnorm is not None:
        total = ops.sqrt(sum(ops.sum(ops.square(g)) for g in grads))
        scale = global_clipnorm / ops.maximum(total, global_clipnorm)
        return [g * scale for g in grads]
    return grads


def _descended(x, delta):
    """x - δ in the wider of float32 and x's own dtype, returned in x's dtype."""
    dtype = x.dtype
    if "float64" in str(dtype):
        return x - ops.cast(delta, dtype)
    return ops.cast(ops.cast(x, "float32") - delta, dtype)


def lamb_step(
    grads, params, m, v, *, learning_rate, step, decay, adapt, beta_1, beta_2, epsilon, weight_decay
):
    """LAMB, Algorithm 2 of arXiv:1904.00962v5, with bias correction and φ(z) = z.

        m ← β₁m + (1-β₁)g                     v ← β₂v + (1-β₂)g²
        r = (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)
        u = r + λx                            x ← x - η (‖x‖ / ‖u‖) u

    Args:
        grads: list of float32 tensors, one per layer, of the layer's shape.
        params: list of float tensors x of any dtype.
        m, v: lists of float32 tensors, the moments.
        learning_rate: float32 scalar η.
        step: float32 scalar t, 1 in the first update.
        decay, adapt: tuples of `bool`, one per layer; False drops λx, or takes ratio 1.
        beta_1, beta_2, epsilon, weight_decay: Python floats.

    Returns:
        `(params, m, v)`, three lists like the ones that came in.
    """
    correction_1 = bias_correction(beta_1, step)
    correction_2 = bias_correction(beta_2, step)
    new_params, new_m, new_v = [], [], []
    for g, x, m_x, v_x, decayed, adapted in zip(grads, params, m, v, decay, adapt, strict=True):
        m_x = beta_1 * m_x + (1 - beta_1) * g
        v_x = beta_2 * v_x + (1 - beta_2) * ops.square(g)
        root = ops.sqrt(v_x / correction_2)
        if epsilon > 0:
            u = (m_x / correction_1) / (root + epsilon)
        else:  # an element that had no gradient yet has no direction: 0, where 0/0 is NaN
            u = ops.divide_no_nan(m_x / correction_1, root)
        x_32 = ops.cast(x, "float32")
        if decayed:
            u = u + weight_decay * x_32
        rate = learning_rate * trust_ratio(norm(x_32), norm(u)) if adapted else learning_rate
        new_params.append(_descended(x, rate * u))
        new_m.append(m_x)
        new_v.append(v_x)
    return new_params, new_m, new_v


def lars_step(
    grads,
    params,
    momentums,
    *,
    learning_rate,
    decay,
    adapt,
    momentum,
    weight_decay,
    trust_coefficient,
    epsilon,
    nesterov,
):
    """LARS as You, Gitman and Ginsburg (arXiv:1708.03888, Algorithm 1) and MLPerf run it.

        r = κ ‖x‖ / (‖g‖ + λ‖x‖ + ε)          m ← μm + η r (g + λx)
        x ← x - m                              (Nesterov: x ← x - (μm + η r (g + λx)))

    A layer with ‖x‖ = 0 or ‖g‖ = 0 takes r = 1, and so does one that is not adapted.

    Args:
        grads: list of float32 tensors, one per layer, of the layer's shape.
        params: list of float tensors x of any dtype.
        momentums: list of float32 tensors m.
        learning_rate: float32 scalar η.
        decay, adapt: tuples of `bool`, one per layer; False drops λ, or takes r = 1.
        momentum, weight_decay, trust_coefficient, epsilon: Python floats μ, λ, κ, ε.
        nesterov: `bool`.

    Returns:
        `(params, momentums)`, two lists like the ones that came in.
    """
    new_params, new_momentums = [], []
    for g, x, m, decayed, adapted in zip(grads, params, momentums, decay, adapt, strict=True):
        x_32 = ops.cast(x, "float32")
        lambda_x = weight_decay if decayed else 0.0
        rate = learning_rate
        if adapted:
            x_norm, g_norm = norm(x_32), norm(g)
            ratio = ops.divide_no_nan(
                trust_coefficient * x_norm, g_norm + lambda_x * x_norm + epsilon
            )
            defined = ops.logical_and(x_norm > 0, g_norm > 0)
            rate = rate * ops.where(defined, ratio, 1.0)
        step = rate * (g + lambda_x * x_32 if decayed else g)
        m = momentum * m + step
        new_params.append(_descended(x, momentum * m + step if nesterov else m))
        new_momentums.append(m)
    return new_params, new_momentums
