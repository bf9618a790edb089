"""Default exclusions, and the plan of each variable: whether it is decayed, adapted or grouped."""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Sequence

# Default exclusions: normalization and biases, as in the published runs. BERT: "LayerNorm",
# "layer_norm", "bias" (google-research/bert, optimization.py; tf-models). ResNet-50:
# "batch_normalization", "bn", "bias" (MLPerf training v0.7, Google, resnet). For those models the
# pattern below selects the same variables.
#
# The patterns match the end of a path, so "norm_conv/kernel" is not excluded. They exclude biases,
# "gamma" and "beta", "scale" and "weight" in a layer whose name ends in the name of a normalization
# (optionally with a number), and LayerScale factors, which start near zero and which a trust ratio
# would keep there. A table of relative positions is an embedding, unless its name ends in "bias".
# `python -m benchmarks.exclusions` lists the result for many networks.
BERT_EXCLUSIONS = (
    r"(?i)bias$|(^|/)(gamma|beta)$"
    r"|(norm|normalization|(^|[/_])([blg]n|grn|rms))[._]?\d*/(scale|weight)$"
    r"|layer_?scale|(^|/)lambda_?\d$",
)
RESNET_EXCLUSIONS = BERT_EXCLUSIONS
# No warning if these patterns match no variable: models without biases are common.
NEVER_WARN = frozenset((*BERT_EXCLUSIONS, *RESNET_EXCLUSIONS))


@dataclasses.dataclass(frozen=True)
class VariablePlan:
    """How an optimizer updates one variable, decided when the optimizer is built.

    Attributes:
        name: String. The variable's full path, such as `"encoder/dense/kernel"`, without
            TensorFlow's `:0`.
        shape: Tuple of integers. The variable's static shape.
        decayed: Boolean. Whether weight decay is part of its update.
        adapted: Boolean. Whether its step is scaled by a trust ratio.
        axes: Tuple of integers. The axes along which the variable stacks layers; each slice along
            them has its own trust ratio. `()` if the variable is a single layer.
        group: String or `None`. The pattern of the group that the variable shares a trust ratio
            with. `None` for a variable that is not adapted, since it has no ratio.
        overwritten: Boolean. Whether Keras assigns the "gradient" to the variable instead of
            calling the optimizer (the scales of float8 training). Such a variable is neither
            decayed nor adapted.
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
    """The checked patterns of the constructor.

    Attributes:
        no_decay: `exclude_from_weight_decay`.
        no_adaptation: `exclude_from_layer_adaptation`; `None` means the same as `no_decay`.
        axes: `layer_axes`.
        groups: `layer_groups`.
    """

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

    A pattern that matches no variable causes a `UserWarning`, unless it is `BERT_EXCLUSIONS` or
    `RESNET_EXCLUSIONS`.

    Args:
        names: The variables' full paths.
        shapes: Their static shapes.
        patterns: The constructor's patterns.
        overwritten: For each variable, whether Keras overwrites it with its gradient. `None` means
            that no variable is overwritten.

    Returns:
        A tuple with a `VariablePlan` for each variable.

    Raises:
        ValueError: If a variable matches more than one pattern of `axes` and `groups`, or does not
            have an axis that its pattern names.
    """
    _warn_unmatched_patterns(names, patterns)
    no_adaptation = patterns.no_adaptation
    if no_adaptation is None:
        no_adaptation = patterns.no_decay
    if overwritten is None:
        overwritten = [False] * len(names)

    def matching(name, candidates):
        return [pattern for pattern in candidates if re.search(pattern, name)]

    plans = []
    for name, shape, is_overwritten in zip(names, shapes, overwritten, strict=True):
        stacked = matching(name, patterns.axes)
        groups = matching(name, patterns.groups)
        if len(stacked) + len(groups) > 1:
            raise ValueError(
                "A variable may match only one pattern of `layer_axes` and `layer_groups`. "
                f"Received: {name!r}, which matches {', '.join(map(repr, stacked + groups))}."
            )
        axes = patterns.axes[stacked[0]] if stacked else ()
        rank = len(shape)
        if not all(-rank <= axis < rank for axis in axes):
            raise ValueError(
                f"`layer_axes` must name axes that the variable has. Received: "
                f"{stacked[0]!r}: {axes} for {name!r} of shape {tuple(shape)}."
            )
        adapted = not is_overwritten and not matching(name, no_adaptation)
        plans.append(
            VariablePlan(
                name,
                tuple(shape),
                decayed=not is_overwritten and not matching(name, patterns.no_decay),
                adapted=adapted,
                axes=tuple(axis % rank for axis in axes),
                group=groups[0] if groups and adapted else None,
                overwritten=is_overwritten,
            )
        )
    return tuple(plans)


def _warn_unmatched_patterns(names: Sequence[str], patterns: Patterns) -> None:
    """Warns for each pattern that matches no variable, and names the nearest variables.

    This is not an error: frozen layers, LoRA and models without biases leave patterns unused.
    """
    arguments = {
        "exclude_from_weight_decay": patterns.no_decay,
        "exclude_from_layer_adaptation": patterns.no_adaptation or (),
        "layer_axes": patterns.axes,
        "layer_groups": patterns.groups,
    }
    for argument, argument_patterns in arguments.items():
        for pattern in argument_patterns:
            if pattern in NEVER_WARN or any(re.search(pattern, name) for name in names):
                continue
            plain_text = re.sub(r"[^\w/]+", "", pattern)
            # Compare with each part of a path, too: a pattern is usually shorter than a path.
            name_of_part = {part: name for name in names for part in (*name.split("/"), name)}
            similar = difflib.get_close_matches(plain_text, name_of_part, n=3, cutoff=0.4)
            nearest = list(dict.fromkeys(name_of_part[part] for part in similar))
            nearest = nearest or list(names[:3])
            warnings.warn(
                f"The pattern {pattern!r} of `{argument}` matches none of the {len(names)} "
                f"variables. The nearest are: {', '.join(nearest)}.",
                UserWarning,
                stacklevel=2,
            )


def table_lines(plans: Sequence[VariablePlan]) -> list[str]:
    """Returns the lines of `layer_table()`: a header, then one line for each variable."""
    rows: list[tuple[str, ...]] = [("variable", "shape", "decayed", "adapted", "group")]
    for plan in plans:
        if plan.overwritten:
            note = "overwritten by its gradient"
        elif plan.axes:
            note = "slices of " + ", ".join(map(str, plan.axes))
        else:
            note = plan.group or "-"
        marks = ("yes" if flag else "-" for flag in (plan.decayed, plan.adapted))
        rows.append((plan.name, str(plan.shape), *marks, note))
    return align_columns(rows)


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns one line for each row, with cells padded to the width of their column."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
