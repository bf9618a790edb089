"""Copies the moments and the step count of another library's LAMB or LARS into ours.

The source is an optimizer, its state, or a TensorFlow checkpoint. Other libraries are recognized by
the structure of their state and are not imported. Only reading a checkpoint imports TensorFlow.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Mapping

import keras
import numpy as np
from keras import ops

from tf_lamb.arguments import check_interval
from tf_lamb.layers import align_columns
from tf_lamb.layerwise import Layerwise


@dataclasses.dataclass(frozen=True)
class MovedLayer:
    """One row of a `MigrationReport`.

    Attributes:
        name: String. The name of the variable in our optimizer.
        source_name: String. The name of the variable in the source.
        shape: Tuple of integers. The shape of the variable.
        before: Dictionary {slot: L2 norm} before the migration.
        after: Dictionary {slot: L2 norm} after the migration.
    """

    name: str
    source_name: str
    shape: tuple[int, ...]
    before: dict[str, float]
    after: dict[str, float]


@dataclasses.dataclass(frozen=True)
class MigrationReport:
    """The result of `migrate`; `print(report)` shows it as a table.

    Attributes:
        layers: Tuple with a `MovedLayer` for each variable.
        step_before: Integer. Our optimizer's number of updates before the migration.
        step_after: Integer. Our optimizer's number of updates after the migration.
    """

    layers: tuple[MovedLayer, ...]
    step_before: int
    step_after: int

    def __str__(self):
        slots = list(self.layers[0].before) if self.layers else []
        headings = [f"‖{slot}‖ {when}" for slot in slots for when in ("before", "after")]
        rows = [("variable", "from", "shape", *headings)]
        for layer in self.layers:
            norms = [f"{side[s]:.6g}" for s in slots for side in (layer.before, layer.after)]
            rows.append((layer.name, layer.source_name, str(layer.shape), *norms))
        last_line = f"step: {self.step_before} before, {self.step_after} after"
        return "\n".join([*align_columns(rows), last_line])


@dataclasses.dataclass(frozen=True)
class _SourceState:
    """The state of a source.

    Attributes:
        names: Tuple of strings. The names of the source's variables.
        slots: Dictionary {name of the slot in our optimizer: list of float32 arrays, in the order
            of `names`}.
        step: Integer or `None`. The number of updates made.
        rate_inside: Boolean. Whether the momentum of LARS contains the learning rate. `None` if
            that is not known, and for LAMB.
    """

    names: tuple[str, ...]
    slots: dict[str, list[np.ndarray]]
    step: int | None
    rate_inside: bool | None = None


def migrate(
    source,
    optimizer,
    *,
    rename: Callable[[str], str] | None = None,
    mapping: Mapping[str, str] | None = None,
    by_order: bool = False,
    step: int | None = None,
) -> MigrationReport:
    """Copies the moments and the step count from another library's optimizer.

    Weights, learning rate and other settings are not copied. Set them yourself, for example with
    `LAMB.variant("tf-models", ...)`. Load the weights first: the moving averages of `use_ema` start
    at them. Gradients that the optimizer has accumulated are dropped. Everything is checked before
    anything is assigned.

    Args:
        source: One of:
            - LAMB of tf-models or TensorFlow Addons (slots m and v), or LARS of tf-models (slot
              momentum). It may be wrapped in a `LossScaleOptimizer`;
            - the path of a `tf.train.Checkpoint` that contains such an optimizer: a prefix, or a
              folder, whose latest checkpoint is read. A checkpoint does not record the version of
              LARS, so set `form` of our optimizer to the version that was trained with:
              `"tf-models"`, or `"tf-models-scaled"` for `classic_momentum=False`;
            - a built `keras.optimizers.Lamb`;
            - the state of `optax.lamb` (or of any chain with one `ScaleByAdamState`), or of
              `optax.lars`, whose trace is -m.
        optimizer: A built `LAMB` or `LARS` of this package. It may be wrapped in a
            `LossScaleOptimizer`.
        rename: Function that converts a variable's name in the source to its name in our optimizer.
            Names in the source are variable names without ":0"; for Keras 3, variable paths; for
            optax, the keys of the parameters (for a list, the positions) joined with "/".
        mapping: Dictionary {name in our optimizer: name in the source}. Takes precedence over
            `rename`.
        by_order: Boolean. Whether to match variables by position instead of by name.
        step: Integer >= 0 or `None`. The number of updates made. Required if the source does not
            store it (`optax.lars` with a constant learning rate). Otherwise it replaces its
            step count.

    Returns:
        A `MigrationReport`.

    Raises:
        ValueError: If names or shapes do not match (the message lists both sides), if the source
            has other slots than our optimizer, another kind of momentum, no step count, or
            gradients that it has accumulated and not applied, if the source is of another type, or
            if our optimizer is not built. Nothing is changed.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, Layerwise):
        raise ValueError(
            f"`optimizer` must be a LAMB or LARS of tf_lamb. Received: optimizer={optimizer!r}."
        )
    layers = optimizer.layers  # Raises `ValueError` if the optimizer is not built.
    state = _read_state(source, optimizer.slot_names)
    _check_momentum(state, optimizer)
    step = state.step if step is None else check_interval("step", step, 0, whole=True)
    if step is None:
        raise ValueError(
            "The source has no step count. Pass `step`, the number of updates it has made."
        )
    if by_order:
        places = list(range(len(state.names)))
    else:
        places = _match_names([layer.name for layer in layers], state.names, rename, mapping or {})
    _check_shapes(layers, state, places)
    return _assign_state(optimizer, state, places, int(step))


