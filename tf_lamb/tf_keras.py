"""LAMB and LARS for Keras 2 (`tf_keras`), which tf-models-official uses.

Prefer the `.keras` format to HDF5 (`.h5`) for a model with a `LossScaleOptimizer`. In HDF5,
tf_keras writes the inner optimizer's class without its package, so the class must be passed when
the model is loaded:

>>> tf_keras.models.load_model("model.h5", custom_objects={"LAMB": tf_lamb.tf_keras.LAMB})

The state of a `LossScaleOptimizer` is not restored from HDF5, whatever the inner optimizer is. From
`.keras`, that of the inner optimizer is; a dynamic loss scale begins again at its initial value.
"""

import dataclasses

import keras

if keras.backend.backend() != "tensorflow":
    raise RuntimeError(
        "tf_lamb.tf_keras needs the TensorFlow backend of Keras 3, whose `keras.ops` it uses. "
        "Set the environment variable KERAS_BACKEND=tensorflow before the first import of keras. "
        f"Received: KERAS_BACKEND={keras.backend.backend()}."
    )

import tensorflow as tf  # noqa: E402  (after the check above)
import tf_keras  # noqa: E402

from tf_lamb import lamb, lars, schedules, xla  # noqa: E402
from tf_lamb import learning_rate as rates  # noqa: E402
from tf_lamb.layerwise import Plan, check_hooks  # noqa: E402
from tf_lamb.telemetry import TelemetryCallbackMixin  # noqa: E402


