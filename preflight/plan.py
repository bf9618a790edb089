"""Proposes a batch size, learning rates and steps for a TPU.

    python -m preflight.plan --recipe=NAME --topology=TPU

The batch size is --batch, or else the largest one published for the same model, but at most the
gradient noise scale if that is given. Learning rates and steps follow the paper's scaling rule
(`recipes.scaling`). Memory, accumulation and time come from the pre-flight (`preflight.run`).
"""

import argparse
import dataclasses
import sys

from inputs import process  # isort: split

import recipes
from inputs.errors import InputError
from preflight import run as preflight
from preflight.children import check_installed, show_progress
from preflight.report import format_minutes
from preflight.topology import Topology, parse_topologies
from recipes.types import Recipe
from training.monitor import noise_scale


def family(name: str) -> list[Recipe]:
    """Returns the recipe with this name, or all recipes whose names start with it.

    Args:
        name: such as "bert-large-32k" (one recipe) or "bert-large" (several).

    Raises:
        InputError: no recipe matches, or the matching ones differ in model or optimizer.
    """
    if name in recipes.RECIPES:
        return [recipes.RECIPES[name]]
    members = [recipe for known, recipe in recipes.RECIPES.items() if known.startswith(f"{name}-")]
    kinds = {(recipe.task, recipe.model, recipe.optimizer) for recipe in members}
    if len(kinds) > 1:
        raise InputError(
            f"--recipe={name} matches recipes of several models or optimizers: "
            f"{', '.join(sorted(recipe.name for recipe in members))}. Give one of them, or a "
            "prefix that matches one model and optimizer, such as bert-large or resnet50-lamb."
        )
    return members or [recipes.find_recipe(name)]


def first_batch_size(recipe: Recipe) -> int:
    """Returns the global batch size of the first phase, which scaling refers to."""
    return recipe.phases[0].global_batch_size


def propose_batch(members: list[Recipe], topology: Topology, scale: float | None) -> int:
    """Returns the largest batch published for this model, but at most the noise scale.

    Above the noise scale, training needs more than twice the examples that it needs with a very
    small batch (McCandlish et al., arXiv:1812.06162, section 2.2).

    Args:
        members: recipes of one model and optimizer, from `family`.
        topology: the slice.
        scale: the gradient noise scale in examples; None if it is not known.

    Returns:
        Examples per step, a multiple of the replicas; at least one example per replica.
    """
    task_and_model = (members[0].task, members[0].model)
    published = [r for r in recipes.RECIPES.values() if (r.task, r.model) == task_and_model]
    batch = max(map(first_batch_size, published))
    if scale is not None:
        batch = min(batch, int(scale))
    batch = max(1, batch // topology.replicas) * topology.replicas
    while batch > topology.replicas and any(
        phase.global_batch_size % topology.replicas
        for phase in scale_nearest(members, batch).phases
    ):
        batch -= topology.replicas  # the batches of later phases must be multiples, too
    return batch


def parse_noise_scale(text: str) -> float:
    """Reads `--noise_scale`.

    Args:
        text: a number of examples, or the folder of a run that measured it.

    Returns:
        The noise scale in examples.

    Raises:
        InputError: the text is neither, or the number is not positive and finite.
    """
    try:
        scale = float(text)
    except ValueError:
        return noise_scale.measured(text)
    if not 0 < scale < float("inf"):
        raise InputError(
            f"--noise_scale must be positive and finite. Received: --noise_scale={text}."
        )
    return scale


def scale_nearest(members: list[Recipe], batch: int) -> Recipe:
    """Returns the recipe with the nearest batch size, scaled to `batch` by the square-root rule."""

    def ratio(recipe):
        size = first_batch_size(recipe)
        return max(batch, size) / min(batch, size)

    nearest = min(members, key=ratio)
    if batch == first_batch_size(nearest):
        return nearest
    return recipes.scale_recipe(nearest, batch, "sqrt")


def describe(recipe: Recipe, results) -> str:
    """Returns the proposal as text, one line per phase.

    Args:
        recipe: from `scale_nearest`.
        results: list with a `preflight.run.PhaseResult` for each phase.
    """
    lines = [f"Plan from {recipe.name}, {recipe.optimizer}, {recipe.compute_dtype}"]
    for phase, result in zip(recipe.phases, results, strict=True):
        if result.error:
            lines.append(f"Phase {result.phase}: does not compile: {result.error}")
            continue
        lines.append(
            f"Phase {result.phase}: batch {phase.global_batch_size:,} = "
            f"{result.topology.replicas:,} replicas x {result.replica_batch_size:,}, in "
            f"{result.accumulation} micro-batch(es); {phase.steps:,} steps; learning rate "
            f"{phase.peak_learning_rate:.4g} after {phase.warmup_steps:,} warm-up steps; "
            f"{format_minutes(result.minutes)} estimated"
        )
    minutes = [result.minutes for result in results]
    if None not in minutes:
        lines.append(f"Total: {format_minutes(sum(minutes))} estimated")
    return "\n".join(lines)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: the command's arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="a recipe, or a prefix of several names")
    parser.add_argument("--topology", required=True, help="such as v3:32x32 or v3-2048")
    parser.add_argument("--batch", type=int, help="examples per step over all replicas")
    parser.add_argument(
        "--noise_scale",
        help="upper bound of the batch: examples, or the model_dir of a run that measured it",
    )
    flags = parser.parse_args(arguments)
    try:
        scale = None if flags.noise_scale is None else parse_noise_scale(flags.noise_scale)
        members = family(flags.recipe)
        topologies = parse_topologies(flags.topology, "--topology")
        if len(topologies) > 1:
            raise InputError(f"--topology={flags.topology}: give exactly one topology.")
        (topology,) = topologies
        if flags.batch is not None and flags.batch < 1:
            raise InputError(f"--batch must be at least 1. Received: --batch={flags.batch}.")
        batch = flags.batch or propose_batch(members, topology, scale)
        recipe = dataclasses.replace(scale_nearest(members, batch), compute_dtype="bfloat16")
        for phase in recipe.phases:
            preflight.replica_batch_size(recipe, phase, topology, "--topology", "--batch")
        check_installed()
        with show_progress(_print_line, total=len(recipe.phases)) as progress:
            results = preflight.examine(recipe, [topology], progress=progress, search=True)
    except ValueError as error:
        print(f"preflight.plan: {error}", file=sys.stderr)
        return 1
    print(describe(recipe, results))
    if scale:
        print(
            f"Noise scale: {scale:,.0f} examples. Larger batches gain little. A batch of "
            f"{batch:,} needs {1 + batch / scale:.2f} times the examples of a very small batch and "
            f"{1 + scale / batch:.2f} times the steps of a very large one."
        )
    return int(any(result.error for result in results))


if __name__ == "__main__":
    process.run(main, sys.argv[1:])
