"""LAMB: the update of a layer, its arguments and its variants."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

from tf_lamb.arguments import (
    Variant,
    check_bounds,
    check_choice,
    check_flag,
    check_interval,
    constructor_arguments,
)
from tf_lamb.layerwise import Layerwise
from tf_lamb.norms import trust_ratio

NESTEROV = (None, "first", "both")
ADAPT_ALL = {"exclude_from_layer_adaptation": ()}
VARIANTS = {
    "paper-v1": Variant("arXiv:1904.00962v1, Algorithm 1: bias correction, φ(z) = z", {}),
    "paper-v3": Variant(
        "arXiv:1904.00962v3, Algorithm 2: no bias correction; gives no bounds for φ",
        {"bias_correction": False},
    ),
    "paper": Variant("arXiv:1904.00962v5, Algorithm 2 (ICLR 2020): bias correction", {}),
    "nvlamb": Variant(
        "NVIDIA DeepLearningExamples, BERT: clip at global norm 1, every layer adapted",
        {"global_clipnorm": 1.0} | ADAPT_ALL,
    ),
    "n-lamb": Variant("arXiv:1904.00962v5, appendix (formula unverified)", {"nesterov": "first"}),
    "nn-lamb": Variant("arXiv:1904.00962v5, appendix (formula unverified)", {"nesterov": "both"}),
    "tf-models": Variant(
        "tf-models-official 2.20 official/modeling/optimization/lamb.py", {"weight_decay": 0.0}
    ),
    "optax": Variant(
        "optax.lamb: every layer decayed and adapted", {"weight_decay": 0.0} | ADAPT_ALL
    ),
    "apex": Variant(
        "NVIDIA apex FusedLAMB, use_nvlamb=False: undecayed layers are not adapted",
        {"global_clipnorm": 1.0, "adapt_undecayed": False},
    ),
    "lambc": Variant(
        "arXiv:2011.13584, LAMBC; timm's `trust_clip`: trust ratio of at most 1",
        {"trust_ratio_bounds": (0.0, 1.0)},
    ),
    "deepspeed": Variant(
        "DeepSpeed FusedLamb: trust ratio in [0.01, 10], of the update without bias correction",
        {
            "epsilon": 1e-8,
            "weight_decay": 0.0,
            "bias_correction": "rate",
            "trust_ratio_bounds": (0.01, 10.0),
        }
        | ADAPT_ALL,
    ),
}


class LAMBRule(Layerwise):
    """LAMB: Adam with a step that is scaled to the norm of each layer's weights.

        m ← β₁m + (1-β₁)g                     v ← β₂v + (1-β₂)g²
        r = (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)
        u = r + λx                            x ← x - η (‖x‖ / ‖u‖) u

    A layer is a variable, unless `layer_axes` or `layer_groups` say otherwise. The trust ratio
    ‖x‖ / ‖u‖ is 1 where either norm is zero. Slots, norms and the step count are float32, whatever
    the dtype of the variables. Under a `tf.distribute` strategy, gradients are summed over the
    replicas before clipping and before the trust ratio is computed.

    Args:
        learning_rate: A float >= 0, a learning-rate schedule, a callable without arguments, or a
            scalar float variable. Defaults to 1e-3. A variable is not copied: a value assigned to
            it is used in the next update. A callable is traced into a compiled step; return a
            tensor if the value must vary. With `gradient_accumulation_steps`, Keras calls a
            schedule with the number of micro-batches. The schedules of this package have the same
            argument, which makes them count updates.
        beta_1: Float in [0, 1). The decay β₁ of the first moment.
        beta_2: Float in [0, 1). The decay β₂ of the second moment.
        epsilon: Float >= 0. The constant ε, added outside the square root.
        weight_decay: Float >= 0, or `None` for 0. The decay λ. It is part of u, so the trust ratio
            applies to it, too.
        exclude_from_weight_decay: List of regular expressions. A variable whose full path contains
            a match is not decayed. Anchor a pattern to the end of the path (`"bias$"`), not to its
            start: the paths of a Sequential or subclassed model begin with the model's name, which
            Keras 3 drops when it loads a Sequential model.
        exclude_from_layer_adaptation: List of regular expressions, or `None`. A variable whose full
            path contains a match has a trust ratio of 1. `None` means the same list as
            `exclude_from_weight_decay`; an empty list means that every layer is adapted.
        adapt_undecayed: Boolean. If `False`, variables without weight decay are not adapted, as in
            apex and timm.
        bias_correction: Boolean or `"rate"`. If `True`, m and v are divided by 1-β₁ᵗ and 1-β₂ᵗ, as
            above. If `False`, they are not. With `"rate"` they are not, and η is multiplied by
            √(1-β₂ᵗ) / (1-β₁ᵗ), outside the trust ratio (DeepSpeed).
        nesterov: `None`, `"first"` or `"both"`. Nesterov momentum in m (N-LAMB), or in m and v
            (NN-LAMB).
        norm: String, `"l2"`, `"l1"` or `"linf"`. The norm of weights and update.
        weight_norm_bounds: Pair (γl, γu) or `None`. Bounds to which ‖x‖ is clipped:
            φ(z) = min(max(z, γl), γu) in the paper.
        trust_ratio_bounds: Pair (low, high) or `None`. Bounds to which the trust ratio is clipped.
            A ratio that is 1 because a norm is zero is not clipped.
        unit_gradient: Boolean. Whether to always scale all gradients to a global norm of 1, as
            described by NVIDIA for NVLAMB. Their program only scales down, which is
            `global_clipnorm=1.0`.
        layer_axes: Dictionary {pattern: axis or list of axes}, for variables that stack layers
            along these axes (scanned encoder layers, fused QKV). Each slice has its own trust
            ratio.
        layer_groups: List of regular expressions. The variables that match one of them share one
            trust ratio, computed from the norms of all of them together. A member without a
            gradient is not updated, but its weights are included in ‖x‖.
        moment_dtype: String, `"float32"` or `"bfloat16"`. The dtype of the first moment m. With
            `"bfloat16"` it takes half the memory, and each update rounds it to 8 significant bits:
            after five updates, the change of the weights differs by up to a relative 1/128.
        skip_nonfinite: Boolean. If `True`, an update is skipped if the sum of squares of all
            gradients is not finite in float32: an element is NaN or infinite, or too large to be
            squared (above 9e18). Weights, moments, averages and the step count keep their
            values, and `skipped_steps` is incremented. If `False`, gradients are used as they are,
            except that elements beyond ±2⁶³ are clipped, because their squares overflow float32.
        telemetry: Boolean. Whether to keep ‖x‖, ‖u‖ and the trust ratio of each variable in
            `telemetry_rows`.
        jit_compile: Boolean. Whether to compile the update with XLA, on TensorFlow. If that is not
            possible (a device without XLA, `tf.debugging.enable_check_numerics`), the update runs
            uncompiled after a `UserWarning`. The argument has no effect in a step that is itself
            compiled.
        clipnorm: Float > 0 or `None`. Each gradient is scaled down to at most this norm.
        clipvalue: Float > 0 or `None`. Each element of a gradient is clipped to ±`clipvalue`.
        global_clipnorm: Float > 0 or `None`. All gradients are scaled down together, so that their
            global norm is at most this value. Only one of `clipnorm`, `clipvalue`,
            `global_clipnorm` and `unit_gradient` can be set. Unlike in Keras 3, they apply to the
            gradients after the sum over replicas.
        use_ema: Boolean. Whether to keep an exponential moving average of the weights, as in Keras.
            It is updated once for each update that is not skipped.
        ema_momentum: Float in [0, 1]. The decay of the average.
        ema_overwrite_frequency: Integer >= 1 or `None`. The number of updates after which the
            weights are overwritten with their averages.
        loss_scale_factor: Float or `None`, as in Keras. Keras 3 only.
        gradient_accumulation_steps: Integer >= 2 or `None`. The number of calls for each update,
            which uses their mean gradient. Bias correction, averages and `iterations` count
            updates. Under a `tf.distribute` strategy, the result is that of one replica with the
            whole batch. If a variable has no gradient in the call that completes an update, its
            earlier gradients count in the next update. Keras 3 only.
        based_on: String or `None`. The variant that the arguments are from. `LAMB.variant(...)`
            sets it.
        name: String or `None`. The name of the optimizer. With `None`, Keras chooses it.
        **base_arguments: Other arguments of the `Optimizer` class of a newer Keras.

    Raises:
        ValueError: If an argument is unknown or out of range, or a pattern is not a regular
            expression. `build` raises it if a variable is not a real floating-point variable.

    Example:

    >>> model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=tf_lamb.LAMB(1e-3, weight_decay=0.01,
    ...     exclude_from_weight_decay=tf_lamb.BERT_EXCLUSIONS), loss="mse")

    Differs from:
        - `keras.optimizers.Lamb`, which applies weight decay outside the trust ratio
          (x ← x - ηλx, before u is computed), has ε = 1e-7, and always adapts all layers.
        - `LAMB` of tf-models, which does not save its exclusion lists, and treats an empty list for
          adaptation like the list for weight decay.
        - arXiv:1904.00962v3, which has no bias correction. Versions 1 and 5 have it.

    References:
        - [You et al., 2020](https://arxiv.org/abs/1904.00962), "Large Batch Optimization for Deep
          Learning: Training BERT in 76 minutes", Algorithm 2
    """

    slot_names = ("m", "v")
    variants = VARIANTS

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float | None = 0.01,
        exclude_from_weight_decay: Sequence[str] | str | None = (),
        exclude_from_layer_adaptation: Sequence[str] | str | None = None,
        *,
        adapt_undecayed: bool = True,
        bias_correction: bool | str = True,
        nesterov: str | None = None,
        norm: str = "l2",
        weight_norm_bounds: tuple[float, float] | None = None,
        trust_ratio_bounds: tuple[float, float] | None = None,
        unit_gradient: bool = False,
        layer_axes: Mapping[str, int | Sequence[int]] | None = None,
        layer_groups: Sequence[str] | str | None = (),
        moment_dtype: str = "float32",
        skip_nonfinite: bool = True,
        telemetry: bool = False,
        jit_compile: bool = True,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        based_on: str | None = None,
        name: str | None = None,
        **base_arguments: Any,
    ) -> None:
        arguments = constructor_arguments(locals())
        arguments["beta_1"] = check_interval("beta_1", beta_1, 0, 1)
        arguments["beta_2"] = check_interval("beta_2", beta_2, 0, 1)
        arguments["epsilon"] = check_interval("epsilon", epsilon, 0)
        arguments["weight_norm_bounds"] = check_bounds("weight_norm_bounds", weight_norm_bounds)
        arguments["unit_gradient"] = check_flag("unit_gradient", unit_gradient)
        if isinstance(bias_correction, str):
            check_choice("bias_correction", bias_correction, (True, False, "rate"))
        else:
            arguments["bias_correction"] = check_flag("bias_correction", bias_correction)
        arguments["nesterov"] = check_choice("nesterov", nesterov, NESTEROV)
        super().__init__(arguments, base_arguments)

    def moments(self, g, x, slots, plan, rate):
        """Returns m and v (Algorithm 2, lines 6 and 7)."""
        h = self.hyperparameters
        m, v = slots
        m = h.beta_1 * m + (1 - h.beta_1) * g
        v = h.beta_2 * v + (1 - h.beta_2) * ops.square(g)
        return m, v

    def direction(self, g, x, slots, scalars, plan):
        """Returns u = m̂ / (√v̂ + ε) + λx (Algorithm 2, lines 8 and 9)."""
        h = self.hyperparameters
        m_hat, v_hat = self._bias_corrected(g, *slots, scalars)
        if h.epsilon:
            r = m_hat / (ops.sqrt(v_hat) + h.epsilon)
        else:
            # 0/0 means that the element has had no gradient so far. Its direction is 0.
            r = ops.divide_no_nan(m_hat, ops.sqrt(v_hat))
        return r + h.weight_decay * x if plan.decayed else r

    def ratio(self, x_norm, u_norm, decay_norm):
        """Returns φ(‖x‖) / ‖u‖ and ‖u‖ (Algorithm 2, line 10)."""
        h = self.hyperparameters
        phi = x_norm if h.weight_norm_bounds is None else ops.clip(x_norm, *h.weight_norm_bounds)
        return trust_ratio(phi, u_norm, h.trust_ratio_bounds), u_norm

    def step(self, g, x, u, slots, rate, plan):
        """Returns η (φ(‖x‖) / ‖u‖) u (Algorithm 2, line 10)."""
        return rate * u

    def scalars(self, t):
        """Returns the factors of the bias correction."""
        h = self.hyperparameters
        if not h.bias_correction:
            return {}
        c_1 = 1 / _one_minus_power(h.beta_1, t)
        c_2 = 1 / _one_minus_power(h.beta_2, t)
        if h.bias_correction == "rate":
            return {"rate": c_1 / ops.sqrt(c_2)}
        factors = {"c_1": c_1, "c_2": c_2}
        if h.nesterov is not None:
            factors["next_1"] = 1 / _one_minus_power(h.beta_1, t + 1)
            factors["next_2"] = 1 / _one_minus_power(h.beta_2, t + 1)
        return factors

    def _bias_corrected(self, g, m, v, scalars):
        """Returns m̂ and v̂, given the new moments m and v.

        Algorithm 2, line 8, with c₁ = 1 / (1-β₁ᵗ), c₂ = 1 / (1-β₂ᵗ), and c' for the step t+1.
        Nesterov: arXiv:1904.00962v5, appendix; Dozat 2016, with a constant β.

            m̂ = c₁m                         v̂ = c₂v                          LAMB
            m̂ = c₁'β₁m + c₁(1-β₁)g          v̂ = c₂β₂v                        N-LAMB
            m̂ = c₁'β₁m + c₁(1-β₁)g          v̂ = c₂'β₂v + c₂(1-β₂)g²          NN-LAMB
        """
        h = self.hyperparameters
        c_1 = scalars.get("c_1", 1.0)
        c_2 = scalars.get("c_2", 1.0)
        if h.nesterov is None:
            return c_1 * m, c_2 * v
        next_1 = scalars.get("next_1", 1.0)
        next_2 = scalars.get("next_2", 1.0)
        m_hat = next_1 * h.beta_1 * m + c_1 * (1 - h.beta_1) * g
        if h.nesterov == "first":
            return m_hat, c_2 * h.beta_2 * v
        return m_hat, next_2 * h.beta_2 * v + c_2 * (1 - h.beta_2) * ops.square(g)


def _one_minus_power(beta, t):
    """Returns 1 - βᵗ, computed as -expm1(t·ln β).

    At β = 0.999, computing βᵗ first would give a relative error of 1e-5 in float32.
    """
    if beta == 0:
        return ops.ones((), "float32")
    return -ops.expm1(t * math.log(beta))
