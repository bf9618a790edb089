"""What is done to each variable, decided once from patterns and paths."""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Sequence

from tf_lamb.exclusions import READY_LISTS


@dataclasses.dataclass(frozen=True)
class VariablePlan:
    """What was decided for one variable when the optimizer was built.

    Attributes:
        name: its full path, `"encoder/dense/kernel"`, without TensorFlow's `:0`.
        shape: its static shape.
        decayed: whether weight decay enters its update.
        adapted: whether its step is scaled by a trust ratio.
        axes: axes along which the variable stacks layers, each with its own ratio; () for one
            layer.
        group: the pattern of the group that shares one ratio with it, or None; a variable that is
            not adapted has no ratio, and is in no group.
        overwritten: whether Keras writes the "gradient" into the variable instead of calling the
            optimizer (the scales of float8 training). Such a variable is neither decayed nor
            adapted.
    """

    name: str
    shape: tuple[int, ...]
    decayed: bool
    adapted: bool
    axes: tuple[int, ...] = ()
    group: str | None = None
    overwritten: bool = False


@dataclasses.dataclass(frozen=True)
class Patterns:
    """The constructor's patterns; `no_adaptation=None` means "the same as `no_decay`"."""

    no_decay: tuple[str, ...]
    no_adaptation: tuple[str, ...] | None
    axes: dict[str, tuple[int, ...]]
    groups: tuple[str, ...]


def plan_variables(
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    patterns: Patterns,
    overwritten: Sequence[bool] | None = None,
) -> tuple[VariablePlan, ...]:
    """Matches the patterns against the variables' paths.

    A pattern that matches no variable is a `UserWarning`, unless it is one of the ready lists'.

    Args:
        names: the variables' full paths.
        shapes: their static shapes.
        patterns: the constructor's patterns.
        overwritten: for each variable, whether Keras overwrites it with its gradient.

    Raises:
        ValueError: a variable that matches two patterns of `axes` or `groups`, or lacks an axis.
    """
    _warn_of_unmatched(names, patterns)
    no_decay, no_adaptation = patterns.no_decay, patterns.no_adaptation
    no_adaptation = no_decay if no_adaptation is None else no_adaptation

    def matching(name, those):
        return [pattern for pattern in those if re.search(pattern, name)]

    plans = []
    for name, shape, skipped in zip(
        names, shapes, overwritten or [False] * len(names), strict=True
    ):
        stacked, groups = matching(name, patterns.axes), matching(name, patterns.groups)
        adapted = not skipped and not matching(name, no_adaptation)
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
        plans.append(
            VariablePlan(
                name,
                tuple(shape),
                decayed=not skipped and not matching(name, no_decay),
                adapted=adapted,
                axes=tuple(axis % rank for axis in axes),
                group=groups[0] if groups and adapted else None,
                overwritten=skipped,
            )
        )
    return tuple(plans)


def _warn_of_unmatched(names, patterns: Patterns) -> None:
    """Frozen layers, LoRA and models without biases are ordinary; a misspelt pattern is not."""
    arguments = {
        "exclude_from_weight_decay": patterns.no_decay,
        "exclude_from_layer_adaptation": patterns.no_adaptation or (),
        "layer_axes": patterns.axes,
        "layer_groups": patterns.groups,
    }
    for argument, given in arguments.items():
        for pattern in given:
            if pattern in READY_LISTS or any(re.search(pattern, name) for name in names):
                continue
            words = re.sub(r"[^\w/]+", "", pattern)
            # Compared with each part of a path, too: a pattern is rarely as long as the path.
            parts = {part: name for name in names for part in (*name.split("/"), name)}
            near = difflib.get_close_matches(words, parts, n=3, cutoff=0.4)
            nearest = list(dict.fromkeys(parts[part] for part in near)) or list(names[:3])
            warnings.warn(
                f"The pattern {pattern!r} of `{argument}` matches none of the {len(names)} "
                f"variables. The nearest are: {', '.join(nearest)}.",
                UserWarning,
                stacklevel=2,
            )


def table_lines(plans: Sequence[VariablePlan]) -> list[str]:
    """One line for the columns' names, then one for each variable."""
    rows: list[tuple[str, ...]] = [("variable", "shape", "decayed", "adapted", "group")]
    for plan in plans:
        marks = ("yes" if flag else "-" for flag in (plan.decayed, plan.adapted))
        note = "slices of " + ", ".join(map(str, plan.axes)) if plan.axes else "-"
        note = "overwritten by its gradient" if plan.overwritten else note
        rows.append((plan.name, str(plan.shape), *marks, plan.group or note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
