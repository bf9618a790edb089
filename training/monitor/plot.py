"""Plots one or several runs: python -m training.monitor.plot MODEL_DIR...

Writes `history.png` into the first folder: loss, learning rate and throughput of all runs, from the
`history.jsonl` of each. If a run recorded its trust ratios, their heat map is drawn below the
curves of a single run, or, if there are several runs, into a file in each run's own folder.
"""

import os
import sys

from inputs import process  # isort: split

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tf_lamb.telemetry import PICTURE as HEAT_MAP
from tf_lamb.telemetry import RECORDS, draw_heat_map
from training.monitor.progress import EVALUATIONS, HISTORY, read_rows
from training.monitor.run_monitor import TELEMETRY

PICTURE = "history.png"
ROW_INCHES = 0.15  # height of one layer's row in the heat map
CURVES = (
    ("loss", "loss (nats)"),
    ("learning_rate", "learning rate"),
    ("examples_per_second", "examples/s"),
)


def draw(model_dirs: list[str], path: str) -> None:
    """Writes a PNG with a panel for each curve and a line for each run.

    Points show a run's held-out loss at its evaluations. If there is a single run and it recorded
    its trust ratios, their heat map (layers x steps) is drawn below the curves.

    Raises:
        ValueError: a folder without a history.
    """
    records = _records(model_dirs[0])
    layers = _drawn_layers(records) if len(model_dirs) == 1 else 0
    if layers:
        height = ROW_INCHES * layers + 1.6
        figure = plt.figure(figsize=(13, 8 + height), layout="constrained")
        curves, heat_map = figure.subfigures(2, 1, height_ratios=[8, height])
        draw_heat_map(records, figure=heat_map)
    else:
        figure = curves = plt.figure(figsize=(8, 8), layout="constrained")
    panels = curves.subplots(len(CURVES), sharex=True)
    for model_dir in model_dirs:
        rows = read_rows(os.path.join(model_dir, HISTORY))
        if not rows:
            raise ValueError(
                f"{model_dir} has no {HISTORY} with a step in it. Give a run's --model_dir."
            )
        label = os.path.basename(os.path.normpath(model_dir))
        for panel, (name, _) in zip(panels, CURVES, strict=True):
            (line,) = panel.plot(*_curve(rows, name), label=label)
        evaluations = [
            row | {"loss": _loss(row)} for row in read_rows(os.path.join(model_dir, EVALUATIONS))
        ]
        if evaluations:
            style = {"marker": "o", "markersize": 4, "linestyle": ":"}
            held_out = _curve(evaluations, "loss")
            panels[0].plot(*held_out, color=line.get_color(), label=f"{label}, held out", **style)
    for panel, (_, title) in zip(panels, CURVES, strict=True):
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0)
    panels[0].legend()
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _records(model_dir) -> str:
    return os.path.join(model_dir, TELEMETRY, RECORDS)


def _drawn_layers(records) -> int:
    """The number of rows of the heat map: layers with a trust ratio other than 1; 0: no records."""
    layers, adapted = set(), set()
    for row in read_rows(records):
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


def main(model_dirs: list[str]) -> int:
    """The command line; returns the exit status."""
    if not model_dirs:
        print(__doc__, file=sys.stderr)
        return 1
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
