"""Proposes a batch size, learning rates and steps for a TPU, and says where each number comes from.

    python -m preflight.plan --recipe=NAME --topology=TPU

Where there are reference runs of the recipe's model, optimizer and target (MLPerf's BERT and
ResNet-50), numbers are interpolated between them (`recipes.evidence`), and the command draws time
and examples to the target over the number of chips. Elsewhere, learning rates and steps follow the
paper's scaling rule (`recipes.scaling`). The batch size is --batch. Without it, it is the critical
batch size of the evidence, or the largest one published for the same model, optimizer, target and
sequence lengths; but at most the gradient noise scale, if that is given. Memory, accumulation and
time come from the pre-flight (`preflight.run`).
"""

import argparse
import dataclasses
import math
import sys

from inputs import process  # isort: split

import recipes
from inputs.errors import InputError, refuse_below
from inputs.storage.files import check_file_writable
from preflight import curve as curves
from preflight import run as preflight
from preflight.compiler.children import check_installed, show_progress
from preflight.compiler.topology import Topology, parse_topologies
from preflight.report import format_minutes
from recipes.evidence import Evidence, Prediction, find_evidence, kind_of
from recipes.types import Recipe
from training.monitor import noise_scale

SMALL_ERROR = 0.1  # of a learning rate, below which no other rates need be tried


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


def propose_batch(
    members: list[Recipe], topology: Topology, scale: float | None, rule: str = "sqrt"
) -> tuple[int, str]:
    """Returns the largest batch published for runs like these, but at most the noise scale.

    Runs are alike if they have the same task, model, optimizer, target and sequence lengths. Above
    the noise scale, training needs more than twice the examples that it needs with a very small
    batch (McCandlish et al., arXiv:1812.06162, section 2.2).

    Args:
        members: recipes of one model and optimizer, from `family`.
        topology: the slice.
        scale: the gradient noise scale in examples; None if it is not known.
        rule: the rule by which the recipes will be scaled, "sqrt" or "linear".

    Returns:
        A tuple of the examples per step, a multiple of the replicas with at least one example per
        replica, and of where this number comes from.

    Raises:
        InputError: one example per replica is too large a batch for the recipes.
    """
    kinds = {kind_of(member) for member in members}
    alike = [recipe for recipe in recipes.RECIPES.values() if kind_of(recipe) in kinds]
    published = sorted({*map(first_batch_size, alike)}, reverse=True)
    usable = next((batch for batch in published if _can_scale(members, batch, rule)), published[-1])
    limit = f"the largest one published for this model and optimizer, {usable:,}"
    source = limit
    if usable < published[0]:
        source += ", of those that leave this recipe steps after its warm-up"
    wanted = usable
    if scale is not None and scale < usable:
        wanted = int(scale)
        limit = f"the noise scale, {scale:,.0f}"
        source = f"at most {limit}"
    batch = wanted // topology.replicas * topology.replicas
    if batch < topology.replicas:
        batch = topology.replicas
        source = f"one example per replica, which is above {limit}"
        try:
            scale_nearest(members, batch, rule)
        except ValueError as error:
            reason = str(error).removesuffix(" Use a smaller batch size.")
            raise InputError(
                f"--topology={topology.name}: with one example per replica, {reason} Give a "
                "smaller slice, or another recipe."
            ) from None
    while batch > topology.replicas and any(
        phase.global_batch_size % topology.replicas
        for phase in scale_nearest(members, batch, rule).phases
    ):
        batch -= topology.replicas  # the batches of later phases must be multiples, too
    return batch, source


def _can_scale(members, batch, rule):
    try:
        scale_nearest(members, batch, rule)
    except ValueError:
        return False
    return True


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
        try:
            return noise_scale.measured(text)
        except InputError as error:
            raise InputError(f"--noise_scale: {error}") from None
    if not 0 < scale < float("inf"):
        raise InputError(
            f"--noise_scale must be positive and finite. Received: --noise_scale={text}."
        )
    return scale


