"""A recipe at another batch size, by the published rules."""

import dataclasses
import math

from recipes.types import Recipe

RULES = ("sqrt", "linear")


def scale_recipe(recipe: Recipe, global_batch_size: int, rule: str = "sqrt") -> Recipe:
    """The recipe at another batch size, over the same number of examples.

    With k = `global_batch_size` / (the first phase's batch size):

        sqrt     rates times √k, warm-up of the same number of steps
                 (You et al., arXiv:1904.00962, Tables 5 and 6)
        linear   rates times k, warm-up of the same number of examples
                 (Goyal et al., arXiv:1706.02677, section 2)

    Where phases have different batch sizes, `global_batch_size` is the first one's, and the
    others keep their proportion to it. A phase ends with the step that is nearest to the number
    of examples that it is to end at, counted from the start of the run; half a step counts as
    one. The exact numbers are kept with the phases, so that scaling there and back changes
    nothing. `evaluate_every_steps` and `save_every_steps` keep their number of examples.

    Args:
        recipe: any recipe.
        global_batch_size: examples per step, over all replicas.
        rule: "sqrt" or "linear".

    Raises:
        ValueError: an unknown rule, a batch size that leaves a phase with fewer steps than its
            warm-up has, or one that is no whole number for a later phase.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}. Received: rule={rule}.")
    first = recipe.phases[0].global_batch_size
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1. Received: {global_batch_size}.")
    k = global_batch_size / first
    rate_factor, warmup_factor = (math.sqrt(k), 1.0) if rule == "sqrt" else (k, 1 / k)
    phases, planned, done = [], 0, 0
    for number, phase in enumerate(recipe.phases, start=1):
        size, rest = divmod(phase.global_batch_size * global_batch_size, first)
        examples = phase.examples or phase.steps * phase.global_batch_size
        planned += examples
        steps = (2 * (planned - done) + size) // (2 * size) if size else 0
        warmup = round(phase.warmup_steps * warmup_factor)
        if rest:
            raise ValueError(
                f"global_batch_size={global_batch_size} leaves no whole number of examples a "
                f"step for phase {number}, whose batch is {phase.global_batch_size}/{first} of "
                "the first one's. Take a multiple of "
                f"{first // math.gcd(first, phase.global_batch_size)}."
            )
        if steps <= warmup:
            raise ValueError(
                f"global_batch_size={global_batch_size} leaves {steps} steps for phase {number}, "
                f"and its warm-up takes {warmup}. Take a smaller batch."
            )
        done += steps * size
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
