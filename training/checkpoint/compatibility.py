"""Checks that the checkpoints in a model_dir belong to the recipe that is to be run."""

import bisect
import dataclasses
import itertools
import json
import os
from collections.abc import Callable

from inputs.errors import InputError
from inputs.order import earlier_number_of_lanes
from inputs.storage.files import (
    atomic_write,
    check_checkpoint_path,
    check_writable,
    read_file,
    read_json,
)
from recipes.types import BERT_EXCLUSIONS, RESNET_EXCLUSIONS
from training.checkpoint.manager import saved_steps

RUN_CONFIG = "recipe.json"
# Of recipe.json. Increase it when a field gets another name or meaning. A new field does not need
# that: runs without it had the field's default (see `recipes.types.Recipe`). 1 was not written.
FORMAT = 5
ORDER_OF_LANES = 3  # from this format on, examples have the order of `inputs.order`
LANES_OF_HOSTS = 4  # from this format on, `lanes=None` is `inputs.order.number_of_lanes`
MOMENTUM_WITHOUT_RATE = 5  # from this format on, the slot of "momentum" is not times the rate

# Fields that may differ when a run is resumed, such as its length, its logging, its evaluation and
# its handling of errors. With any other field changed, the saved weights and slots belong to a
# different run.
MAY_CHANGE = (
    "name",
    "reference",
    "steps",
    "warmup_steps",
    "warmup_from",
    "decay_from",
    "decay_steps",
    "examples",
    "save_every_steps",
    "evaluate_every_steps",
    "evaluate_every_examples",
    "target",
    "evaluation_examples",
    "n_best",
    "max_answer_length",
    "expected",
    "accumulation",
    "jit_compile",
    "remat",
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
# Fields of which None means that the task finds the value out, which it does after the first check;
# each with the value that runs had before there was the field.
FOUND_OUT = {"lower_case": True}
# Lists of patterns in the recipes of version 0.1.0. Those of today select the same variables of our
# models (tests/training/checkpoint/test_old_runs.py).
EARLIER_PATTERNS = {
    ("(?i)layer_?norm", "bias$"): BERT_EXCLUSIONS,
    ("(?i)batch_?norm|bn/", "bias$"): RESNET_EXCLUSIONS,
}


def check_compatible(model_dir: str, recipe, **facts) -> None:
    """Compares the run in `model_dir`, if there is one, with the run that is to be started.

    Args:
        model_dir: a folder, which may not exist yet.
        recipe: a `recipes.types.Recipe`.
        **facts: further settings that the checkpoints depend on, as JSON values. Settings that are
            not given are not compared.

    Raises:
        InputError: the folder cannot be written, its checkpoints could not be read, it holds a run
            with other settings or one that is already longer than `recipe`, or its newest step
            belongs to another phase of `recipe` than of the run.
    """
    check_checkpoint_path(model_dir, "--model_dir")
    check_writable(model_dir, "--model_dir")
    steps = saved_steps(model_dir)
    if not steps:
        return
    if steps[-1] > recipe.steps:
        raise InputError(
            f"--model_dir: {model_dir} holds a run at step {steps[-1]}, beyond the {recipe.steps} "
            "steps asked for. Give more --steps, or choose another folder."
        )
    old = _read_settings(model_dir, recipe)
    if old["optimizer"] == "momentum" and old.get("format", 1) < MOMENTUM_WITHOUT_RATE:
        raise InputError(
            f"--model_dir: {model_dir} was begun by a version whose momentum contains the learning "
            "rate; in this one it does not. Finish the run with that version, or give another "
            "--model_dir."
        )
    _check_same_settings(model_dir, old, json.loads(run_config(recipe, facts)), facts)
    then = [phase["steps"] for phase in old["phases"]]
    now = [phase.steps for phase in recipe.phases]
    if not _phases_at(steps[-1], then) & _phases_at(steps[-1], now):
        raise InputError(
            f"--model_dir: {model_dir} holds a run at step {steps[-1]} of phases of "
            f"{' and '.join(map(str, then))} steps; with the {' and '.join(map(str, now))} asked "
            "for now it would be in another phase. Give the same --steps, or choose another folder."
        )


def has_earlier_order(model_dir: str) -> bool:
    """Whether the run in `model_dir` was begun with the order of examples of version 0.1.0."""
    old = _read_config(model_dir)
    return old is not None and old.get("format", 1) < ORDER_OF_LANES


def check_lanes(model_dir: str, recipe, order: Callable) -> None:
    """Checks that a run which found out its number of lanes in another way goes on with it.

    Args:
        model_dir: a folder, which may not exist yet.
        recipe: a `recipes.types.Recipe`.
        order: takes the index of a phase; returns its `inputs.order.Order`, or None.

    Raises:
        InputError: the examples would come in another order.
    """
    old = _read_config(model_dir)
    if old is None or not _found_lanes_earlier(old):
        return
    step = saved_steps(model_dir)[-1]
    ends = itertools.accumulate(phase.steps for phase in recipe.phases)
    left = [index for index, end in enumerate(ends) if end > step]
    orders = [one for one in map(order, left) if one]
    then = [earlier_number_of_lanes(one.batch, one.examples) for one in orders]
    now = [one.lanes for one in orders]
    if then != now:
        if len(set(then)) == 1:
            advice = f"Give --set lanes={then[0]} to keep it, or another --model_dir."
        else:
            advice = "Finish it with the version that began it, or give another --model_dir."
        raise InputError(
            f"--model_dir: {model_dir} was begun with the data in "
            f"{' and '.join(map(str, then))} lanes. With the {' and '.join(map(str, now))} of now, "
            f"the examples would come in another order. {advice}"
        )


def _found_lanes_earlier(old: dict) -> bool:
    return old.get("format") == ORDER_OF_LANES and old.get("lanes") is None


def _read_config(model_dir: str) -> dict | None:
    """The content of recipe.json; None without checkpoints, or if it cannot be read."""
    if not saved_steps(model_dir):
        return None
    try:
        content = read_json(os.path.join(model_dir, RUN_CONFIG))
    except InputError:  # `check_compatible` reports it
        return None
    return content if isinstance(content, dict) else None


def _phases_at(step: int, lengths: list[int]) -> set[int]:
    """The index of the phase that contains `step`; both indices at the boundary of two phases."""
    borders = list(itertools.accumulate(lengths[:-1]))
    return {bisect.bisect_left(borders, step), bisect.bisect_right(borders, step)}


def run_config(recipe, facts: dict) -> str:
    """Returns the recipe as run and the other settings that checkpoints depend on, as JSON."""
    return json.dumps({"format": FORMAT} | dataclasses.asdict(recipe) | facts, indent=2)


def write_run_config(model_dir: str, recipe, **facts) -> None:
    """Writes `run_config` to recipe.json beside the checkpoints, after `check_compatible`.

    Args:
        model_dir: folder of the checkpoints.
        recipe: a `recipes.types.Recipe`.
        **facts: all settings besides the recipe that the checkpoints depend on, as JSON values.

    Raises:
        InputError: see `check_compatible`; or the run in `model_dir` has settings that this version
            does not know.
    """
    check_compatible(model_dir, recipe, **facts)
    if saved_steps(model_dir):
        _check_known(model_dir, _read_settings(model_dir, recipe), run_config(recipe, facts))
    path = os.path.join(model_dir, RUN_CONFIG)
    with atomic_write(path) as file:
        file.write(run_config(recipe, facts))


def _read_settings(model_dir: str, recipe) -> dict:
    """Reads recipe.json, of this version or an earlier one, as the current version writes it.

    Fields that the file lacks get the defaults of the classes of `recipe` and its phases.

    Raises:
        InputError: the file cannot be read, or a later version wrote it.
    """
    try:
        settings = json.loads(read_file(os.path.join(model_dir, RUN_CONFIG)))
        written = settings.get("format", 1)
        phases = [_defaults(recipe.phases[0]) | phase for phase in settings["phases"]]
        settings = _defaults(recipe) | FOUND_OUT | settings | {"phases": phases}
        for field, value in settings.items():
            if field.startswith("exclude_from_") and value is not None:
                settings[field] = list(EARLIER_PATTERNS.get(tuple(value), value))
        newer = written > FORMAT
        all(phase["steps"] for phase in phases)  # raises KeyError
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"--model_dir: {model_dir} holds checkpoints but no readable recipe.json ({error}). "
            "Choose another folder."
        ) from None
    if newer:
        raise InputError(
            f"--model_dir: a later version of this program wrote {model_dir} (recipe.json has "
            f"format {written}, this version writes {FORMAT}). Use that version, or choose another "
            "folder."
        )
    return settings


