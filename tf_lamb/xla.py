"""How an update is compiled and placed on TensorFlow, for Keras 3 and tf_keras."""

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
from tf_lamb.layerwise import GradientSummary, replace_rows, sum_duplicates, telemetry_row

# Arguments on which the program of a layer does not depend.
NOT_IN_PROGRAMS = (
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
# A least-recently-used cache of programs. The key contains the rule, its arguments and the layer: a
# second optimizer with the same arguments compiles nothing.
PROGRAMS: collections.OrderedDict[Any, Any] = collections.OrderedDict()
MAX_PROGRAMS = 512
# An eager caller's update is traced for this many different sets of variables with a gradient. A
# trace takes longer than tens of updates, and is kept as long as the optimizer.
MAX_TRACED_SETS = 4
# On a CPU, a program that contains all layers updates them in waves of about this many elements.
WAVE_ELEMENTS = 2**21


def check_strategy(strategy) -> None:
    """Raises `ValueError` for a strategy that places variables on several servers."""
    if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
        raise ValueError(
            "A layer's norm needs the whole layer on one device, and ParameterServerStrategy "
            "places variables on several servers. Use MirroredStrategy, "
            "MultiWorkerMirroredStrategy or TPUStrategy."
        )


@functools.cache
def _has_xla(device_type: str) -> bool:
    """Returns whether XLA can compile for a type of device. Compiles one addition to find out."""
    # Not on the device of another process, where an eager call of a compiled function fails
    # (TensorFlow 2.20); inside of another function it works there.
    with tf.init_scope(), tf.device(None), tf.device(device_type):
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

    On a TPU, each replica also computes the sums of squares of its own gradients, which tell
    whether the gradients are finite. XLA fuses these sums into the operations that compute the
    gradients, which are then not read again. The sums of squares are summed over the replicas, too.
    Since ‖Σᵣgᵣ‖² ≤ R Σᵣ‖gᵣ‖² for R replicas, R times the result is an upper bound of the squared
    norm of the summed gradient.

    Args:
        rule: The optimizer.
        grads: List of tensors. In replica context they are summed, otherwise returned as they are.

    Returns:
        A tuple `(grads, squares)`: the summed gradients, and the upper bounds as a float32 tensor
        [gradients] for `Layerwise.summarize_gradients`, or `None`.
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


def _is_inside_xla() -> bool:
    """Returns whether the caller compiles the graph being traced, with `jit_compile=True`."""
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def _device_type(variable) -> str:
    """Returns the type of device of a variable, or of the current replica's copy of it."""
    if isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
        return "TPU"
    return tf.DeviceSpec.from_string(variable.handle.device).device_type


class Update:
    """The update of a model's variables, after the sum of gradients over replicas.

    - On a CPU, each layer is an XLA program, which layers of the same shape share. The first update
      compiles a few small programs, and TensorFlow runs several programs at a time.
    - On a GPU, the whole update is one XLA program, because launching many programs would take
      longer than running them.
    - On a TPU, and in a step that the caller compiles, the update is part of the caller's program.

    Args:
        rule: The optimizer, a `Layerwise`.
        plan: Its `Plan`, without `update`.
        variables: List of `tf.Variable`, the model's variables.
        slots: List of `tf.Variable` in the order of `variables`, for each slot.
        iterations: Integer `tf.Variable` that Keras increments after each call. A skipped update
            subtracts `accumulation_steps` from it.
        skipped: Integer `tf.Variable` that a skipped update increments.
        telemetry: Float32 `tf.Variable` of shape [variables, 3], or `None`.
        averages: List with a `tf.Variable` or `None` for each variable. `None` without EMA.
        averages_start_at_first_update: Boolean. Whether the averages start at the weights after the
            first update, as in Keras 3, or at the initial weights, as in tf_keras.
        accumulators: List of `tf.Variable`, one for each variable. `None` without accumulation.
        accumulation_steps: Integer. The number of calls that make an update.
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
        averages_start_at_first_update=True,
        accumulators=None,
        accumulation_steps: int = 1,
    ) -> None:
        self._rule = rule._rule_without_variables()
        self._rule_key = (type(self._rule), self._rule.hyperparameters.key(NOT_IN_PROGRAMS))
        self._plan = plan
        self._variables = variables
        self._slots = slots
        self._iterations = iterations
        self._skipped = skipped
        self._telemetry = telemetry
        self._averages = averages
        self._averages_start_at_first_update = averages_start_at_first_update
        self._accumulators = accumulators
        self._accumulation_steps = accumulation_steps
        self._traced_sets: set[tuple[int, ...]] = set()
        # Traced once for each device, whose name is part of the key of a `tf.function`.
        self._staged = {
            is_one_program: tf.function(
                self._update, jit_compile=is_one_program or None, autograph=False
            )
            for is_one_program in (False, True)
        }

    def __call__(self, strategy, index: Sequence[int], grads, learning_rate, squares=None) -> None:
        """Updates each replica's variables on its device. Called in merge context.

        Args:
            strategy: The current `tf.distribute.Strategy`.
            index: Positions of the variables that have a gradient.
            grads: List of float tensors or `tf.IndexedSlices`, one for each position.
            learning_rate: Float scalar.
            squares: As returned by `sum_over_replicas`.
        """
        index = tuple(index)

        def on_replica(_, grads, learning_rate, squares):
            on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
            is_inlined = on_tpu or _is_inside_xla() or not self._is_traced(index)
            update = self._update if is_inlined else self._staged[self._is_one_program()]
            update(
                index,
                [_to_dense(g, self._variables[i].shape) for i, g in zip(index, grads, strict=True)],
                tf.cast(tf.convert_to_tensor(learning_rate), tf.float32),
                squares,
            )

        # A single call, for the first variable, runs `on_replica` on each replica's device with the
        # replica's gradients.
        strategy.extended.update(
            self._variables[index[0]],
            on_replica,
            args=(grads, learning_rate, squares),
            group=False,
        )

    def _is_traced(self, index) -> bool:
        """Returns whether to trace the update of these variables, or to run it eagerly."""
        if tf.executing_eagerly() and len(self._traced_sets) < MAX_TRACED_SETS:
            self._traced_sets.add(index)
        return not tf.executing_eagerly() or index in self._traced_sets

    def _is_one_program(self) -> bool:
        """Returns whether the whole update is compiled as one program."""
        devices = {variable.handle.device for variable in self._variables}
        on_gpu = _device_type(self._variables[0]) == "GPU"
        return on_gpu and len(devices) == 1 and self._compiles("GPU")

    def _compiles(self, device_type: str) -> bool:
        """Returns whether to compile for a type of device. Warns if compilation is impossible."""
        if not self._rule.jit_compile:
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
        """Accumulates the gradients or applies an update, on one device."""
        positions, grads = sum_duplicates(index, [tf.cast(g, tf.float32) for g in grads])
        calls = _value(self._iterations)
        if self._accumulators is None:
            if len(positions) < len(index):
                squares = None  # They belong to the gradients before `sum_duplicates`.
            self._update_or_skip(positions, grads, learning_rate, calls, squares)
            return
        steps = self._accumulation_steps
        accumulators = [self._accumulators[i] for i in positions]
        totals = [
            tf.cast(_value(accumulator), tf.float32) + g
            for accumulator, g in zip(accumulators, grads, strict=True)
        ]

        def apply():
            means = [total / steps for total in totals]
            self._update_or_skip(positions, means, learning_rate, calls // steps, None)
            for accumulator in accumulators:
                _assign(accumulator, tf.zeros(accumulator.shape, accumulator.dtype))
            return tf.constant(0)

        def accumulate():
            for accumulator, total in zip(accumulators, totals, strict=True):
                _assign(accumulator, tf.cast(total, accumulator.dtype))
            return tf.constant(0)

        tf.cond((calls + 1) % steps == 0, apply, accumulate)

    def _update_or_skip(self, index, grads, learning_rate, updates, squares) -> None:
        """Updates everything, or skips the update if a gradient is not finite.

        Args:
            index: Tuple of positions of the variables that have a gradient.
            grads: List of float32 tensors, one for each position.
            learning_rate: Float32 scalar.
            updates: Integer scalar, the number of earlier updates.
            squares: As returned by `sum_over_replicas`.
        """
        rule = self._rule
        step = tf.cast(updates, tf.float32) + 1.0
        in_xla = _is_inside_xla()
        sums: Any = contextlib.nullcontext()
        if _device_type(self._variables[index[0]]) == "CPU":
            sums = xla_cpu.xla_sums() if in_xla else xla_cpu.tensorflow_sums()
        with sums:
            squares = None if squares is None else tf.unstack(squares, len(grads))
            summary: GradientSummary = rule.summarize_gradients(grads, squares)
        scalars = rule.scalars(step)
        if summary.finite is None or in_xla:
            self._update_variables(index, grads, learning_rate, summary, scalars, updates, in_xla)
        else:
            # Outside XLA, a skipped update runs no program. The programs therefore need not select
            # between old and new values.
            summary_of_finite = dataclasses.replace(summary, finite=None)

            def update():
                self._update_variables(
                    index, grads, learning_rate, summary_of_finite, scalars, updates, in_xla
                )
                return tf.constant(0)

            def skip():
                if self._telemetry is not None:
                    # ‖u‖ becomes NaN for each variable whose gradient is not finite.
                    marks = dict(zip(index, summary.nonfinite_marks, strict=True))
                    zero = tf.constant(0.0)
                    column = [marks.get(i, zero) for i in range(len(self._variables))]
                    rows = _value(self._telemetry)
                    _assign(self._telemetry, rows + tf.stack([[0.0, mark, 0.0] for mark in column]))
                return tf.constant(0)

            tf.cond(summary.finite, update, skip)
        if summary.finite is not None:
            missed = tf.logical_not(summary.finite)
            _add(self._skipped, tf.cast(missed, self._skipped.dtype))
            steps = tf.cast(missed, self._iterations.dtype) * self._accumulation_steps
            _add(self._iterations, -steps)

    def _update_variables(
        self, index, grads, learning_rate, summary, scalars, updates, in_xla
    ) -> None:
        """Updates variables, slots, averages and telemetry. Arguments as in `_update_or_skip`."""
        rule = self._rule
        plan = self._plan
        place_of = {i: place for place, i in enumerate(index)}
        rows: dict[int, Any] = {}
        wave_elements = 0
        last_ratio = None
        ratio_of_last_wave = None
        for layer in plan.layers(index):
            places = [place_of.get(i) for i in layer]
            layer_grads = [None if place is None else grads[place] for place in places]
            scales = summary.scales and [
                None if place is None else summary.scales[place] for place in places
            ]
            is_adapted = plan.variables[layer[0]].adapted
            if in_xla and _device_type(self._variables[layer[0]]) == "CPU":
                # All layers of a wave depend on the last ratio of the previous wave.
                if wave_elements > WAVE_ELEMENTS:
                    ratio_of_last_wave = last_ratio
                    wave_elements = 0
                wave_elements += sum(math.prod(plan.variables[i].shape) for i in layer)
            devices = {self._variables[i].handle.device for i in layer}
            with tf.device(None if in_xla or len(devices) > 1 else devices.pop()):
                arguments = (
                    [self._variables[i].handle for i in layer],
                    [[slot[i].handle for slot in self._slots] for i in layer],
                    layer_grads,
                    learning_rate,
                    summary.finite,
                    scales,
                    scalars,
                    ratio_of_last_wave,
                )
                measured = None
                if rule.telemetry and not is_adapted:
                    # A separate program, so that telemetry does not change the update's program.
                    measured = self._layer_program(layer, in_xla, measure=True)(*arguments)
                updated = self._layer_program(layer, in_xla)(*arguments)
                measured = updated if measured is None else measured
            if measured is not None:
                last_ratio = measured[2] if is_adapted else last_ratio
                for place, i in zip(places, layer, strict=True):
                    if rule.telemetry and place is not None:
                        rows[i] = telemetry_row(measured, summary.nonfinite_marks, place)
        self._update_averages(summary.finite, updates)
        if rule.telemetry:
            _assign(self._telemetry, replace_rows(_value(self._telemetry), rows))

    def _layer_program(self, layer, in_xla, measure=False):
        """Returns the function that updates a layer, given handles of variables and tensors.

        Layers whose shapes, dtypes, decay and adaptation are equal share a function. It returns the
        tuple `measured` of `Layerwise.update_layer`.

        Args:
            layer: Tuple of positions of the layer's variables.
            in_xla: Boolean. Whether the caller compiles the graph being traced.
            measure: Boolean. Whether the function only computes the norms, even of a layer that is
                not adapted, and assigns nothing.
        """
        rule = self._rule
        plans = [self._plan.variables[i] for i in layer]
        dtypes = [_dtype(self._variables[i]) for i in layer]
        slot_dtypes = [[_dtype(slot[i]) for slot in self._slots] for i in layer]
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
        is_large = elements > xla_cpu.RECOMPUTE_ABOVE
        if on_cpu and (jit or in_xla) and plans[0].adapted and is_large:
            rule = xla_cpu.make_recomputing(rule)
        if key in PROGRAMS:
            PROGRAMS.move_to_end(key)
            return PROGRAMS[key]

        def program(handles, slot_handles, grads, learning_rate, finite, scales, scalars, ratio):
            params = [
                _read(handle, dtype, plan.shape)
                for handle, dtype, plan in zip(handles, dtypes, plans, strict=True)
            ]
            slots = [
                tuple(_read(h, d, plan.shape) for h, d in zip(own, own_dtypes, strict=True))
                for own, own_dtypes, plan in zip(slot_handles, slot_dtypes, plans, strict=True)
            ]
            if ratio is not None:
                params = [xla_cpu.depend_on(ratio, x) for x in params]
                grads = [g if g is None else xla_cpu.depend_on(ratio, g) for g in grads]
            sums: Any = contextlib.nullcontext()
            if on_cpu:
                sums = xla_cpu.xla_sums() if jit or in_xla else xla_cpu.tensorflow_sums()
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
            # The program also reads and writes the variables, so that XLA updates them in place.
            for i, g in enumerate(grads):
                if g is not None and not measure:
                    _write(handles[i], new_params[i])
                    for handle, value in zip(slot_handles[i], new_slots[i], strict=True):
                        _write(handle, value)
            return measured

        if jit:
            program = tf.function(program, jit_compile=True, autograph=False)
        if in_xla:
            return program  # Not cached: it would keep the caller's graph alive.
        PROGRAMS[key] = program
        if len(PROGRAMS) > MAX_PROGRAMS:
            PROGRAMS.popitem(last=False)
        return program

    def _update_averages(self, finite, updates) -> None:
        """Updates Keras's moving averages, and overwrites the weights with them if that is due."""
        rule = self._rule
        if self._averages is None:
            return
        overwrite = tf.constant(False)
        if rule.ema_overwrite_frequency:
            overwrite = (updates + 1) % rule.ema_overwrite_frequency == 0
        for variable, average in zip(self._variables, self._averages, strict=True):
            if average is None:
                continue
            x = _value(variable)
            old = _value(average)
            mu = tf.constant(rule.ema_momentum, x.dtype)
            if self._averages_start_at_first_update:
                mu = mu * tf.cast(updates != 0, x.dtype)
            new = mu * tf.cast(old, x.dtype) + (1 - mu) * x
            if finite is not None:
                new = tf.where(finite, new, tf.cast(old, x.dtype))
            _assign(average, tf.cast(new, old.dtype))
            if rule.ema_overwrite_frequency:
                written = overwrite if finite is None else overwrite & finite
                _assign(variable, tf.where(written, new, x))


def _to_dense(g, shape):
    """Converts a gradient to a dense tensor of static shape."""
    if isinstance(g, tf.SparseTensor):
        g = tf.sparse.to_dense(g)
    g = tf.convert_to_tensor(g)
    g.set_shape(shape)  # Conversion of a sparse gradient may lose the static shape.
    return g


def _dtype(variable):
    """Returns the dtype in memory, which differs from `dtype` under autocasting."""
    return getattr(variable, "true_dtype", variable.dtype)


# The following functions access a variable through its handle: the methods of a tf_keras variable
# would cast under autocasting, and a program that layers share is given handles only.


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
