"""Writes docs/results/preflight.md: estimates for the recipes, next to the published times.

    python -m preflight.document [RECIPE... --output=FILE]

`make preflight` runs it for all recipes. With names it writes a page of those recipes only, into
another file. The page is written at the end, but what was compiled is kept in
~/.cache/tf_lamb/preflight: a command that was stopped resumes from there.
"""

import argparse
import datetime
import math
import pathlib
import sys

from inputs import process  # isort: split

import recipes
from inputs.errors import InputError
from inputs.storage.files import atomic_write, check_file_writable
from preflight import estimate
from preflight import run as preflight
from preflight.compiler.children import REQUIRED_VERSIONS, check_installed, show_progress
from preflight.compiler.topology import parse_topologies
from preflight.report import LEGEND
from recipes import mlperf

PATH = pathlib.Path(__file__).parents[1] / "docs/results/preflight.md"
# The pod that each recipe was published on or is meant for. The paper's other batch sizes are not
# listed: a replica gets 16 examples with all of them, and so runs the program of bert-large-32k.
PODS = {
    "bert-mini-demo": "v3:2x2",
    "bert-mini": "v3:2x2",
    "bert-base": "v3:4x4",
    "bert-large-32k": "v3:32x32",
    "bert-large-64k-32k": "v3:32x32",
    "nvlamb-64k-32k": "v3:32x32",
    "mlperf-v0.7": "v3:32x32",
    "squad-large": "v3:2x2",
    "squad-base": "v3:2x2",
    "resnet50-lamb-32k": "v3:32x32",
    "resnet50-lamb-author-32k": "v3:32x32",
    "resnet50-lars-32k": "v3:32x32",
    "resnet50-lars-65536": "v3:32x32",
    "resnet50-momentum-8k": "v3:16x16",
    "resnet50-adamw-16k": "v3:16x32",
    "resnet50-adagrad-16k": "v3:16x32",
}
PODS |= {r.recipe.name: r.topology for r in mlperf.RESULTS if r.topology} | PODS
# Recipes whose largest batch is searched for. A search takes several compilations per phase.
SEARCHED = ("bert-mini-demo", "bert-mini", "bert-large-64k-32k")
# Minutes on 1,024 v3 chips: arXiv:1904.00962v3, Table 1; MLPerf Training v0.6, Google, ResNet.
PUBLISHED = {"bert-large-32k": 101.2, "bert-large-64k-32k": 76.19, "resnet50-lars-32k": 76.9 / 60}
# Columns of the same table with 16 examples per replica: global batch size, topology, minutes.
COLUMNS = (
    (512, "v3:4x4", 82.8 * 60),
    (1_024, "v3-64", 43.2 * 60),
    (2_048, "v3-128", 21.4 * 60),
    (4_096, "v3-256", 693.6),
    (8_192, "v3-512", 390.5),
    (16_384, "v3-1024", 200.0),
    (32_768, "v3-2048", 101.2),
)
HEAD = (
    "| recipe | phase | TPU | examples per replica | largest that fits | GiB of HBM | TFLOP | "
    "HBM, GB | all memories, GB | work, ms | by | compiler, ms | update, ms | floats per parameter "
    "| by the compiler | all-reduce, ms | step, ms | of peak | minutes |\n|" + "---|" * 19
)
GAPS = """
The estimates are below the published times, because they assume that each operation and each link
runs at its peak rate, and leave out everything around the step. They are a lower bound on the time,
not a prediction of what was measured in 2019. For BERT, the last column is the share of the peak
that the chips reached in the published time. Part of the gap is due to the XLA of that time, and
part is outside the step (input, checkpoints, evaluation, waiting for the slowest of 2,048
replicas). The paper gives no figures that separate them. For ResNet-50, MLPerf's time includes the
evaluations and the first pass over the data.

The scaling is better than the published one, which falls to 76.7 %, because the model does not
contain replicas that wait for each other. It is above 100 % for the two largest slices: a mesh has
wrap-around links only in a dimension as long as the pod, so these slices have more links for the
same all-reduce.

No constant was fitted to close these gaps."""