def _defaults(dataclass) -> dict:
    """Field -> default as a JSON value, of the fields that have one."""
    fields = dataclasses.fields(dataclass)
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return json.loads(json.dumps(defaults))


def _check_same_settings(model_dir: str, old: dict, new: dict, facts) -> None:
    """Raises `InputError` if a setting that decides the weights differs."""
    differing = {}
    if _found_lanes_earlier(old):
        old = old | {"lanes": new["lanes"]}  # `check_lanes` compares what was found
    if len(old["phases"]) != len(new["phases"]):
        differing["the number of phases"] = len(old["phases"]), len(new["phases"])
    old, new = _flatten(old), _flatten(new)
    for key, value in new.items():
        if key.rpartition(".")[2] in MAY_CHANGE or key == "format" or old.get(key) == value:
            continue
        if key in FOUND_OUT and value is None:
            continue
        # An earlier version did not record a fact that was added later.
        if key in old or key not in facts:
            differing[key] = old.get(key), value
    if differing:
        pairs = ", ".join(f"{key} {a!r} (now {b!r})" for key, (a, b) in differing.items())
        raise InputError(
            f"--model_dir: {model_dir} holds a run with other settings: {pairs}. "
            "Give that run's settings, or another --model_dir."
        )


def _check_known(model_dir: str, old: dict, new: str) -> None:
    """Raises `InputError` if recipe.json has a setting of a later version, which would be lost."""
    known = _flatten(json.loads(new)).keys() | FOUND_OUT.keys()
    unknown = sorted(_flatten(old).keys() - known)
    if unknown:
        raise InputError(
            f"--model_dir: recipe.json in {model_dir} has settings that this version does not "
            f"know: {', '.join(unknown)}. Use the version that wrote it, or choose another folder."
        )


def _flatten(settings: dict) -> dict:
    flat = {key: value for key, value in settings.items() if key != "phases"}
    for i, phase in enumerate(settings["phases"], start=1):
        flat |= {f"phase{i}.{key}": value for key, value in phase.items()}
    return flat
