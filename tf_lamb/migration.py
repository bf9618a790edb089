"""Moments and step count of another library's LAMB or LARS, brought into ours.

Read from the object where it is at hand, or from a TensorFlow checkpoint. The other libraries are
known by the form of their state and are never imported; TensorFlow is, to read a checkpoint.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Mapping

import keras
import numpy as np
from keras import ops

from tf_lamb.layerwise import Layerwise

RATE_INSIDE = ("mlperf", "tf-models")  # forms of LARS whose momentum holds η r d, not d
NO_STEP = "The source keeps no step count. Pass `step`, the number of updates it has made."


@dataclasses.dataclass(frozen=True)
class State:
    """What a source holds.

    names: of its variables.
    slots: {our slot's name: float32 arrays in the order of `names`}.
    step: how many updates were made, or None.
    rate_inside: whether LARS's momentum holds the learning rate; None where that is not known.
    """

    names: tuple[str, ...]
    slots: dict[str, list[np.ndarray]]
    step: int | None
    rate_inside: bool | None = None


@dataclasses.dataclass(frozen=True)
class MovedLayer:
    """One line of the report; `before` and `after` hold each slot's L2 norm, in float64."""

    name: str
    source_name: str
    shape: tuple[int, ...]
    before: dict[str, float]
    after: dict[str, float]


@dataclasses.dataclass(frozen=True)
class MigrationReport:
    """What `migrate` did, layer by layer; `print(report)` shows it as a table."""

    layers: tuple[MovedLayer, ...]
    step_before: int
    step_after: int

    def __str__(self):
        slots = list(self.layers[0].before) if self.layers else []
        heads = [f"‖{slot}‖ {when}" for slot in slots for when in ("before", "after")]
        rows = [("variable", "from", "shape", *heads)]
        for layer in self.layers:
            norms = [f"{side[s]:.6g}" for s in slots for side in (layer.before, layer.after)]
            rows.append((layer.name, layer.source_name, str(layer.shape), *norms))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, f"step: {self.step_before} before, {self.step_after} after"])


def migrate(
    source,
    optimizer,
    *,
    rename: Callable[[str], str] | None = None,
    mapping: Mapping[str, str] | None = None,
    by_order: bool = False,
    step: int | None = None,
) -> MigrationReport:
    """Copies moments and step count from another library's optimizer into ours.

    The weights, the learning rate and the other settings are not touched: take those over
    yourself (`LAMB.variant("tf-models", ...)`). Nothing is written before everything is checked.

    Args:
        source: one of
            - tf-models' or TensorFlow Addons' LAMB (slots m and v) or tf-models' LARS (momentum),
              also inside a `LossScaleOptimizer`;
            - the path of a `tf.train.Checkpoint` with such an optimizer, a prefix or a folder
              whose latest is taken. Which form of LARS wrote it is not in there: `form` of ours
              must be the one that matches ("tf-models", without classic momentum
              "tf-models-scaled");
            - `keras.optimizers.Lamb`, built;
            - the state of `optax.lamb` (or any chain with one `ScaleByAdamState`), or of
              `optax.lars`, whose trace is -m.
        optimizer: a built `LAMB` or `LARS` of either flavour, or a `LossScaleOptimizer` around it.
        rename: function from the source's name of a variable to ours. The source's names are
            variable names without ":0", in Keras 3 paths, and in optax the keys of the parameters
            joined by "/" (positions, where they are a list).
        mapping: {our name: the source's name}, for variables that it names; before `rename`.
        by_order: pairs the k-th variable with the k-th, whatever their names.
        step: the number of updates made, for a source that does not say (`optax.lars` at a
            constant rate), or instead of what it says.

    Returns:
        A `MigrationReport`.

    Raises:
        ValueError: the names or shapes do not match (both sides are listed), the source holds
            other slots than ours, a momentum of another meaning or no step, or is none of the
            above; or ours is not built. Nothing was changed.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, Layerwise):
        raise ValueError(
            f"`optimizer` must be a LAMB or LARS of tf_lamb. Received: optimizer={optimizer!r}."
        )
    layers = optimizer.layers  # raises where it is not built
    state = _read(source, optimizer.slot_names)
    _check_meaning(state, optimizer)
    step = state.step if step is None else step
    if step is None:
        raise ValueError(NO_STEP)
    if by_order:
        pairs = list(range(len(state.names)))
    else:
        pairs = _paired([layer.name for layer in layers], state.names, rename, mapping or {})
    _check_shapes(layers, state, pairs)
    return _written(optimizer, state, pairs, int(step))


def _written(optimizer, state: State, pairs, step: int) -> MigrationReport:
    """Assigns everything; `pairs[i]` is the source's position of our variable i."""
    moved = [{}, {}]
    for slot, variables in zip(optimizer.slot_names, optimizer._plan.slots, strict=True):
        moved[0][slot] = [_norm(_array(variable)) for variable in variables]
        for variable, place in zip(variables, pairs, strict=True):
            variable.assign(
                ops.cast(ops.convert_to_tensor(state.slots[slot][place]), variable.dtype)
            )
        moved[1][slot] = [_norm(_array(variable)) for variable in variables]
    # Keras 3 counts gradients, of which accumulation takes several to an update.
    per_update = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    before = int(_array(optimizer.iterations))
    optimizer._iterations.assign(step * per_update)
    lines = tuple(
        MovedLayer(
            layer.name,
            state.names[place],
            layer.shape,
            *({slot: norms[i] for slot, norms in side.items()} for side in moved),
        )
        for i, (layer, place) in enumerate(zip(optimizer.layers, pairs, strict=True))
    )
    return MigrationReport(lines, before, step)


