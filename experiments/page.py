"""Writes the results page of a table from its run files: settings, table, tests and figures."""

import collections
import dataclasses
import math
import os
import re
import statistics

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported, which would look for a display
from matplotlib import pyplot, ticker
from scipy import stats

import tf_lamb
from experiments.grid import Cell, Group, Table, chip_hours, find_cell, progress
from experiments.runner import COMPLETE, Places, State, curves, images, metrics
from inputs.storage.files import atomic_write

SWEEP = "sweep.png"
RULE = """\
All optimizers are tuned by the same rule. Each learning rate of the grid runs with the first seed.
While the best rate is at an edge of the grid, the next one beyond it runs, too. While no rate
learns{chance}, the next lower one runs. The best rate then runs with the other seeds. It is chosen
with the first seed by the metric of this table, on the same test data, so that all values are
slightly too high."""


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
    seeds = best_values(table, now)
    left = len(now.todo) + now.later
    parts = [f"# {table.title}", table.text, _rule(table)]
    if left:
        parts.append(f"**{format_runs(len(now.runs))} done; at least {left} still to be run.**")
    parts += [_command(table), _about(table, now)]
    parts.append(_rows(table, groups, seeds, values))
    parts.append(_lines(table, values))
    if table.pairs:
        parts.append(_tests(table, now))
    os.makedirs(places.output, exist_ok=True)
    folder = os.path.relpath(places.output, os.path.dirname(os.path.abspath(path)))
    pictures = [
        f"![{caption}]({folder}/{name})\n\n*{caption[0].upper()}{caption[1:]}.*"
        for name, caption in _pictures(table, groups, seeds, now, places)
    ]
    if pictures and SWEEP in pictures[0]:  # it goes first
        parts.insert(parts.index(table.text) + 1, pictures.pop(0))
    parts += pictures
    if now.runs:
        parts.append(
            f"Each run is a file in `{folder}/`: settings, seed, versions, curve and result."
        )
    with atomic_write(path) as file:
        file.write("\n\n".join(part for part in parts if part) + "\n")


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between two groups of a table, each at its best rate.

    Attributes:
        first, second: names of the groups.
        mean: difference of the means.
        p: of Welch's test, two-sided.
        corrected: `p` corrected by Holm's method for the number of tests of the table.
    """

    first: str
    second: str
    mean: float
    p: float
    corrected: float


def differences(table: Table, now: State) -> list[Difference]:
    """Returns the differences of `table.pairs` that can be tested.

    A pair is left out if a group has fewer than two seeds of its best rate, if one of them
    diverged, or if groups with the same settings and best rate, and so the same runs, make it a
    comparison of runs with themselves or one that an earlier pair has made.
    """
    values = metrics(table, now.runs)
    seeds = best_values(table, now)
    found = []
    made: list[tuple] = []
    for names in table.pairs:
        groups = [table.group(name) for name in names]
        runs = tuple((group.settings, progress(table, group, values).best) for group in groups)
        result = compare(*(seeds[name] for name in names))
        if result is not None and runs[0] != runs[1] and runs not in made:
            made.append(runs)
            found.append((*names, *result))
    order = sorted(range(len(found)), key=lambda i: found[i][3])
    corrected = [0.0] * len(found)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(found) - rank) * found[i][3]))
        corrected[i] = least
    return [Difference(*row, p) for row, p in zip(found, corrected, strict=True)]


def format_p(p: float) -> str:
    """Returns a probability as text."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def best_values(table: Table, now: State) -> dict[str, list[float]]:
    """Returns the metric of the runs at each group's best rate, one per seed that is done.

    A group whose rates have not all been tried has none.
    """
    values = metrics(table, now.runs)
    found = {}
    for group in table.groups:
        best = progress(table, group, values).best
        names = [] if best is None else [Cell(group, best, seed).name for seed in group.seeds]
        found[group.name] = [values[name] for name in names if name in values]
    return found