def _assign_state(optimizer, state: _SourceState, places, step: int) -> MigrationReport:
    """Assigns slots and step. `places[i]` is the position of our variable i in the source."""
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    for slot, variables in zip(optimizer.slot_names, optimizer._plan.slots, strict=True):
        before[slot] = [_l2_norm(variable) for variable in variables]
        for variable, place in zip(variables, places, strict=True):
            value = ops.convert_to_tensor(state.slots[slot][place])
            variable.assign(ops.cast(value, variable.dtype))
        after[slot] = [_l2_norm(variable) for variable in variables]
    step_before = int(_to_numpy(optimizer.iterations))
    # Keras 3 counts calls. With gradient accumulation, an update takes several of them.
    calls_per_update = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    optimizer._iterations.assign(step * calls_per_update)
    for gradient in getattr(optimizer, "_accumulated_gradients", None) or ():
        if gradient is not None:
            gradient.assign(ops.zeros_like(gradient))
    if optimizer.use_ema:
        # In Keras 3 they are 0 until update 0, which an optimizer with a step count does not make.
        # In tf_keras they start at the weights, and it has no `_trainable_variables`. A copy,
        # because a step on JAX donates the arrays of the weights and of the averages.
        weights = getattr(optimizer, "_trainable_variables", ())
        for weight, average in zip(weights, optimizer._model_variables_moving_average):  # noqa: B905
            if average is not None:
                average.assign(ops.copy(ops.cast(weight, average.dtype)))
    moved = tuple(
        MovedLayer(
            layer.name,
            state.names[place],
            layer.shape,
            {slot: norms[i] for slot, norms in before.items()},
            {slot: norms[i] for slot, norms in after.items()},
        )
        for i, (layer, place) in enumerate(zip(optimizer.layers, places, strict=True))
    )
    return MigrationReport(moved, step_before, step)


def _l2_norm(variable) -> float:
    return float(np.linalg.norm(_to_numpy(variable).astype(np.float64).ravel()))


def _check_momentum(state: _SourceState, optimizer) -> None:
    """Raises `ValueError` if the source's momentum differs from ours by the learning rate."""
    form = getattr(optimizer, "form", None)
    if form is None or state.rate_inside is None:
        return
    if state.rate_inside != optimizer.rate_inside or form == "paper":
        content = "η r (g + λx)" if state.rate_inside else "g + λx, without the learning rate"
        fitting = '"tf-models" or "mlperf"' if state.rate_inside else '"tf-models-scaled"'
        raise ValueError(
            f"The source's momentum is a sum of {content}. That of form={form!r} is not. Create "
            f"the optimizer with form={fitting}. Received: form={form!r}."
        )


