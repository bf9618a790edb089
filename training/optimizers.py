"""The optimizer and the learning-rate schedule of a recipe."""

import tensorflow as tf
import tf_keras

from recipes.types import Recipe
from tf_lamb import tf_keras as ours
from tf_lamb.arguments import check_interval
from tf_lamb.layers import Patterns, plan_variables

KERAS_OPTIMIZERS = ("adamw", "adagrad")  # of tf_keras: they skip no update


def make_schedule(recipe: Recipe) -> ours.Phases:
    """Returns the learning-rate schedule over the steps of all phases."""
    return ours.Phases([phase.schedule() for phase in recipe.phases])


class RunSchedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    """A schedule over the steps of the run, times the run's `rate_factor`.

    It does not use the optimizer's `iterations`, which restarts when a phase resets the slots and
    excludes skipped updates, so that later phases would begin late.

    Args:
        schedule: `(step) -> learning rate`.
        state: a `training.checkpoint.manager.RunState`.
    """

    def __init__(self, schedule, state):
        self._schedule = schedule
        self._state = state

    def __call__(self, step):
        """Returns the learning rate at the run's current step, a float32 scalar; ignores `step`."""
        del step
        return self._schedule(self._state.step) * self._state.rate_factor

    def get_config(self):
        """Returns the schedule and the current `rate_factor`."""
        factor = float(self._state.rate_factor.numpy())
        return {"schedule": self._schedule, "rate_factor": factor}


def make_optimizer(recipe: Recipe, learning_rate):
    """Returns the recipe's optimizer, not built yet: call `build` next.

    LAMB and LARS are those of `tf_lamb`. "momentum" is LARS without layer adaptation, which is
    momentum SGD with the decay λx inside the momentum and the learning rate outside: m ← μm + g +
    λx, x ← x - ηm (arXiv:1706.02677, equation 9). With the rate inside, as in Keras's SGD and in
    LARS, steps after a drop of the rate would be too large unless m is corrected (section 3 there,
    remark 2); and Keras's SGD applies decay outside of the momentum. AdamW and Adagrad are those
    of tf_keras, which subtract ηλx.

    Args:
        recipe: a checked recipe.
        learning_rate: a tf_keras schedule.

    Raises:
        ValueError: a setting is outside its range, or the variant is unknown.
    """
    settings = {"weight_decay": recipe.weight_decay}
    if recipe.clip_each_replica:  # by `ReplicaStep`
        settings["global_clipnorm"] = None
    elif recipe.global_clipnorm is not None:
        settings["global_clipnorm"] = recipe.global_clipnorm
    if recipe.optimizer in KERAS_OPTIMIZERS:
        return _keras_optimizer(recipe, learning_rate, settings)
    settings |= {
        "exclude_from_weight_decay": recipe.exclude_from_weight_decay,
        "skip_nonfinite": recipe.skip_nonfinite,
        "telemetry": True,  # names the layers whose gradient is not finite
    }
    if recipe.optimizer == "momentum":
        settings |= {"form": "tf-models-scaled", "exclude_from_layer_adaptation": [".*"]}
        return ours.LARS(learning_rate, momentum=recipe.momentum, **settings)
    for name in ("trust_coefficient", "exclude_from_layer_adaptation"):
        if getattr(recipe, name) is not None:
            settings[name] = getattr(recipe, name)
    settings["epsilon"] = recipe.epsilon
    if recipe.optimizer == "lars":
        chosen = ours.LARS
        settings = settings | {"momentum": recipe.momentum}
    else:
        betas = {"beta_1": recipe.beta_1, "beta_2": recipe.beta_2}
        chosen = ours.LAMB
        settings = settings | betas
    if recipe.variant:
        return chosen.variant(recipe.variant, learning_rate, **settings)
    return chosen(learning_rate, **settings)


def _keras_optimizer(recipe, learning_rate, settings):
    """Returns AdamW or Adagrad, after a check of the ranges, which tf_keras does not do."""
    settings["epsilon"] = recipe.epsilon
    if recipe.optimizer == "adamw":
        settings |= {"beta_1": recipe.beta_1, "beta_2": recipe.beta_2}
    for name, value in settings.items():
        check_interval(name, value, 0, 1 if name.startswith("beta") else float("inf"))
    kinds = {"adamw": tf_keras.optimizers.AdamW, "adagrad": tf_keras.optimizers.Adagrad}
    return kinds[recipe.optimizer](learning_rate, **settings)


def build(optimizer, recipe: Recipe, variables) -> None:
    """Creates the slots and applies the recipe's exclusions from weight decay.

    Warns (`UserWarning`) of an exclusion pattern that matches no variable.
    """
    if recipe.optimizer in KERAS_OPTIMIZERS:
        # tf_keras matches against names that end in ":0", so "bias$" would match nothing.
        kept = decayed(recipe.exclude_from_weight_decay, variables)
        excluded = [v for v, added in zip(variables, kept, strict=True) if not added]
        optimizer.exclude_from_weight_decay(var_list=excluded)
    optimizer.build(variables)


def decayed(exclusions, variables) -> tuple[bool, ...]:
    """Returns for each variable whether no pattern of `exclusions` is found in its path.

    Warns (`UserWarning`) of a pattern that matches no variable.
    """
    layers = plan_variables(
        [v.name.split(":")[0] for v in variables],
        [v.shape for v in variables],
        Patterns(tuple(exclusions), (), {}, ()),
    )
    return tuple(layer.decayed for layer in layers)


def assign_slots(optimizer, step: int, slots) -> None:
    """Sets the slots of an optimizer of `tf_lamb`, and the step of its bias correction.

    Args:
        optimizer: a built optimizer.
        step: number of updates that led to these slots.
        slots: for each kind of slot a list of arrays, one for each variable, in their order.
    """
    variables = [v for v in optimizer.variables if v is not optimizer.iterations]
    values = [value for kind in slots for value in kind]
    for variable, value in zip(variables, values):  # noqa: B905, the slots are the first ones
        variable.assign(value)
    optimizer.iterations.assign(step)


def reset_slots(optimizer) -> None:
    """Sets the slots to their initial values and `iterations`, the step of bias correction, to 0.

    Resetting `iterations` alone would be wrong: bias correction at step 1 would multiply the
    moments of a long run by 1/(1 - beta), that is, by 10 and 1,000 for betas 0.9 and 0.999.
    """
    start = getattr(optimizer, "initial_accumulator_value", 0)
    kept = ("skipped_steps", "current_learning_rate", "learning_rate")
    for variable in optimizer.variables:
        if variable.name.split(":")[0] not in kept:
            value = 0 if variable is optimizer.iterations else start
            variable.assign(tf.fill(variable.shape, tf.cast(value, variable.dtype)))
