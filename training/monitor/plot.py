"""Plots one or several runs: python -m training.monitor.plot MODEL_DIR...

Writes `history.png` into the first folder: loss, held-out accuracy, learning rate and throughput of
all runs, from the `history.jsonl` and `evaluations.jsonl` of each. If a run recorded its trust
ratios, their heat map is drawn below the curves of a single run, or, if there are several runs,
into a file in each run's own folder.
"""

import argparse
import os
import sys
import textwrap

from inputs import process  # isort: split

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from inputs.errors import InputError
from inputs.storage import files
from tf_lamb.telemetry import PICTURE as HEAT_MAP
from tf_lamb.telemetry import (
    RECORDS,
    adapted_layers,
    draw_heat_map,
    escape_missing,
    read_records,
    save_figure,
)
from training.monitor.progress import (
    EVALUATIONS,
    HIGHER_IS_BETTER,
    HISTORY,
    SLOW_LOOPS,
    read_rows,
)
from training.monitor.run_monitor import TELEMETRY

PICTURE = "history.png"
ROW_INCHES = 0.15  # height of one layer's row in the heat map
FIRST_SHARE = 0.05  # of the steps: a higher loss in them does not set the scale
HELD_OUT = {"marker": "o", "markersize": 4, "linestyle": ":"}
MARKERS = "os^Dv"  # of the accuracies
WIDE = 5  # a logarithmic axis for losses or peak rates of several runs that differ by more
MARGIN = 1.05  # the upper end of an axis from zero, relative to the highest value
TITLE_CHARACTERS = 70  # per line
LEGEND_CHARACTERS = 90  # per line
LINE_INCHES = 0.2
# What evaluations of version 0.1.0 recorded. They do not say which metrics are better if higher,
# and have the terms of the loss, but not their sum.
ACCURACIES_OF_0_1_0 = (
    *("masked_accuracy", "sentence_accuracy", "span_accuracy", "image_top1", "image_top5"),
)
LOSSES_OF_0_1_0 = ("masked_loss", "sentence_loss", "span_loss", "image_loss")


def draw(model_dirs: list[str], path: str) -> None:
    """Writes a PNG with a panel for each curve and a line for each run.

    Points show a run's held-out loss and accuracy at its evaluations. Where a loss is not finite
    until the end, a dashed line marks the step, and the legend names it. The speed of the first
    loops, which compile, is left out. If there is a single run and it recorded its trust ratios,
    their heat map (layers x steps) is drawn below the curves.

    Raises:
        InputError: a folder without a history, or with a line that is JSON, but not a row.
        OSError: a file cannot be read, or the picture cannot be written.
    """
    histories, evaluations = {}, {}
    for model_dir, label in zip(model_dirs, distinct_names(model_dirs), strict=True):
        rows = read_rows(os.path.join(model_dir, HISTORY))
        if not rows:
            raise InputError(
                f"{model_dir} has no {HISTORY} with a step in it. Give a run's --model_dir."
            )
        histories[label] = rows
        evaluations[label] = read_rows(os.path.join(model_dir, EVALUATIONS))
    panels = [_draw_loss, _draw_learning_rate, _draw_speed]
    if any(_accuracy_names(rows) for rows in evaluations.values()):
        panels.insert(1, _draw_accuracy)
    steps = max(rows[-1]["step"] for rows in histories.values())
    runs = f"{len(histories)} runs" if len(histories) > 1 else next(iter(histories))
    title = textwrap.fill(f"{_escape(runs)}: {steps:,} steps", TITLE_CHARACTERS)
    legend = _legend(histories, evaluations) if len(histories) > 1 else {}
    lines = title.count("\n") + legend.pop("lines", 0)
    height = 2.7 * len(panels) + LINE_INCHES * lines
    records = _records(model_dirs[0])
    layers = _drawn_layers(records) if len(model_dirs) == 1 else 0
    if layers:
        below = ROW_INCHES * layers + 1.6
        figure = plt.figure(figsize=(13, height + below), layout="constrained")
        curves, heat_map = figure.subfigures(2, 1, height_ratios=[height, below])
        draw_heat_map(records, figure=heat_map)
    else:
        figure = curves = plt.figure(figsize=(8, height), layout="constrained")
    axes = curves.subplots(len(panels), sharex=True)
    for panel, draw_panel in zip(axes, panels, strict=True):
        draw_panel(panel, histories, evaluations)
        panel.grid(alpha=0.3)
    if legend:
        curves.legend(loc="outside lower center", fontsize=9, frameon=False, **legend)
    axes[-1].set_xlabel("step")
    curves.suptitle(title, fontsize=12)
    save_figure(figure, path)
    plt.close(figure)


def distinct_names(model_dirs: list[str]) -> list[str]:
    """Returns the last part of each path, with as many parts before it as tell the paths apart."""
    parts = [files.absolute(model_dir).strip(os.sep).split(os.sep) for model_dir in model_dirs]
    count = 1
    while len({tuple(p[-count:]) for p in parts}) < len({tuple(p) for p in parts}):
        count += 1
    return [os.sep.join(p[-count:]) for p in parts]