def _array(variable) -> np.ndarray:
    """A variable or array of any library, on the host, as float32."""
    value = variable.numpy() if hasattr(variable, "numpy") else variable
    return np.asarray(value).astype(np.float32)


def _norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def _check_meaning(state: State, optimizer) -> None:
    form = getattr(optimizer, "form", None)
    if form is None or state.rate_inside is None:
        return
    if state.rate_inside != (form in RATE_INSIDE) or form == "paper":
        holds = "η r (g + λx)" if state.rate_inside else "g + λx, without the learning rate"
        fitting = '"tf-models" or "mlperf"' if state.rate_inside else '"tf-models-scaled"'
        raise ValueError(
            f"The source's momentum sums up {holds}; that of form={form!r} does not. Make ours "
            f"with form={fitting}. Received: form={form!r}."
        )


def _paired(ours, theirs, rename, mapping):
    """For each of our variables the source's position; `ValueError` lists what is left over."""
    renamed = [rename(name) if rename else name for name in theirs]
    explicit = {their_name: our_name for our_name, their_name in mapping.items()}
    renamed = [explicit.get(name, new) for name, new in zip(theirs, renamed, strict=True)]
    lists = {"in the source": renamed, "in the optimizer": ours}
    for side, names in lists.items():
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f"Several variables {side} bear one name: {', '.join(twice)}. Tell them apart "
                "with `mapping` or `rename`, or pass `by_order=True`. Nothing was changed."
            )
    unknown = (set(mapping) - set(ours)) | (set(explicit) - set(theirs))
    missing, extra = set(ours) - set(renamed), set(renamed) - set(ours)
    if missing or extra or unknown:
        shown = [
            name if name == new else f"{name} (renamed to {new})"
            for name, new in zip(theirs, renamed, strict=True)
            if new in extra
        ]
        sides = [("source", shown), ("optimizer", [name for name in ours if name in missing])]
        sides += [("`mapping`, and on neither side", sorted(unknown))] if unknown else []
        listed = "\n".join(
            f"Only in the {side} ({len(names)}):" + "".join(f"\n  {name}" for name in names)
            for side, names in sides
        )
        raise ValueError(
            "The names of the source's variables and of the optimizer's do not match; nothing was "
            "changed. Pass `rename` or `mapping` (or `by_order=True`, if the order is the same).\n"
            + listed
        )
    return [renamed.index(name) for name in ours]


def _check_shapes(layers, state: State, pairs) -> None:
    if len(pairs) != len(layers):
        ours, theirs = [layer.name for layer in layers], state.names
        raise ValueError(
            f"The source has {len(theirs)} variables and the optimizer {len(ours)}; nothing was "
            "changed.\nIn the source:\n  "
            + "\n  ".join(theirs)
            + "\nIn the optimizer:\n  "
            + "\n  ".join(ours)
        )
    wrong = [
        f"\n  {layer.name}: {layer.shape}; the source's {slot} of {state.names[place]}: {x.shape}"
        for slot, arrays in state.slots.items()
        for layer, place in zip(layers, pairs, strict=True)
        for x in [arrays[place]]
        if x.shape != tuple(layer.shape)
    ]
    if wrong:
        raise ValueError(
            "The shapes of the source's variables and of the optimizer's do not match; nothing was "
            "changed." + "".join(wrong)
        )


def _read(source, slot_names) -> State:
    """The source's state; its kind shows in its form."""
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
    if not set(slot_names) <= set(found):
        raise ValueError(
            f"The optimizer takes the slots {', '.join(slot_names)}, and the source has "
            f"{', '.join(map(str, found)) or 'none'} (an optimizer makes them with its first "
            "update, or when it is built)."
        )


def _read_keras(source, slot_names) -> State:
    """Keras 3's LAMB; `_momentums`, `_velocities` and `_trainable_variables` are Keras's names."""
    _check_slots(("m", "v") if source.built else (), slot_names)
    names = tuple(variable.path for variable in source._trainable_variables)
    moments = {"m": source._momentums, "v": source._velocities}
    slots = {slot: [_array(x) for x in variables] for slot, variables in moments.items()}
    return State(names, slots, int(_array(source.iterations)))


