"""Checks that the checkpoints in a model_dir belong to the recipe that is to be run."""

import bisect
import dataclasses
import itertools
import json
import os

from inputs.errors import InputError
from inputs.files import atomic_write, check_writable
from training.checkpoint.manager import saved_steps

RUN_CONFIG = "recipe.json"

# Fields that may differ when a run is resumed, such as its length, its logging and its handling of
# errors. With any other field changed, the saved weights and slots belong to a different run.
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
# Fields that earlier versions did not have, with the value that their runs had.
ADDED = {"lower_case": True}
# Fields of which None means that the task finds the value out, which it does after the first check.
FOUND_OUT = ("lower_case",)


def check_compatible(model_dir: str, recipe, **facts) -> None:
    """Compares the run in `model_dir`, if there is one, with the run that is to be started.

    Args:
        model_dir: a folder, which may not exist yet.
        recipe: a `recipes.types.Recipe`.
        **facts: further settings that the checkpoints depend on, as JSON values. Settings that are
            not given are not compared.

    Raises:
        InputError: the folder cannot be written, holds a run with other settings, holds a run that
            is already longer than `recipe`, or its newest step belongs to another phase of
            `recipe` than of the run.
    """
    check_writable(model_dir, "--model_dir")
    steps = saved_steps(model_dir)
    if not steps:
        return
    if steps[-1] > recipe.steps:
        raise InputError(
            f"--model_dir: {model_dir} holds a run at step {steps[-1]}, beyond the {recipe.steps} "
            "steps asked for. Give more --steps, or choose another folder."
        )
    new = json.loads(run_config(recipe, facts))
    old = _check_same_settings(model_dir, os.path.join(model_dir, RUN_CONFIG), new)
    then = [old[f"phase{i}.steps"] for i in range(1, len(recipe.phases) + 1)]
    now = [phase.steps for phase in recipe.phases]
    if not _phases_at(steps[-1], then) & _phases_at(steps[-1], now):
        raise InputError(
            f"--model_dir: {model_dir} holds a run at step {steps[-1]} of phases of "
            f"{' and '.join(map(str, then))} steps; with the {' and '.join(map(str, now))} asked "
            "for now it would be in another phase. Give the same --steps, or choose another folder."
        )


def _phases_at(step: int, lengths: list[int]) -> set[int]:
    """The index of the phase that contains `step`; both indices at the boundary of two phases."""
    borders = list(itertools.accumulate(lengths[:-1]))
    return {bisect.bisect_left(borders, step), bisect.bisect_right(borders, step)}


def run_config(recipe, facts: dict) -> str:
    """Returns the recipe as run and the other settings that checkpoints depend on, as JSON."""
    return json.dumps(dataclasses.asdict(recipe) | facts, indent=2)


def write_run_config(model_dir: str, recipe, **facts) -> None:
    """Writes `run_config` to recipe.json beside the checkpoints, after `check_compatible`.

    Args:
        model_dir: folder of the checkpoints.
        recipe: a `recipes.types.Recipe`.
        **facts: all settings besides the recipe that the checkpoints depend on, as JSON values.

    Raises:
        InputError: see `check_compatible`.
    """
    check_compatible(model_dir, recipe, **facts)
    path = os.path.join(model_dir, RUN_CONFIG)
    with atomic_write(path) as file:
        file.write(run_config(recipe, facts))


def _check_same_settings(model_dir: str, path: str, new: dict) -> dict:
    """Returns the saved settings; raises if they differ from `new` outside of `MAY_CHANGE`."""
    try:
        with open(path, encoding="utf-8") as file:
            old = _flatten(json.load(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--model_dir: {model_dir} holds checkpoints but no readable recipe.json ({error}). "
            "Choose another folder."
        ) from None
    new = _flatten(new)
    old = {key: value for key, value in ADDED.items() if key in new} | old
    left_out = {key for key in FOUND_OUT if new.get(key) is None}
    differing = [key for key in new if key not in left_out and old.get(key) != new[key]]
    differing = [key for key in differing if key.rpartition(".")[2] not in MAY_CHANGE]
    if differing:
        pairs = ", ".join(f"{k} {old.get(k)!r} (now {new.get(k)!r})" for k in differing)
        raise InputError(
            f"--model_dir: {model_dir} holds a run with other settings: {pairs}. "
            "Give that run's settings, or another --model_dir."
        )
    return old


def _flatten(settings: dict) -> dict:
    flat = {key: value for key, value in settings.items() if key != "phases"}
    for i, phase in enumerate(settings["phases"], start=1):
        flat |= {f"phase{i}.{key}": value for key, value in phase.items()}
    return flat
