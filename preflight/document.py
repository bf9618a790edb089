"""Writes docs/results/preflight.md: recipes on their own pods, beside what was published.

`make preflight` runs it, or for a page of some recipes alone python -m preflight.document
NAME...
"""

import pathlib
import sys

import recipes
from inputs.errors import InputError
from preflight import estimate
from preflight import run as preflight
from preflight.children import check_installed
from preflight.report import LEGEND
from preflight.topology import parse_topologies

PATH = pathlib.Path("docs/results/preflight.md")
# Where each recipe was published, or is meant to run. The other columns of the paper's tables have
# the programs of their largest one: 16 examples a core.
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
# Whose largest batch is looked for, which compiles a phase several times.
SEARCHED = ("bert-mini-demo", "bert-mini", "bert-large-64k-32k")
# Minutes on 1,024 v3 chips: arXiv:1904.00962v3, Table 1; MLPerf training v0.6, Google, ResNet.
PUBLISHED = {"bert-large-32k": 101.2, "bert-large-64k-32k": 76.19, "resnet50-lars-32k": 76.9 / 60}
# The same table's columns of 16 examples a core: batch, chips, minutes.
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
    "| recipe | phase | TPU | examples a core | fits up to | GiB of HBM | TFLOP | GB moved | "
    "compiler, ms | update, ms | floats a parameter | all-reduce, ms | step, ms | of peak | "
    "minutes |\n|" + "---|" * 15
)
GAPS = """
Why the estimates are below what was published. Each operation is taken at the chip's peak rate and
the links at theirs, and what is around the step is left out: they say what the chips must do at the
least, not what they did in 2019. BERT: in the published time its chips did the last column's share
of their peak. Part of the gap is the XLA of then, part what no step contains (input, checkpoints,
evaluation, waiting for the slowest of 2,048 replicas); the paper says nothing from which to tell
them apart. ResNet-50: MLPerf's time has the evaluations in it, and the first reading of the data.

Why the scaling is better than the published one, which falls to 76.7 %: replicas that wait
for one another are not in the model. Above 100 %: a pod's mesh is closed to rings in a dimension
only where the slice is as long as the pod, so the two largest have more links for the same sum.

No constant here was fitted to close a gap."""


def row(name: str, finding) -> str:
    """One phase of a recipe as a line of the table."""
    start = f"| {name} | {finding.phase} | {finding.topology.name} | {finding.replica_batch_size}"
    if finding.error:
        return f"{start} | does not compile: {finding.error}" + " |" * 11
    program, time = finding.program, finding.time
    if finding.accumulation > 1:
        start += f" / {finding.accumulation}"
    values = (
        finding.largest or "-",
        f"{program['hbm_bytes'] / 2**30:.2f}",
        f"{program['flops'] / 1e12:.3g}",
        f"{program['bytes_accessed'] / 1e9:.3g}",
        f"{1e3 * time.compiler:.3g}",
        f"{1e3 * time.update:.3g}",
        f"{finding.update['bytes_accessed'] / 4 / finding.parameters:.2f}",
        f"{1e3 * time.all_reduce:.3g}",
        f"{1e3 * time.step:.3g}",
        f"{finding.utilisation:.0%}",
        f"{finding.minutes:.3g}",
    )
    return f"{start} | {' | '.join(map(str, values))} |"


def yardsticks(found: dict) -> list[str]:
    """Whole recipes beside the published times; `found` holds the findings by recipe."""
    lines = [
        "| recipe | estimated minutes | published | estimated / published | FLOP/s of the peak, "
        "estimated | in the published time |",
        "|---|---|---|---|---|---|",
    ]
    for name, published in PUBLISHED.items():
        findings = found.get(name, ())
        if findings and not any(finding.error for finding in findings):
            total = sum(finding.minutes for finding in findings)
            busy = sum(finding.minutes * finding.utilisation for finding in findings)
            lines.append(
                f"| {name} | {total:.3g} | {published:.4g} | {total / published:.0%} | "
                f"{busy / total:.0%} | {busy / published:.0%} |"
            )
    return lines if len(lines) > 2 else []


def scaling(findings) -> list[str]:
    """The paper's columns, each with the program of 32K: all have 16 examples a core."""
    if not findings:  # nobody asked for it
        return []
    lines = [
        "| batch | chips | estimated minutes | published | estimated speed-up | published |",
        "|---|---|---|---|---|---|",
    ]
    first = None
    for batch, name, published in COLUMNS:
        (topology,) = parse_topologies(name)
        minutes = 0.0
        for finding in findings:
            if finding.error or finding.replica_batch_size != 16:
                return []
            time = estimate.step_time(topology, finding.program, finding.update, 1)
            steps = finding.steps * finding.global_batch_size / batch
            minutes += steps * time.step / 60
        first = first or (minutes, published, topology.chips)
        more = topology.chips / first[2]
        ours, theirs = first[0] / minutes, first[1] / published
        lines.append(
            f"| {batch:,} | {topology.chips:,} | {minutes:,.0f} | {published:,.1f} | "
            f"{ours:.1f} ({ours / more:.1%}) | {theirs:.1f} ({theirs / more:.1%}) |"
        )
    return lines


def main(names: list[str]) -> int:
    """Runs the pre-flights and writes the page; returns the exit status."""

    def log(line):
        print(line, file=sys.stderr, flush=True)

    found = {}
    try:
        check_installed()
        for name in names or PODS:
            if name not in PODS:
                raise InputError(f"{name} has no pod here. There are: {', '.join(PODS)}.")
            recipe = recipes.override(recipes.find_recipe(name), ["compute_dtype=bfloat16"])
            topologies = parse_topologies(PODS[recipe.name])
            log(f"{name} on {PODS[name]}")
            found[name] = preflight.findings_of(
                recipe, topologies, log=log, search=name in SEARCHED
            )
            PATH.write_text(page(found), encoding="utf-8")  # all of them take an hour
    except ValueError as error:
        log(f"preflight.document: {error}")
        return 1
    log(f"Written: {PATH}")
    return 0


def page(found: dict) -> str:
    """The page in Markdown; `found` holds the findings by recipe."""
    table = [row(name, finding) for name, findings in found.items() for finding in findings]
    text = ["# Pre-flight", "", "Written by `make preflight`; no TPU was there.", "", HEAD, *table]
    text += ["", *LEGEND.strip().splitlines()]
    if found.keys() & PUBLISHED.keys():
        text += ["", "## Beside the published runs", "", *yardsticks(found), ""]
        text += [*scaling(found.get("bert-large-32k", ())), GAPS]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