MLPERF_GAPS = """
The steps are those to the mean number of examples at which the runs reached the target. The
published time is from the start of the run to the target, with the evaluations and the first pass
over the data."""


def format_row(name: str, result) -> str:
    """Returns the table row of one phase of a recipe.

    Args:
        name: the recipe.
        result: its `PhaseResult`.
    """
    start = f"| {name} | {result.phase} | {result.topology.name} | {result.replica_batch_size}"
    if result.error:
        return f"{start} | does not compile: {result.error}" + " |" * 15
    program = result.program
    time = result.time
    if result.accumulation > 1:
        start += f" / {result.accumulation}"
    largest = result.largest or "-"
    if result.search_error:
        largest = f"at least {largest}" if result.largest else "the search failed"
    values = (
        largest,
        f"{program['hbm_bytes'] / 2**30:.2f}",
        f"{program['flops'] / 1e12:.3g}",
        f"{program['main_bytes'] / 1e9:.3g}",
        f"{program['bytes_accessed'] / 1e9:.3g}",
        f"{1e3 * time.work:.3g}",
        time.source,
        f"{1e3 * time.compiler:.3g}",
        f"{1e3 * time.update:.3g}",
        f"{result.floats_per_parameter:.2f}",
        f"{result.compiler_floats_per_parameter:.2f}",
        f"{1e3 * time.all_reduce:.3g}",
        f"{1e3 * time.step:.3g}",
        f"{result.utilization:.0%}",
        f"{result.minutes:.3g}",
    )
    return f"{start} | {' | '.join(map(str, values))} |"


def published_table(results_of: dict) -> list[str]:
    """Returns the lines of the table of whole recipes next to the published times.

    Args:
        results_of: recipe name -> list of `PhaseResult`.

    Returns:
        The lines; an empty list if no published recipe compiles.
    """
    lines = [
        "| recipe | estimated minutes | published | estimated / published | estimated share of the "
        "peak FLOP/s | share in the published time |",
        "|---|---|---|---|---|---|",
    ]
    for name, published in PUBLISHED.items():
        results = results_of.get(name, ())
        if results and not any(result.error for result in results):
            total = sum(result.minutes for result in results)
            busy = sum(result.minutes * result.utilization for result in results)
            lines.append(
                f"| {name} | {total:.3g} | {published:.4g} | {total / published:.0%} | "
                f"{busy / total:.0%} | {busy / published:.0%} |"
            )
    return lines if len(lines) > 2 else []


