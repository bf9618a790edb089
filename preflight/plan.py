"""Proposes batch, rate and steps for a TPU: python -m preflight.plan --recipe=NAME --topology=TPU

The batch size comes from --batch, or is the largest that a published recipe of the same model
has; a gradient noise scale bounds it. Rates and steps follow by the paper's rule
(`recipes.scaling`), memory, accumulation and time from the pre-flight (`preflight.run`).
"""

import argparse
import dataclasses
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: its start-up notices

import recipes
from inputs.errors import InputError
from preflight import run as preflight
from preflight.topology import Topology, parse_topologies
from recipes.types import Recipe
from training.monitor import noise_scale


def family(name: str) -> list[Recipe]:
    """The recipe of that name, or those whose names begin with it: "bert-large" has several.

    Raises:
        InputError: none, or they are of several models or optimizers.
    """
    if name in recipes.RECIPES:
        return [recipes.RECIPES[name]]
    members = [recipe for known, recipe in recipes.RECIPES.items() if known.startswith(f"{name}-")]
    kinds = {(recipe.task, recipe.model, recipe.optimizer) for recipe in members}
    if len(kinds) > 1:
        raise InputError(
            f"--recipe={name} is the beginning of recipes of several models or optimizers: "
            f"{', '.join(sorted(recipe.name for recipe in members))}. Name one of them, or a "
            "family of one kind, such as bert-large or resnet50-lamb."
        )
    return members or [recipes.find_recipe(name)]


def batch_of(recipe: Recipe) -> int:
    """The first phase's, by which recipes are scaled."""
    return recipe.phases[0].global_batch_size


def proposed_batch(members: list[Recipe], topology: Topology, noise_scale: float | None) -> int:
    """The largest batch that is published for this model, and not above the noise scale, but at
    least one example a replica.

    Beyond a batch as large as the noise scale, half of what more data parallelism adds is wasted
    (McCandlish et al., arXiv:1812.06162, section 2.2).
    """
    kind = members[0].task, members[0].model
    published = [r for r in recipes.RECIPES.values() if (r.task, r.model) == kind]
    batch = max(map(batch_of, published))
    if noise_scale is not None:
        batch = min(batch, int(noise_scale))
    batch = max(1, batch // topology.replicas) * topology.replicas
    while batch > topology.replicas and any(
        phase.global_batch_size % topology.replicas for phase in planned(members, batch).phases
    ):
        batch -= topology.replicas  # the later phases' batches are to divide, too
    return batch


def given_noise_scale(text: str) -> float:
    """Examples, from `--noise_scale`.

    Raises:
        InputError: it is neither a positive number nor the folder of a run that measured it.
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


def planned(members: list[Recipe], batch: int) -> Recipe:
    """The member with the nearest batch size, scaled by the square root to `batch`."""
    nearest = min(members, key=lambda r: max(batch, batch_of(r)) / min(batch, batch_of(r)))
    return nearest if batch == batch_of(nearest) else recipes.scale_recipe(nearest, batch, "sqrt")


def in_words(recipe: Recipe, findings) -> str:
    """The proposal, phase by phase."""
    lines = [f"Plan from {recipe.name}, {recipe.optimizer}, {recipe.compute_dtype}"]
    for phase, finding in zip(recipe.phases, findings, strict=True):
        if finding.error:
            lines.append(f"Phase {finding.phase}: does not compile: {finding.error}")
            continue
        lines.append(
            f"Phase {finding.phase}: batch {phase.global_batch_size:,} = "
            f"{finding.topology.replicas:,} replicas x {finding.replica_batch_size:,}, in "
            f"{finding.accumulation} micro-batch(es); {phase.steps:,} steps, rate "
            f"{phase.peak_learning_rate:.4g} after {phase.warmup_steps:,} of warm-up; "
            f"{finding.minutes:,.1f} minutes estimated"
        )
    minutes = [finding.minutes for finding in findings]
    if None not in minutes:
        lines.append(f"In all: {sum(minutes):,.1f} minutes estimated")
    return "\n".join(lines)


def main(arguments) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="a recipe, or what several begin with")
    parser.add_argument("--topology", required=True, help="v3:32x32 or v3-2048")
    parser.add_argument("--batch", type=int, help="examples per step over all replicas")
    parser.add_argument(
        "--noise_scale",
        help="examples, or the model_dir of a run that measured it; bounds the batch",
    )
    flags = parser.parse_args(arguments)
    try:
        scale = None if flags.noise_scale is None else given_noise_scale(flags.noise_scale)
        members = family(flags.recipe)
        topologies = parse_topologies(flags.topology, "--topology")
        if len(topologies) > 1:
            raise InputError(f"--topology={flags.topology}: a plan is for one topology. Give one.")
        (topology,) = topologies
        if flags.batch is not None and flags.batch < 1:
            raise InputError(f"--batch must be at least 1. Received: --batch={flags.batch}.")
        batch = flags.batch or proposed_batch(members, topology, scale)
        recipe = dataclasses.replace(planned(members, batch), compute_dtype="bfloat16")
        for phase in recipe.phases:
            preflight.replica_batch_size(recipe, phase, topology, "--topology", "--batch")
        preflight.check_installed()
        findings = preflight.findings_of(
            recipe, [topology], log=lambda line: print(line, file=sys.stderr), search=True
        )
    except ValueError as error:
        print(f"preflight.plan: {error}", file=sys.stderr)
        return 1
    print(in_words(recipe, findings))
    if scale:
        print(
            f"Noise scale {scale:,.0f} examples: up to about that batch more data parallelism "
            f"pays. A batch of {batch:,} needs {1 + batch / scale:.2f} times the examples of a "
            f"very small one, in {1 + scale / batch:.2f} times the steps of a very large one."
        )
    return int(any(finding.error for finding in findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
