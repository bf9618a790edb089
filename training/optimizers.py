"""The optimizer that a recipe names: made, built on a model's variables, set back to its start."""

import tensorflow as tf
import tf_keras

from recipes.types import Recipe
from tf_lamb import tf_keras as ours
from tf_lamb.arguments import check_interval
from tf_lamb.layers import Patterns, plan_variables


def make_schedule(recipe: Recipe) -> ours.Phases:
    """The rate of each step of the run, over all phases."""
    return ours.Phases([phase.schedule() for phase in recipe.phases])


def make_optimizer(recipe: Recipe, learning_rate):
    """The recipe's optimizer; `build` makes its slots.

    LAMB and LARS are ours, and so is "momentum", LARS without a layer to adapt: momentum SGD
    with the rate and the decay, λx, inside the momentum (arXiv:1706.02677, section 2). Keras's
    own SGD decays outside of it. AdamW and Adagrad are tf_keras's, whose decay is ηλx.

    Args:
        recipe: a checked recipe.
        learning_rate: a schedule of tf_keras.

    Raises:
        ValueError: a setting outside its range, or an unknown variant.
    """
    settings = {"weight_decay": recipe.weight_decay}
    if recipe.global_clipnorm is not None:
        settings["global_clipnorm"] = recipe.global_clipnorm
    if recipe.optimizer in ("adamw", "adagrad"):
        return _keras_optimizer(recipe, learning_rate, settings)
    settings |= {
        "exclude_from_weight_decay": recipe.exclude_from_weight_decay,
        "skip_nonfinite": recipe.skip_nonfinite,
        "telemetry": True,  # names the layer of a gradient that is not finite
    }
    if recipe.optimizer == "momentum":
        everything = {"exclude_from_layer_adaptation": [".*"]}
        return ours.LARS(learning_rate, momentum=recipe.momentum, **settings | everything)
    for name in ("trust_coefficient", "exclude_from_layer_adaptation"):
        if getattr(recipe, name) is not None:
            settings[name] = getattr(recipe, name)
    settings["epsilon"] = recipe.epsilon
    if recipe.optimizer == "lars":
        chosen, settings = ours.LARS, settings | {"momentum": recipe.momentum}
    else:
        betas = {"beta_1": recipe.beta_1, "beta_2": recipe.beta_2}
        chosen, settings = ours.LAMB, settings | betas
    if recipe.variant:
        return chosen.variant(recipe.variant, learning_rate, **settings)
    return chosen(learning_rate, **settings)


def _keras_optimizer(recipe, learning_rate, settings):
    """AdamW or Adagrad. tf_keras takes any number; the ranges are checked here."""
    settings["epsilon"] = recipe.epsilon
    if recipe.optimizer == "adamw":
        settings |= {"beta_1": recipe.beta_1, "beta_2": recipe.beta_2}
    for name, value in settings.items():
        check_interval(name, value, 0, 1 if name.startswith("beta") else float("inf"))
    kinds = {"adamw": tf_keras.optimizers.AdamW, "adagrad": tf_keras.optimizers.Adagrad}
    return kinds[recipe.optimizer](learning_rate, **settings)


def build(optimizer, recipe: Recipe, variables) -> None:
    """Makes the slots, and decides which variables are decayed: alike for every optimizer.

    An exclusion pattern that matches no variable is a `UserWarning`.
    """
    if recipe.optimizer in ("adamw", "adagrad"):
        # tf_keras searches its patterns in names that end in ":0", where "bias$" finds nothing.
        layers = plan_variables(
            [v.name.split(":")[0] for v in variables],
            [v.shape for v in variables],
            Patterns(tuple(recipe.exclude_from_weight_decay), (), {}, ()),
        )
        excluded = [v for v, layer in zip(variables, layers, strict=True) if not layer.decayed]
        optimizer.exclude_from_weight_decay(var_list=excluded)
    optimizer.build(variables)


def reset_slots(optimizer) -> None:
    """Sets the slots to what `build` made them, and the step of bias correction to 0 with them.

    One without the other is wrong: step 1 would take the moments of a long run for those of one
    gradient, the first 10 and the second 1,000 times too large.
    """
    start = getattr(optimizer, "initial_accumulator_value", 0)
    kept = ("skipped_steps", "current_learning_rate", "learning_rate")
    for variable in optimizer.variables:
        if variable.name.split(":")[0] not in kept:
            value = 0 if variable is optimizer.iterations else start
            variable.assign(tf.fill(variable.shape, tf.cast(value, variable.dtype)))
