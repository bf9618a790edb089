"""A recipe at another batch size, by the published rules."""

import dataclasses
import math

from recipes.types import Recipe

RULES = ("sqrt", "linear")


def scale_recipe(recipe: Recipe, global_batch_size: int, rule: str = "sqrt") -> Recipe:
    """Returns the recipe at another batch size, over the same number of examples.

    With `k = global_batch_size / recipe.phases[0].global_batch_size`:

        sqrt     rates times sqrt(k), warm-up of the same number of steps
                 (You et al., arXiv:1904.00962, Tables 5 and 6)
        linear   rates times k, warm-up of the same number of examples
                 (Goyal et al., arXiv:1706.02677, section 2)

    `tf_lamb.scale_batch` is the same rule for one schedule outside of recipes.

    If phases have different batch sizes, `global_batch_size` is that of the first one, and the
    others keep their proportion to it. Each phase ends at the step nearest to the number of
    examples, counted from the start of the run, at which it should end; half a step is rounded up.
    Each phase keeps its exact number of examples, so that scaling there and back changes nothing.
    `evaluate_every_steps` and `save_every_steps` keep their number of examples.

    Args:
        recipe: `recipes.types.Recipe`.
        global_batch_size: Integer. Examples per step over all replicas, in the first phase.
        rule: String, `"sqrt"` or `"linear"`.

    Raises:
        ValueError: The rule is unknown, the batch size leaves a phase no steps after its warm-up,
            or the batch size of a later phase would not be an integer.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}. Received: rule={rule}.")
    first = recipe.phases[0].global_batch_size
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1. Received: {global_batch_size}.")
    k = global_batch_size / first
    # As in tf_lamb/batch_scaling.py; tests/tf_lamb/test_batch_scaling.py compares the two.
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
