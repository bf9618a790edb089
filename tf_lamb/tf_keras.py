"""LAMB and LARS for Keras 2 (`tf_keras`), the flavour that tf-models-official uses."""

import keras

if keras.backend.backend() != "tensorflow":
    raise RuntimeError(
        "tf_lamb.tf_keras runs on TensorFlow, and its update is written on Keras 3's `keras.ops`. "
        "Set the environment variable KERAS_BACKEND=tensorflow before the first import of keras. "
        f"Received: KERAS_BACKEND={keras.backend.backend()}."
    )

import tensorflow as tf  # noqa: E402  the check above speaks first
import tf_keras  # noqa: E402

from tf_lamb import fused, lamb, lars, rates, schedules  # noqa: E402
from tf_lamb.layerwise import Plan  # noqa: E402
from tf_lamb.telemetry import TelemetryCallbackRule  # noqa: E402


class Adapter(tf_keras.optimizers.Optimizer):
    """A tf_keras optimizer that hands the whole model to its rule.

    It overrides the one private hook that runs after the gradients were summed (pinned by
    tests/test_contract.py), which in tf_keras also owns the EMA and the step counter.
    """

    schedule_class = tf_keras.optimizers.schedules.LearningRateSchedule

    def __init__(self, learning_rate, *, weight_decay, name, jit_compile=True, **keras_arguments):
        super().__init__(name=name, weight_decay=weight_decay, **keras_arguments)
        # The base turns XLA off where there is no GPU. One program for the whole model is faster
        # on a CPU too.
        self.jit_compile = jit_compile
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
        rates.check_settable(self._learning_rate, rate)
        if callable(rate):
            self._learning_rate = self._build_learning_rate(
                rates.checked(rate, self.schedule_class)
            )
        else:
            self._learning_rate.assign(rate)

    def build(self, var_list):
        """Creates the slots and decides, once, which variable is decayed and adapted.

        Raises:
            ValueError: an exclusion pattern matches no variable.
        """
        if getattr(self, "_built", False):
            return
        var_list = list(var_list)
        fused.check_strategy(self._distribution_strategy)
        layers = self._planned(
            [v.name.split(":")[0] for v in var_list], [v.shape for v in var_list]
        )
        super().build(var_list)
        slots = tuple(
            [self._slot(v, name, "float32" if k else self.moment_dtype) for v in var_list]
            for k, name in enumerate(self.slot_names)
        )
        skipped = self._variable(tf.zeros([], tf.int64), "skipped_steps")
        telemetry = None
        if self.telemetry:
            telemetry = self._variable(tf.zeros([len(var_list), 3]), "telemetry")
        run = fused.fused_update(
            self._updated,
            var_list,
            slots,
            iterations=self._iterations,
            skipped=skipped,
            telemetry=telemetry,
            per_update=1,
            jit=self.jit_compile,
        )
        self._plan = Plan(layers, slots, skipped, telemetry, run)
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

    def _distributed_apply_gradients_fn(self, distribution, grads_and_vars, **unused_kwargs):
        """The hook in merge context, after the sum over the replicas."""
        grads, variables = zip(*grads_and_vars, strict=True)
        unknown = [v.name for v in variables if self._var_key(v) not in self._index_dict]
        if unknown:
            raise ValueError(
                f"The optimizer was not built with {', '.join(unknown)}. Call "
                "`optimizer.build(variables)` with all variables before the first step."
            )
        index = tuple(self._index_dict[self._var_key(v)] for v in variables)
        self._plan.run(distribution, index, grads, self.learning_rate, lambda: self.iterations)
        if self.use_ema:
            self._update_model_variables_moving_average(variables)
            if self.ema_overwrite_frequency:
                tf.cond(
                    (self.iterations + 1) % self.ema_overwrite_frequency == 0,
                    lambda: self._overwrite_model_variables_with_average_value(variables),
                    lambda: None,
                )
        return self.iterations.assign_add(1)

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
