"""LARS: the update of a layer, its arguments and its variants."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

from tf_lamb.arguments import (
    Variant,
    check_choice,
    check_flag,
    check_interval,
    constructor_arguments,
)
from tf_lamb.layerwise import Layerwise
from tf_lamb.norms import trust_ratio


@dataclasses.dataclass(frozen=True)
class Form:
    """One published version of the rule. See the argument `form` of `LARS`.

    Attributes:
        denominator: String, `"g"`, `"d"` or `"m"`. The tensor whose norm is the denominator of the
            trust ratio, where d = g + λx.
        decay_norm: Boolean. Whether λ‖x‖ is added to the denominator.
        rate_inside: Boolean. Whether the momentum contains the learning rate.
        decay_inside: Boolean. Whether the momentum contains λx.
        averaged: Boolean. Whether the momentum is a moving average, whose new terms are multiplied
            by 1-μ.
    """

    denominator: str
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
        "tf.contrib.opt.LARSOptimizer: rate at the end, decay only in the ratio (L2 in the loss)",
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
    """LARS: momentum SGD with a learning rate that is scaled to the norm of each layer's weights.

        r = κ ‖x‖ / (‖g‖ + λ‖x‖ + ε)          m ← μm + η r (g + λx)          x ← x - m

    The learning rate is inside the momentum, as in MLPerf's TensorFlow runs. A layer is a variable,
    unless `layer_axes` or `layer_groups` say otherwise. The trust ratio r is 1 where ‖x‖ or ‖g‖ is
    zero, and for an excluded layer, which is then updated by momentum SGD with rate η. Slots and
    norms are float32, whatever the dtype of the variables. Under a `tf.distribute` strategy,
    gradients are summed over the replicas before clipping and before the trust ratio is computed.

    Args:
        learning_rate: A float >= 0, a learning-rate schedule, a callable without arguments, or a
            scalar float variable. Defaults to 1e-3. A variable is not copied: a value assigned to
            it is used in the next update. A callable is traced into a compiled step; return a
            tensor if the value must vary. With `gradient_accumulation_steps`, Keras calls a
            schedule with the number of micro-batches. The schedules of this package have the same
            argument, which makes them count updates.
        momentum: Float in [0, 1). The momentum μ.
        weight_decay: Float >= 0, or `None` for 0. The decay λ. It takes the place of an L2 term in
            the loss.
        trust_coefficient: Float > 0. The coefficient κ, called `eeta` in older TensorFlow code.
        epsilon: Float >= 0. The constant ε.
        nesterov: Boolean. Whether to use Nesterov momentum: x ← x - (μm + η r (g + λx)).
        exclude_from_weight_decay: List of regular expressions. A variable whose full path contains
            a match is not decayed. Anchor a pattern to the end of the path (`"bias$"`), not to its
            start: the paths of a Sequential or subclassed model begin with the model's name, which
            Keras 3 drops when it loads a Sequential model.
        exclude_from_layer_adaptation: List of regular expressions, or `None`. A variable whose full
            path contains a match has a trust ratio of 1. `None` means the same list as
            `exclude_from_weight_decay`; an empty list means that every layer is adapted.
        adapt_undecayed: Boolean. If `False`, variables without weight decay are not adapted, as in
            apex and timm.
        form: String. The published version of the rule. `"mlperf"` is the formula above. With
            d = g + λx:

            mlperf            r = κ‖x‖ / (‖g‖ + λ‖x‖ + ε)   m ← μm + ηrd        x ← x - m
            tf-models         r = κ‖x‖ / (‖d‖ + ε)          m ← μm + ηrd        x ← x - m
            tf-models-scaled  r = κ‖x‖ / (‖m‖ + ε)          m ← μm + d          x ← x - ηrm
            tf-contrib        r = κ‖x‖ / (‖g‖ + λ‖x‖ + ε)   m ← μm + g          x ← x - ηrm
            paper             r = κ‖x‖ / (‖m‖ + ε)          m ← μm + (1-μ)d     x ← x - ηrm
        norm: String, `"l2"`, `"l1"` or `"linf"`. The norm of weights and gradients.
        trust_ratio_bounds: Pair (low, high) or `None`. Bounds to which the trust ratio is clipped.
            A ratio that is 1 because a norm is zero is not clipped.
        layer_axes: Dictionary {pattern: axis or list of axes}, for variables that stack layers
            along these axes (scanned layers). Each slice has its own trust ratio.
        layer_groups: List of regular expressions. The variables that match one of them share one
            trust ratio, computed from the norms of all of them together. A member without a
            gradient is not updated, but its weights are included in ‖x‖.
        moment_dtype: String, `"float32"` or `"bfloat16"`. The dtype of the momentum m. With
            `"bfloat16"` it takes half the memory, and each update rounds it to 8 significant bits:
            after five updates, the change of the weights differs by up to a relative 1/128.
        skip_nonfinite: Boolean. If `True`, an update is skipped if the sum of squares of all
            gradients is not finite in float32: an element is NaN or infinite, or too large to be
            squared (above 9e18). Weights, momentum, averages and the step count keep their
            values, and `skipped_steps` is incremented. If `False`, gradients are used as they are,
            except that elements beyond ±2⁶³ are clipped, because their squares overflow float32.
        telemetry: Boolean. Whether to keep ‖x‖, the ratio's denominator and the ratio of each
            variable in `telemetry_rows`.
        jit_compile: Boolean. Whether to compile the update with XLA, on TensorFlow. If that is not
            possible (a device without XLA, `tf.debugging.enable_check_numerics`), the update runs
            uncompiled after a `UserWarning`. The argument has no effect in a step that is itself
            compiled.
        clipnorm: Float > 0 or `None`. Each gradient is scaled down to at most this norm.
        clipvalue: Float > 0 or `None`. Each element of a gradient is clipped to ±`clipvalue`.
        global_clipnorm: Float > 0 or `None`. All gradients are scaled down together, so that their
            global norm is at most this value. Only one of `clipnorm`, `clipvalue` and
            `global_clipnorm` can be set. Unlike in Keras 3, they apply to the gradients after the
            sum over replicas.
        use_ema: Boolean. Whether to keep an exponential moving average of the weights, as in Keras.
            It is updated once for each update that is not skipped.
        ema_momentum: Float in [0, 1]. The decay of the average.
        ema_overwrite_frequency: Integer >= 1 or `None`. The number of updates after which the
            weights are overwritten with their averages.
        loss_scale_factor: Float or `None`, as in Keras. Keras 3 only.
        gradient_accumulation_steps: Integer >= 2 or `None`. The number of calls for each update,
            which uses their mean gradient. Averages and `iterations` count updates. Under a
            `tf.distribute` strategy, the result is that of one replica with the whole batch. If a
            variable has no gradient in the call that completes an update, its earlier gradients
            count in the next update. Keras 3 only.
        based_on: String or `None`. The variant that the arguments are from. `LARS.variant(...)`
            sets it.
        name: String or `None`. The name of the optimizer. With `None`, Keras chooses it.
        **base_arguments: Other arguments of the `Optimizer` class of a newer Keras.

    Raises:
        ValueError: If an argument is unknown or out of range, or a pattern is not a regular
            expression. `build` raises it if a variable is not a real floating-point variable.

    Example:

    >>> model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=tf_lamb.LARS(1.0, weight_decay=1e-4,
    ...     exclude_from_weight_decay=tf_lamb.RESNET_EXCLUSIONS), loss="mse")

    Differs from:
        - arXiv:1904.00962, Algorithm 1, which uses the norm of the averaged momentum, without κ.
        - `LARS` of tf-models, which uses the norm of the decayed gradient ‖g + λx‖, and does not
          save its exclusion lists.

    References:
        - [You et al., 2017](https://arxiv.org/abs/1708.03888), "Large Batch Training of
          Convolutional Networks", Algorithm 1
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
        arguments = constructor_arguments(locals())
        arguments["momentum"] = check_interval("momentum", momentum, 0, 1)
        arguments["trust_coefficient"] = check_interval(
            "trust_coefficient", trust_coefficient, 0, open_low=True
        )
        arguments["epsilon"] = check_interval("epsilon", epsilon, 0)
        arguments["nesterov"] = check_flag("nesterov", nesterov)
        arguments["form"] = check_choice("form", form, FORMS)
        super().__init__(arguments, base_arguments)

    @property
    def unit_gradient(self) -> bool:
        """Always `False`: only LAMB can scale gradients to a global norm of 1."""
        return False

    def scalars(self, t):
        """Returns no scalars: LARS has no bias correction."""
        return {}

    @property
    def rate_inside(self) -> bool:
        """Whether the momentum contains η r d instead of d."""
        return FORMS[self.hyperparameters.form].rate_inside

    def moments(self, g, x, slots, plan, rate):
        """Returns the new momentum, in a tuple."""
        momentum = self.hyperparameters.momentum * slots[0]
        return (momentum + self._momentum_term(g, x, plan, rate),)

    def direction(self, g, x, slots, scalars, plan):
        """Returns g, d or the new momentum, whose norm is in the denominator of the ratio."""
        form = FORMS[self.hyperparameters.form]
        if form.denominator == "g":
            return g
        if form.denominator == "d":
            return self._decayed_gradient(g, x, plan)
        return self._lookahead(g, x, slots, plan)

    def ratio(self, x_norm, u_norm, decay_norm):
        """Returns the ratio κ‖x‖ / (‖u‖ + ε) and its denominator.

        In forms with `decay_norm`, the denominator is ‖u‖ + ‖λx‖ + ε.
        """
        h = self.hyperparameters
        denominator = u_norm + h.epsilon
        if FORMS[h.form].decay_norm:
            denominator = denominator + decay_norm
        ratio = trust_ratio(h.trust_coefficient * x_norm, denominator, h.trust_ratio_bounds)
        return ops.where(u_norm == 0, 1.0, ratio), denominator

    def step(self, g, x, u, slots, rate, plan):
        """Returns m, or ηrm if the learning rate is outside the momentum."""
        if self.rate_inside:
            return self._lookahead(g, x, slots, plan, rate)
        return rate * self._lookahead(g, x, slots, plan)

    def _decayed_gradient(self, g, x, plan):
        """Returns d = g + λx."""
        h = self.hyperparameters
        return g + h.weight_decay * x if plan.decayed and FORMS[h.form].decay_inside else g

    def _momentum_term(self, g, x, plan, rate=1.0):
        """Returns the term that an update adds to μm."""
        h = self.hyperparameters
        weight = 1 - h.momentum if FORMS[h.form].averaged else 1.0
        return rate * weight * self._decayed_gradient(g, x, plan)

    def _lookahead(self, g, x, slots, plan, rate=1.0):
        """Returns the new momentum, with Nesterov momentum one step ahead."""
        h = self.hyperparameters
        if not h.nesterov:
            return slots[0]
        return h.momentum * slots[0] + self._momentum_term(g, x, plan, rate)