def compare(one: list[float], other: list[float]) -> tuple[float, float] | None:
    """Returns (difference of the means, p of Welch's test, two-sided).

    None if one of them has fewer than two values, or a run that diverged.
    """
    if min(len(one), len(other)) < 2 or any(map(math.isinf, one + other)):
        return None
    difference = statistics.mean(one) - statistics.mean(other)
    if len({*one}) == len({*other}) == 1:  # no spread, of which the test would divide by 0
        return difference, 1.0 if difference == 0 else 0.0
    return difference, float(stats.ttest_ind(one, other, equal_var=False).pvalue)


def _rule(table):
    if not any(len(group.rates) > 1 and group.extended for group in table.groups):
        return ""
    known = math.isfinite(table.chance)
    return RULE.format(chance=f" ({table.metric} above {table.chance:g})" if known else "")


def _command(table):
    return f"```bash\npython -m experiments {table.name} --data_dir=DATA\n```"


def _about(table, now):
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
    machines = collections.Counter(run["machine"] for run in runs)
    for machine, count in machines.items():
        lines.append(f"| machine | {machine} ({format_runs(count)}) |")
    for counts in {images(run) for run in runs} - {(), *COMPLETE.values()}:
        train, test = (f"{count:,}" for count in counts)
        said = f"{train} for training, {test} for the test: not the published set"
        lines.append(f"| images | {said} |")
    for version in versions:
        lines.append(f"| versions | {', '.join(f'{name} {value}' for name, value in version)} |")
    since = "" if table.program == "keras" else ", each since its last start"  # they are resumed
    lines.append(f"| processor time | {hours:.1f} h for {format_runs(len(runs))}{since} |")
    return "\n".join(lines)


def group_label(group: Group) -> str:
    """Returns the name of a group as it is written on pages."""
    return re.sub(r"(?<!\de)-", " ", group.name)  # not the sign of an exponent


