"""LAMB and LARS for Keras 3, on the TensorFlow, JAX and torch backends."""

import contextlib
import dataclasses
import inspect
from typing import Any

import keras
from keras import ops

from tf_lamb import lamb, lars, schedules
from tf_lamb import learning_rate as rates
from tf_lamb.layerwise import Plan, check_hooks, load_state, with_rows

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
if ON_TENSORFLOW:
    import tensorflow as tf

    from tf_lamb import xla

# Keras 3.10 calls every Adam "adam"; a later one counts them, "adam", "adam_1".
FIXED_NAMES = bool(inspect.signature(keras.optimizers.Adam.__init__).parameters["name"].default)


def _native(variable):
    """The backend's own variable; models may also hold bare `tf.Variable`s."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _path(variable) -> str:
    """`"encoder/dense/kernel"`; a bare `tf.Variable` has a name, `"dense/kernel:0"`."""
    return getattr(variable, "path", None) or variable.name.split(":")[0]


def _dtype(variable) -> str:
    """The name of what is stored, also where a policy shows another dtype."""
    return keras.backend.standardize_dtype(getattr(variable, "_dtype", None) or variable.dtype)


class Adapter(keras.optimizers.Optimizer):
    """A Keras 3 optimizer that updates all variables at once.

    It overrides one private method, `_backend_apply_gradients`, and so owns accumulation, clipping,
    decay, the sum over replicas, the update and the moving average. What `apply` does around it
    stays Keras's: loss scale, constraints, the step counter.
    """

    schedule_class = keras.optimizers.schedules.LearningRateSchedule

    def __init__(self, learning_rate, **arguments):
        lent = rates.is_variable(learning_rate)
        if FIXED_NAMES:
            arguments["name"] = arguments.get("name") or type(self).__name__.lower()
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
        rate = rates.settable(self._learning_rate, rate, self.schedule_class)
        keras.optimizers.Optimizer.learning_rate.fset(self, rate)

    def build(self, variables):
        """Creates the slots, and decides which variable is decayed and adapted.

        Args:
            variables: list of variables that will be updated.

        Raises:
            ValueError: a variable that is not a real floating-point one, or that `layer_axes` or
                `layer_groups` do not fit; a strategy that scatters variables over machines.
            RuntimeError: this Keras does not call what is overridden here.
        """
        if self._plan is not None:
            return
        check_hooks(keras.optimizers.Optimizer.apply, "_backend_apply_gradients")
        variables = list(variables)
        if ON_TENSORFLOW:
            xla.check_strategy(self._distribution_strategy)
        plans = self._make_plan(
            [_path(v) for v in variables],
            [tuple(v.shape) for v in variables],
            [_dtype(v) for v in variables],
            [self._overwrite_variable_with_gradient(v) for v in variables],
        )
        super().build(variables)
        slots = tuple(
            [self._slot(v, name, "float32" if k else self.moment_dtype) for v in variables]
            for k, name in enumerate(self.slot_names)
        )
        once = {"initializer": "zeros", "aggregation": "only_first_replica"}
        # These come last: `save_own_variables` leaves them out.
        skipped = self.add_variable((), dtype="int", name="skipped_steps", **once)
        telemetry = None
        if self.telemetry:
            telemetry = self.add_variable(
                (len(variables), 3), dtype="float32", name="telemetry", **once
            )
        plan = Plan(plans, slots, skipped, telemetry)
        if ON_TENSORFLOW:
            averages = self._model_variables_moving_average if self.use_ema else None
            totals = self._accumulated_gradients if self.gradient_accumulation_steps else None
            update = xla.Update(
                self,
                plan,
                [_native(v) for v in variables],
                [[_native(v) for v in slot] for slot in slots],
                iterations=_native(self._iterations),
                skipped=_native(skipped),
                telemetry=None if telemetry is None else _native(telemetry),
                averages=averages and [_native(v) for v in averages],
                accumulators=totals and [_native(v) for v in totals],
                accumulation=self.gradient_accumulation_steps or 1,
            )
            plan = dataclasses.replace(plan, update=update)
        self._plan = plan

    def _slot(self, variable, name, dtype):
        """A zero of the variable's shape beside it, whatever the variable's dtype."""
        place: Any = contextlib.nullcontext()
        if ON_TENSORFLOW:
            place = self._distribution_strategy.extended.colocate_vars_with(_native(variable))
        with place:
            return self.add_variable(
                shape=variable.shape,
                initializer="zeros",
                dtype=dtype,
                layout=getattr(variable, "_layout", None),
                name=f"{_path(variable).replace('/', '_')}_{name}",
            )

    def _backend_apply_gradients(self, grads, trainable_variables):
        """The hook: what `apply` calls with gradients that are not None."""
        index = tuple(self._get_variable_index(v) for v in trainable_variables)
        if not ON_TENSORFLOW:
            self._apply(index, grads)
            return
        dense = [ops.convert_to_tensor(g, sparse=False) for g in grads]
        grads, squares = xla.sum_over_replicas(self, dense)

        def update(strategy, grads, learning_rate, squares):
            self._plan.update(strategy, index, grads, learning_rate, squares)

        tf.__internal__.distribute.interim.maybe_merge_call(
            update, self._distribution_strategy, grads, self.learning_rate, squares
        )

    def _apply(self, index, grads):
        """JAX and torch: an update inside whatever step the backend compiles."""
        plan, variables = self._plan, self._trainable_variables
        summed: dict[int, Any] = {}
        for i, g in zip(index, grads, strict=True):
            g = ops.cast(_dense(g), "float32")
            # A variable that is there twice moves by the sum, as in Keras's SGD.
            summed[i] = summed[i] + g if i in summed else g
        index, grads = tuple(summed), list(summed.values())
        steps = self.gradient_accumulation_steps or 1
        calls = ops.convert_to_tensor(self._iterations)
        is_update = None
        if steps > 1:
            is_update = ops.equal((calls + 1) % steps, 0)
            totals = [self._accumulated_gradients[i] for i in index]
            grads = [ops.cast(t.value, "float32") + g for t, g in zip(totals, grads, strict=True)]
            for total, g in zip(totals, grads, strict=True):
                total.assign(ops.cast(ops.where(is_update, 0.0, g), total.dtype))
            grads = [g / steps for g in grads]
        updates = calls // steps
        olds = [[ops.stop_gradient(v.value) for v in variables]]
        olds += [[v.value for v in slot] for slot in plan.slots]
        old_rows = None if plan.telemetry is None else plan.telemetry.value

        def update():
            values, finite, rows = self._updated(
                index,
                grads,
                olds[0],
                olds[1:],
                ops.cast(self.learning_rate, "float32"),
                ops.cast(updates, "float32") + 1.0,
            )
            finite = ops.convert_to_tensor(True) if finite is None else finite
            rows = [] if rows is None else [with_rows(old_rows, rows)]
            return values, finite, rows

        def keep():
            return olds, ops.convert_to_tensor(True), [] if old_rows is None else [old_rows]

        if is_update is None:
            (values, finite, rows), made = update(), ops.convert_to_tensor(True)
        else:
            (values, finite, rows), made = ops.cond(is_update, update, keep), is_update
        for targets, results, old in zip((variables, *plan.slots), values, olds, strict=True):
            for target, result, was in zip(targets, results, old, strict=True):
                if result is not was:
                    target.assign(result)
        missed = ops.cast(ops.logical_not(finite), plan.skipped.dtype)
        plan.skipped.assign(plan.skipped + missed)
        self._iterations.assign(self._iterations - steps * missed)
        if rows:
            plan.telemetry.assign(rows[0])
        if self.use_ema:
            self._average(ops.logical_and(finite, made), updates)

    def _average(self, made, updates):
        """JAX and torch: Keras's moving average of all weights, where an update was made."""
        frequency = self.ema_overwrite_frequency
        pairs = zip(self._trainable_variables, self._model_variables_moving_average, strict=True)
        for variable, average in pairs:
            if average is None:
                continue
            x, old = variable.value, average.value
            mu = self.ema_momentum * ops.cast(ops.not_equal(updates, 0), x.dtype)
            new = ops.where(
                made, mu * ops.cast(old, x.dtype) + (1 - mu) * x, ops.cast(old, x.dtype)
            )
            average.assign(new)
            if frequency:
                due = ops.logical_and(made, ops.equal((updates + 1) % frequency, 0))
                variable.assign(ops.where(due, new, x))

    def finalize_variable_values(self, var_list):
        """Gives the moving averages to the model; before the first update there are none.

        Args:
            var_list: list of the model's trainable variables.
        """
        if self._plan is not None and int(ops.convert_to_numpy(self.iterations)) > 0:
            super().finalize_variable_values(var_list)

    def save_own_variables(self, store):
        """Saves the state; counters of skipped updates and telemetry are not saved."""
        for i, variable in enumerate(self._state_variables()):
            store[str(i)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        """Loads the state; files of version 0.1.0 also hold counters and telemetry, at the end."""
        load_state(self, store, self._state_variables())

    def _state_variables(self):
        observations = () if self._plan is None else (self._plan.skipped, self._plan.telemetry)
        return [v for v in self.variables if not any(v is other for other in observations)]

    def get_config(self):
        """What the base saves; `ValueError` for a callable rate that no file can hold."""
        rates.check_savable(self._learning_rate)
        return super().get_config()


def _dense(g):
    """The gradient as a dense tensor: JAX's BCOO and torch's sparse tensors are made dense."""
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