def _match_names(ours, theirs, rename, mapping):
    """Returns the position in the source of each of our variables.

    Args:
        ours: List of strings, the names of our variables.
        theirs: List of strings, the names of the source's variables.
        rename: As in `migrate`.
        mapping: As in `migrate`.

    Raises:
        ValueError: If names occur twice or do not match. The message lists them.
    """
    renamed = [rename(name) if rename else name for name in theirs]
    explicit = {their_name: our_name for our_name, their_name in mapping.items()}
    renamed = [explicit.get(name, new) for name, new in zip(theirs, renamed, strict=True)]
    lists = {"in the source": renamed, "in the optimizer": ours}
    for side, names in lists.items():
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f"Several variables {side} have the same name: {', '.join(twice)}. Distinguish "
                "them with `mapping` or `rename`, or pass `by_order=True`. Nothing was changed."
            )
    unknown = (set(mapping) - set(ours)) | (set(explicit) - set(theirs))
    missing = set(ours) - set(renamed)
    extra = set(renamed) - set(ours)
    if missing or extra or unknown:
        shown = [
            name if name == new else f"{name} (renamed to {new})"
            for name, new in zip(theirs, renamed, strict=True)
            if new in extra
        ]
        sides = [
            ("the source", shown),
            ("the optimizer", [name for name in ours if name in missing]),
        ]
        if unknown:
            sides.append(("`mapping`", sorted(unknown)))
        listed = "\n".join(
            f"Only in {side} ({len(names)}):" + "".join(f"\n  {name}" for name in names)
            for side, names in sides
        )
        raise ValueError(
            "The names of the source's variables do not match those of the optimizer. Nothing was "
            "changed. Pass `rename` or `mapping` (or `by_order=True`, if the order is the same).\n"
            + listed
        )
    return [renamed.index(name) for name in ours]


def _check_shapes(layers, state: _SourceState, places) -> None:
    """Raises `ValueError` if the number of variables or a shape differs."""
    if len(places) != len(layers):
        ours = [layer.name for layer in layers]
        raise ValueError(
            f"The source has {len(state.names)} variables and the optimizer {len(ours)}. Nothing "
            "was changed.\nIn the source:\n  "
            + "\n  ".join(state.names)
            + "\nIn the optimizer:\n  "
            + "\n  ".join(ours)
        )
    wrong = [
        f"\n  {layer.name}: {layer.shape}; the source's {slot} of {state.names[place]}: {x.shape}"
        for slot, arrays in state.slots.items()
        for layer, place in zip(layers, places, strict=True)
        if (x := arrays[place]).shape != tuple(layer.shape)
    ]
    if wrong:
        raise ValueError(
            "The shapes of the source's variables do not match those of the optimizer. Nothing was "
            "changed." + "".join(wrong)
        )


# Reading a source.


def _to_numpy(variable) -> np.ndarray:
    """Converts a variable or array of any library to a float32 NumPy array."""
    value = variable.numpy() if hasattr(variable, "numpy") else variable
    return np.asarray(value).astype(np.float32)


def _read_state(source, slot_names) -> _SourceState:
    """Returns the state of any kind of source."""
    if isinstance(source, str | os.PathLike):
        return _read_checkpoint(os.fspath(source), slot_names)
    if isinstance(source, tuple):
        return _read_optax(source, slot_names)
    source = getattr(source, "inner_optimizer", source)
    if isinstance(source, keras.optimizers.Lamb):
        return _read_keras(source, slot_names)
    if hasattr(source, "get_slot_names") and hasattr(source, "_slots"):
        return _read_legacy(source, slot_names)
    raise ValueError(
        "`source` must be a tf-models or TensorFlow Addons optimizer, a checkpoint's path, a "
        f"`keras.optimizers.Lamb`, or an optax state. Received: a {type(source).__name__}."
    )