def mlperf_table(results_of: dict) -> list[str]:
    """Returns the lines of the table of MLPerf's results whose own systems are slices.

    Args:
        results_of: recipe name -> list of `PhaseResult`.

    Returns:
        The lines; an empty list if no such recipe compiles.
    """
    lines = [
        "| recipe | round | system | examples to the target | steps | estimated minutes | "
        "published | estimated / published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for published in mlperf.RESULTS:
        results = results_of.get(published.recipe.name, ())
        # Some systems are larger than any slice; their recipes are compiled for another one.
        if published.topology and published.examples and results and not results[0].error:
            (result,) = results
            steps = math.ceil(published.examples / result.global_batch_size)
            minutes = steps * result.time.step / 60
            lines.append(
                f"| {published.recipe.name} | {published.round} | {published.system} | "
                f"{published.examples:,.0f} | {steps:,} | {minutes:.3f} | {published.minutes} | "
                f"{minutes / published.minutes:.0%} |"
            )
    return lines if len(lines) > 2 else []


def scaling_table(results) -> list[str]:
    """Returns the lines of the table of the paper's columns, all with 16 examples per replica.

    Args:
        results: list of `PhaseResult` of bert-large-32k, whose program all columns run; may be
            empty.

    Returns:
        The lines; an empty list if there are no results, if a phase does not compile, or if a
        replica gets another number of examples.
    """
    if not results:
        return []
    lines = [
        "| batch | chips | estimated minutes | published | estimated speed-up | published |",
        "|---|---|---|---|---|---|",
    ]
    smallest = None
    for batch, name, published in COLUMNS:
        (topology,) = parse_topologies(name)
        minutes = 0.0
        for result in results:
            if result.error or result.replica_batch_size != 16:
                return []
            time = estimate.step_time(
                topology, result.program, result.update, 1, result.gradient_bytes
            )
            steps = result.steps * result.global_batch_size / batch
            minutes += steps * time.step / 60
        smallest = smallest or (minutes, published, topology.chips)
        smallest_minutes, smallest_published, smallest_chips = smallest
        ideal = topology.chips / smallest_chips
        estimated_speedup = smallest_minutes / minutes
        published_speedup = smallest_published / published
        lines.append(
            f"| {batch:,} | {topology.chips:,} | {minutes:,.0f} | {published:,.1f} | "
            f"{estimated_speedup:.1f} ({estimated_speedup / ideal:.1%}) | "
            f"{published_speedup:.1f} ({published_speedup / ideal:.1%}) |"
        )
    return lines


def format_page(results_of: dict, names=()) -> str:
    """Returns the page in Markdown.

    Args:
        results_of: recipe name -> list of `PhaseResult`.
        names: the recipes that were asked for; () if all were.
    """
    table = [format_row(name, result) for name, results in results_of.items() for result in results]
    command = "make preflight"
    if names:
        command = f"python -m preflight.document {' '.join(names)} --output=FILE"
    written = (
        f"Written by `{command}` on {datetime.date.today()}, without a TPU (libtpu "
        f"{REQUIRED_VERSIONS['libtpu']})."
    )
    title = f"# Pre-flight{' of ' if names else ''}{' and '.join(names)}"
    text = [title, "", written, "", HEAD, *table]
    text += ["", *LEGEND.strip().splitlines()]
    if results_of.keys() & PUBLISHED.keys():
        text += ["", "## Next to the published runs", "", *published_table(results_of), ""]
        text += [*scaling_table(results_of.get("bert-large-32k", ())), GAPS]
    if table := mlperf_table(results_of):
        text += ["", "## Next to MLPerf's results", "", *table, MLPERF_GAPS]
    return "\n".join(text) + "\n"


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: the command's arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python -m preflight.document", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", metavar="RECIPE", nargs="*", help="a recipe; by default, all")
    parser.add_argument(
        "--output",
        help="the page; with RECIPE, it must be given (default: docs/results/preflight.md)",
    )
    flags = parser.parse_args(arguments)
    names = flags.names
    path = flags.output or str(PATH)
    try:
        for name in names:
            if name not in PODS:
                known = ", ".join(PODS)
                raise InputError(f"{name}: no pod is listed for it. Known recipes: {known}.")
        if names and not flags.output:
            raise InputError(
                f"give the page of {' '.join(names)} with --output=FILE; {path} is that of all "
                "recipes."
            )
        check_file_writable(path, f"--output={path}")
        check_installed()
        chosen = {name: recipes.find_recipe(name) for name in names or PODS}
        results_of = {}
        phases = sum(len(recipe.phases) for recipe in chosen.values())
        with show_progress(_print_line, total=phases) as progress:
            for name, recipe in chosen.items():
                progress.title(f"{name} on {PODS[name]}")
                results_of[name] = preflight.examine(
                    recipes.override(recipe, ["compute_dtype=bfloat16"]),
                    parse_topologies(PODS[name]),
                    progress=progress,
                    search=name in SEARCHED,
                )
        with atomic_write(path) as file:
            file.write(format_page(results_of, names))
    except (ValueError, OSError) as error:
        _print_line(f"preflight.document: {error}")
        return 1
    _print_line(f"Written: {path}")
    return 0


if __name__ == "__main__":
    process.run(main, sys.argv[1:])
