"""The optimizer and the learning-rate schedule of a recipe."""

import tensorflow as tf
import tf_keras

from recipes.types import Recipe
from tf_lamb import tf_keras as ours
from tf_lamb.arguments import check_interval
from tf_lamb.layers import Patterns, plan_variables


def make_schedule(recipe: Recipe) -> ours.Phases:
    """The learning rate as a function of the run's step, over all phases."""
    return ours.Phases([phase.schedule() for phase in recipe.phases])


class RunSchedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    """A schedule over the steps of the run, times the run's `rate_factor`.

    The optimizer's own `iterations` does not serve: it restarts where a phase resets the slots,
    and does not count skipped updates, so that phases would begin late.

    Args:
        schedule: `(step) -> learning rate`.
        state: a `training.checkpoint.state.RunState`.
    """

    def __init__(self, schedule, state):
        self._schedule = schedule
        self._state = state

    def __call__(self, step):
        """The learning rate of the run's current step, whatever `step`: a float32 scalar."""
        del step
        return self._schedule(self._state.step) * self._state.rate_factor

    def get_config(self):
        """The arguments, with the present factor."""
        factor = float(self._state.rate_factor.numpy())
        return {"schedule": self._schedule, "rate_factor": factor}


def make_optimizer(recipe: Recipe, learning_rate):
    """The recipe's optimizer; `build` creates its slots.

    LAMB and LARS are those of `tf_lamb`. "momentum" is LARS without layer adaptation, that is,
    momentum SGD with the learning rate and the decay λx inside the momentum (arXiv:1706.02677,
    section 2); Keras's SGD decays outside of it. AdamW and Adagrad are tf_keras's, with decay ηλx.

    Args:
        recipe: a checked recipe.
        learning_rate: a tf_keras schedule.

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
        "telemetry": True,  # names the layers whose gradient is not finite
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
    """AdamW or Adagrad. tf_keras does not check ranges; this function does."""
    settings["epsilon"] = recipe.epsilon
    if recipe.optimizer == "adamw":
        settings |= {"beta_1": recipe.beta_1, "beta_2": recipe.beta_2}
    for name, value in settings.items():
        check_interval(name, value, 0, 1 if name.startswith("beta") else float("inf"))
    kinds = {"adamw": tf_keras.optimizers.AdamW, "adagrad": tf_keras.optimizers.Adagrad}
    return kinds[recipe.optimizer](learning_rate, **settings)


def build(optimizer, recipe: Recipe, variables) -> None:
    """Creates the slots and applies the recipe's exclusions from weight decay.

    An exclusion pattern that matches no variable raises a `UserWarning`.
    """
    if recipe.optimizer in ("adamw", "adagrad"):
        # tf_keras searches names that end in ":0", where the pattern "bias$" matches nothing.
        layers = plan_variables(
            [v.name.split(":")[0] for v in variables],
            [v.shape for v in variables],
            Patterns(tuple(recipe.exclude_from_weight_decay), (), {}, ()),
        )
        excluded = [v for v, layer in zip(variables, layers, strict=True) if not layer.decayed]
        optimizer.exclude_from_weight_decay(var_list=excluded)
    optimizer.build(variables)


def reset_slots(optimizer) -> None:
    """Sets the slots to their initial values and `iterations`, the step of bias correction, to 0.

    Both have to be reset: with `iterations` alone, bias correction at step 1 would scale the
    moments of a long run by 10 and 1,000.
    """
    start = getattr(optimizer, "initial_accumulator_value", 0)
    kept = ("skipped_steps", "current_learning_rate", "learning_rate")
    for variable in optimizer.variables:
        if variable.name.split(":")[0] not in kept:
            value = 0 if variable is optimizer.iterations else start
            variable.assign(tf.fill(variable.shape, tf.cast(value, variable.dtype)))
