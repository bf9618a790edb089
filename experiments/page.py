"""Writes the results page of a table from its run files: settings, table, tests and figures."""

import math
import os
import statistics

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported, which would look for a display
from matplotlib import pyplot
from scipy import stats

import tf_lamb
from experiments.grid import Cell, Group, Table, progress
from experiments.runner import Places, State, metrics
from inputs.files import atomic_write

RULE = """\
The rule of tuning is the same for all: each learning rate of the grid with the first seed; while
the best is the lowest or the highest, the next one beyond it; then the best one with the other
seeds. The best one is chosen by the metric of this table, on the same test data, so that all values
are slightly too high, for each optimizer alike."""


def write_page(table: Table, now: State, path: str, places: Places) -> None:
    """Writes the page to `path`, and its figures to the folder of the run files.

    Args:
        table: the table.
        now: the state of its runs.
        path: the Markdown file; an existing file is replaced.
        places: folders of the run files, and of the records that heat maps are drawn from.
    """
    values = metrics(table, now.runs)
    groups = {group.name: progress(table, group, values) for group in table.groups}
    seeds = {
        group.name: [
            values[cell.name]
            for seed in group.seeds
            if (best := groups[group.name].best) is not None
            and (cell := Cell(group, best, seed)).name in values
        ]
        for group in table.groups
    }
    left = len(now.todo) + now.later
    parts = [f"# {table.title}", table.text, RULE if _tuned(table) else ""]
    if left:
        parts.append(f"**{len(now.runs)} runs are done; at least {left} are still to be run.**")
    parts += [_command(table), _about(now)]
    parts.append(_rows(table, groups, seeds, values))
    if table.pairs:
        parts.append(_tests(table, seeds))
    os.makedirs(places.output, exist_ok=True)
    for name, caption in _pictures(table, groups, seeds, now, places):
        parts.append(f"![{caption}]({os.path.basename(places.output)}/{name})")
    folder = os.path.relpath(places.output, os.path.dirname(os.path.abspath(path)))
    parts.append(f"Each run is a file in `{folder}/`: settings, seed, versions, curve and result.")
    with atomic_write(path) as file:
        file.write("\n\n".join(part for part in parts if part) + "\n")


def _tuned(table):
    return any(len(group.rates) > 1 for group in table.groups)


def _command(table):
    return f"```bash\npython -m experiments {table.name} --data_dir=DATA\n```"


def _about(now):
    if not now.runs:
        return ""
    runs = list(now.runs.values())

    def span(name):
        found = sorted({str(run[name]) for run in runs})
        return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"

    versions = sorted({tuple(run["versions"].items()) for run in runs})
    hours = sum(run["processor_seconds"] for run in runs) / 3600
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    lines = ["| | |", "|---|---|", f"| date | {span('date')} |", f"| commit | {commits} |"]
    lines.append(f"| machine | {span('machine')} for each run |")
    for version in versions:
        lines.append(f"| versions | {', '.join(f'{name} {value}' for name, value in version)} |")
    lines.append(f"| processor time | {hours:.1f} h for {len(runs)} runs |")
    return "\n".join(lines)


def _label(group: Group) -> str:
    return group.name.replace("-", " ")


