"""Compares optimizers on CIFAR-10: python -m experiments.cifar10 --data_dir=DIR --output=DIR

Trains with LARS, LAMB, momentum SGD and AdamW at batch sizes 128 and 4,096, for the same number of
epochs. Each combination is run with 0.25, 1 and 4 times its recipe's learning rate; the best of
the three is then run with more seeds. Each run is a run of train.py in its own folder. Finished
runs are skipped and a stopped run is resumed, so the same command can be repeated until all runs
are done. OUTPUT/table.json, table.md and curves.png are updated after each run.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # set before TensorFlow logs at import

import matplotlib

matplotlib.use("Agg")  # before the import of pyplot, which would look for a display
from matplotlib import pyplot

from experiments import DIVERGED
from recipes import find_recipe

ROOT = pathlib.Path(__file__).parents[1]
OPTIMIZERS = ("lars", "lamb", "momentum", "adamw")
BATCHES = (128, 4_096)
IMAGES = 50_000
RATE_FACTORS = (0.25, 1.0, 4.0)


def peak_rate(optimizer: str, batch: int) -> float:
    """Returns the peak learning rate of the recipe."""
    return find_recipe(f"cifar10-{optimizer}-{batch}").phases[0].peak_learning_rate


def run(folder: pathlib.Path, row: dict, flags) -> dict:
    """Runs or resumes train.py unless the run is finished; returns `row` with its results."""
    batch = row["batch"]
    result = folder / "run.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        steps = round(flags.epochs * IMAGES / batch)
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"--recipe=cifar10-{row['optimizer']}-{batch}",
            f"--data_dir={flags.data_dir}",
            f"--model_dir={folder}",
            f"--seed={row['seed']}",
            f"--set=peak_learning_rate={row['rate']!r}",
            f"--steps={steps}",
            f"--steps_per_loop={max(1, steps // 30)}",  # about 30 points per curve
            f"--set=evaluate_every_steps={steps}",
        ]
        start = time.monotonic()
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            status = subprocess.run(command, stdout=log, stderr=log).returncode
        if status < 0 or status > 128:
            raise KeyboardInterrupt  # a signal stopped it
        row["minutes"] = (time.monotonic() - start) / 60  # only of the last start
        if status == 0:
            row |= json.loads((folder / "results.json").read_text())
        elif status != DIVERGED:
            raise SystemExit(f"{' '.join(command)} failed; see {folder / 'log.txt'}")
        result.write_text(json.dumps(row, indent=1))
    return json.loads(result.read_text())


def accuracy(row: dict) -> float:
    """Returns top-1 accuracy on the 10,000 test images; 0 for a run that diverged."""
    return row.get("image_top1", 0.0)


def summary(rows: list[dict]) -> str:
    """Returns a Markdown table: the best rate of each pair, and its accuracy for each seed."""
    lines = [
        "| optimizer | batch | best rate | top-1, of each seed | first seed, by rate |",
        "|---|---|---|---|---|",
    ]
    for optimizer in OPTIMIZERS:
        for batch in BATCHES:
            own = [r for r in rows if (r["optimizer"], r["batch"]) == (optimizer, batch)]
            if own:
                rate = max(own, key=accuracy)["rate"]
                found = sorted(accuracy(row) for row in own if row["rate"] == rate)
                shown = ", ".join(f"{value:.4f}" for value in found)
                grid = [f"{row['rate']:g}: {accuracy(row):.4f}" for row in own if row["seed"] == 1]
                lines.append(
                    f"| {optimizer} | {batch:,} | {rate:g} | {shown} | {', '.join(grid)} |"
                )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], output: pathlib.Path) -> None:
    """Plots training loss over epochs for the best run of each pair."""
    figure, axes = pyplot.subplots(1, len(BATCHES), figsize=(10, 4), sharey=True)
    for axis, batch in zip(axes, BATCHES, strict=True):
        for optimizer in OPTIMIZERS:
            own = [r for r in rows if (r["optimizer"], r["batch"]) == (optimizer, batch)]
            if own:
                best = max(own, key=accuracy)
                history = (output / name(best) / "history.jsonl").read_text().splitlines()
                points = [json.loads(line) for line in history]
                epochs = [point["step"] * batch / IMAGES for point in points]
                label = f"{optimizer}, {best['rate']:g}: {accuracy(best):.3f}"
                axis.plot(epochs, [point["loss"] for point in points], label=label)
        axis.set(title=f"batch {batch:,}", xlabel="epoch")
        if axis.lines:
            axis.legend()
    axes[0].set_ylabel("training loss, nats")
    figure.tight_layout()
    figure.savefig(output / "curves.png", dpi=120)
    pyplot.close(figure)


def name(row: dict) -> str:
    """Returns the name of a run's folder."""
    epochs = f"{row['epochs']:g}epochs"
    return f"{row['optimizer']}-{row['batch']}-{row['rate']:g}-{epochs}-seed{row['seed']}"


def main() -> None:
    """Runs the command line: all runs that are not finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="from inputs.images.prepare")
    parser.add_argument("--output", required=True)
    parser.add_argument("--seeds", type=int, default=2, help="of the best rate of each pair")
    parser.add_argument("--epochs", type=float, default=15.0)
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    flags = parser.parse_args()
    output = pathlib.Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []

    def do(optimizer, batch, rate, seed):
        row = {"optimizer": optimizer, "batch": batch, "rate": rate, "epochs": flags.epochs}
        row |= {"seed": seed}
        rows.append(run(output / name(row), row, flags))
        (output / "table.json").write_text(json.dumps(rows, indent=1))
        (output / "table.md").write_text(summary(rows))
        draw(rows, output)
        print(f"{name(row)}: top-1 {accuracy(rows[-1]):.4f}", flush=True)

    for batch in map(int, flags.batches.split(",")):
        for optimizer in flags.optimizers.split(","):
            first = len(rows)
            for factor in RATE_FACTORS:
                do(optimizer, batch, factor * peak_rate(optimizer, batch), 1)
            best = max(rows[first:], key=accuracy)["rate"]
            for seed in range(2, flags.seeds + 1):
                do(optimizer, batch, best, seed)
    print(summary(rows))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("experiments.cifar10: stopped. The same command goes on.")