def _rows(table, groups, seeds, values):
    published = any(group.name in table.published for group in table.groups)
    head = ["run", "best rate", f"{table.metric}, mean ± standard deviation (seeds)"]
    head += ["published"] if published else []
    head += ["first seed, by rate"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    in_order = table.groups
    if table.x:
        in_order = sorted(table.groups, key=lambda group: group.settings[table.x])
    for group in in_order:
        own = groups[group.name]
        found = seeds[group.name]
        tried = {
            float(name.rpartition("-rate")[2].rpartition("-seed")[0]): value
            for name, value in values.items()
            if name.rpartition("-rate")[0] == group.name and name.endswith(f"-seed{group.seeds[0]}")
        }
        rate = "" if own.best is None else f"{own.best:g}{' (edge)' if own.at_edge else ''}"
        cells = [group_label(group), rate, format_mean(found)]
        cells += [f"{table.published[group.name]:.4f}" if group.name in table.published else ""] * (
            published
        )
        each = [f"{rate:g}: {format_value(tried[rate])}" for rate in sorted(tried)]
        cells += [", ".join(each) or "not run"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _lines(table, values):
    """The published lines beside the runs, for groups that have them."""
    lines = ["| line | chip-hours | published | here |", "|---|---|---|---|"]
    for group in table.groups:
        for rate, published in group.published.items():
            name = Cell(group, rate, group.seeds[0]).name
            here = format_value(values[name]) if name in values else ""
            cost = f"{chip_hours(group.chip_hours_of):.1f}" if group.chip_hours_of else ""
            line = f"{group_label(group)}, rate {rate:g}"
            lines.append(f"| {line} | {cost} | {published:.4f} | {here} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def format_runs(count: int) -> str:
    """Returns a number of runs as text."""
    return f"{count} run" if count == 1 else f"{count} runs"


def format_value(value: float) -> str:
    """Returns the metric of a run as text."""
    return "diverged" if math.isinf(value) else f"{value:.4f}"


def format_mean(found: list[float]) -> str:
    """Returns mean, standard deviation and number of seeds as text; "" if there are none."""
    if not found:
        return ""
    if any(map(math.isinf, found)):
        return ", ".join(map(format_value, found))
    spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.4f}{spread} ({len(found)})"


def _tests(table, now):
    rows = [
        f"| {group_label(table.group(one.first))} − {group_label(table.group(one.second))} "
        f"| {one.mean:+.4f} | {format_p(one.p)} | {format_p(one.corrected)} |"
        for one in differences(table, now)
    ]
    head = [
        "Welch's test of the difference of means, two-sided. The last column is corrected for the "
        "number of tests here by Holm's method:",
        "",
        "| difference | mean | p | p, corrected |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) if rows else ""


def _pictures(table, groups, seeds, now, places):
    """Draws the figures that the finished runs allow; yields (file name, caption)."""
    done = [group for group in table.groups if seeds[group.name]]
    if not done:
        return
    if table.x and len({group.settings[table.x] for group in done}) > 1:
        shown = f"{_kind(table, now)} {_metric_label(table)}"
        shown = f"1 − {shown}" if _is_error_shown(seeds) else shown
        _draw_sweep(table, done, seeds, os.path.join(places.output, SWEEP), shown)
        yield SWEEP, f"{shown} over {table.x}: mean and range (lowest to highest) of the seeds"
    _draw_curves(table, done, groups, seeds, now, os.path.join(places.output, "curves.png"))
    one = "" if len({group.seeds for group in done}) > 1 else f" ({done[0].seeds[0]})"
    yield "curves.png", f"loss and {_metric_label(table)} of the best rate, first seed{one} only"
    for name in table.heat_maps:
        best = groups[name].best
        if best is None:
            continue
        group = table.group(name)
        cell = Cell(group, best, group.seeds[0])
        twin = now.runs.get(cell.name, {}).get("same_as")
        folder = places.folder(table, find_cell(table, twin) if twin else cell)
        records = os.path.join(folder, "trust_ratios.jsonl")
        picture = os.path.join(places.output, f"trust-ratios-{name}.png")
        if os.path.exists(records):
            tf_lamb.draw_heat_map(records, picture)
        if os.path.exists(picture):
            caption = f"trust ratios of {group_label(group)}, layers × steps; colors have each "
            yield os.path.basename(picture), f"{caption}picture's own range"


def _line_label(table, group):
    """The name of a group without its batch size."""
    label = group_label(group).removesuffix(f" {group.settings.get(table.x)}")
    return label.replace(" untuned", ", untuned")


def _color(table, group):
    """The color of a group, the same for all batch sizes and in all figures."""
    labels = list(dict.fromkeys(_line_label(table, other) for other in table.groups))
    return f"C{labels.index(_line_label(table, group))}"


def _is_error_shown(seeds):
    """Whether a metric is drawn as 1 - metric on a logarithmic axis: if it is close to 1."""
    found = [value for values in seeds.values() for value in values]
    return 0.8 < max(found) < 1


def _metric_label(table):
    return table.metric.replace("_", " ")


def _kind(table, now):
    """Of which examples the metric is: "held-out", "test" or "training"."""
    runs = now.runs.values()
    if any("evaluations" in run for run in runs):
        return "held-out"
    return "test" if any(f"test_{table.metric}" in run["curve"] for run in runs) else "training"


def _draw_sweep(table, done, seeds, path, shown):
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[str, list] = {}
    lost = []
    error = _is_error_shown(seeds)
    for group in done:
        found = [1 - value if error else value for value in seeds[group.name]]
        found = [value for value in found if math.isfinite(value)]
        label = _line_label(table, group)
        if diverged := len(seeds[group.name]) - len(found):
            lost.append((group.settings[table.x], label, diverged, len(seeds[group.name])))
        if found:
            color = _color(table, group)
            lines.setdefault(label, []).append((group.settings[table.x], found, color))
    ticks = sorted({group.settings[table.x] for group in done})
    # Error bars at the same batch size stand side by side, within 3 % of the axis.
    width = 0.03 * math.log(ticks[-1] / ticks[0] if len(ticks) > 1 else 2)
    for index, (label, points) in enumerate(lines.items()):
        points.sort()
        shift = math.exp(width * (index / max(1, len(lines) - 1) - 0.5))
        means = [statistics.mean(found) for _, found, _ in points]
        below = [mean - min(found) for mean, (_, found, _) in zip(means, points, strict=True)]
        above = [max(found) - mean for mean, (_, found, _) in zip(means, points, strict=True)]
        # The untuned runs lie on the tuned ones where the rule gives the best rate.
        style = {"linestyle": "--", "markerfacecolor": "none"} if "untuned" in label else {}
        axes.errorbar(
            [x * shift for x, _, _ in points],
            means,
            (below, above),
            label=label,
            capsize=3,
            marker="o",
            markersize=5,
            color=points[0][2],
            **style,
        )
        for (x, found, color), mean in zip(points, means, strict=True):
            if len(found) == 1:
                note = {"xytext": (0, 6), "textcoords": "offset points", "fontsize": "x-small"}
                axes.annotate("1 seed", (x * shift, mean), ha="center", color=color, **note)
    for x, label, diverged, count in lost:  # at the edge; a mean is that of the other seeds
        said = f"{label} at {x:,}: {diverged} of {count} seeds diverged"
        worst = 0.98 if error else 0.02
        axes.plot(x, worst, "kx", transform=axes.get_xaxis_transform(), label=said)
    if error:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xscale="log", xlabel=table.x, ylabel=shown)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.margins(y=0.08)  # room for a note above the highest point
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


class _Plain(ticker.LogFormatter):
    """Labels the ticks of a logarithmic axis as 0.1, not as 1e-01."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def _draw_curves(table, done, groups, seeds, now, path):
    """Draws loss and metric over steps, with a column for each value of `table.x`."""
    values = sorted({group.settings[table.x] for group in done}) if table.x else [None]
    error = _is_error_shown(seeds)
    width = 11 if len(values) < 3 else 3.2 * len(values)
    if table.x:
        figure, axes = pyplot.subplots(
            2, len(values), figsize=(width, 7), layout="constrained", squeeze=False, sharey="row"
        )
    else:
        figure, row = pyplot.subplots(1, 2, figsize=(width, 4.5), layout="constrained")
        axes = row.reshape(2, 1)
    for panel in axes[0] if not error else axes.flat:
        panel.set_yscale("log")
        for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            set_formatter(_Plain(minor_thresholds=(1, 0.4)))
    ends = []
    for value, (top, bottom) in zip(values, axes.T, strict=True):
        for group in done:
            run = now.runs.get(Cell(group, groups[group.name].best, group.seeds[0]).name)
            if run is None or (table.x and group.settings[table.x] != value):
                continue
            steps, loss, metric = curves(run, table.metric)
            metric = [math.nan if point is None else point for point in metric]
            style = {"label": _line_label(table, group), "color": _color(table, group)}
            style |= {"linestyle": "--"} if "untuned" in group.name else {}
            top.plot(steps, loss, **style)
            bottom.plot(steps, [1 - y if error else y for y in metric], **style)
            ends += [metric[-1]] if metric and math.isfinite(metric[-1]) else []
        top.set_xlabel("" if table.x else "step")
        top.set_title(f"{table.x} {value:,}" if table.x else "")
        bottom.set(xlabel="step")
        if table.x == "batch":
            # By default, the functions would have the batch of the last panel.
            scale = (lambda x, batch=value: x * batch, lambda x, batch=value: x / batch)
            samples = top.secondary_xaxis("top", functions=scale)
            samples.set_xlabel("samples")
            samples.xaxis.set_major_locator(ticker.MaxNLocator(4))
            samples.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        for panel in (top, bottom):
            panel.grid(alpha=0.3)
    kind = _kind(table, now)
    axes[0][0].set_ylabel(f"{'held-out' if kind == 'held-out' else 'training'} loss, nats")
    name = f"{kind} {_metric_label(table)}"
    axes[1][0].set_ylabel(f"1 − {name}" if error else name)
    for panel in axes[1]:
        if ends and not error:  # not those of runs that diverged
            panel.set_ylim(bottom=min(ends) / 2)
    handles = {
        label: handle
        for panel in axes.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        fontsize="small",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
