"""What a model_dir holds: checkpoints, and the recipe they belong to."""

import dataclasses
import json
import os

import tensorflow as tf

from inputs.errors import InputError

KEPT = 3
# A run may be made longer or shorter on the way; everything else decides what its state means.
MAY_CHANGE = ("steps", "warmup_steps", "save_every_steps", "evaluate_every_steps", "expected")


def make_manager(model_dir, model, optimizer, save_every_steps) -> tf.train.CheckpointManager:
    """Keeps the newest checkpoints of model and optimizer, named by the step."""
    return tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model, optimizer=optimizer),
        model_dir,
        max_to_keep=KEPT,
        step_counter=optimizer.iterations,
        checkpoint_interval=save_every_steps,
    )


def saved_step(model_dir: str) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    newest = tf.train.latest_checkpoint(model_dir)
    return int(newest.rsplit("-", 1)[1]) if newest else 0


def claim(model_dir: str, recipe, **facts) -> None:
    """Makes `model_dir` and writes the recipe as run beside the checkpoints.

    Args:
        model_dir: folder, made if missing.
        recipe: a `tf_lamb.recipes.Recipe`.
        **facts: what else the checkpoints depend on (seed, vocabulary), as JSON values.

    Raises:
        InputError: the folder cannot be written, or holds a run of another recipe.
    """
    path = os.path.join(model_dir, "recipe.json")
    # Through JSON, so that tuples compare equal to the lists they are read back as.
    ours = json.loads(json.dumps(dataclasses.asdict(recipe) | facts))
    try:
        os.makedirs(model_dir, exist_ok=True)
        if tf.train.latest_checkpoint(model_dir):
            _check_same(model_dir, path, ours)
        temporary = path + ".new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(ours, file, indent=2)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"--model_dir: {model_dir} cannot be written ({error.strerror}). Choose another folder."
        ) from None


def _check_same(model_dir: str, path: str, ours: dict) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            theirs = json.load(file)
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"--model_dir: {model_dir} holds checkpoints but no readable recipe.json ({error}). "
            "Choose another folder."
        ) from None
    theirs, wanted = _flat(theirs), _flat(ours)
    differing = [key for key in {**theirs, **wanted} if theirs.get(key) != wanted.get(key)]
    differing = [key for key in differing if key.rpartition(".")[2] not in MAY_CHANGE]
    if differing:
        pairs = ", ".join(f"{k} {theirs.get(k)!r} (now {wanted.get(k)!r})" for k in differing)
        raise InputError(
            f"--model_dir: {model_dir} holds a run with other settings: {pairs}. "
            "Give that run's settings, or another --model_dir."
        )


def _flat(settings: dict) -> dict:
    flat = {key: value for key, value in settings.items() if key != "phases"}
    for number, phase in enumerate(settings["phases"], start=1):
        flat |= {f"phase{number}.{key}": value for key, value in phase.items()}
    return flat
