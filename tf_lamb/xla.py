"""TensorFlow: how an update is compiled and placed. Both flavours of Keras call it."""

import collections
import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.ops import control_flow_util

from tf_lamb import norms, xla_cpu
from tf_lamb.layerwise import Gradients, telemetry_row, with_rows

# Arguments that the program of a layer does not depend on.
OUTSIDE_PROGRAMS = (
    "learning_rate",
    "exclude_from_weight_decay",
    "exclude_from_layer_adaptation",
    "layer_axes",
    "layer_groups",
    "adapt_undecayed",
    "clipnorm",
    "global_clipnorm",
    "unit_gradient",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "moment_dtype",
    "jit_compile",
    "telemetry",
    "based_on",
    "name",
)
# Programs by rule, arguments and layer: another optimizer with the same arguments compiles nothing.
PROGRAMS: collections.OrderedDict[Any, Any] = collections.OrderedDict()
MAX_PROGRAMS = 512
CHAIN = 2**21  # elements of the layers that one program may begin together on a CPU


def check_strategy(strategy) -> None:
    """Raises `ValueError` for a strategy that scatters the variables over machines."""
    if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
        raise ValueError(
            "A layer's norm needs the whole layer on one device, and ParameterServerStrategy "
            "places variables on several servers. Use MirroredStrategy, "
            "MultiWorkerMirroredStrategy or TPUStrategy."
        )


@functools.cache
def _has_xla(device_type: str) -> bool:
    """Whether XLA compiles for this type of device, found out with a program of one addition."""
    with tf.init_scope(), tf.device(device_type):
        try:
            tf.function(lambda x: x + 1.0, jit_compile=True)(tf.zeros([]))
        except tf.errors.OpError:
            return False
    return True


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"The update is not compiled with XLA: {reason}. Results are the same, but it is slower.",
        UserWarning,
        stacklevel=2,
    )


def sum_over_replicas(rule, grads):
    """Sums gradients over the replicas.

    On a TPU the sums of squares, which tell whether the gradients are finite, are taken of each
    replica's own gradients: there XLA fuses them into the operations that make the gradients, and
    reads nothing again. They are summed along. Since ‖Σᵣgᵣ‖² ≤ R Σᵣ‖gᵣ‖² for R replicas, the result
    times R is an upper bound, which is finite only where the gradients' squares are.

    Args:
        rule: the optimizer.
        grads: list of tensors, in replica context.

    Returns:
        `(grads, squares)`: the summed gradients; a [gradients] float32 tensor for
        `Layerwise.measure_gradients`, or None.
    """
    replica = tf.distribute.get_replica_context()
    if replica is None:
        return grads, None
    grads = [tf.convert_to_tensor(g) for g in grads]
    if isinstance(replica.strategy, tf.distribute.TPUStrategy) and rule.checks_finite_per_replica:
        own = tf.stack([norms.sum_squares(tf.cast(g, tf.float32)) for g in grads])
        *grads, squares = replica.all_reduce(tf.distribute.ReduceOp.SUM, [*grads, own])
        return grads, squares * replica.num_replicas_in_sync
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, grads), None


def _in_xla() -> bool:
    """Whether the graph being traced is compiled as a whole: `jit_compile=True` of the caller."""
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def _device_type(variable) -> str:
    """The type of device that holds the variable, or the replica's copy of it."""
    if isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
        return "TPU"
    return tf.DeviceSpec.from_string(variable.handle.device).device_type


