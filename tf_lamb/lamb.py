"""LAMB: the rule's arguments and documentation; its arithmetic is `updates.lamb_step`."""

from tf_lamb import updates
from tf_lamb.layerwise import Layerwise, check_interval


class LAMBRule(Layerwise):
    """LAMB: Adam whose step is scaled, layer by layer, to the norm of the layer's weights.

        m ← β₁m + (1-β₁)g                     v ← β₂v + (1-β₂)g²
        r = (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)
        u = r + λx                            x ← x - η (‖x‖ / ‖u‖) u

    A layer is a variable. The ratio ‖x‖ / ‖u‖ is 1 where either norm is zero. Slots, norms and
    the step count are float32 whatever the variables' dtype. Under a `tf.distribute` strategy
    the gradients are summed first; clipping and the ratio see the sum.

    Args:
        learning_rate: η, a float > 0, a learning-rate schedule, or (Keras 3) a callable.
        beta_1: float in [0, 1), decay of the first moment.
        beta_2: float in [0, 1), decay of the second moment.
        epsilon: float >= 0, added to √v̂, outside the root.
        weight_decay: λ, a float >= 0. It enters u, inside the ratio.
        exclude_from_weight_decay: list of regular expressions, searched in each variable's full
            path; a variable that one of them matches takes λ = 0. Anchor a pattern at its end
            ("bias$"), not at its start: a path begins with the model's name, which Keras 3 drops
            when it loads a Sequential model.
        exclude_from_layer_adaptation: likewise for the ratio, which is then 1. `None` means "the
            same as `exclude_from_weight_decay`"; an empty list means "adapt every layer".
        name: name of the optimizer.
        **keras_arguments: `clipnorm`, `clipvalue` or `global_clipnorm` (at most one), `use_ema`,
            `ema_momentum`, `ema_overwrite_frequency`; in Keras 3 also `loss_scale_factor` and
            `gradient_accumulation_steps`; in tf_keras also `jit_compile` (default True).

    Raises:
        ValueError: an argument outside its range, an unknown one, a pattern that is no regular
            expression, or (when built) one that matches no variable.

    Differs from:
        - `keras.optimizers.Lamb` decays outside the ratio (x ← x - ηλx before u is formed), has
          ε = 1e-7, and can exclude no layer from adaptation.
        - tf-models' `LAMB` drops its exclusion lists when saved, and reads an empty
          adaptation list as "the same as the decay list".
        - arXiv:1904.00962v3 has no bias correction; versions 1 and 5 have it.

    Reference:
        You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
        ICLR 2020, arXiv:1904.00962, Algorithm 2.
    """

    slot_names = ("m", "v")

    def __init__(
        self,
        learning_rate=1e-3,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-6,
        weight_decay=0.01,
        exclude_from_weight_decay=(),
        exclude_from_layer_adaptation=None,
        name="lamb",
        **keras_arguments,
    ):
        check_interval("beta_1", beta_1, 0, 1)
        check_interval("beta_2", beta_2, 0, 1)
        check_interval("epsilon", epsilon, 0)
        super().__init__(
            learning_rate,
            weight_decay=weight_decay,
            exclude_from_weight_decay=exclude_from_weight_decay,
            exclude_from_layer_adaptation=exclude_from_layer_adaptation,
            name=name,
            **keras_arguments,
        )
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon

    def _new_values(self, grads, params, slots, **step):
        return updates.lamb_step(
            grads,
            params,
            *slots,
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            weight_decay=self.weight_decay,
            **step,
        )
