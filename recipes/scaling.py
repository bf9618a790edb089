"""Scales a recipe to another batch size, by the published rules."""

import dataclasses
import math

from recipes.evidence import scale_by_evidence
from recipes.types import Recipe

RULES = ("sqrt", "linear", "evidence")


def scale_recipe(recipe: Recipe, global_batch_size: int, rule: str = "sqrt") -> Recipe:
    """Returns the recipe for another batch size.

    The number of examples stays the same, except by the rule "evidence".

    With `k = global_batch_size / recipe.phases[0].global_batch_size`:

        sqrt     learning rates times sqrt(k), the same number of warm-up steps
                 (You et al., arXiv:1904.00962, Tables 5 and 6)
        linear   learning rates times k, the same number of warm-up examples
                 (Goyal et al., arXiv:1706.02677, section 2)
        evidence settings and steps between MLPerf's reference runs, where there are such runs of
                 the recipe's model, optimizer and target: see `recipes.evidence`

    `tf_lamb.scale_batch` applies the same rules to a single schedule.

    If phases have different batch sizes, `global_batch_size` is that of the first one, and the
    batch sizes of the others are scaled by the same factor. The end of each phase, counted in
    examples from the start of the run, is rounded to the nearest step; half a step is rounded up.
    The exact number of examples of each phase is kept in `Phase.examples`, so that scaling back
    restores the recipe. `evaluate_every_steps` and `save_every_steps` are scaled to the same number
    of examples.

    Args:
        recipe: A `Recipe`.
        global_batch_size: Integer. Examples per step over all replicas, in the first phase.
        rule: String, `"sqrt"`, `"linear"` or `"evidence"`.

    Returns:
        A `Recipe`.

    Raises:
        ValueError: If the rule is unknown, if the batch size leaves a phase no steps after its
            warm-up, if the batch size of a later phase would not be an integer, or if there is no
            evidence for the recipe or the batch size.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}. Received: rule={rule}.")
    first = recipe.phases[0].global_batch_size
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1. Received: {global_batch_size}.")
    if rule == "evidence":
        return scale_by_evidence(recipe, global_batch_size)
    k = global_batch_size / first
    # As in tf_lamb/batch_scaling.py. tests/tf_lamb/test_batch_scaling.py compares the results.
    rate_factor, warmup_factor = (math.sqrt(k), 1.0) if rule == "sqrt" else (k, 1 / k)
    phases = []
    old_end = 0  # Examples up to the end of the phase in the old recipe, and in the new one.
    new_end = 0
    for phase_index, phase in enumerate(recipe.phases):
        size, remainder = divmod(phase.global_batch_size * global_batch_size, first)
        if remainder:
            raise ValueError(
                f"global_batch_size={global_batch_size} leaves no whole number of examples a "
                f"step for phase {phase_index + 1}, whose batch size is "
                f"{phase.global_batch_size}/{first} of that of phase 1. Use a multiple of "
                f"{first // math.gcd(first, phase.global_batch_size)}."
            )
        examples = phase.examples or phase.steps * phase.global_batch_size
        old_end += examples
        steps = (2 * (old_end - new_end) + size) // (2 * size)
        warmup = round(phase.warmup_steps * warmup_factor)
        if steps <= warmup + round(phase.warmup_from * warmup_factor):
            raise ValueError(
                f"global_batch_size={global_batch_size} leaves {steps} steps for phase "
                f"{phase_index + 1}, and its warm-up takes {warmup}. Use a smaller batch size."
            )
        new_end += steps * size
        phases.append(
            dataclasses.replace(
                phase.stretched(steps, warmup_factor),
                global_batch_size=size,
                peak_learning_rate=phase.peak_learning_rate * rate_factor,
                end_learning_rate=phase.end_learning_rate * rate_factor,
                examples=examples,
            )
        )
    every = recipe.evaluate_every_steps
    return dataclasses.replace(
        recipe,
        phases=tuple(phases),
        evaluate_every_steps=every and max(1, round(every / k)),
        save_every_steps=max(1, round(recipe.save_every_steps / k)),
    )