def _check_slots(found, slot_names):
    """Raises `ValueError` if the source does not have our slots."""
    if not set(slot_names) <= set(found):
        raise ValueError(
            f"The optimizer has the slots {', '.join(slot_names)}, and the source has "
            f"{', '.join(map(str, found)) or 'none'} (an optimizer creates them in its first "
            "update, or when it is built)."
        )


def _read_keras(source, slot_names) -> _SourceState:
    """Reads `keras.optimizers.Lamb`, whose slots are private attributes."""
    _check_slots(("m", "v") if source.built else (), slot_names)
    micro_batches = source.gradient_accumulation_steps or 1
    _check_accumulated(int(_to_numpy(source._iterations)) % micro_batches)
    names = tuple(variable.path for variable in source._trainable_variables)
    moments = {"m": source._momentums, "v": source._velocities}
    slots = {slot: [_to_numpy(x) for x in variables] for slot, variables in moments.items()}
    return _SourceState(names, slots, int(_to_numpy(source.iterations)))


def _check_accumulated(micro_batches: int) -> None:
    """Raises `ValueError` if a source has accumulated gradients, of so many micro-batches."""
    if micro_batches:
        raise ValueError(
            f"The source has accumulated the gradients of {micro_batches} micro-batches and not "
            "applied them. Nothing was changed. Make its update first."
        )


def _read_legacy(source, slot_names) -> _SourceState:
    """Reads an optimizer of tf-models or Addons.

    Its `_slots` is a dictionary {key of a variable: {name of a slot: variable}}. The key is the
    variable's name, in eager mode followed by "_" and a number.
    """
    _check_slots(source.get_slot_names(), slot_names)
    first_slot = slot_names[0]
    names: list[str] = []
    slots: dict[str, list[np.ndarray]] = {slot: [] for slot in slot_names}
    for key, slot_variables in source._slots.items():
        name = re.sub(r"_\d+$", "", key)
        slot_path = slot_variables[first_slot].name.split(":")[0]
        names.append(name if slot_path.endswith(f"{name}/{first_slot}") else key)
        for slot in slot_names:
            slots[slot].append(_to_numpy(slot_variables[slot]))
    rate_inside = getattr(source, "classic_momentum", None)
    return _SourceState(tuple(names), slots, int(_to_numpy(source.iterations)), rate_inside)


def _read_checkpoint(path, slot_names) -> _SourceState:
    """Reads a checkpoint.

    Raises:
        ValueError: If the path is not that of a checkpoint, or it cannot be used.
    """
    import tensorflow as tf

    if path.endswith((".keras", ".h5")):
        raise ValueError(
            "A file of Keras is not read from its path. Load the model, and give `model.optimizer` "
            f"as `source`. Received: {path!r}."
        )
    try:
        reader = tf.train.load_checkpoint(path)
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise _no_checkpoint(path, error) from None
    try:
        return _read_object_graph(reader, path, slot_names)
    except (tf.errors.OpError, RuntimeError) as error:
        raise _no_checkpoint(path, error) from None


