"""LAMB and LARS for Keras 3, on the TensorFlow, JAX and torch backends."""

import contextlib
import dataclasses
import inspect
from typing import Any

import keras
from keras import ops

from tf_lamb import lamb, lars, schedules
from tf_lamb import learning_rate as rates
from tf_lamb.layerwise import Plan, check_hooks, replace_rows, sum_duplicates

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
if ON_TENSORFLOW:
    import tensorflow as tf

    from tf_lamb import xla

# Keras 3.10 names every Adam "adam". Later versions number them: "adam", "adam_1".
KERAS_NUMBERS_NAMES = not bool(
    inspect.signature(keras.optimizers.Adam.__init__).parameters["name"].default
)


def _backend_variable(variable):
    """Returns the backend's variable of a `keras.Variable`, and a `tf.Variable` unchanged."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _path_of(variable) -> str:
    """Returns a path such as `"encoder/dense/kernel"`, or the name of a `tf.Variable`."""
    return getattr(variable, "path", None) or variable.name.split(":")[0]


def _stored_dtype(variable) -> str:
    """Returns the name of the dtype in memory, which differs from `dtype` under autocasting."""
    return keras.backend.standardize_dtype(getattr(variable, "_dtype", None) or variable.dtype)


class Adapter(keras.optimizers.Optimizer):
    """A Keras 3 optimizer that updates all variables at once.

    It overrides the private method `_backend_apply_gradients`, which in Keras does gradient
    accumulation, clipping, weight decay, the sum over replicas, the update and moving averages. The
    rest of `apply` is Keras's: loss scale, constraints and the step counter.
    """

    schedule_class = keras.optimizers.schedules.LearningRateSchedule

    def __init__(self, learning_rate, **arguments):
        if not KERAS_NUMBERS_NAMES:
            arguments["name"] = arguments.get("name") or type(self).__name__.lower()
        if not rates.is_variable(learning_rate):
            super().__init__(learning_rate, **arguments)
            return
        # Given a callable, the base class creates no variable of its own.
        super().__init__(lambda: 0.0, **arguments)
        if not isinstance(learning_rate, keras.Variable):
            # A `keras.Variable` around a `tf.Variable` shares its value.
            learning_rate = keras.Variable(learning_rate, trainable=False, name="learning_rate")
        self._track_variable(learning_rate)
        self._learning_rate = learning_rate

    @property
    def learning_rate(self):
        """The learning rate of the next update: a variable, or a schedule's current value."""
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, rate):
        rate = rates.check_assigned_rate(self._learning_rate, rate, self.schedule_class)
        keras.optimizers.Optimizer.learning_rate.fset(self, rate)

    def build(self, variables):
        """Creates the slots, and decides which variables are decayed and adapted.

        Args:
            variables: List of variables to update.

        Raises:
            ValueError: If a variable is not a real floating-point variable, if it does not fit
                `layer_axes` or `layer_groups`, or under `ParameterServerStrategy`.
            RuntimeError: If this version of Keras does not call the overridden methods.
        """
        if self._plan is not None:
            return
        check_hooks(keras.optimizers.Optimizer.apply, "_backend_apply_gradients")
        variables = list(variables)
        if ON_TENSORFLOW:
            xla.check_strategy(self._distribution_strategy)
        plans = self._make_plan(
            [_path_of(v) for v in variables],
            [tuple(v.shape) for v in variables],
            [_stored_dtype(v) for v in variables],
            [self._overwrite_variable_with_gradient(v) for v in variables],
        )
        super().build(variables)
        slots = tuple(
            [self._add_slot(v, name, "float32" if k else self.moment_dtype) for v in variables]
            for k, name in enumerate(self.slot_names)
        )
        # `save_own_variables` does not save `skipped` and `telemetry`.
        options = {"initializer": "zeros", "aggregation": "only_first_replica"}
        skipped = self.add_variable((), dtype="int", name="skipped_steps", **options)
        telemetry = None
        if self.telemetry:
            telemetry = self.add_variable(
                (len(variables), 3), dtype="float32", name="telemetry", **options
            )
        plan = Plan(plans, slots, skipped, telemetry)
        if ON_TENSORFLOW:
            averages = self._model_variables_moving_average if self.use_ema else None
            accumulators = self._accumulated_gradients if self.gradient_accumulation_steps else None
            update = xla.Update(
                self,
                plan,
                [_backend_variable(v) for v in variables],
                [[_backend_variable(v) for v in slot] for slot in slots],
                iterations=_backend_variable(self._iterations),
                skipped=_backend_variable(skipped),
                telemetry=None if telemetry is None else _backend_variable(telemetry),
                averages=averages and [_backend_variable(v) for v in averages],
                accumulators=accumulators and [_backend_variable(v) for v in accumulators],
                accumulation_steps=self.gradient_accumulation_steps or 1,
            )
            plan = dataclasses.replace(plan, update=update)
        self._plan = plan

    def add_variable_from_reference(self, reference_variable, name=None, **arguments):
        """Creates Keras's variables; in float32, whatever the variable's dtype, the accumulator.

        A sum of gradients in float16 overflows, and one in bfloat16 stops growing at 256 times the
        first gradient.
        """
        if name == "gradient_accumulator":
            return self._add_slot(reference_variable, name, "float32")
        return super().add_variable_from_reference(reference_variable, name=name, **arguments)

    def _add_slot(self, variable, name, dtype):
        """Creates a slot of zeros with the variable's shape, on its device."""
        device_scope: Any = contextlib.nullcontext()
        if ON_TENSORFLOW:
            device_scope = self._distribution_strategy.extended.colocate_vars_with(
                _backend_variable(variable)
            )
        with device_scope:
            return self.add_variable(
                shape=variable.shape,
                initializer="zeros",
                dtype=dtype,
                layout=getattr(variable, "_layout", None),
                name=f"{_path_of(variable).replace('/', '_')}_{name}",
            )

    def _backend_apply_gradients(self, grads, trainable_variables):
        """Updates the variables. `apply` calls it without the gradients that are `None`."""
        index = tuple(self._get_variable_index(v) for v in trainable_variables)
        if not ON_TENSORFLOW:
            self._update_on_jax_or_torch(index, grads)
            return
        dense = [ops.convert_to_tensor(g, sparse=False) for g in grads]
        grads, squares = xla.sum_over_replicas(self, dense)

        def update(strategy, grads, learning_rate, squares):
            self._plan.update(strategy, index, grads, learning_rate, squares)

        tf.__internal__.distribute.interim.maybe_merge_call(
            update, self._distribution_strategy, grads, self.learning_rate, squares
        )

    def _update_on_jax_or_torch(self, index, grads):
        """Updates the variables, as part of a step that the backend may compile."""
        plan = self._plan
        variables = self._trainable_variables
        index, grads = sum_duplicates(index, [ops.cast(_to_dense(g), "float32") for g in grads])
        accumulation_steps = self.gradient_accumulation_steps or 1
        calls = ops.convert_to_tensor(self._iterations)
        completes_update = _true()
        if accumulation_steps > 1:
            completes_update = ops.equal((calls + 1) % accumulation_steps, 0)
            totals = [self._accumulated_gradients[i] for i in index]
            grads = [ops.cast(t.value, "float32") + g for t, g in zip(totals, grads, strict=True)]
            for total, g in zip(totals, grads, strict=True):
                total.assign(ops.cast(ops.where(completes_update, 0.0, g), total.dtype))
            grads = [g / accumulation_steps for g in grads]
        updates = calls // accumulation_steps
        old_values = [[ops.stop_gradient(v.value) for v in variables]]
        old_values += [[v.value for v in slot] for slot in plan.slots]
        old_rows = None if plan.telemetry is None else plan.telemetry.value

        # `ops.cond` cannot return `None`, so the telemetry is a list: empty, or of one tensor.
        def update():
            values, finite, rows = self._update_model(
                index,
                grads,
                old_values[0],
                old_values[1:],
                ops.cast(self.learning_rate, "float32"),
                ops.cast(updates, "float32") + 1.0,
            )
            finite = _true() if finite is None else finite
            return values, finite, [] if rows is None else [replace_rows(old_rows, rows)]

        def keep():
            return old_values, _true(), [] if old_rows is None else [old_rows]

        if accumulation_steps > 1:
            values, finite, telemetry = ops.cond(completes_update, update, keep)
        else:
            values, finite, telemetry = update()
        for targets, news, olds in zip((variables, *plan.slots), values, old_values, strict=True):
            for target, new, old in zip(targets, news, olds, strict=True):
                if new is not old:
                    target.assign(new)
        missed = ops.cast(ops.logical_not(finite), plan.skipped.dtype)
        plan.skipped.assign(plan.skipped + missed)
        self._iterations.assign(self._iterations - accumulation_steps * missed)
        if telemetry:
            plan.telemetry.assign(telemetry[0])
        if self.use_ema:
            self._update_averages(ops.logical_and(finite, completes_update), updates)

    def _update_averages(self, is_updated, updates):
        """Updates Keras's moving averages of the weights, on JAX and torch.

        Args:
            is_updated: Boolean scalar. Whether this call updated the weights.
            updates: Integer scalar. The number of updates before this call.
        """
        frequency = self.ema_overwrite_frequency
        pairs = zip(self._trainable_variables, self._model_variables_moving_average, strict=True)
        for variable, average in pairs:
            if average is None:
                continue
            x = variable.value
            old = average.value
            mu = self.ema_momentum * ops.cast(ops.not_equal(updates, 0), x.dtype)
            old = ops.cast(old, x.dtype)
            new = ops.where(is_updated, mu * old + (1 - mu) * x, old)
            average.assign(new)
            if frequency:
                due = ops.logical_and(is_updated, ops.equal((updates + 1) % frequency, 0))
                variable.assign(ops.where(due, new, x))

    def finalize_variable_values(self, var_list):
        """Assigns the moving averages to the model, unless there was no update yet.

        Args:
            var_list: List of the model's trainable variables.
        """
        # Keras also calls this after a step that failed, where JAX has deleted the variables: an
        # error of reading them would hide the one of the step.
        if not self.use_ema or self._plan is None or _is_gone(self._iterations):
            return
        if int(ops.convert_to_numpy(self.iterations)) == 0:
            return
        averages = self._model_variables_moving_average
        if len(var_list) == len(averages):
            super().finalize_variable_values(var_list)
        else:  # Some layers are frozen. Keras would assign the averages of others.
            for variable in var_list:
                average = averages[self._get_variable_index(variable)]
                if average is not None:
                    variable.assign(average)
        # On JAX, an average and its variable may now be one array, and a step of another `fit`
        # would fail, because it donates both.
        for average in averages:
            if average is not None:
                average.assign(ops.copy(average.value))

    def get_config(self):
        """Returns the configuration of Keras's base class.

        Raises:
            ValueError: If the learning rate is a callable that cannot be saved.
        """
        rates.check_savable(self._learning_rate)
        return super().get_config()


def _is_gone(variable):
    """Returns whether a step of `fit` on JAX has taken the value of a variable, and then failed."""
    value = variable._value
    return value is None or bool(getattr(value, "is_deleted", bool)())


def _true():
    """Returns a boolean scalar. With floatx bfloat16, Keras on JAX makes it a float by default."""
    return ops.convert_to_tensor(True, dtype="bool")


def _to_dense(g):
    """Converts a gradient, which may be sparse (JAX's BCOO, torch's sparse tensors), to dense."""
    if getattr(g, "is_sparse", False):
        return g.to_dense()
    return ops.convert_to_tensor(g, sparse=False)


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