class Adapter(tf_keras.optimizers.Optimizer):
    """A tf_keras optimizer that updates all variables at once.

    It overrides the private method `_distributed_apply_gradients_fn`, which runs after the sum of
    gradients over replicas. In tf_keras, this method also updates the moving averages and the step
    counter. tests/tf_lamb/test_contract.py checks its signature.
    """

    schedule_class = tf_keras.optimizers.schedules.LearningRateSchedule

    def __init__(self, *, learning_rate, name, jit_compile, **arguments):
        super().__init__(name=name or type(self).__name__, **arguments)
        # The base class turns `jit_compile` off where there is no GPU.
        self.jit_compile = jit_compile
        # Set by `aggregate_gradients`, for the update in the same call of `apply_gradients`.
        self._squares = None
        self._learning_rate = self._build_learning_rate(learning_rate)

    def _build_learning_rate(self, learning_rate):
        """Returns a variable or a callable unchanged. The base class would copy its value."""
        if isinstance(learning_rate, (float, self.schedule_class)):
            return super()._build_learning_rate(learning_rate)
        return learning_rate.value if isinstance(learning_rate, keras.Variable) else learning_rate

    @property
    def learning_rate(self):
        """The learning rate of the next update: a variable, or a callable's current value."""
        rate = super().learning_rate
        return rate() if callable(rate) else rate

    @learning_rate.setter
    def learning_rate(self, rate):
        rate = rates.check_assigned_rate(self._learning_rate, rate, self.schedule_class)
        if callable(rate) and not rates.is_variable(rate):
            self._learning_rate = self._build_learning_rate(rate)
        else:
            self._learning_rate.assign(rate)

    @property
    def lr(self):
        """The learning rate, which the callbacks of tf_keras read and assign by this name."""
        if rates.is_variable(self._learning_rate):
            return self.learning_rate
        return rates.ReadOnlyRate(float(self.learning_rate))

    @lr.setter
    def lr(self, rate):
        self.learning_rate = rate

    def build(self, var_list):
        """Creates the slots, and decides which variables are decayed and adapted.

        Args:
            var_list: List of `tf.Variable` to update.

        Raises:
            ValueError: If a variable is not a real floating-point variable, if it does not fit
                `layer_axes` or `layer_groups`, or under `ParameterServerStrategy`.
            RuntimeError: If this version of tf_keras does not call the overridden methods.
        """
        if getattr(self, "_built", False):
            return
        base = tf_keras.optimizers.Optimizer
        check_hooks(base._internal_apply_gradients, "_distributed_apply_gradients_fn")
        check_hooks(
            base.__mro__[1].apply_gradients,
            "_internal_apply_gradients",
            "_clip_gradients",
            "_apply_weight_decay",
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
            [self._add_slot(v, name, "float32" if k else self.moment_dtype) for v in var_list]
            for k, name in enumerate(self.slot_names)
        )
        # `save_own_variables` does not save `skipped` and `telemetry`.
        skipped = self._add_variable(tf.zeros([], tf.int64), "skipped_steps")
        telemetry = None
        if self.telemetry:
            telemetry = self._add_variable(tf.zeros([len(var_list), 3]), "telemetry")
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
            averages_start_at_first_update=False,
        )
        self._plan = dataclasses.replace(plan, update=update)
        self._built = True

    def _add_slot(self, variable, name, dtype):
        """Creates a slot of zeros with the variable's shape, on its device."""
        with self._distribution_strategy.extended.colocate_vars_with(variable):
            return self._add_variable(
                tf.zeros(variable.shape, dtype), f"{name}/{variable.name.split(':')[0]}"
            )

    def _add_variable(self, value, name):
        variable = tf.Variable(value, name=name, trainable=False)
        self._variables.append(variable)
        return variable

    def aggregate_gradients(self, grads_and_vars):
        """Sums gradients over the replicas.

        Args:
            grads_and_vars: List of (gradient, variable) pairs. A gradient may be `None`.

        Returns:
            A list of the same pairs with the summed gradients.
        """
        pairs = list(grads_and_vars)
        present = [g for g, _ in pairs if g is not None]
        if not present:
            return pairs
        # An attribute may hold `squares`: they are not `None` only on a TPU, whose replicas are all
        # traced once, in this thread, and the update follows at once.
        sums, self._squares = xla.sum_over_replicas(self, present)
        sums = iter(sums)
        return [(None if g is None else next(sums), v) for g, v in pairs]

    def apply_gradients(self, grads_and_vars, *arguments, **named_arguments):
        """Updates the variables. Arguments and result are those of tf_keras."""
        self._squares = None
        try:
            return super().apply_gradients(grads_and_vars, *arguments, **named_arguments)
        finally:
            self._squares = None

    def _deduplicate_sparse_grad(self, grads):
        """Returns the gradients unchanged: `xla.Update` converts sparse gradients to dense."""
        return grads

    def _distributed_apply_gradients_fn(self, distribution, grads_and_vars, **unused_kwargs):
        """Updates the variables. Called in merge context, after the sum over replicas."""
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

    def set_weights(self, weights):
        """Sets the optimizer's variables.

        Args:
            weights: List of arrays in the order of `variables`. The number of skipped updates and
                the telemetry come last. They are ignored and may be missing.
        """
        count = len(self._state_variables())
        if self._plan is not None and count <= len(weights) <= count + 2:
            weights = [*weights[:count], *(v.numpy() for v in self.variables[count:])]
        super().set_weights(weights)

    def get_config(self):
        """Returns the configuration of the base class, and the learning rate.

        Raises:
            ValueError: If the learning rate is a callable that cannot be saved.
        """
        rate = self._learning_rate
        rates.check_savable(rate)
        config = super().get_config()
        del config["is_legacy_optimizer"]  # Not a constructor argument. Keras does not need it.
        if rates.is_variable(rate):
            return config | {"learning_rate": rates.to_float(rate)}
        return config | {"learning_rate": tf_keras.utils.serialize_keras_object(rate)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates an optimizer from the result of `get_config`, without its state."""
        rate = config.get("learning_rate")
        # The base class only deserializes schedules, and leaves a function's name as it is.
        if isinstance(rate, dict) and rate.get("class_name") in ("function", "__lambda__"):
            rate = tf_keras.utils.deserialize_keras_object(rate, custom_objects)
            config = config | {"learning_rate": rate}
        # HDF5 contains the class name only, which tf_keras looks up among its own classes.
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


class TelemetryCallback(TelemetryCallbackMixin, tf_keras.callbacks.Callback):  # noqa: D101
    __doc__ = TelemetryCallbackMixin.__doc__


SCHEDULES = {
    schedule.__name__: schedule for schedule in (WarmupPolynomialDecay, WarmupStepDecay, Phases)
}