def _escape(name: str) -> str:
    """Returns a name so that matplotlib shows it as it is."""
    name = escape_missing(name).replace("$", r"\$")
    return f"./{name}" if name.startswith("_") else name  # else it has no place in a legend


def _legend(histories, evaluations) -> dict:
    """Returns the arguments of the legend of several runs, and how many `lines` it has."""
    labels = [
        textwrap.fill(
            "; ".join(filter(None, [_escape(label), _describe_losses(rows, evaluations[label])])),
            LEGEND_CHARACTERS,
        )
        for label, rows in histories.items()
    ]
    colors = [_color(place, histories) for place in range(len(labels))]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = max(1, min(len(labels), LEGEND_CHARACTERS // (longest + 6)))
    rows = -(-len(labels) // columns)
    return {
        "handles": [Line2D([], [], color=color) for color in colors],
        "labels": labels,
        "ncols": columns,
        "lines": rows * max(label.count("\n") + 1 for label in labels) + 1,
    }


def _color(place: int, runs):
    """Returns the color of a run; more than ten need more than matplotlib's ten."""
    return f"C{place}" if len(runs) <= 10 else matplotlib.colormaps["turbo"](place / len(runs))


def _style(place: int, histories, values) -> dict:
    """Returns the style of a run's line; a finite value without a finite neighbor is a point."""
    finite = np.pad(np.isfinite(values), 1)
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    style = {"color": _color(place, histories)}
    return style | ({"marker": ".", "markevery": alone} if alone.any() else {})


def _first_of_last_nonfinite(steps, values) -> int | None:
    """Returns the step from which on no value is finite; None if the last one is."""
    finite = np.flatnonzero(np.isfinite(values))
    first = finite[-1] + 1 if finite.size else 0
    return steps[first] if first < len(steps) else None


def _describe_end(steps, values) -> str:
    """Returns from which step on no value is finite, in words; "" if the last one is."""
    step = _first_of_last_nonfinite(steps, values)
    return "" if step is None else f"not finite from step {step:,}"


def _describe_losses(rows, evaluations) -> str:
    """Returns from which step on the losses of a run are not finite, if they are not."""
    training = _describe_end(*_curve(rows, "loss"))
    held_out = _describe_end(*_held_out_losses(evaluations))
    return training or (held_out and f"held-out loss {held_out}")


def _draw_loss(panel, histories, evaluations):
    drawn, first = [], []  # the latter: of each curve
    for place, (label, rows) in enumerate(histories.items()):
        steps, losses = _curve(rows, "loss")
        curves = {"training": (steps, losses, _style(place, histories, losses))}
        later = losses[np.array(steps) > FIRST_SHARE * steps[-1]]
        drawn.append(later if np.isfinite(later).any() else losses)
        held_out = _held_out_losses(evaluations[label])
        if held_out[0]:
            curves["held out"] = (*held_out, {"color": _color(place, histories)} | HELD_OUT)
            drawn.append(held_out[1])
        for name, (steps, losses, style) in curves.items():
            end = _describe_end(steps, losses)
            panel.plot(steps, losses, label=f"{name}; {end}" if end else name, **style)
            first += losses[np.isfinite(losses)][:1].tolist()
            if end:
                step = _first_of_last_nonfinite(steps, losses)
                panel.axvline(step, color=style["color"], linestyle="--", linewidth=1)
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    if values.size:
        low, high = values.min(), values.max()
        # A loss above the first one, of a run that diverges, does not set the scale.
        if low < max(first):
            high = min(high, max(first))
        if len(histories) > 1 and 0 < WIDE * low < high:
            _scale_by_factors(panel, low, high)
        else:
            margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
            panel.set_ylim(low - margin, high + margin)
    else:
        panel.set_yticks([])
    panel.set_ylabel("loss (nats)")
    if len(histories) == 1:
        panel.legend()
    elif any(_held_out_losses(rows)[0] for rows in evaluations.values()):
        # The runs are in the legend of the figure.
        panel.legend(handles=[Line2D([], [], color="black", label="held out", **HELD_OUT)])


def _draw_accuracy(panel, histories, evaluations):
    names = [name for rows in evaluations.values() for name in _accuracy_names(rows)]
    several = len(evaluations) > 1
    handles = []
    for kind, name in enumerate(dict.fromkeys(names)):
        style = HELD_OUT | {"marker": MARKERS[kind % len(MARKERS)]}
        for place, rows in enumerate(evaluations.values()):
            # One run: a color for each accuracy. Several runs: the color of the run.
            color = _color(place, evaluations) if several else f"C{kind}"
            steps, values = _curve([row for row in rows if name in row], name)
            end = "" if several else _describe_end(steps, values)
            label = "; ".join(filter(None, [name.replace("_", " "), end]))
            panel.plot(steps, values, color=color, label=label, clip_on=False, **style)
        color = "black" if several else f"C{kind}"
        handles.append(Line2D([], [], color=color, label=label, **style))
    panel.set_ylabel("held-out accuracy")
    _scale_from_zero(panel)
    panel.legend(handles=handles)


def _draw_learning_rate(panel, histories, evaluations):
    for place, rows in enumerate(histories.values()):
        steps, rates = _curve(rows, "learning_rate")
        panel.plot(steps, rates, **_style(place, histories, rates))
    panel.set_ylabel("learning rate")
    rates = [line.get_ydata() for line in panel.lines]
    peaks = [np.nanmax(values) for values in rates if np.isfinite(values).any()]
    if peaks and 0 < WIDE * min(peaks) < max(peaks):
        _scale_by_factors(panel, min(peaks) / WIDE, max(peaks))
    else:
        _scale_from_zero(panel)


def _draw_speed(panel, histories, evaluations):
    for place, rows in enumerate(histories.values()):
        steps, speeds = _curve(rows, "examples_per_second")
        speeds[_slow(rows)] = np.nan
        panel.plot(steps, speeds, **_style(place, histories, speeds))
    panel.set_ylabel("examples/s")
    _scale_from_zero(panel)


def _scale_by_factors(panel, low, high):
    """Makes the vertical axis logarithmic, with plain ticks."""
    panel.set_yscale("log")
    panel.set_ylim(low / MARGIN**2, high * MARGIN**2)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _scale_from_zero(panel):
    """Sets the vertical axis to begin at zero, with room for markers above the highest value."""
    values = np.concatenate([line.get_ydata() for line in panel.lines])
    values = values[np.isfinite(values)]
    if values.size:
        panel.set_ylim(min(0, MARGIN * values.min()), MARGIN * values.max() or 1)
    else:
        panel.set_yticks([])


def _slow(rows) -> list[bool]:
    """Returns for each row of a history whether it is of the first loops after a start.

    The first loop compiles, and the next one is slow, too (`training.monitor.progress`). If there
    are no others, all are kept.
    """
    if any("input_wait_share" in row for row in rows):
        compiling = ["input_wait_share" not in row for row in rows]
    else:  # a history without these values
        phases = [row.get("phase") for row in rows]
        compiling = [place == phases.index(phase) for place, phase in enumerate(phases)]
    slow = [any(compiling[max(0, i - SLOW_LOOPS + 1) : i + 1]) for i in range(len(rows))]
    return [False] * len(rows) if all(slow) else slow


def _accuracy_names(rows) -> list[str]:
    """Returns the names of the metrics of evaluations of which a higher value is better."""
    names = {}
    for row in rows:
        names |= dict.fromkeys(row.get(HIGHER_IS_BETTER, ACCURACIES_OF_0_1_0))
    return [name for name in names if any(name in row for row in rows)]


def _records(model_dir) -> str:
    return os.path.join(model_dir, TELEMETRY, RECORDS)


def _drawn_layers(records) -> int:
    """The number of rows of the heat map; 0 if there are no records.

    Raises:
        InputError: a line is JSON, but not a record.
    """
    try:
        rows = [*read_records(records)]
    except FileNotFoundError:
        return 0
    except ValueError as error:
        raise InputError(str(error)) from None
    return len(adapted_layers(rows)) or len({name for row in rows for name in row["layers"]})


def _held_out_losses(evaluations):
    """Returns (steps, losses) of the evaluations that recorded one, also of version 0.1.0."""
    rows = []
    for row in evaluations:
        names = ("loss",) if "loss" in row else LOSSES_OF_0_1_0
        terms = [row[name] for name in names if name in row]
        if terms:
            rows.append({"step": row["step"], "loss": None if None in terms else sum(terms)})
    return _curve(rows, "loss")


def _curve(rows, name):
    """Returns (steps, values). A null in the file, for a value that was not finite, is a gap."""
    values = [row.get(name) for row in rows]
    return [row["step"] for row in rows], np.array(values, np.float64)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.monitor.plot",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model_dirs", metavar="MODEL_DIR", nargs="+", help="the folder of a run")
    model_dirs = parser.parse_args(arguments).model_dirs
    picture = os.path.join(model_dirs[0], PICTURE)
    try:
        draw(model_dirs, picture)
        print(picture)
        for model_dir in model_dirs[1:] and model_dirs:
            if _drawn_layers(_records(model_dir)):
                picture = os.path.join(model_dir, TELEMETRY, HEAT_MAP)
                draw_heat_map(_records(model_dir), picture)
                print(picture)
    except OSError as error:
        name = error.filename or picture
        done = "written" if name == picture else "read"
        said = f"{name} cannot be {done} ({error.strerror or error})."
    except InputError as error:
        said = str(error)
    else:
        return 0
    print(f"training.monitor.plot: {said}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    process.run(main, sys.argv[1:])
