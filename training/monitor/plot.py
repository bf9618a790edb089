"""Plots one or several runs: python -m training.monitor.plot MODEL_DIR...

Writes `history.png` into the first folder: loss, held-out accuracy, learning rate and throughput of
all runs, from the `history.jsonl` and `evaluations.jsonl` of each. If a run recorded its trust
ratios, their heat map is drawn below the curves of a single run, or, if there are several runs,
into a file in each run's own folder.
"""

import argparse
import contextlib
import os
import sys

from inputs import process  # isort: split

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from inputs.storage import files
from tf_lamb.telemetry import PICTURE as HEAT_MAP
from tf_lamb.telemetry import RECORDS, draw_heat_map, read_records, save_figure
from training.monitor.progress import EVALUATIONS, HISTORY, SLOW_LOOPS, read_rows
from training.monitor.run_monitor import TELEMETRY

PICTURE = "history.png"
ROW_INCHES = 0.15  # height of one layer's row in the heat map
FIRST_SHARE = 0.05  # of the steps: a higher loss in them does not set the scale
ACCURACY_WORDS = ("accuracy", "top1", "exact_match")  # in the names of values of an evaluation
HELD_OUT = {"marker": "o", "markersize": 4, "linestyle": ":"}
MARKERS = "os^Dv"  # of the accuracies


def draw(model_dirs: list[str], path: str) -> None:
    """Writes a PNG with a panel for each curve and a line for each run.

    Points show a run's held-out loss and accuracy at its evaluations. The speed of the first loops,
    which compile, is left out. If there is a single run and it recorded its trust ratios, their
    heat map (layers x steps) is drawn below the curves.

    Raises:
        ValueError: a folder without a history.
    """
    histories, evaluations = {}, {}
    for model_dir, label in zip(model_dirs, distinct_names(model_dirs), strict=True):
        rows = read_rows(os.path.join(model_dir, HISTORY))
        if not rows:
            raise ValueError(
                f"{model_dir} has no {HISTORY} with a step in it. Give a run's --model_dir."
            )
        histories[label] = rows
        evaluations[label] = read_rows(os.path.join(model_dir, EVALUATIONS))
    panels = [_draw_loss, _draw_learning_rate, _draw_speed]
    if any(_accuracy_names(rows) for rows in evaluations.values()):
        panels.insert(1, _draw_accuracy)
    height = 2.7 * len(panels)
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
    axes[0].legend()
    axes[-1].set_xlabel("step")
    steps = max(rows[-1]["step"] for rows in histories.values())
    curves.suptitle(f"{', '.join(histories)}: {steps:,} steps", fontsize=12)
    save_figure(figure, path)
    plt.close(figure)


def distinct_names(model_dirs: list[str]) -> list[str]:
    """Returns the last part of each path, with as many parts before it as tell the paths apart."""
    parts = [files.absolute(model_dir).strip(os.sep).split(os.sep) for model_dir in model_dirs]
    count = 1
    while len({tuple(p[-count:]) for p in parts}) < len({tuple(p) for p in parts}):
        count += 1
    return [os.sep.join(p[-count:]) for p in parts]


def _style(place: int, rows) -> dict:
    """Returns the style of a run's lines; a single row is drawn as a point."""
    return {"color": f"C{place}", "marker": "." if len(rows) == 1 else ""}


def _draw_loss(panel, histories, evaluations):
    drawn, first = [], []  # the latter: of each curve
    for place, (label, rows) in enumerate(histories.items()):
        steps, losses = _curve(rows, "loss")
        panel.plot(steps, losses, **_style(place, rows), label=label)
        first += losses[np.isfinite(losses)][:1].tolist()
        later = np.array(steps) > FIRST_SHARE * steps[-1]
        drawn.append(losses[later] if later.any() else losses)
        points = [row | {"loss": _loss(row)} for row in evaluations[label]]
        if points:
            held_out = _curve(points, "loss")
            panel.plot(*held_out, color=f"C{place}", label=f"{label}, held out", **HELD_OUT)
            drawn.append(held_out[1])
            first += held_out[1][np.isfinite(held_out[1])][:1].tolist()
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    if values.size:
        low, high = values.min(), values.max()
        # A loss above the first one, of a run that diverges, does not set the scale.
        if low < max(first):
            high = min(high, max(first))
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
        panel.set_ylim(low - margin, high + margin)
    panel.set_ylabel("loss (nats)")


def _draw_accuracy(panel, histories, evaluations):
    names = [name for rows in evaluations.values() for name in _accuracy_names(rows)]
    for kind, name in enumerate(dict.fromkeys(names)):
        marker = MARKERS[kind % len(MARKERS)]
        for place, (label, rows) in enumerate(evaluations.items()):
            # One run: a colour for each accuracy. Several runs: the colour of the run.
            several = len(evaluations) > 1
            color = f"C{place if several else kind}"
            shown = name.replace("_", " ")
            shown = f"{label}, {shown}" if several else shown
            style = HELD_OUT | {"marker": marker}
            panel.plot(*_curve(rows, name), color=color, label=shown, **style)
    panel.set_ylabel("held-out accuracy")
    panel.set_ylim(bottom=0)
    panel.legend()


def _draw_learning_rate(panel, histories, evaluations):
    for place, rows in enumerate(histories.values()):
        panel.plot(*_curve(rows, "learning_rate"), **_style(place, rows))
    panel.set_ylabel("learning rate")
    panel.set_ylim(bottom=0)


def _draw_speed(panel, histories, evaluations):
    for place, rows in enumerate(histories.values()):
        steps, speeds = _curve(rows, "examples_per_second")
        speeds[_slow(rows)] = np.nan
        panel.plot(steps, speeds, **_style(place, rows))
    panel.set_ylabel("examples/s")
    panel.set_ylim(bottom=0)


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
    """Returns the names of the accuracies in the rows of evaluations."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(word in name for word in ACCURACY_WORDS)]


def _records(model_dir) -> str:
    return os.path.join(model_dir, TELEMETRY, RECORDS)


def _drawn_layers(records) -> int:
    """The number of rows of the heat map: layers with a trust ratio other than 1; 0: no records."""
    layers, adapted = set(), set()
    rows = []
    with contextlib.suppress(FileNotFoundError):
        rows = [*read_records(records)]
    for row in rows:
        layers |= row["layers"].keys()
        adapted |= {name for name, layer in row["layers"].items() if layer["ratio"] != 1.0}
    return len(adapted) or len(layers)


def _loss(row):
    """The loss of an evaluation. Older runs recorded only its terms, such as masked_loss."""
    if "loss" in row:
        return row["loss"]
    terms = [value for name, value in row.items() if name.endswith("_loss")]
    return None if None in terms else sum(terms)


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
    path = os.path.join(model_dirs[0], PICTURE)
    try:
        draw(model_dirs, path)
        print(path)
        for model_dir in model_dirs[1:] and model_dirs:
            if _drawn_layers(_records(model_dir)):
                heat_map = os.path.join(model_dir, TELEMETRY, HEAT_MAP)
                draw_heat_map(_records(model_dir), heat_map)
                print(heat_map)
    except (OSError, ValueError) as error:
        print(f"training.monitor.plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    process.run(main, sys.argv[1:])