def _read_legacy(source, slot_names) -> State:
    """tf-models and Addons: `_slots` is {variable's key: {slot's name: variable}}.

    The key is the variable's name, and outside of a graph "_" and a number after it.
    """
    _check_slots(source.get_slot_names(), slot_names)
    names, slots = [], {slot: [] for slot in slot_names}
    for key, held in source._slots.items():
        slot = held[slot_names[0]].name.split(":")[0]
        bare = re.sub(r"_\d+$", "", key)
        names.append(bare if slot.endswith(f"{bare}/{slot_names[0]}") else key)
        for name in slot_names:
            slots[name].append(_array(held[name]))
    inside = getattr(source, "classic_momentum", None)
    return State(tuple(names), slots, int(_array(source.iterations)), inside)


def _read_checkpoint(path, slot_names) -> State:
    """An object-based checkpoint names each slot's variable in its object graph."""
    import tensorflow as tf
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    reader = tf.train.load_checkpoint(path)
    if not reader.has_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"):
        raise ValueError(
            "The checkpoint must be one that `tf.train.Checkpoint` or Keras wrote, with an object "
            f"graph; this one only has names. Received: {path!r}."
        )
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    nodes = graph.nodes
    optimizers = [n for n in nodes if set(slot_names) <= {s.slot_name for s in n.slot_variables}]
    if len(optimizers) != 1:
        _check_slots(
            dict.fromkeys(s.slot_name for n in nodes for s in n.slot_variables), slot_names
        )
        raise ValueError(f"The checkpoint holds {len(optimizers)} optimizers. Received: {path!r}.")
    held: dict[int, dict[str, np.ndarray]] = {}
    for slot in optimizers[0].slot_variables:
        if slot.slot_name in slot_names:
            key = nodes[slot.slot_variable_node_id].attributes[0].checkpoint_key
            value = reader.get_tensor(key).astype(np.float32)
            held.setdefault(slot.original_variable_node_id, {})[slot.slot_name] = value
    names = [nodes[i].attributes[0].full_name for i in held]
    counters = [c.node_id for c in optimizers[0].children if c.local_name == "iter"]
    steps = [int(reader.get_tensor(nodes[i].attributes[0].checkpoint_key)) for i in counters]
    slots = {name: [arrays[name] for arrays in held.values()] for name in slot_names}
    return State(tuple(names), slots, steps[0] if steps else None)


def _read_optax(source, slot_names) -> State:
    """optax, by the names of its state's types: nothing of it need be installed."""
    found = list(_states(source))
    wanted = {("m", "v"): "ScaleByAdamState", ("momentum",): "TraceState"}[tuple(slot_names)]
    chosen = [(state, last) for state, last in found if type(state).__name__ == wanted]
    if len(chosen) != 1:
        held = ", ".join(type(state).__name__ for state, _ in found)
        raise ValueError(
            f"The optax state must hold one {wanted}, and holds {len(chosen)}. Received: {held}."
        )
    state, is_last = chosen[0]
    if wanted == "TraceState":
        if not is_last:
            raise ValueError(
                "The optax state must be that of `optax.lars`, in which the trace comes last, "
                "after the learning rate. Received: a TraceState with others after it."
            )
        counts = [s.count for s, _ in found if type(s).__name__ == "ScaleByScheduleState"]
        trace = _flat(state.trace)
        # optax adds its updates, we subtract ours.
        slots = {"momentum": [-x for x in trace.values()]}
        return State(tuple(trace), slots, int(_array(counts[0])) if counts else None, True)
    m, v = _flat(state.mu), _flat(state.nu)
    return State(
        tuple(m), {"m": list(m.values()), "v": [v[name] for name in m]}, int(_array(state.count))
    )


def _states(state, is_last=True):
    """Each named tuple in an optax state, and whether no other transformation comes after it."""
    if hasattr(state, "_fields"):
        yield state, is_last
        for child in state:
            yield from _states(child, is_last)
    elif isinstance(state, tuple):
        for place, child in enumerate(state, start=1):
            yield from _states(child, is_last and place == len(state))
    elif isinstance(state, Mapping):
        for child in state.values():
            yield from _states(child, is_last)


def _flat(tree, path="") -> dict[str, np.ndarray]:
    """{keys joined by "/": float32 array} of nested dictionaries, lists and tuples."""
    if tree is None or type(tree).__name__ == "MaskedNode":
        return {}
    if isinstance(tree, list | tuple):
        tree = {str(i): child for i, child in enumerate(tree)}
    if isinstance(tree, Mapping):
        parts = [_flat(x, f"{path}/{key}" if path else str(key)) for key, x in tree.items()]
        return {name: x for part in parts for name, x in part.items()}
    return {path: _array(tree)}