class Update:
    """One update of a model's variables: called where gradients are summed over the replicas.

    - On a CPU each layer is an XLA program, and layers that are alike share it. A graph calls
      them, so several run at a time, and a first update compiles a few small programs.
    - On a GPU the whole update is one XLA program: launching many costs more than running them.
    - On a TPU, and inside a step that the caller compiles, the update is part of that program.

    Args:
        rule: the optimizer, a `Layerwise`.
        plan: its `Plan`, `update` aside.
        variables: list of `tf.Variable`, the model's.
        slots: one list of `tf.Variable` for each slot, in the order of `variables`.
        iterations: int `tf.Variable` that Keras raises by one after each call; a skipped update
            takes `accumulation` from it beforehand.
        skipped: int `tf.Variable`, raised by a skipped update.
        telemetry: [variables, 3] `tf.Variable`, or None.
        averages: list of `tf.Variable` or None, one for each variable; or None without EMA.
        average_starts_at_first: whether the average takes the weights of the first update as its
            start (Keras 3), or starts at the initial weights (tf_keras).
        accumulators: list of `tf.Variable`, one for each variable; or None.
        accumulation: how many calls make an update.
    """

    def __init__(
        self,
        rule,
        plan,
        variables,
        slots,
        *,
        iterations,
        skipped,
        telemetry,
        averages=None,
        average_starts_at_first=True,
        accumulators=None,
        accumulation: int = 1,
    ) -> None:
        self._rule, self._plan = rule._rule(), plan
        self._jit_compile = rule.jit_compile
        self._rule_key = (type(self._rule), self._rule.hyperparameters.key(OUTSIDE_PROGRAMS))
        self._variables, self._slots = variables, slots
        self._iterations, self._averages = iterations, averages
        self._average_starts_at_first = average_starts_at_first
        self._accumulators, self._accumulation = accumulators, accumulation
        self._skipped, self._telemetry = skipped, telemetry
        # Traced once for each device, since its name is part of the key.
        self._staged = {
            whole: tf.function(self._update, jit_compile=whole or None, autograph=False)
            for whole in (False, True)
        }

    def __call__(self, strategy, index: Sequence[int], grads, learning_rate, squares=None) -> None:
        """Updates every replica's variables on its own device.

        Args:
            strategy: the current one, or the default strategy; in merge context, or without one.
            index: positions of the variables that have a gradient.
            grads: list of float tensors (or `tf.IndexedSlices`), one for each position.
            learning_rate: float scalar.
            squares: what `sum_over_replicas` returned.
        """
        index = tuple(index)

        def on_replica(_, grads, learning_rate, squares):
            on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
            update = self._update if on_tpu or _in_xla() else self._staged[self._is_one_program()]
            update(
                index,
                [_dense(g, self._variables[i].shape) for i, g in zip(index, grads, strict=True)],
                tf.cast(tf.convert_to_tensor(learning_rate), tf.float32),
                squares,
            )

        # One call, anchored on the first variable, hands each replica its gradients and device.
        strategy.extended.update(
            self._variables[index[0]],
            on_replica,
            args=(grads, learning_rate, squares),
            group=False,
        )

    def _is_one_program(self) -> bool:
        devices = {variable.handle.device for variable in self._variables}
        on_gpu = _device_type(self._variables[0]) == "GPU"
        return on_gpu and len(devices) == 1 and self._compiles("GPU")

    def _compiles(self, device_type: str) -> bool:
        """Whether layers on such a device are compiled; where they cannot be, a warning says so."""
        if not self._jit_compile:
            return False
        if context.context().op_callbacks:
            _warn_once(
                "tf.debugging.enable_check_numerics or enable_dump_debug_info adds operations "
                "that XLA does not have"
            )
            return False
        if not _has_xla(device_type):
            _warn_once(f"this TensorFlow has no XLA for {device_type}")
            return False
        return True

    def _update(self, index, grads, learning_rate, squares) -> None:
        """A call's part on one device: accumulation, then the update."""
        summed: dict[int, Any] = {}
        for i, g in zip(index, grads, strict=True):
            g = tf.cast(g, tf.float32)
            # A variable that is there twice moves by the sum, as in Keras's SGD.
            summed[i] = summed[i] + g if i in summed else g
        if len(summed) < len(index) or self._accumulators is not None:
            squares = None  # of other gradients than those that are applied
        index, grads = tuple(summed), list(summed.values())
        calls = _value(self._iterations)
        if self._accumulators is None:
            self._apply(index, grads, learning_rate, calls, squares)
            return
        accumulators = [self._accumulators[i] for i in index]
        totals = [
            tf.cast(_value(total), tf.float32) + g
            for total, g in zip(accumulators, grads, strict=True)
        ]

        def apply():
            mean = [total / self._accumulation for total in totals]
            self._apply(index, mean, learning_rate, calls // self._accumulation, None)
            for total in accumulators:
                _assign(total, tf.zeros(total.shape, total.dtype))
            return tf.constant(0)

        def accumulate():
            for variable, total in zip(accumulators, totals, strict=True):
                _assign(variable, tf.cast(total, variable.dtype))
            return tf.constant(0)

        tf.cond((calls + 1) % self._accumulation == 0, apply, accumulate)

    def _apply(self, index, grads, learning_rate, updates, squares) -> None:
        """The update after `updates` others: variables, slots, averages, counters, telemetry."""
        rule = self._rule
        step = tf.cast(updates, tf.float32) + 1.0
        in_xla = _in_xla()
        sums: Any = contextlib.nullcontext()
        if _device_type(self._variables[index[0]]) == "CPU":
            sums = xla_cpu.inside_programs() if in_xla else xla_cpu.outside_programs()
        with sums:
            squares = None if squares is None else tf.unstack(squares, len(grads))
            gradients: Gradients = rule.measure_gradients(grads, squares)
        scalars = rule.scalars(step)
        if gradients.finite is None or in_xla:
            self._advance(index, grads, learning_rate, gradients, scalars, updates, in_xla)
        else:
            # Outside XLA nothing is computed for an update that is skipped, and no program has to
            # choose between old and new values.
            used = dataclasses.replace(gradients, finite=None)

            def advance():
                self._advance(index, grads, learning_rate, used, scalars, updates, in_xla)
                return tf.constant(0)

            def skip():
                if self._telemetry is not None:
                    marks = dict(zip(index, gradients.nonfinite, strict=True))
                    nothing = tf.constant(0.0)
                    column = [marks.get(i, nothing) for i in range(len(self._variables))]
                    rows = _value(self._telemetry)
                    # The layer at fault shows as ‖u‖ = NaN.
                    _assign(self._telemetry, rows + tf.stack([[0.0, mark, 0.0] for mark in column]))
                return tf.constant(0)

            tf.cond(gradients.finite, advance, skip)
        if gradients.finite is not None:
            missed = tf.logical_not(gradients.finite)
            _add(self._skipped, tf.cast(missed, self._skipped.dtype))
            back = tf.cast(missed, self._iterations.dtype) * -self._accumulation
            _add(self._iterations, back)

    def _advance(self, index, grads, learning_rate, gradients, scalars, updates, in_xla) -> None:
        """Variables, slots, averages and telemetry of an update."""
        rule, plan = self._rule, self._plan
        at = {i: place for place, i in enumerate(index)}
        rows: dict[int, Any] = {}
        begun, last, after = 0, None, None
        for layer in plan.layers(index):
            places = [at.get(i) for i in layer]
            layer_grads = [None if place is None else grads[place] for place in places]
            scales = gradients.scales and [
                None if place is None else gradients.scales[place] for place in places
            ]
            if in_xla and _device_type(self._variables[layer[0]]) == "CPU":
                # Layers come in waves: all of one depend on the last ratio of the wave before it.
                after, begun = (last, 0) if begun > CHAIN else (after, begun)
                begun += sum(math.prod(plan.variables[i].shape) for i in layer)
            devices = {self._variables[i].handle.device for i in layer}
            with tf.device(None if in_xla or len(devices) > 1 else devices.pop()):
                arguments = (
                    [self._variables[i].handle for i in layer],
                    [[kind[i].handle for kind in self._slots] for i in layer],
                    layer_grads,
                    learning_rate,
                    gradients.finite,
                    scales,
                    scalars,
                    after,
                )
                measured = None
                if rule.telemetry and not plan.variables[layer[0]].adapted:
                    # Apart, so that the update's program is the same without telemetry.
                    measured = self._program(layer, in_xla, measure=True)(*arguments)
                updated = self._program(layer, in_xla)(*arguments)
                measured = updated if measured is None else measured
            if measured is not None:
                last = measured[2] if plan.variables[layer[0]].adapted else last
                for place, i in zip(places, layer, strict=True):
                    if rule.telemetry and place is not None:
                        rows[i] = telemetry_row(measured, gradients.nonfinite, place)
        self._average(gradients.finite, updates)
        if rule.telemetry:
            _assign(self._telemetry, with_rows(_value(self._telemetry), rows))

    def _program(self, layer, in_xla, measure=False):
        """The update of a layer as a function of handles and tensors: one for all that are alike.

        Alike are layers of the same shapes and dtypes that are decayed and adapted alike. With
        `measure` it writes nothing, and measures a layer that is not adapted, too.
        """
        rule = self._rule
        plans = [self._plan.variables[i] for i in layer]
        dtypes = [_dtype(self._variables[i]) for i in layer]
        slot_dtypes = [[_dtype(kind[i]) for kind in self._slots] for i in layer]
        on_cpu = _device_type(self._variables[layer[0]]) == "CPU"
        elements = sum(math.prod(plan.shape) for plan in plans)
        jit = not in_xla and self._compiles(_device_type(self._variables[layer[0]]))
        if jit and len({self._variables[i].handle.device for i in layer}) > 1:
            _warn_once("the variables of a group are on several devices")
            jit = False
        key = (
            self._rule_key,
            tuple(
                (p.shape, p.decayed, p.adapted, p.axes, d)
                for p, d in zip(plans, dtypes, strict=True)
            ),
            tuple(map(tuple, slot_dtypes)),
            jit,
            in_xla,
            on_cpu,
            measure,
        )
        if on_cpu and (jit or in_xla) and plans[0].adapted and elements > xla_cpu.LARGE:
            rule = xla_cpu.recomputing(rule)
        if key in PROGRAMS:
            PROGRAMS.move_to_end(key)
            return PROGRAMS[key]

        def program(handles, slot_handles, grads, learning_rate, finite, scales, scalars, after):
            params = [
                _read(handle, dtype, plan.shape)
                for handle, dtype, plan in zip(handles, dtypes, plans, strict=True)
            ]
            slots = [
                tuple(_read(h, d, plan.shape) for h, d in zip(own, own_dtypes, strict=True))
                for own, own_dtypes, plan in zip(slot_handles, slot_dtypes, plans, strict=True)
            ]
            if after is not None:
                params = [xla_cpu.depend_on(after, x) for x in params]
                grads = [g if g is None else xla_cpu.depend_on(after, g) for g in grads]
            sums: Any = contextlib.nullcontext()
            if on_cpu:
                inside = jit or in_xla
                sums = xla_cpu.inside_programs() if inside else xla_cpu.outside_programs()
            with sums:
                new_params, new_slots, measured = rule.update_layer(
                    plans,
                    grads,
                    params,
                    slots,
                    learning_rate,
                    finite,
                    scales,
                    scalars,
                    measure=measure,
                )
            # Reads and writes stand in one program: XLA writes into the buffers it read.
            for i, g in enumerate(grads):
                if g is not None and not measure:
                    _write(handles[i], new_params[i])
                    for handle, value in zip(slot_handles[i], new_slots[i], strict=True):
                        _write(handle, value)
            return measured

        if jit:
            program = tf.function(program, jit_compile=True, autograph=False)
        if in_xla:
            return program  # a part of the caller's graph, which must not be kept alive
        PROGRAMS[key] = program
        if len(PROGRAMS) > MAX_PROGRAMS:
            PROGRAMS.popitem(last=False)
        return program

    def _average(self, finite, updates) -> None:
        """Keras's exponential moving average of all weights, and the overwriting with it."""
        rule = self._rule
        if self._averages is None:
            return
        overwrite = tf.constant(False)
        if rule.ema_overwrite_frequency:
            overwrite = (updates + 1) % rule.ema_overwrite_frequency == 0
        for variable, average in zip(self._variables, self._averages, strict=True):
            if average is None:
                continue
            x, old = _value(variable), _value(average)
            mu = tf.constant(rule.ema_momentum, x.dtype)
            if self._average_starts_at_first:
                mu = mu * tf.cast(updates != 0, x.dtype)
            new = mu * tf.cast(old, x.dtype) + (1 - mu) * x
            if finite is not None:
                new = tf.where(finite, new, tf.cast(old, x.dtype))
            _assign(average, tf.cast(new, old.dtype))
            if rule.ema_overwrite_frequency:
                written = overwrite if finite is None else overwrite & finite
                _assign(variable, tf.where(written, new, x))


def _dense(g, shape):
    """The gradient as a dense tensor of static shape."""
    if isinstance(g, tf.SparseTensor):
        g = tf.sparse.to_dense(g)
    g = tf.convert_to_tensor(g)
    g.set_shape(shape)  # a sparse gradient made dense may have lost it
    return g


def _dtype(variable):
    """The dtype of what is stored, also where a policy shows another."""
    return getattr(variable, "true_dtype", variable.dtype)


def _read(handle, dtype, shape):
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
    value.set_shape(shape)
    return value


def _write(handle, value):
    tf.raw_ops.AssignVariableOp(resource=handle, value=value)


def _value(variable):
    return _read(variable.handle, _dtype(variable), variable.shape)


def _assign(variable, value):
    _write(variable.handle, tf.cast(value, _dtype(variable)))


def _add(variable, value):
    tf.raw_ops.AssignAddVariableOp(resource=variable.handle, value=value)
