"""Batch warm-up: a recipe whose batch size grows in steps, as phases of the same recipe."""

import dataclasses
import math
from collections.abc import Sequence

from recipes.types import Recipe


def grow_batch(recipe: Recipe, batches: Sequence[int]) -> Recipe:
    """Returns the recipe with its only phase split into one phase for each batch size.

    Each phase has the same number of examples, up to rounding, and together they have as many as
    before. As a function of the number of examples, the learning rate of a phase is that of the
    recipe times √k, where k is the batch size relative to the recipe's (You et al.,
    arXiv:1904.00962, and, for batch warm-up with Adam, Merrill et al., arXiv:2505.23971). Slots are
    kept from one phase to the next. The warm-up of the rate must end in the first phase. The run is
    evaluated after as many examples as before; checkpoints stay a number of steps apart.

    Change fields of the phase, such as its learning rate, before this: `override` would give all
    phases the same value. `train.py --grow_batch` does so with `--set`, except for fields such as
    `phase2.peak_learning_rate`.

    Args:
        recipe: A `Recipe` with one phase and a linear decay.
        batches: The batch sizes, in the order of training.

    Raises:
        ValueError: If the recipe has several phases or another schedule, if a batch size is less
            than 1, if the decay would begin after the last step, or if a phase would have no steps
            after the warm-up.
    """
    if len(recipe.phases) != 1:
        raise ValueError(
            f"the batch can grow in a recipe of one phase. {recipe.name} has {len(recipe.phases)}."
        )
    (phase,) = recipe.phases
    if phase.power != 1.0 or phase.decay_steps:
        raise ValueError(
            f"the batch can grow in a recipe with a linear decay. Received: power={phase.power:g}, "
            f"decay_steps={list(phase.decay_steps)}."
        )
    if not batches or min(batches) < 1:
        raise ValueError(f"batch sizes must be at least 1. Received: {list(batches)}.")
    size = phase.global_batch_size
    examples = phase.examples or phase.steps * size
    decay_from = phase.decay_from
    if decay_from is None:
        decay_from = phase.warmup_steps + phase.warmup_from
    if decay_from >= phase.steps:
        raise ValueError(
            f"the decay must begin before the end of the phase. Received: {phase.steps} steps, "
            f"warmup_steps={phase.warmup_steps}, decay_from={phase.decay_from}."
        )

    def rate(seen):
        """The recipe's rate after the warm-up, once `seen` examples were seen."""
        left = (phase.steps - seen / size) / (phase.steps - decay_from)
        height = phase.peak_learning_rate - phase.end_learning_rate
        return phase.end_learning_rate + height * max(0.0, left)

    phases = []
    seen = 0
    for index, batch in enumerate(batches):
        due = examples * (index + 1) / len(batches)
        steps = round((due - seen) / batch)
        warmup = round(phase.warmup_steps * size / batch) if index == 0 else 0
        warmup_from = round(phase.warmup_from * size / batch) if index == 0 else 0
        if steps <= warmup + warmup_from or steps < 1:
            raise ValueError(
                f"batch size {batch} has {steps} steps, {warmup + warmup_from} of them warm-up. "
                "Give smaller or fewer batch sizes, or a shorter warm-up."
            )
        factor = math.sqrt(batch / size)
        end = seen + steps * batch
        peak = phase.peak_learning_rate if index == 0 else rate(seen)
        phases.append(
            dataclasses.replace(
                phase,
                steps=steps,
                global_batch_size=batch,
                peak_learning_rate=peak * factor,
                end_learning_rate=rate(end) * factor,
                warmup_steps=warmup,
                warmup_from=warmup_from,
                decay_from=phase.decay_from and round(phase.decay_from * size / batch),
                reset_slots=phase.reset_slots and index == 0,
                examples=None,
            )
        )
        if index:
            phases[-1] = dataclasses.replace(phases[-1], decay_from=None)
        seen = end
    every = recipe.evaluate_every_steps
    if every:  # after as many examples as before, whatever the batch size
        recipe = dataclasses.replace(
            recipe, evaluate_every_steps=None, evaluate_every_examples=every * size
        )
    return dataclasses.replace(recipe, phases=tuple(phases))
