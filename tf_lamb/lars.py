"""LARS: the rule of one layer, its arguments and its variants."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

from tf_lamb.arguments import Variant, check_choice, check_interval, collected
from tf_lamb.layerwise import Layerwise
from tf_lamb.norms import trust_ratio


@dataclasses.dataclass(frozen=True)
class Form:
    """What tells one published LARS from another.

    Attributes:
        divisor: whose norm divides the ratio: "g", "d" (= g + λx) or "m".
        decay_norm: whether λ‖x‖ is added to that norm.
        rate_inside: whether the rate stands inside the momentum.
        decay_inside: whether λx enters the momentum.
        averaged: whether the momentum is an average, with 1-μ before the new term.
    """

    divisor: str
    decay_norm: bool = False
    rate_inside: bool = False
    decay_inside: bool = True
    averaged: bool = False


FORMS = {
    "mlperf": Form("g", decay_norm=True, rate_inside=True),
    "tf-models": Form("d", rate_inside=True),
    "tf-models-scaled": Form("m"),
    "tf-contrib": Form("g", decay_norm=True, decay_inside=False),
    "paper": Form("m", averaged=True),
}
MLPERF = Variant(
    "arXiv:1708.03888, Algorithm 1; MLPerf training v0.7, Google, resnet TF2: rate inside the "
    "momentum",
    {"form": "mlperf"},
)
VARIANTS = {
    "paper": Variant(
        "arXiv:1904.00962, Algorithm 1: ratio of the averaged momentum, no κ",
        {"form": "paper", "trust_coefficient": 1.0},
    ),
    "you-2017": MLPERF,
    "mlperf": MLPERF,
    "tf-contrib": Variant(
        "tf.contrib.opt.LARSOptimizer: rate at the end, decay in the ratio alone (L2 in the loss)",
        {"form": "tf-contrib"},
    ),
    "tf-models": Variant(
        "tf-models-official 2.20 official/modeling/optimization/lars.py, classic_momentum=True",
        {"form": "tf-models", "weight_decay": 0.0},
    ),
    "tf-models-scaled": Variant(
        "tf-models-official 2.20 official/modeling/optimization/lars.py, classic_momentum=False",
        {"form": "tf-models-scaled", "weight_decay": 0.0},
    ),
    "optax": Variant(
        "optax.lars: every layer decayed and adapted",
        {"form": "tf-models", "weight_decay": 0.0, "exclude_from_layer_adaptation": ()},
    ),
}


class LARSRule(Layerwise):
    """LARS: momentum SGD whose rate is scaled, layer by layer, to the norm of the weights.

        r = κ ‖x‖ / (‖g‖ + λ‖x‖ + ε)          m ← μm + η r (g + λx)          x ← x - m

    The rate stands inside the momentum buffer, as in MLPerf's TensorFlow runs. A layer is a
    variable. r is 1 where ‖x‖ or ‖g‖ is zero, and for an excluded layer, which is then plain
    momentum SGD at rate η. Slots and norms are float32 whatever the variables' dtype. Under a
    `tf.distribute` strategy the gradients are summed first; clipping and r see the sum.

    Args:
        learning_rate: η, a number >= 0, a learning-rate schedule, a callable without arguments, or
            a scalar float variable. A variable is used itself: assigning it changes the next
            update. A callable is traced into a compiled step: return a tensor if the value must
            vary. With `gradient_accumulation_steps` a schedule counts micro-batches, as in Keras;
            the schedules of this package take the same argument, and then count updates.
        momentum: μ, float in [0, 1).
        weight_decay: λ, a float >= 0, or None for 0. Use it in place of an L2 term in the loss.
        trust_coefficient: κ, a float > 0; "eeta" in TensorFlow's older code.
        epsilon: ε, a float >= 0.
        nesterov: whether the step looks ahead: x ← x - (μm + η r (g + λx)).
        exclude_from_weight_decay: list of regular expressions, searched in each variable's full
            path; a variable that one of them matches takes λ = 0. Anchor a pattern at its end
            ("bias$"), not at its start: a path begins with the model's name, which Keras 3 drops
            when it loads a Sequential model.
        exclude_from_layer_adaptation: likewise for the ratio, which is then 1. `None` means "the
            same as `exclude_from_weight_decay`"; an empty list means "adapt every layer".
        adapt_undecayed: whether a variable without weight decay is adapted. False: it is not, as
            in apex and timm.
        form: which published rule; "mlperf" is the formula above. With d = g + λx:

            mlperf            r = κ‖x‖ / (‖g‖ + λ‖x‖ + ε)   m ← μm + ηrd        x ← x - m
            tf-models         r = κ‖x‖ / (‖d‖ + ε)          m ← μm + ηrd        x ← x - m
            tf-models-scaled  r = κ‖x‖ / (‖m‖ + ε)          m ← μm + d          x ← x - ηrm
            tf-contrib        r = κ‖x‖ / (‖g‖ + λ‖x‖ + ε)   m ← μm + g          x ← x - ηrm
            paper             r = κ‖x‖ / (‖m‖ + ε)          m ← μm + (1-μ)d     x ← x - ηrm
        norm: "l2", "l1" or "linf".
        trust_ratio_bounds: (low, high) that the ratio is clipped to, or None. A ratio that is 1
            because a norm is zero is not clipped.
        layer_axes: {pattern: axis or axes} for variables that stack layers along these axes
            (scanned layers): each slice has a ratio of its own.
        layer_groups: list of patterns; the variables that one matches share one ratio, from the
            norm of all of them together. A member without a gradient is not updated, but its
            weights are included in ‖x‖.
        moment_dtype: "float32", or "bfloat16" to keep m in half the memory. Each update rounds it
            to 8 bits; after five updates the distance moved differs by up to 1/128.
        skip_nonfinite: whether an update is skipped when the sum of squares of all gradients is
            not finite in float32: an element is NaN or infinite, or too large to be squared
            (above 9e18). Weights, momentum, averages and step keep their values, and
            `skipped_steps` counts the update. False: gradients are used as they are; elements
            beyond ±2⁶³ are clipped to it, because their squares overflow float32.
        telemetry: whether `telemetry_rows` keeps ‖x‖, the ratio's divisor and the ratio of each
            variable.
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
            many calls. Averages and `iterations` count updates. Under a
            `tf.distribute` strategy the result equals that of one replica with the whole batch.
            Keras 3 only. A gradient of a variable that has none in the
            call that completes an update counts in the next one.
        based_on: name of the variant these arguments come from; `LARS.variant(name)` sets it.
        name: name of the optimizer. `None`: as Keras names its own.
        **base_arguments: arguments that a newer Keras's `Optimizer` takes.

    Raises:
        ValueError: an argument outside its range, an unknown one, a pattern that is no regular
            expression, or (when built) a variable that is not a real floating-point one.

    Example:

    >>> model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=tf_lamb.LARS(1.0, weight_decay=1e-4,
    ...     exclude_from_weight_decay=tf_lamb.RESNET_EXCLUSIONS), loss="mse")

    Differs from:
        - arXiv:1904.00962, Algorithm 1, takes the ratio of the averaged momentum, without κ.
        - tf-models' `LARS` takes the norm of the decayed gradient, ‖g + λx‖, and drops its
          exclusion lists when saved.
        - Keras has no LARS.

    References:
        You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks",
        arXiv:1708.03888, Algorithm 1.
    """

    slot_names = ("momentum",)
    variants = VARIANTS

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        momentum: float = 0.9,
        weight_decay: float | None = 1e-4,
        trust_coefficient: float = 0.001,
        epsilon: float = 0.0,
        nesterov: bool = False,
        exclude_from_weight_decay: Sequence[str] | str | None = (),
        exclude_from_layer_adaptation: Sequence[str] | str | None = None,
        *,
        adapt_undecayed: bool = True,
        form: str = "mlperf",
        norm: str = "l2",
        trust_ratio_bounds: tuple[float, float] | None = None,
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
        arguments["momentum"] = check_interval("momentum", momentum, 0, 1)
        arguments["trust_coefficient"] = check_interval(
            "trust_coefficient", trust_coefficient, 0, open_low=True
        )
        arguments["epsilon"] = check_interval("epsilon", epsilon, 0)
        arguments["nesterov"] = bool(nesterov)
        check_choice("form", form, FORMS)
        super().__init__(arguments, base_arguments)

    @property
    def unit_gradient(self) -> bool:
        """LARS divides by the gradient's norm itself."""
        return False

    def scalars(self, t):
        """None: LARS has no bias correction."""
        return {}

    @property
    def rate_inside(self) -> bool:
        """Whether m holds η r d, and not d."""
        return FORMS[self.hyperparameters.form].rate_inside

    def moments(self, g, x, slots, plan, rate):
        """m ← μm + rate·d; with an average, m ← μm + (1-μ)d."""
        return (self.hyperparameters.momentum * slots[0] + self.term(g, x, plan, rate),)

    def direction(self, g, x, slots, scalars, plan):
        """The tensor whose norm divides the ratio: g, d or what x moves along."""
        form = FORMS[self.hyperparameters.form]
        if form.divisor == "g":
            return g
        return self.decayed(g, x, plan) if form.divisor == "d" else self.ahead(g, x, slots, plan)

    def ratio(self, x_norm, u_norm, decay_norm):
        """κ‖x‖ / (‖u‖ + ε), and what divides."""
        h = self.hyperparameters
        divisor = u_norm + h.epsilon
        if FORMS[h.form].decay_norm:
            divisor = divisor + decay_norm
        ratio = trust_ratio(h.trust_coefficient * x_norm, divisor, h.trust_ratio_bounds)
        return ops.where(u_norm == 0, 1.0, ratio), divisor

    def step(self, g, x, u, slots, rate, plan):
        """x ← x - m, or x ← x - ηrm where the rate stands outside the momentum."""
        if self.rate_inside:
            return self.ahead(g, x, slots, plan, rate)
        return rate * self.ahead(g, x, slots, plan)

    def decayed(self, g, x, plan):
        """d = g + λx."""
        h = self.hyperparameters
        return g + h.weight_decay * x if plan.decayed and FORMS[h.form].decay_inside else g

    def term(self, g, x, plan, rate=1.0):
        """What an update adds to the momentum."""
        h = self.hyperparameters
        share = 1 - h.momentum if FORMS[h.form].averaged else 1.0
        return rate * share * self.decayed(g, x, plan)

    def ahead(self, g, x, slots, plan, rate=1.0):
        """What x moves along: the new m, with Nesterov one step ahead of it."""
        h = self.hyperparameters
        return h.momentum * slots[0] + self.term(g, x, plan, rate) if h.nesterov else slots[0]