def _no_checkpoint(path, error) -> ValueError:
    """Returns the error for a path that TensorFlow cannot read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ValueError(
        "`source` must be the path of a checkpoint of `tf.train.Checkpoint`: a prefix, such as "
        f"run/ckpt-100, or a folder with a file `checkpoint`. Received: {path!r} ({reason})."
    )


def _read_object_graph(reader, path, slot_names) -> _SourceState:
    """Reads an object-based checkpoint. Its object graph says which variable a slot belongs to."""
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    if not reader.has_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"):
        raise ValueError(
            "The checkpoint must be written by `tf.train.Checkpoint` or Keras, with an object "
            f"graph. This one has variable names only. Received: {path!r}."
        )
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    nodes = graph.nodes
    optimizers = [n for n in nodes if set(slot_names) <= {s.slot_name for s in n.slot_variables}]
    if len(optimizers) != 1:
        if any(child.local_name == "_momentums" for n in nodes for child in n.children):
            raise ValueError(
                "In a checkpoint, an optimizer of Keras 3 does not say which variable a moment "
                "belongs to. Restore it into the model, and give `model.optimizer` as `source`. "
                f"Received: {path!r}."
            )
        _check_slots(
            dict.fromkeys(s.slot_name for n in nodes for s in n.slot_variables), slot_names
        )
        raise ValueError(
            f"The checkpoint must contain one optimizer, and contains {len(optimizers)}. "
            f"Received: {path!r}."
        )
    values: dict[int, dict[str, np.ndarray]] = {}  # Node of a variable: {slot: value}.
    for slot in optimizers[0].slot_variables:
        if slot.slot_name in slot_names:
            key = nodes[slot.slot_variable_node_id].attributes[0].checkpoint_key
            value = reader.get_tensor(key).astype(np.float32)
            values.setdefault(slot.original_variable_node_id, {})[slot.slot_name] = value
    names = [nodes[i].attributes[0].full_name for i in values]
    counters = [c.node_id for c in optimizers[0].children if c.local_name == "iter"]
    steps = [int(reader.get_tensor(nodes[i].attributes[0].checkpoint_key)) for i in counters]
    slots = {name: [arrays[name] for arrays in values.values()] for name in slot_names}
    return _SourceState(tuple(names), slots, steps[0] if steps else None)


def _read_optax(source, slot_names) -> _SourceState:
    """Reads an optax state. Compares the names of types, so that optax need not be installed."""
    found = list(_optax_states(source))
    for state, _ in found:
        _check_accumulated(int(_to_numpy(getattr(state, "mini_step", 0))))  # of `MultiSteps`
    expected = {("m", "v"): "ScaleByAdamState", ("momentum",): "TraceState"}[tuple(slot_names)]
    chosen = [(state, last) for state, last in found if type(state).__name__ == expected]
    if len(chosen) != 1:
        names = ", ".join(type(state).__name__ for state, _ in found)
        raise ValueError(
            f"The optax state must contain one {expected}, and contains {len(chosen)}. "
            f"Received: {names}."
        )
    state, is_last = chosen[0]
    if expected == "TraceState":
        if not is_last:
            raise ValueError(
                "The optax state must be that of `optax.lars`, in which the trace comes last, "
                "after the learning rate. Received: a TraceState followed by other states."
            )
        counts = [s.count for s, _ in found if type(s).__name__ == "ScaleByScheduleState"]
        trace = _flatten(state.trace)
        # optax adds the trace to the weights. We subtract the momentum.
        slots = {"momentum": [-x for x in trace.values()]}
        step = int(_to_numpy(counts[0])) if counts else None
        return _SourceState(tuple(trace), slots, step, rate_inside=True)
    m = _flatten(state.mu)
    v = _flatten(state.nu)
    return _SourceState(
        tuple(m),
        {"m": list(m.values()), "v": [v[name] for name in m]},
        int(_to_numpy(state.count)),
    )


def _optax_states(state, is_last=True):
    """Yields each named tuple in an optax state, and whether it belongs to the last transform."""
    if hasattr(state, "_fields"):
        yield state, is_last
        for child in state:
            yield from _optax_states(child, is_last)
    elif isinstance(state, tuple):
        for place, child in enumerate(state, start=1):
            yield from _optax_states(child, is_last and place == len(state))
    elif isinstance(state, Mapping):
        for child in state.values():
            yield from _optax_states(child, is_last)


def _flatten(tree, path="") -> dict[str, np.ndarray]:
    """Flattens nested dictionaries, lists and tuples to {keys joined with "/": float32 array}."""
    if tree is None or type(tree).__name__ == "MaskedNode":
        return {}
    if isinstance(tree, list | tuple):
        tree = {str(i): child for i, child in enumerate(tree)}
    if isinstance(tree, Mapping):
        parts = [_flatten(x, f"{path}/{key}" if path else str(key)) for key, x in tree.items()]
        return {name: x for part in parts for name, x in part.items()}
    return {path: _to_numpy(tree)}
