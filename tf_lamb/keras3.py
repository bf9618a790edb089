"""LAMB and LARS for Keras 3, on the TensorFlow, JAX and torch backends."""

import contextlib

import keras
from keras import ops

from tf_lamb import lamb, lars, rates, schedules, updates
from tf_lamb.layerwise import Plan

if keras.backend.backend() == "tensorflow":
    from tf_lamb import fused


def _native(variable):
    """The backend's own variable; models may also hold bare `tf.Variable`s."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _path(variable):
    """`"encoder/dense/kernel"`; a bare `tf.Variable` has a name, `"dense/kernel:0"`."""
    return getattr(variable, "path", None) or variable.name.split(":")[0]


class Adapter(keras.optimizers.Optimizer):
    """A Keras 3 optimizer that hands the whole model to its rule.

    It overrides one private hook per backend, the one that runs after the gradients were summed
    (pinned by tests/test_contract.py). Everything before and after it stays Keras's: loss
    scale, accumulation, EMA, constraints, the step counter.
    """

    schedule_class = keras.optimizers.schedules.LearningRateSchedule

    def __init__(self, learning_rate, **arguments):
        lent = rates.is_variable(learning_rate)
        # The base makes a variable of a number and none of a callable.
        super().__init__(rates.checked if lent else learning_rate, **arguments)
        if lent:
            if not isinstance(learning_rate, keras.Variable):
                # Around a `tf.Variable` Keras makes no variable of its own: both are assigned.
                learning_rate = keras.Variable(learning_rate, trainable=False, name="learning_rate")
            self._track_variable(learning_rate)
            self._learning_rate = learning_rate

    @property
    def learning_rate(self):
        """η of the next update: a variable, or what the schedule or callable says now."""
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, rate):
        rates.check_settable(self._learning_rate, rate)
        if callable(rate):
            rate = rates.checked(rate, self.schedule_class)
        keras.optimizers.Optimizer.learning_rate.fset(self, rate)

    def build(self, variables):
        """Creates the slots and decides, once, which variable is decayed and adapted.

        Raises:
            ValueError: an exclusion pattern matches no variable.
        """
        if self.built:
            return
        variables = list(variables)
        on_tensorflow = keras.backend.backend() == "tensorflow"
        if on_tensorflow:
            fused.check_strategy(self._distribution_strategy)
        layers = self._planned([_path(v) for v in variables], [v.shape for v in variables])
        super().build(variables)
        slots = tuple(
            [self._slot(v, name, "float32" if k else self.moment_dtype) for v in variables]
            for k, name in enumerate(self.slot_names)
        )
        once = {"initializer": "zeros", "aggregation": "only_first_replica"}
        skipped = self.add_variable((), dtype="int", name="skipped_steps", **once)
        telemetry = None
        if self.telemetry:
            telemetry = self.add_variable(
                (len(variables), 3), dtype="float32", name="telemetry", **once
            )
        run = None
        if on_tensorflow:
            run = fused.fused_update(
                self._updated,
                [_native(v) for v in variables],
                [[_native(v) for v in slot] for slot in slots],
                iterations=_native(self._iterations),
                skipped=_native(skipped),
                telemetry=None if telemetry is None else _native(telemetry),
                per_update=self.gradient_accumulation_steps or 1,
                jit=True,
            )
        self._plan = Plan(layers, slots, skipped, telemetry, run)

    def _slot(self, variable, name, dtype):
        """A zero of the variable's shape beside it, whatever the variable's dtype."""
        place = contextlib.nullcontext()
        if keras.backend.backend() == "tensorflow":
            place = self._distribution_strategy.extended.colocate_vars_with(_native(variable))
        with place:
            return self.add_variable(
                shape=variable.shape,
                initializer="zeros",
                dtype=dtype,
                layout=getattr(variable, "_layout", None),
                name=f"{_path(variable).replace('/', '_')}_{name}",
            )

    def _distributed_tf_update_step(self, distribution, grads_and_vars, learning_rate):
        """TensorFlow: the hook in merge context, after the sum over the replicas."""
        grads, variables = zip(*grads_and_vars, strict=True)
        index = tuple(self._get_variable_index(v) for v in variables)
        self._plan.run(distribution, index, grads, learning_rate, lambda: self.iterations)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """JAX and torch: the hook, inside whatever step the backend compiles."""
        if keras.backend.backend() == "tensorflow":
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        index = tuple(self._get_variable_index(v) for v in trainable_variables)
        slots = [[slot[i] for i in index] for slot in self._plan.slots]
        values, finite, rows = self._updated(
            index,
            grads,
            [ops.stop_gradient(v.value) for v in trainable_variables],
            [[v.value for v in slot] for slot in slots],
            ops.cast(learning_rate, "float32"),
            ops.cast(self.iterations, "float32") + 1.0,
        )
        for targets, results in zip((trainable_variables, *slots), values, strict=True):
            for target, result in zip(targets, results, strict=True):
                target.assign(result)
        plan = self._plan
        if finite is not None:
            missed = ops.cast(ops.logical_not(finite), plan.skipped.dtype)
            plan.skipped.assign(plan.skipped + missed)
            per_update = self.gradient_accumulation_steps or 1
            self._iterations.assign(self._iterations - per_update * missed)
        if rows is not None:
            plan.telemetry.assign(updates.placed(plan.telemetry.value, rows, index))

    def get_config(self):
        """What the base saves; `ValueError` for a callable rate that no file can hold."""
        rates.check_savable(self._learning_rate)
        return super().get_config()


@keras.saving.register_keras_serializable("tf_lamb")
class LAMB(lamb.LAMBRule, Adapter):  # noqa: D101
    __doc__ = lamb.LAMBRule.__doc__


@keras.saving.register_keras_serializable("tf_lamb")
class LARS(lars.LARSRule, Adapter):  # noqa: D101
    __doc__ = lars.LARSRule.__doc__


@keras.saving.register_keras_serializable("tf_lamb")
class WarmupPolynomialDecay(  # noqa: D101
    schedules.WarmupPolynomialDecayRule, keras.optimizers.schedules.LearningRateSchedule
):
    __doc__ = schedules.WarmupPolynomialDecayRule.__doc__


@keras.saving.register_keras_serializable("tf_lamb")
class WarmupStepDecay(  # noqa: D101
    schedules.WarmupStepDecayRule, keras.optimizers.schedules.LearningRateSchedule
):
    __doc__ = schedules.WarmupStepDecayRule.__doc__


@keras.saving.register_keras_serializable("tf_lamb")
class Phases(schedules.PhasesRule, keras.optimizers.schedules.LearningRateSchedule):  # noqa: D101
    __doc__ = schedules.PhasesRule.__doc__
    _schedule = WarmupPolynomialDecay
    _step_schedule = WarmupStepDecay
