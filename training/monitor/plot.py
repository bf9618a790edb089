"""Draws one or several runs: python -m training.monitor.plot MODEL_DIR...

Writes `history.png` into the first folder, loss, rate and throughput of all of them, from the
`history.jsonl` in each; and beside each one's trust ratios, if it kept some, their heat map.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: its start-up notices

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tf_lamb.telemetry import PICTURE, RECORDS, draw_heat_map
from training.monitor.history import EVALUATIONS, HISTORY, read_rows
from training.monitor.trust_ratios import FOLDER

CURVES = (
    ("loss", "loss (nats)"),
    ("learning_rate", "learning rate"),
    ("examples_per_second", "examples/s"),
)


def draw(model_dirs: list[str], path: str) -> None:
    """Writes a PNG with a panel for each curve and a line for each run.

    Where a run was evaluated on the way its held-out loss is drawn, too, as points.

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
        evaluations = [row | {"loss": _loss(row)} for row in _evaluations(model_dir)]
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


def _evaluations(model_dir):
    return read_rows(os.path.join(model_dir, EVALUATIONS))


def _loss(row):
    """The sum of an evaluation's losses, as in training."""
    return sum(value for name, value in row.items() if name.endswith("_loss"))


def _curve(rows, name):
    """(steps, values); a value that was not finite, null in the file, leaves a gap."""
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
            records = os.path.join(model_dir, FOLDER, RECORDS)
            if os.path.exists(records):
                picture = os.path.join(model_dir, FOLDER, PICTURE)
                draw_heat_map(records, picture)
                print(picture)
    except (OSError, ValueError) as error:
        print(f"training.monitor.plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
