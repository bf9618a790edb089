"""A run of two steps, to see that everything can be built, before the long one."""

import dataclasses
import os
import pathlib

from training.monitor.history import HISTORY, read_rows

STEPS = 2  # of each phase: one that compiles, and one that does not


def shortened(recipe):
    """The recipe with two steps of each phase and one batch of each evaluation."""
    phases = tuple(dataclasses.replace(phase, steps=STEPS) for phase in recipe.phases)
    batch = max(phase.global_batch_size for phase in phases)
    return dataclasses.replace(
        recipe, phases=phases, evaluation_examples=batch, evaluate_every_steps=None, profile=None
    )


def in_words(recipe, model_dir: str, export_dir: str) -> str:
    """What the shortened recipe's run, in `model_dir`, has shown."""
    lines = [f"Dry run    {recipe.name}: trained, saved, evaluated and exported; nothing is kept"]
    history = read_rows(os.path.join(model_dir, HISTORY))
    for number, phase in enumerate(recipe.phases, start=1):
        rows = [row for row in history if row["phase"] == number]
        first, second = (phase.global_batch_size / row["examples_per_second"] for row in rows)
        lines.append(
            f"Phase {number}    first step {first:.1f} s, compiled in it; second {second:.3f} s; "
            f"loss {rows[0]['loss']:.4f}, {rows[1]['loss']:.4f}"
        )
    files = (path for path in pathlib.Path(export_dir).rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    return "\n".join([*lines, f"SavedModel {size / 1e6:.1f} MB"])
