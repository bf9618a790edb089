"""Plots one or several runs: python -m training.monitor.plot MODEL_DIR...

Writes `history.png` into the first folder: loss, learning rate and throughput of all runs, from the
`history.jsonl` of each. Draws the heat map of the trust ratios of each run that recorded them.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: its start-up notices

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tf_lamb.telemetry import PICTURE, RECORDS, draw_heat_map
from training.monitor.progress import EVALUATIONS, HISTORY, read_rows
from training.monitor.run_monitor import TELEMETRY

CURVES = (
    ("loss", "loss (nats)"),
    ("learning_rate", "learning rate"),
    ("examples_per_second", "examples/s"),
)


def draw(model_dirs: list[str], path: str) -> None:
    """Writes a PNG with a panel for each curve and a line for each run.

    Points show the held-out loss of a run at its evaluations.

    Raises:
        ValueError: a folder without a history.
    """
    figure, panels = plt.subplots(len(CURVES), sharex=True, figsize=(8, 8), layout="constrained")
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


def _loss(row):
    """The loss of an evaluation. Older runs recorded only its terms, such as masked_loss."""
    if "loss" in row:
        return row["loss"]
    return sum(value for name, value in row.items() if name.endswith("_loss"))


def _curve(rows, name):
    """(steps, values). A value that is null in the file, because it was not finite, is a gap."""
    values = [row.get(name) for row in rows]
    return [row["step"] for row in rows], np.array(values, np.float64)


def main(model_dirs: list[str]) -> int:
    """The command line; returns the exit status."""
    if not model_dirs:
        print(__doc__, file=sys.stderr)
        return 1
    path = os.path.join(model_dirs[0], "history.png")
    try:
        draw(model_dirs, path)
        print(path)
        for model_dir in model_dirs:
            records = os.path.join(model_dir, TELEMETRY, RECORDS)
            if os.path.exists(records):
                picture = os.path.join(model_dir, TELEMETRY, PICTURE)
                draw_heat_map(records, picture)
                print(picture)
    except (OSError, ValueError) as error:
        print(f"training.monitor.plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
