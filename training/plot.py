"""Draws loss, rate and throughput of one or several runs: python -m training.plot MODEL_DIR...

Writes `history.png` into the first folder, from the `history.jsonl` in each.
"""

import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from training.progress import read_history

CURVES = (
    ("loss", "training loss (nats)"),
    ("learning_rate", "learning rate"),
    ("examples_per_second", "sequences/s"),
)


def draw(model_dirs: list[str], path: str) -> None:
    """Writes a PNG with a panel for each curve and a line for each run.

    Raises:
        ValueError: a folder without a history.
    """
    figure, panels = plt.subplots(len(CURVES), sharex=True, figsize=(8, 8), layout="constrained")
    for model_dir in model_dirs:
        rows = read_history(os.path.join(model_dir, "history.jsonl"))
        if not rows:
            raise ValueError(
                f"{model_dir} has no history.jsonl with a step in it. Give a run's --model_dir."
            )
        label = os.path.basename(os.path.normpath(model_dir))
        for panel, (name, _) in zip(panels, CURVES, strict=True):
            panel.plot([row["step"] for row in rows], [row[name] for row in rows], label=label)
    for panel, (_, title) in zip(panels, CURVES, strict=True):
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0)
    panels[0].legend()
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(model_dirs: list[str]) -> int:
    """The command line; returns the exit status."""
    if not model_dirs:
        print(__doc__, file=sys.stderr)
        return 1
    path = os.path.join(model_dirs[0], "history.png")
    try:
        draw(model_dirs, path)
    except ValueError as error:
        print(f"training.plot: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
