"""The state of other libraries' LAMB and LARS, for `migration`.

Read from the object where it is at hand, or from a TensorFlow checkpoint. The other libraries are
known by the form of their state and are never imported; TensorFlow is, to read a checkpoint.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

import keras
import numpy as np


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


def host_array(variable) -> np.ndarray:
    """A variable or array of any library, on the host, as float32."""
    value = variable.numpy() if hasattr(variable, "numpy") else variable
    return np.asarray(value).astype(np.float32)


def read_state(source, slot_names) -> State:
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
    slots = {slot: [host_array(x) for x in variables] for slot, variables in moments.items()}
    return State(names, slots, int(host_array(source.iterations)))


def _read_legacy(source, slot_names) -> State:
    """tf-models and Addons: `_slots` is {variable's key: {slot's name: variable}}.

    The key is the variable's name, and outside of a graph "_" and a number after it.
    """
    _check_slots(source.get_slot_names(), slot_names)
    names: list[str] = []
    slots: dict[str, list[np.ndarray]] = {slot: [] for slot in slot_names}
    for key, held in source._slots.items():
        slot = held[slot_names[0]].name.split(":")[0]
        bare = re.sub(r"_\d+$", "", key)
        names.append(bare if slot.endswith(f"{bare}/{slot_names[0]}") else key)
        for name in slot_names:
            slots[name].append(host_array(held[name]))
    inside = getattr(source, "classic_momentum", None)
    return State(tuple(names), slots, int(host_array(source.iterations)), inside)


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
        return State(tuple(trace), slots, int(host_array(counts[0])) if counts else None, True)
    m, v = _flat(state.mu), _flat(state.nu)
    return State(
        tuple(m),
        {"m": list(m.values()), "v": [v[name] for name in m]},
        int(host_array(state.count)),
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
    return {path: host_array(tree)}
