"""Changes to a recipe: single fields (`--set field=value`), number of steps, batch size."""

import dataclasses
import difflib
import types
import typing

from recipes.types import Recipe

FIXED = ("name", "task", "phases", "examples")  # what makes it this recipe


def override(recipe: Recipe, assignments: list[str]) -> Recipe:
    """Changes fields of a recipe, each given as "field=value".

    A field of a phase changes in every phase; "phase2.steps=10" changes the second one alone. A
    list is written with commas, None as "none".

    Raises:
        ValueError: an unknown field (the message names the nearest) or a value of another type.
    """
    for assignment in assignments:
        field, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"write field=value. Received: {assignment!r}.")
        field = field.strip()
        if field in _fields(recipe) and field not in FIXED:
            value = _parsed(recipe, field, text)
            recipe = dataclasses.replace(recipe, **{field: value})
            continue
        place, _, phase_field = field.rpartition(".")
        numbered = {f"phase{i}": i - 1 for i in range(1, len(recipe.phases) + 1)}
        in_phase = _fields(recipe.phases[0]).keys() - FIXED
        if phase_field not in in_phase or (place and place not in numbered):
            known = [name for name in (*_fields(recipe), *sorted(in_phase)) if name not in FIXED]
            if place and phase_field in in_phase:
                known = [f"{phase}.{phase_field}" for phase in numbered]
            raise ValueError(f"no field is called {field!r}. {nearest_name(field, known)}")
        changed = {phase_field: _parsed(recipe.phases[0], phase_field, text)}
        if phase_field in ("steps", "global_batch_size"):
            changed["examples"] = None
        phases = tuple(
            dataclasses.replace(phase, **changed) if not place or numbered[place] == i else phase
            for i, phase in enumerate(recipe.phases)
        )
        recipe = dataclasses.replace(recipe, phases=phases)
    return recipe


def resized(recipe: Recipe, *, steps: int | None = None, global_batch_size: int | None = None):
    """The recipe run for `steps` steps in all, or at another batch size; rates stay as they are.

    Phases and their warm-up keep their share of the steps.
    """
    phases, done, planned = [], 0, 0
    for phase in recipe.phases:
        if steps is not None:
            share = steps / recipe.steps
            planned += phase.steps
            phase = phase.stretched(max(1, round(planned * share) - done), share)
            done += phase.steps
        if global_batch_size is not None:
            phase = dataclasses.replace(phase, global_batch_size=global_batch_size, examples=None)
        phases.append(phase)
    return dataclasses.replace(recipe, phases=tuple(phases))


def _fields(holder) -> dict[str, typing.Any]:
    return typing.get_type_hints(type(holder))


def nearest_name(name: str, known) -> str:
    """Returns a sentence for a message: the name in `known` nearest to `name`, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(sorted(known))}."


def _parsed(holder, field: str, text: str):
    """`text` as the type that the class of `holder` declares for `field`."""
    hint = _fields(holder)[field]
    choices = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if type(None) in choices:
        if text.lower() == "none":
            return None
        choices = tuple(choice for choice in choices if choice is not type(None))
    (kind,) = choices
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            (element, _) = typing.get_args(kind)
            return tuple(element(part) for part in text.split(",") if part)
        return kind(text)
    except (KeyError, ValueError):
        expected = "true or false" if kind is bool else f"a value of type {kind.__name__}"
        raise ValueError(f"{field} takes {expected}. Received: {field}={text}.") from None