def scale_nearest(members: list[Recipe], batch: int, rule: str = "sqrt") -> Recipe:
    """Returns the recipe with the nearest batch size, scaled to `batch` by a rule."""

    def ratio(recipe):
        size = first_batch_size(recipe)
        return max(batch, size) / min(batch, size)

    nearest = min(members, key=ratio)
    if batch == first_batch_size(nearest):
        return nearest
    return recipes.scale_recipe(nearest, batch, rule)


def propose_batch_by_evidence(
    evidence: Evidence, topology: Topology, scale: float | None
) -> tuple[int, str]:
    """Returns the critical batch size of the evidence, but at most the noise scale.

    At the critical batch size, training needs twice the examples that it needs with a very small
    batch.

    Args:
        evidence: the reference runs.
        topology: the slice.
        scale: the gradient noise scale in examples; None if it is not known.

    Returns:
        A tuple of the examples per step, a multiple of the replicas within the evidence, and of
        where this number comes from.

    Raises:
        InputError: no multiple of the replicas is within the evidence.
    """
    low, high = evidence.batches
    _, critical = evidence.fit()
    largest = high // topology.replicas * topology.replicas
    if largest < low:
        raise InputError(
            f"--topology={topology.name} has {topology.replicas:,} replicas, and the evidence for "
            f"{evidence.subject} goes from batch {low:,} to {high:,}. Give a slice of which a "
            "multiple of the replicas is in this range."
        )
    wanted = critical
    limit = f"critical batch size of the reference points, {critical:,.0f}"
    source = limit
    if scale is not None and scale < critical:
        wanted = scale
        limit = f"noise scale, {scale:,.0f}"
        source = f"at most the {limit}"
    smallest = -(-low // topology.replicas) * topology.replicas
    batch = int(wanted) // topology.replicas * topology.replicas
    if batch < smallest == topology.replicas:
        source = f"one example per replica, which is above the {limit}"
    elif batch < smallest:
        source = f"the smallest of the evidence, {smallest:,}, which is above the {limit}"
    elif batch > largest:
        source = f"the largest of the evidence, {largest:,}, which is below the {limit}"
    return min(max(batch, smallest), largest), source


@dataclasses.dataclass(frozen=True)
class Plan:
    """A proposal and where it comes from.

    Attributes:
        recipe: The recipe, for the proposed batch size.
        batch_source: Where the batch size comes from.
        source: Where learning rate, warm-up, decay, moments and steps come from.
        evidence: The evidence, or None if a rule was used.
        prediction: What the evidence says of the batch size, or None.
    """

    recipe: Recipe
    batch_source: str
    source: str
    evidence: Evidence | None = None
    prediction: Prediction | None = None


def make_plan(
    members: list[Recipe],
    topology: Topology,
    *,
    batch: int | None = None,
    scale: float | None = None,
    rule: str = "auto",
    examples: int | None = None,
) -> Plan:
    """Proposes batch size, learning rates and steps.

    Args:
        members: recipes of one model and optimizer, from `family`.
        topology: the slice.
        batch: examples per step; None to choose them.
        scale: the gradient noise scale in examples; None if it is not known.
        rule: "evidence", "sqrt" or "linear"; or "auto" for the evidence where there is some, else
            "sqrt".
        examples: examples to train on in all, instead of those of the recipe; None to keep them.
            The evidence says itself how many the target needs.

    Raises:
        InputError: the topology does not suit the evidence, or is too large for the recipe.
        ValueError: the batch is outside the evidence, or there is none, or a rule leaves no steps.
    """
    evidence = find_evidence(members[0]) if rule in ("auto", "evidence") else None
    if rule == "evidence" and evidence is None:
        recipes.scale_recipe(members[0], batch or first_batch_size(members[0]), rule)  # raises
    rule = "sqrt" if rule == "auto" else rule
    batch_source = "--batch"
    if batch is None and evidence:
        batch, batch_source = propose_batch_by_evidence(evidence, topology, scale)
    elif batch is None:
        batch, batch_source = propose_batch(members, topology, scale, rule)
    if evidence:
        prediction = evidence.predict(batch)
        recipe = recipes.scale_recipe(members[0], batch, "evidence")
        return Plan(recipe, batch_source, prediction.source, evidence, prediction)
    recipe = scale_nearest(members, batch, rule)
    if examples is not None:
        recipe = recipes.resized(recipe, steps=max(1, round(examples / batch)))
    source = f"{recipe.name}: {recipe.reference}"
    if batch != first_batch_size(recipes.find_recipe(recipe.name)):
        formula = {"sqrt": "paper's rule, the square root", "linear": "linear rule, the ratio"}[
            rule
        ]
        source += f"; scaled by the {formula} of the batch sizes, which no run at this size checks"
    return Plan(recipe, batch_source, source)


def describe_error(error: float) -> str:
    """Returns how well the evidence knows the learning rate, for a relative error."""
    basis = "the larger error of the two points, each predicted from the others"
    if error <= SMALL_ERROR:
        return f"known to {math.ceil(100 * error)}%, {basis}"
    return f"known to a factor of {1 + error:.2g} only, {basis}; try some around it"


def describe(plan: Plan, results, examples: int | None = None) -> str:
    """Returns the proposal as text: the numbers, and where each comes from.

    Args:
        plan: from `make_plan`.
        results: list with a `preflight.run.PhaseResult` for each phase.
        examples: number of training examples, to say how often they are repeated; None if unknown.
    """
    recipe = plan.recipe
    prediction = plan.prediction
    lines = [f"Plan from {recipe.name}, {recipe.optimizer}, {recipe.compute_dtype}"]
    for phase, result in zip(recipe.phases, results, strict=True):
        if result.error:
            lines.append(f"Phase {result.phase}: does not compile: {result.error}")
            continue
        lines.append(
            f"Phase {result.phase}: batch {phase.global_batch_size:,} = "
            f"{result.topology.replicas:,} replicas x {result.replica_batch_size:,}, in "
            f"{result.accumulation} micro-batch(es); {phase.steps:,} steps; learning rate "
            f"{phase.peak_learning_rate:.4g} after {phase.warmup_steps:,} warm-up steps"
            f"{f' from step {phase.warmup_from}' if phase.warmup_from else ''}; "
            f"{format_minutes(result.minutes)} estimated"
        )
        if result.search_error:
            lines.append(f"The search for a larger batch ended early: {result.search_error}")
    minutes = [result.minutes for result in results]
    lines.append(f"Batch: {plan.batch_source}")
    lines.append(f"Rate, warm-up, steps: {plan.source}")
    names = ("beta_1", "beta_2") if recipe.optimizer == "lamb" else ("momentum",)
    settings = ", ".join(f"{name} {getattr(recipe, name):.5g}" for name in names)
    lines.append(f"Settings: {settings}, weight_decay {recipe.weight_decay:.5g}; the same source")
    if prediction:
        if prediction.rate_error:
            lines.append(f"Learning rate: {describe_error(prediction.rate_error)}")
        lines.append(
            f"To the target: {prediction.examples / 1e6:,.2f} million {plan.evidence.unit} "
            f"({prediction.low / 1e6:,.2f} to {prediction.high / 1e6:,.2f}), {prediction.steps:,} "
            "steps"
        )
        if examples:
            lines.append(f"Data: {prediction.examples / examples:.3g} times {examples:,} examples")
    (seconds, *_) = [result.time.step if result.time else None for result in results]
    if None not in minutes and prediction:
        batch = first_batch_size(recipe)
        low, middle, high = (
            math.ceil(n / batch) * seconds / 60
            for n in (prediction.low, prediction.examples, prediction.high)
        )
        lines.append(
            f"Time to the target: {middle:,.2f} minutes estimated ({low:,.2f} to {high:,.2f} by "
            f"the interval of the {plan.evidence.unit}); step {seconds:.3g} s by the pre-flight, a "
            "lower bound"
        )
    elif None not in minutes:
        lines.append(f"Total: {format_minutes(sum(minutes))} estimated by the pre-flight")
    return "\n".join(lines)


def describe_curve(points) -> str:
    """Returns a table of `preflight.curve.Point`s, and the point beyond which chips do not pay."""
    lines = ["chips   batch     million examples        steps   minutes"]
    for point in points:
        found = point.prediction
        span = f"({found.low / 1e6:,.2f} to {found.high / 1e6:,.2f})"
        lines.append(
            f"{point.topology.chips:<7,} {point.batch:<9,} {found.examples / 1e6:<6,.2f} "
            f"{span:<17}{found.steps:<7,} {point.minutes():,.3g}"
        )
    end = curves.pays_until(points)
    if end is points[-1]:
        lines.append(f"Up to {end.topology.chips:,} chips, twice as many save a tenth or more.")
    else:
        lines.append(
            f"From {end.topology.chips:,} chips on, twice as many save less than a tenth of the "
            "time."
        )
    return "\n".join(lines)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: the command's arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python -m preflight.plan", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--recipe", required=True, help="a recipe, or a prefix of several names")
    parser.add_argument("--topology", required=True, help="such as v3:32x32 or v3-2048")
    parser.add_argument("--batch", type=int, help="examples per step over all replicas")
    parser.add_argument(
        "--noise_scale",
        help="upper bound of the batch: examples, or the model_dir of a run that measured it",
    )
    parser.add_argument(
        "--rule",
        choices=("auto", *recipes.scaling.RULES),
        default="auto",
        help="where the settings come from; auto: the evidence where there is some, else sqrt",
    )
    parser.add_argument(
        "--examples",
        type=int,
        help="number of training examples: with evidence, the size of the training set; otherwise, "
        "the batch size times the steps of the run",
    )
    parser.add_argument(
        "--picture", help="a PNG of time and examples to the target over the chips (evidence only)"
    )
    flags = parser.parse_args(arguments)
    try:
        scale = None if flags.noise_scale is None else parse_noise_scale(flags.noise_scale)
        members = family(flags.recipe)
        topologies = parse_topologies(flags.topology, "--topology")
        if len(topologies) > 1:
            raise InputError(f"--topology={flags.topology}: give exactly one topology.")
        (topology,) = topologies
        refuse_below(1, batch=flags.batch, examples=flags.examples)
        if flags.picture:
            check_file_writable(flags.picture, f"--picture={flags.picture}")
        plan = make_plan(
            members,
            topology,
            batch=flags.batch,
            scale=scale,
            rule=flags.rule,
            examples=flags.examples,
        )
        if flags.picture and not plan.evidence:
            raise InputError(
                f"--picture: there is no evidence for {members[0].name}, so nothing to draw. Leave "
                "--picture out, or choose a recipe of the family mlperf-bert or mlperf-resnet50."
            )
        plan = dataclasses.replace(
            plan, recipe=dataclasses.replace(plan.recipe, compute_dtype="bfloat16")
        )
        for phase in plan.recipe.phases:
            preflight.replica_batch_size(plan.recipe, phase, topology, "--topology", "--batch")
        check_installed()
        with show_progress(_print_line, total=len(plan.recipe.phases)) as progress:
            results = preflight.examine(plan.recipe, [topology], progress=progress, search=True)
        print(describe(plan, results, flags.examples))
        if plan.evidence and results[0].time:
            model = curves.StepModel.from_result(results[0])
            points = curves.curve(plan.evidence, model, topology)
            print(describe_curve(points))
            if flags.picture:
                curves.draw(plan.evidence, points, flags.picture)
    except (ValueError, OSError) as error:
        print(f"preflight.plan: {error}", file=sys.stderr)
        return 1
    batch = first_batch_size(plan.recipe)
    if scale:
        print(
            f"Noise scale: {scale:,.0f} examples. Larger batches gain little. A batch of "
            f"{batch:,} needs {1 + batch / scale:.2f} times the examples of a very small batch and "
            f"{1 + scale / batch:.2f} times the steps of a very large one."
        )
    return int(any(result.error for result in results))


if __name__ == "__main__":
    process.run(main, sys.argv[1:])
