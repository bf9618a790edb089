"""Whether the checkpoints in a model_dir belong to the recipe that is asked for."""

import bisect
import dataclasses
import itertools
import json
import os

from inputs.errors import InputError
from inputs.files import atomic_write, check_writable
from training.checkpoint.manager import saved_steps

# A run may be made longer or shorter on the way, and be watched in another way; everything else
# decides what its state means.
MAY_CHANGE = (
    "steps",
    "warmup_steps",
    "warmup_from",
    "decay_from",
    "examples",
    "save_every_steps",
    "evaluate_every_steps",
    "expected",
    "accumulation",
    "jit_compile",
    "measure_noise_scale",
    "keep_checkpoints",
    "max_skipped_in_row",
    "max_loss",
    "on_divergence",
    "rollback_rate_factor",
    "max_rollbacks",
    "max_bad_record_share",
    "on_bad_record",
    "telemetry",
    "profile",
)


def check(model_dir: str, recipe, **facts) -> None:
    """Compares the run in `model_dir`, if there is one, with what is asked for now.

    Args:
        model_dir: folder, may be missing.
        recipe: a `recipes.types.Recipe`.
        **facts: what else the checkpoints depend on, as JSON values; those that are known yet.

    Raises:
        InputError: the folder cannot be written, or holds a run of another recipe, or one that
            is already longer, or in a phase that would be another now.
    """
    check_writable(model_dir, "--model_dir")
    steps = saved_steps(model_dir)
    if not steps:
        return
    if steps[-1] > recipe.steps:
        raise InputError(
            f"--model_dir: {model_dir} holds a run at step {steps[-1]}, beyond the {recipe.steps} "
            "steps asked for. Ask for more --steps, or choose another folder."
        )
    ours = json.loads(settings(recipe, facts))
    theirs = _check_same(model_dir, os.path.join(model_dir, "recipe.json"), ours)
    then = [theirs[f"phase{number}.steps"] for number in range(1, len(recipe.phases) + 1)]
    now = [phase.steps for phase in recipe.phases]
    if not _phases_at(steps[-1], then) & _phases_at(steps[-1], now):
        raise InputError(
            f"--model_dir: {model_dir} holds a run at step {steps[-1]} of phases of "
            f"{' and '.join(map(str, then))} steps; with the {' and '.join(map(str, now))} asked "
            "for now it would be in another phase. Give the same --steps, or choose another folder."
        )


def _phases_at(step: int, lengths: list[int]) -> set[int]:
    """The phase that a step is in, or between which two it is."""
    borders = list(itertools.accumulate(lengths[:-1]))
    return {bisect.bisect_left(borders, step), bisect.bisect_right(borders, step)}


def settings(recipe, facts: dict) -> str:
    """The recipe as run and what else the weights' meaning depends on, as JSON."""
    return json.dumps(dataclasses.asdict(recipe) | facts, indent=2)


def claim(model_dir: str, recipe, **facts) -> None:
    """Writes the recipe as run beside the checkpoints.

    Args: as `check`'s, all facts.

    Raises:
        InputError: as `check`.
    """
    check(model_dir, recipe, **facts)
    path = os.path.join(model_dir, "recipe.json")
    with atomic_write(path) as file:
        file.write(settings(recipe, facts))


def _check_same(model_dir: str, path: str, ours: dict) -> dict:
    """The settings of the run that is there, which are the same but for `MAY_CHANGE`."""
    try:
        with open(path, encoding="utf-8") as file:
            theirs = _flat(json.load(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--model_dir: {model_dir} holds checkpoints but no readable recipe.json ({error}). "
            "Choose another folder."
        ) from None
    wanted = _flat(ours)
    differing = [key for key in wanted if theirs.get(key) != wanted[key]]
    differing = [key for key in differing if key.rpartition(".")[2] not in MAY_CHANGE]
    if differing:
        pairs = ", ".join(f"{k} {theirs.get(k)!r} (now {wanted.get(k)!r})" for k in differing)
        raise InputError(
            f"--model_dir: {model_dir} holds a run with other settings: {pairs}. "
            "Give that run's settings, or another --model_dir."
        )
    return theirs


def _flat(settings: dict) -> dict:
    flat = {key: value for key, value in settings.items() if key != "phases"}
    for number, phase in enumerate(settings["phases"], start=1):
        flat |= {f"phase{number}.{key}": value for key, value in phase.items()}
    return flat