def _rows(table, groups, seeds, values):
    published = any(group.name in table.published for group in table.groups)
    head = ["run", "best rate", f"{table.metric}, mean ± standard deviation (seeds)"]
    head += ["published"] if published else []
    head += ["first seed, by rate"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in table.groups:
        own, found = groups[group.name], seeds[group.name]
        tried = {
            float(name.rpartition("-rate")[2].rpartition("-seed")[0]): value
            for name, value in values.items()
            if name.rpartition("-rate")[0] == group.name and name.endswith(f"-seed{group.seeds[0]}")
        }
        rate = "" if own.best is None else f"{own.best:g}{' (edge)' if own.at_edge else ''}"
        cells = [_label(group), rate, _mean(found)]
        cells += [f"{table.published[group.name]:.4f}" if group.name in table.published else ""] * (
            published
        )
        cells += [", ".join(f"{rate:g}: {_value(tried[rate])}" for rate in sorted(tried))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _value(value):
    return "diverged" if math.isinf(value) else f"{value:.4f}"


def _mean(found):
    if not found:
        return ""
    if any(map(math.isinf, found)):
        return ", ".join(map(_value, found))
    spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.4f}{spread} ({len(found)})"


def _tests(table, seeds):
    lines = [
        "Welch's test of the difference of means, two-sided, without correction for the number of "
        "tests:",
        "",
        "| difference | mean | p |",
        "|---|---|---|",
    ]
    rows = 0
    for first, second in table.pairs:
        one, other = seeds[first], seeds[second]
        if min(len(one), len(other)) < 2 or any(map(math.isinf, one + other)):
            continue
        p = stats.ttest_ind(one, other, equal_var=False).pvalue
        difference = statistics.mean(one) - statistics.mean(other)
        names = f"{_label(table.group(first))} − {_label(table.group(second))}"
        lines.append(f"| {names} | {difference:+.4f} | {p:.3f} |")
        rows += 1
    return "\n".join(lines) if rows else ""


def _pictures(table, groups, seeds, now, places):
    """Draws the figures that the finished runs allow; yields (file name, caption)."""
    done = [group for group in table.groups if seeds[group.name]]
    if not done:
        return
    if table.x:
        _draw_sweep(table, done, seeds, os.path.join(places.output, "sweep.png"))
        yield "sweep.png", f"{table.metric} over {table.x}, mean and range of the seeds"
    _draw_curves(table, done, groups, now, os.path.join(places.output, "curves.png"))
    yield "curves.png", "training loss and metric over steps, best rate, first seed"
    for name in table.heat_maps:
        best = groups[name].best
        if best is None:
            continue
        group = table.group(name)
        folder = places.folder(table, Cell(group, best, group.seeds[0]))
        records = os.path.join(folder, "trust_ratios.jsonl")
        picture = os.path.join(places.output, f"trust-ratios-{name}.png")
        if os.path.exists(records):
            tf_lamb.draw_heat_map(records, picture)
        if os.path.exists(picture):
            yield os.path.basename(picture), f"trust ratios of {_label(group)}, layers × steps"


def _draw_sweep(table, done, seeds, path):
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[str, list] = {}
    for group in done:
        found = [value for value in seeds[group.name] if not math.isinf(value)]
        if found:
            label = group.name.removesuffix(f"-{group.settings[table.x]}").replace("-", ", ")
            lines.setdefault(label, []).append((group.settings[table.x], found))
    for label, points in lines.items():
        points.sort()
        means = [statistics.mean(found) for _, found in points]
        below = [mean - min(found) for mean, (_, found) in zip(means, points, strict=True)]
        above = [max(found) - mean for mean, (_, found) in zip(means, points, strict=True)]
        axes.errorbar([x for x, _ in points], means, (below, above), label=label, capsize=3)
    axes.set(xscale="log", xlabel=table.x, ylabel=f"test {table.metric}")
    ticks = sorted({group.settings[table.x] for group in done})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_curves(table, done, groups, now, path):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for group in done:
        run = now.runs.get(Cell(group, groups[group.name].best, group.seeds[0]).name)
        if run is None:
            continue
        curve = run["curve"]
        metric = curve.get(f"test_{table.metric}", curve.get(table.metric))
        left.plot(curve["step"], curve["loss"], label=_label(group))
        right.plot(curve["step"], metric, label=_label(group))
    left.set(xlabel="step", ylabel="training loss, nats", yscale="log")
    right.set(xlabel="step", ylabel=table.metric)
    lowest = min((line.get_ydata()[-1] for line in right.lines), default=0)
    right.set_ylim(bottom=lowest - 0.05)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if table.x == "batch":
            axes.set_xscale("log")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
