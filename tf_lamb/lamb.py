"""LAMB: the rule of one layer, its arguments and its variants."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

from tf_lamb.arguments import Variant, check_bounds, check_choice, check_interval, collected
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
        "NVIDIA apex FusedLAMB, use_nvlamb=False: what is not decayed is not adapted",
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
    """LAMB: Adam whose step is scaled, layer by layer, to the norm of the layer's weights.

        m ← β₁m + (1-β₁)g                     v ← β₂v + (1-β₂)g²
        r = (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)
        u = r + λx                            x ← x - η (‖x‖ / ‖u‖) u

    A layer is a variable unless `layer_axes` or `layer_groups` says otherwise. The ratio
    ‖x‖ / ‖u‖ is 1 where either norm is zero. Slots, norms and the step count are float32 whatever
    the variables' dtype. Under a `tf.distribute` strategy the gradients are summed first;
    clipping and the ratio see the sum.

    Args:
        learning_rate: η, a number >= 0, a learning-rate schedule, a callable without arguments, or
            a scalar float variable. A variable is used itself: assigning it changes the next
            update. A callable is traced into a compiled step: return a tensor if the value must
            vary. With `gradient_accumulation_steps` a schedule counts micro-batches, as in Keras;
            the schedules of this package take the same argument, and then count updates.
        beta_1: float in [0, 1), decay of the first moment.
        beta_2: float in [0, 1), decay of the second moment.
        epsilon: float >= 0, added to √v̂, outside the root.
        weight_decay: λ, a float >= 0, or None for 0. It enters u, inside the ratio.
        exclude_from_weight_decay: list of regular expressions, searched in each variable's full
            path; a variable that one of them matches takes λ = 0. Anchor a pattern at its end
            ("bias$"), not at its start: a path begins with the model's name, which Keras 3 drops
            when it loads a Sequential model.
        exclude_from_layer_adaptation: likewise for the ratio, which is then 1. `None` means "the
            same as `exclude_from_weight_decay`"; an empty list means "adapt every layer".
        adapt_undecayed: whether a variable without weight decay is adapted. False: it is not, as
            in apex and timm.
        bias_correction: True: m̂ = m / (1-β₁ᵗ) and v̂ = v / (1-β₂ᵗ). False: m̂ = m and v̂ = v.
            "rate": likewise, and η is multiplied by √(1-β₂ᵗ) / (1-β₁ᵗ), outside the ratio
            (DeepSpeed).
        nesterov: None; "first" looks ahead in m (N-LAMB), "both" in v too (NN-LAMB).
        norm: "l2", "l1" or "linf", of weights and update.
        weight_norm_bounds: (γl, γu): φ(z) = min(max(z, γl), γu) for ‖x‖. None: φ(z) = z.
        trust_ratio_bounds: (low, high) that the ratio is clipped to, or None. A ratio that is 1
            because a norm is zero is not clipped.
        unit_gradient: whether all gradients are always scaled to global norm 1, as NVLAMB's text
            says; `global_clipnorm=1.0` scales down only, as its code does.
        layer_axes: {pattern: axis or axes} for variables that stack layers along these axes
            (scanned encoder layers, fused QKV): each slice has a ratio of its own.
        layer_groups: list of patterns; the variables that one matches share one ratio, from the
            norm of all of them together. A member without a gradient is not updated, but its
            weights are included in ‖x‖.
        moment_dtype: "float32", or "bfloat16" to keep m in half the memory. Each update rounds it
            to 8 bits; after five updates the distance moved differs by up to 1/128.
        skip_nonfinite: whether an update is skipped when the sum of squares of all gradients is
            not finite in float32: an element is NaN or infinite, or too large to be squared
            (above 9e18). Weights, moments, averages and step keep their values, and
            `skipped_steps` counts the update. False: gradients are used as they are; elements
            beyond ±2⁶³ are clipped to it, because their squares overflow float32.
        telemetry: whether `telemetry_rows` keeps ‖x‖, ‖u‖ and ratio of each variable.
        jit_compile: TensorFlow only: whether XLA compiles the update. Where it cannot (a device
            without XLA, `tf.debugging.enable_check_numerics`), a warning says so, and the update
            runs uncompiled. Inside a step that is compiled as a whole it changes nothing.
        clipnorm: float > 0; each gradient is scaled down to at most this norm.
        clipvalue: float > 0; each element is clipped to ±`clipvalue`.
        global_clipnorm: float > 0; all gradients are scaled down to at most this norm together.
            Only one of the three may be set. Unlike in Keras 3, all of them see the gradients
            after the sum over replicas.
        use_ema: whether an exponential moving average of the weights is kept, as in Keras. It is
            updated once for each update that is not skipped.
        ema_momentum: float in [0, 1], the decay of the average.
        ema_overwrite_frequency: int >= 1, or None: after so many updates the weights take the
            average's values.
        loss_scale_factor: float or None, as in Keras. Keras 3 only.
        gradient_accumulation_steps: int >= 2 or None: an update takes the mean gradient of so
            many calls. Bias correction, averages and `iterations` count updates. Under a
            `tf.distribute` strategy the result equals that of one replica with the whole batch.
            Keras 3 only. A gradient of a variable that has none in the
            call that completes an update counts in the next one.
        based_on: name of the variant these arguments come from; `LAMB.variant(name)` sets it.
        name: name of the optimizer. `None`: as Keras names its own.
        **base_arguments: arguments that a newer Keras's `Optimizer` takes.

    Raises:
        ValueError: an argument outside its range, an unknown one, a pattern that is no regular
            expression, or (when built) a variable that is not a real floating-point one.

    Example:

    >>> model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=tf_lamb.LAMB(1e-3, weight_decay=0.01,
    ...     exclude_from_weight_decay=tf_lamb.BERT_EXCLUSIONS), loss="mse")

    Differs from:
        - `keras.optimizers.Lamb` decays outside the ratio (x ← x - ηλx before u is formed), has
          ε = 1e-7, and can exclude no layer from adaptation.
        - tf-models' `LAMB` drops its exclusion lists when saved, and reads an empty
          adaptation list as "the same as the decay list".
        - arXiv:1904.00962v3 has no bias correction; versions 1 and 5 have it.

    References:
        You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
        ICLR 2020, arXiv:1904.00962, Algorithm 2.
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
        arguments = collected(locals())
        arguments["beta_1"] = check_interval("beta_1", beta_1, 0, 1)
        arguments["beta_2"] = check_interval("beta_2", beta_2, 0, 1)
        arguments["epsilon"] = check_interval("epsilon", epsilon, 0)
        arguments["weight_norm_bounds"] = check_bounds("weight_norm_bounds", weight_norm_bounds)
        arguments["unit_gradient"] = bool(unit_gradient)
        if bias_correction != "rate":
            arguments["bias_correction"] = bool(bias_correction)
        check_choice("nesterov", nesterov, NESTEROV)
        super().__init__(arguments, base_arguments)

    def moments(self, g, x, slots, plan, rate):
        """Algorithm 2, lines 6 and 7: the moments of the gradient and of its square."""
        h = self.hyperparameters
        m, v = slots
        m = h.beta_1 * m + (1 - h.beta_1) * g
        v = h.beta_2 * v + (1 - h.beta_2) * ops.square(g)
        return m, v

    def direction(self, g, x, slots, scalars, plan):
        """Algorithm 2, lines 8 and 9: u = m̂ / (√v̂ + ε) + λx."""
        h = self.hyperparameters
        m_hat, v_hat = self.unbiased(g, *slots, scalars)
        r = m_hat / (ops.sqrt(v_hat) + h.epsilon) if h.epsilon else _quotient(m_hat, v_hat)
        return r + h.weight_decay * x if plan.decayed else r

    def ratio(self, x_norm, u_norm, decay_norm):
        """Algorithm 2, line 10: φ(‖x‖) / ‖u‖, and ‖u‖."""
        h = self.hyperparameters
        phi = x_norm if h.weight_norm_bounds is None else ops.clip(x_norm, *h.weight_norm_bounds)
        return trust_ratio(phi, u_norm, h.trust_ratio_bounds), u_norm

    def step(self, g, x, u, slots, rate, plan):
        """Algorithm 2, line 10: x ← x - η (φ(‖x‖) / ‖u‖) u."""
        return rate * u

    def scalars(self, t):
        """The factors of `unbiased`, and of η."""
        h = self.hyperparameters
        if not h.bias_correction:
            return {}
        c_1, c_2 = 1 / _one_minus_power(h.beta_1, t), 1 / _one_minus_power(h.beta_2, t)
        if h.bias_correction == "rate":
            return {"rate": c_1 / ops.sqrt(c_2)}
        factors = {"c_1": c_1, "c_2": c_2}
        if h.nesterov is not None:
            factors["next_1"] = 1 / _one_minus_power(h.beta_1, t + 1)
            factors["next_2"] = 1 / _one_minus_power(h.beta_2, t + 1)
        return factors

    def unbiased(self, g, m, v, scalars):
        """m̂ and v̂ of the new moments m and v.

        With c₁ = 1 / (1-β₁ᵗ), c₂ = 1 / (1-β₂ᵗ), and c' for the step t+1 (Algorithm 2, line 8;
        Nesterov: arXiv:1904.00962v5, appendix; Dozat 2016, at constant β):

            m̂ = c₁m                         v̂ = c₂v
            m̂ = c₁'β₁m + c₁(1-β₁)g          v̂ = c₂β₂v                        N-LAMB
            m̂ = c₁'β₁m + c₁(1-β₁)g          v̂ = c₂'β₂v + c₂(1-β₂)g²          NN-LAMB
        """
        h = self.hyperparameters
        c_1, c_2 = scalars.get("c_1", 1.0), scalars.get("c_2", 1.0)
        if h.nesterov is None:
            return c_1 * m, c_2 * v
        next_1, next_2 = scalars.get("next_1", 1.0), scalars.get("next_2", 1.0)
        m_hat = next_1 * h.beta_1 * m + c_1 * (1 - h.beta_1) * g
        if h.nesterov == "first":
            return m_hat, c_2 * h.beta_2 * v
        return m_hat, next_2 * h.beta_2 * v + c_2 * (1 - h.beta_2) * ops.square(g)


def _quotient(m_hat, v_hat):
    """m̂ / √v̂; 0/0 is an element that has had no gradient: it has no direction."""
    return ops.divide_no_nan(m_hat, ops.sqrt(v_hat))


def _one_minus_power(beta, t):
    """1 - βᵗ as -expm1(t·ln β): the plain power loses 1e-5 of its value to float32 at β=0.999."""
    if beta == 0:
        return ops.ones((), "float32")
    return -ops.expm1(t * math.log(beta))
