"""What counts as a layer, and what is done to it: decided once, from patterns and paths."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Layer:
    """What was decided for one variable when the optimizer was built.

    name: its full path, `"encoder/dense/kernel"`, without TensorFlow's `:0`.
    shape: its static shape.
    decayed: whether weight decay enters its update.
    adapted: whether its step is scaled by a trust ratio.
    axes: axes along which the variable stacks layers, each with its own ratio; () for one layer.
    group: the pattern of the group that shares one ratio with it, or None; a variable that is
        not adapted has no ratio, and is in no group.
    """

    name: str
    shape: tuple[int, ...]
    decayed: bool
    adapted: bool
    axes: tuple[int, ...] = ()
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class Patterns:
    """The constructor's patterns; `no_adaptation=None` means "the same as `no_decay`"."""

    no_decay: tuple[str, ...]
    no_adaptation: tuple[str, ...] | None
    axes: dict[str, tuple[int, ...]]
    groups: tuple[str, ...]


def plan_layers(names, shapes, patterns: Patterns) -> tuple[Layer, ...]:
    """Matches the patterns against the variables' paths, once.

    Raises:
        ValueError: a pattern matches no variable (the message lists the names there are), a
            variable in two groups, in a group and stacked, or without the axis.
    """
    no_decay, no_adaptation = patterns.no_decay, patterns.no_adaptation
    no_adaptation = no_decay if no_adaptation is None else no_adaptation
    for pattern in dict.fromkeys((*no_decay, *no_adaptation, *patterns.axes, *patterns.groups)):
        if not any(re.search(pattern, name) for name in names):
            listed = "\n  ".join(names)
            raise ValueError(
                f"Every pattern must match a variable. Received: {pattern!r}, which matches none "
                f"of the {len(names)} variables. Correct it or take it out of "
                "`exclude_from_weight_decay`, `exclude_from_layer_adaptation`, `layer_axes` or "
                f"`layer_groups`; the names are:\n  {listed}"
            )

    def matching(name, those):
        return [pattern for pattern in those if re.search(pattern, name)]

    layers = []
    for name, shape in zip(names, shapes, strict=True):
        stacked, groups = matching(name, patterns.axes), matching(name, patterns.groups)
        adapted = not matching(name, no_adaptation)
        if len(stacked) + len(groups) > 1:
            raise ValueError(
                "A variable belongs to one pattern of `layer_axes` or `layer_groups` at most. "
                f"Received: {name!r}, which matches {', '.join(map(repr, stacked + groups))}."
            )
        axes = patterns.axes[stacked[0]] if stacked else ()
        rank = len(shape)
        if not all(-rank <= axis < rank for axis in axes):
            raise ValueError(
                f"`layer_axes` must name axes that the variable has. Received: "
                f"{stacked[0]!r}: {axes} for {name!r} of shape {tuple(shape)}."
            )
        layers.append(
            Layer(
                name,
                tuple(shape),
                decayed=not matching(name, no_decay),
                adapted=adapted,
                axes=tuple(axis % rank for axis in axes),
                group=groups[0] if groups and adapted else None,
            )
        )
    return tuple(layers)


def table_lines(layers) -> list[str]:
    """One line for the columns' names, then one for each layer."""
    rows = [("variable", "shape", "decayed", "adapted", "group")]
    for layer in layers:
        marks = ("yes" if flag else "-" for flag in (layer.decayed, layer.adapted))
        slices = "slices of " + ", ".join(map(str, layer.axes)) if layer.axes else "-"
        rows.append((layer.name, str(layer.shape), *marks, layer.group or slices))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
