"""Moments and step count of another library's LAMB or LARS, brought into ours.

`foreign_state` reads them; here they are compared with ours and, if all of it fits, assigned.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from keras import ops

from tf_lamb.foreign_state import State, host_array, read_state
from tf_lamb.layerwise import Layerwise

NO_STEP = "The source keeps no step count. Pass `step`, the number of updates it has made."


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
    state = read_state(source, optimizer.slot_names)
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
    moved: tuple[dict[str, list[float]], ...] = ({}, {})
    for slot, variables in zip(optimizer.slot_names, optimizer._plan.slots, strict=True):
        moved[0][slot] = [_norm(host_array(variable)) for variable in variables]
        for variable, place in zip(variables, pairs, strict=True):
            variable.assign(
                ops.cast(ops.convert_to_tensor(state.slots[slot][place]), variable.dtype)
            )
        moved[1][slot] = [_norm(host_array(variable)) for variable in variables]
    # Keras 3 counts gradients, of which accumulation takes several to an update.
    per_update = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    before = int(host_array(optimizer.iterations))
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


def _norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def _check_meaning(state: State, optimizer) -> None:
    form = getattr(optimizer, "form", None)
    if form is None or state.rate_inside is None:
        return
    if state.rate_inside != optimizer.rate_inside or form == "paper":
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
