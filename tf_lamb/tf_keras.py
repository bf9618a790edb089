"""LAMB and LARS for Keras 2 (`tf_keras`), the flavour that tf-models-official uses."""

import dataclasses

import keras

if keras.backend.backend() != "tensorflow":
    raise RuntimeError(
        "tf_lamb.tf_keras runs on TensorFlow, and its update is written on Keras 3's `keras.ops`. "
        "Set the environment variable KERAS_BACKEND=tensorflow before the first import of keras. "
        f"Received: KERAS_BACKEND={keras.backend.backend()}."
    )

import tensorflow as tf  # noqa: E402  the check above speaks first
import tf_keras  # noqa: E402

from tf_lamb import lamb, lars, schedules, xla  # noqa: E402
from tf_lamb import learning_rate as rates  # noqa: E402
from tf_lamb.layerwise import Plan, check_hooks, load_state  # noqa: E402
from tf_lamb.telemetry import TelemetryCallbackRule  # noqa: E402


class Adapter(tf_keras.optimizers.Optimizer):
    """A tf_keras optimizer that hands the whole model to its rule.

    It overrides the one private hook that runs after the gradients were summed (pinned by
    tests/tf_lamb/test_contract.py), which in tf_keras also owns the EMA and the step counter.
    """

    schedule_class = tf_keras.optimizers.schedules.LearningRateSchedule

    def __init__(self, *, learning_rate, name, jit_compile, **arguments):
        super().__init__(name=name or type(self).__name__, **arguments)
        # The base turns XLA off where there is no GPU.
        self.jit_compile = jit_compile
        self._squares = None
        self._learning_rate = self._build_learning_rate(learning_rate)

    def _build_learning_rate(self, learning_rate):
        """A variable and a callable stay what they are: the base would copy their value of now."""
        if isinstance(learning_rate, (float, self.schedule_class)):
            return super()._build_learning_rate(learning_rate)
        return learning_rate.value if isinstance(learning_rate, keras.Variable) else learning_rate

    @property
    def learning_rate(self):
        """η of the next update: a variable, or what the callable says now."""
        rate = super().learning_rate
        return rate() if callable(rate) else rate

    @learning_rate.setter
    def learning_rate(self, rate):
        rate = rates.settable(self._learning_rate, rate, self.schedule_class)
        if callable(rate) and not rates.is_variable(rate):
            self._learning_rate = self._build_learning_rate(rate)
        else:
            self._learning_rate.assign(rate)

    @property
    def lr(self):
        """What the callbacks of tf_keras read and assign."""
        if rates.is_variable(self._learning_rate):
            return self.learning_rate
        return rates.FixedRate(float(self.learning_rate))

    @lr.setter
    def lr(self, rate):
        self.learning_rate = rate

    def build(self, var_list):
        """Creates the slots, and decides which variable is decayed and adapted.

        Args:
            var_list: list of `tf.Variable` that will be updated.

        Raises:
            ValueError: a variable that is not a real floating-point one, or that `layer_axes` or
                `layer_groups` do not fit; a strategy that scatters variables over machines.
            RuntimeError: this tf_keras does not call what is overridden here.
        """
        if getattr(self, "_built", False):
            return
        base = tf_keras.optimizers.Optimizer
        check_hooks(base._internal_apply_gradients, "_distributed_apply_gradients_fn")
        check_hooks(
            base.__mro__[1].apply_gradients,
            *("_internal_apply_gradients", "_clip_gradients", "_apply_weight_decay"),
        )
        var_list = list(var_list)
        xla.check_strategy(self._distribution_strategy)
        plans = self._make_plan(
            [v.name.split(":")[0] for v in var_list],
            [tuple(v.shape) for v in var_list],
            [getattr(v, "true_dtype", v.dtype).name for v in var_list],
        )
        super().build(var_list)
        slots = tuple(
            [self._slot(v, name, "float32" if k else self.moment_dtype) for v in var_list]
            for k, name in enumerate(self.slot_names)
        )
        # These come last: `save_own_variables` leaves them out.
        skipped = self._variable(tf.zeros([], tf.int64), "skipped_steps")
        telemetry = None
        if self.telemetry:
            telemetry = self._variable(tf.zeros([len(var_list), 3]), "telemetry")
        plan = Plan(plans, slots, skipped, telemetry)
        update = xla.Update(
            self,
            plan,
            var_list,
            slots,
            iterations=self._iterations,
            skipped=skipped,
            telemetry=telemetry,
            averages=list(self._model_variables_moving_average) if self.use_ema else None,
            average_starts_at_first=False,
        )
        self._plan = dataclasses.replace(plan, update=update)
        self._built = True

    def _slot(self, variable, name, dtype):
        """A zero of the variable's shape beside it, whatever the variable's dtype."""
        with self._distribution_strategy.extended.colocate_vars_with(variable):
            return self._variable(
                tf.zeros(variable.shape, dtype), f"{name}/{variable.name.split(':')[0]}"
            )

    def _variable(self, value, name):
        variable = tf.Variable(value, name=name, trainable=False)
        self._variables.append(variable)
        return variable

    def aggregate_gradients(self, grads_and_vars):
        """Sums gradients over the replicas.

        Args:
            grads_and_vars: list of (gradient, variable) pairs; a gradient may be None.

        Returns:
            The same pairs with the sums.
        """
        pairs = list(grads_and_vars)
        present = [g for g, _ in pairs if g is not None]
        if not present:
            return pairs
        # A TPU's replica is traced once, in one thread: the update that follows takes them.
        sums, self._squares = xla.sum_over_replicas(self, present)
        sums = iter(sums)
        return [(None if g is None else next(sums), v) for g, v in pairs]

    def apply_gradients(self, grads_and_vars, *arguments, **named_arguments):
        """Updates the variables; arguments and result are those of tf_keras."""
        self._squares = None
        try:
            return super().apply_gradients(grads_and_vars, *arguments, **named_arguments)
        finally:
            self._squares = None

    def _deduplicate_sparse_grad(self, grads):
        """Nothing: sparse gradients are made dense."""
        return grads

    def _distributed_apply_gradients_fn(self, distribution, grads_and_vars, **unused_kwargs):
        """The hook in merge context, after the sum over the replicas."""
        grads, variables = zip(*grads_and_vars, strict=True)
        unknown = [v.name for v in variables if self._var_key(v) not in self._index_dict]
        if unknown:
            raise ValueError(
                f"The optimizer was not built with {', '.join(unknown)}. Call "
                "`optimizer.build(variables)` with all variables before the first step."
            )
        index = [self._index_dict[self._var_key(v)] for v in variables]
        self._plan.update(distribution, index, grads, self.learning_rate, self._squares)
        return self.iterations.assign_add(1)

    def save_own_variables(self, store):
        """Saves the state; counters of skipped updates and telemetry are not saved."""
        for i, variable in enumerate(self._state_variables()):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store):
        """Loads the state; files of version 0.1.0 also hold counters and telemetry, at the end."""
        load_state(self, store, self._state_variables())

    def set_weights(self, weights):
        """Sets the optimizer's variables; the observations at their end may be missing.

        Args:
            weights: list of arrays, in the order of `variables`.
        """
        count = len(self._state_variables())
        if self._plan is not None and count <= len(weights) <= count + 2:
            weights = [*weights[:count], *(v.numpy() for v in self.variables[count:])]
        super().set_weights(weights)

    def _state_variables(self):
        observations = () if self._plan is None else (self._plan.skipped, self._plan.telemetry)
        return [v for v in self.variables if not any(v is other for other in observations)]

    def get_config(self):
        """What the base saves, and the learning rate, which it leaves to its subclasses."""
        rate = self._learning_rate
        rates.check_savable(rate)
        config = super().get_config()
        del config["is_legacy_optimizer"]  # no argument of ours; Keras takes its absence for False
        saved = rates.value if rates.is_variable(rate) else tf_keras.utils.serialize_keras_object
        return config | {"learning_rate": saved(rate)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The optimizer that `get_config` described, without its state."""
        rate = config.get("learning_rate")
        # The base reads schedules only: of a function that it does not find it makes its name.
        if isinstance(rate, dict) and rate.get("class_name") in ("function", "__lambda__"):
            rate = tf_keras.utils.deserialize_keras_object(rate, custom_objects)
            config = config | {"learning_rate": rate}
        # The HDF5 format writes a class's bare name, and looks among Keras's own schedules.
        elif isinstance(rate, dict) and rate.get("class_name") in SCHEDULES:
            rate = SCHEDULES[rate["class_name"]].from_config(rate["config"])
            config = config | {"learning_rate": rate}
        return super().from_config(config, custom_objects)


@tf_keras.utils.register_keras_serializable("tf_lamb")
class LAMB(lamb.LAMBRule, Adapter):  # noqa: D101
    __doc__ = lamb.LAMBRule.__doc__


@tf_keras.utils.register_keras_serializable("tf_lamb")
class LARS(lars.LARSRule, Adapter):  # noqa: D101
    __doc__ = lars.LARSRule.__doc__


@tf_keras.utils.register_keras_serializable("tf_lamb")
class WarmupPolynomialDecay(  # noqa: D101
    schedules.WarmupPolynomialDecayRule, tf_keras.optimizers.schedules.LearningRateSchedule
):
    __doc__ = schedules.WarmupPolynomialDecayRule.__doc__


@tf_keras.utils.register_keras_serializable("tf_lamb")
class WarmupStepDecay(  # noqa: D101
    schedules.WarmupStepDecayRule, tf_keras.optimizers.schedules.LearningRateSchedule
):
    __doc__ = schedules.WarmupStepDecayRule.__doc__


@tf_keras.utils.register_keras_serializable("tf_lamb")
class Phases(schedules.PhasesRule, tf_keras.optimizers.schedules.LearningRateSchedule):  # noqa: D101
    __doc__ = schedules.PhasesRule.__doc__
    _schedule = WarmupPolynomialDecay
    _step_schedule = WarmupStepDecay


class TelemetryCallback(TelemetryCallbackRule, tf_keras.callbacks.Callback):  # noqa: D101
    __doc__ = TelemetryCallbackRule.__doc__


SCHEDULES = {
    schedule.__name__: schedule for schedule in (WarmupPolynomialDecay, WarmupStepDecay, Phases)
}
