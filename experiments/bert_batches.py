"""Compares LAMB and AdamW at a small and a 32 times larger batch, for the same number of epochs.

    python -m experiments.bert_batches --data_dir=enwiki-articles.jsonl.gz --vocab=vocab.txt

trains `bert-mini` through both of its phases (length 128, then 512 at half the batch size, with
warm-up in each). The rule for tuning the learning rate is the same for each optimizer and batch
size. Three rates, a factor of two apart, are tried with the first seed. While the best of them, by
held-out masked-token accuracy, is the lowest or the highest, the next rate beyond it is tried. The
best rate is then run with the other seeds. The second phase has half the batch size, so its rate is
1/√2 of the first phase's. Steps of more than --micro_batch sequences use gradient accumulation.

The outcome of each run is saved in OUTPUT/NAME.json. If the command is stopped, the same command
resumes the run that was in progress. Two commands with different --optimizers can run at the same
time. OUTPUT/table.md and OUTPUT/curves.png are written even if only some of the runs are done.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # set before TensorFlow logs at import

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import DIVERGED
from inputs.files import write_json
from recipes import find_recipe, scale_recipe

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECIPE, TIMES_LARGER, SEEDS = "bert-mini", 32, (1, 2, 3)
# Expected best rate at the small batch. At the large batch it is multiplied by √32.
EXPECTED_RATE = {"lamb": 0.00125, "adamw": 0.0005}
AROUND = (1 / 2, 1, 2)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: an optimizer at a batch size (of the first phase), a peak rate and a seed."""

    optimizer: str
    batch: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder and outcome file."""
        return f"{self.optimizer}-{self.batch}-rate{self.rate:g}-seed{self.seed}"


def pairs(options) -> list[tuple[str, int, list[float]]]:
    """Returns (optimizer, batch size, the first rates to try) of each combination."""
    return [
        (
            optimizer,
            options.small_batch * larger,
            [float(f"{EXPECTED_RATE[optimizer] * larger**0.5 * factor:.2g}") for factor in AROUND],
        )
        for larger in (1, TIMES_LARGER)
        for optimizer in options.optimizers.split(",")
    ]


def command(trial: Trial, options, folder: str) -> list[str]:
    """Returns the `train.py` command of a trial."""
    # "linear" keeps the share of warm-up steps. `settings` replaces the rates that it computes.
    steps = round(options.share * scale_recipe(find_recipe(RECIPE), trial.batch, "linear").steps)
    settings = {
        "optimizer": trial.optimizer,
        "model": options.model,
        "phase1.peak_learning_rate": trial.rate,
        "phase2.peak_learning_rate": trial.rate / 2**0.5,
        "accumulation": max(1, trial.batch // options.micro_batch),
        "save_every_steps": max(1, steps // 10),
        "keep_checkpoints": 1,
    }
    return [
        sys.executable,
        os.path.join(ROOT, "train.py"),
        f"--recipe={RECIPE}",
        f"--data_dir={options.data_dir}",
        f"--vocab={options.vocab}",
        f"--global_batch_size={trial.batch}",
        "--scaling=linear",
        f"--steps={steps}",
        f"--steps_per_loop={max(1, steps // 50)}",
        f"--seed={trial.seed}",
        f"--model_dir={folder}",
        *(f"--set={name}={value}" for name, value in settings.items()),
        *(f"--set={assignment}" for assignment in options.set),
    ]


def run(trial: Trial, options) -> dict:
    """Returns the trial's outcome from its file; if there is none, runs or resumes the trial.

    Raises:
        RuntimeError: train.py failed other than by divergence, or the file has other settings.
    """
    folder = os.path.join(options.runs, trial.name)
    path = outcome_path(trial, options)
    settings = {"model": options.model, "share": options.share, "set": options.set}
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        start = time.perf_counter()
        with open(os.path.join(folder, "train.log"), "a", encoding="utf-8") as log:
            arguments = command(trial, options, folder)
            status = subprocess.run(arguments, stdout=log, stderr=log, check=False).returncode
        diverged = status == DIVERGED
        if status and not diverged:
            raise RuntimeError(f"train.py ended with status {status}; see {folder}/train.log")
        outcome = dataclasses.asdict(trial) | settings
        outcome |= {"diverged": diverged, "accuracy": 0.0, "curve": []}
        if not diverged:
            with open(os.path.join(folder, "results.json"), encoding="utf-8") as file:
                outcome |= {"accuracy": json.load(file)["masked_accuracy"]}
            outcome |= {"curve": curve(folder)}
        outcome["seconds_since_start"] = round(time.perf_counter() - start, 1)
        write_json(path, outcome, indent=None)
        for name in os.listdir(folder):  # delete weights and keep logs, as there are many runs
            if name.startswith("ckpt-") or name in ("best", "export", "checkpoint"):
                place = os.path.join(folder, name)
                shutil.rmtree(place) if os.path.isdir(place) else os.remove(place)
    with open(path, encoding="utf-8") as file:
        outcome = json.load(file)
    if any(outcome[name] != value for name, value in settings.items()):
        raise RuntimeError(f"{path} is of other settings than {settings}; take another --output")
    return outcome


def outcome_path(trial: Trial, options) -> str:
    """Returns the path of the trial's outcome file."""
    return os.path.join(options.output, f"{trial.name}.json")


def curve(folder: str) -> list[tuple[int, float]]:
    """Returns (sequences used so far, masked-token training accuracy) of each loop of steps."""
    with open(os.path.join(folder, "recipe.json"), encoding="utf-8") as file:
        first, second = json.load(file)["phases"]
    points = []
    with open(os.path.join(folder, "history.jsonl"), encoding="utf-8") as file:
        for row in map(json.loads, file):
            in_first = min(row["step"], first["steps"])
            used = in_first * first["global_batch_size"]
            used += (row["step"] - in_first) * second["global_batch_size"]
            points.append((used, round(row["masked_accuracy"], 5)))
    return points


def compare(options, say=print) -> list[dict]:
    """Runs missing trials, at most `options.limit`; returns all outcomes found or made."""
    outcomes = []

    def outcome(trial):
        done = os.path.exists(outcome_path(trial, options))
        if not done:
            if options.limit == 0:
                return None
            options.limit -= 1
            say(f"{time.strftime('%H:%M:%S')} {trial.name}")
        outcomes.append(run(trial, options))
        if not done:
            say(f"  accuracy {outcomes[-1]['accuracy']:.4f}")
        return outcomes[-1]

    for optimizer, batch, rates in pairs(options):
        tuned = {rate: outcome(Trial(optimizer, batch, rate, SEEDS[0])) for rate in rates}
        while None not in tuned.values():
            best = max(tuned, key=lambda rate: tuned[rate]["accuracy"])
            if min(tuned) < best < max(tuned) or tuned[best]["diverged"]:
                for seed in SEEDS[1:]:
                    outcome(Trial(optimizer, batch, best, seed))
                break
            beyond = best * 2 if best == max(tuned) else best / 2
            tuned[beyond] = outcome(Trial(optimizer, batch, beyond, SEEDS[0]))
    return outcomes


def summary(outcomes: list[dict]) -> list[dict]:
    """Returns a row for each optimizer and batch size: best rate, its seeds and all rates tried."""
    rows = []
    for key in dict.fromkeys((o["optimizer"], o["batch"]) for o in outcomes):
        own = [o for o in outcomes if (o["optimizer"], o["batch"]) == key]
        grid = {o["rate"]: o["accuracy"] for o in own if o["seed"] == SEEDS[0]}
        best = max(grid, key=grid.get)
        runs = [o for o in own if o["rate"] == best]
        rows.append(
            {
                "optimizer": key[0],
                "batch": key[1],
                "rate": best,
                "at_the_edge": best in (min(grid), max(grid)),
                "accuracies": [o["accuracy"] for o in runs],
                "grid": grid,
                "curves": [o["curve"] for o in runs],
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Returns a Markdown table: mean and standard deviation over the seeds, and all rates tried."""
    lines = [
        "| optimizer | batch | best rate | held-out masked-token accuracy | first seed, by rate |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        found = row["accuracies"]
        spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
        tried = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in sorted(row["grid"].items()))
        edge = " (edge)" if row["at_the_edge"] else ""
        lines.append(
            f"| {row['optimizer']} | {row['batch']} | {row['rate']:g}{edge} | "
            f"{statistics.mean(found):.4f}{spread} ({len(found)} seeds) | {tried} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: str) -> None:
    """Plots training accuracy against sequences used to a PNG, with a line for each seed."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, row in enumerate(rows):
        for i, points in enumerate(curve for curve in row["curves"] if curve):
            label = f"{row['optimizer']}, batch {row['batch']}" if i == 0 else None
            axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, alpha=0.7)
    axes.set_xlabel("training sequences")
    axes.set_ylabel("masked training tokens right (share)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="text, as train.py takes it")
    parser.add_argument("--vocab", required=True, help="a BERT vocab.txt")
    parser.add_argument("--runs", default="runs/bert-batches", help="a folder for each run")
    parser.add_argument("--output", default="docs/results/bert_batches", help="a folder")
    parser.add_argument("--model", default="mini", help="size of the network")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE, as train.py's")
    parser.add_argument("--small_batch", type=int, default=16, help="of the first phase")
    parser.add_argument("--micro_batch", type=int, default=32, help="most sequences at a time")
    parser.add_argument("--share", type=float, default=1.0, help="of the recipe's sequences")
    parser.add_argument("--optimizers", default=",".join(EXPECTED_RATE))
    parser.add_argument("--limit", type=int, default=-1, help="runs to do now; -1 for all")
    options = parser.parse_args(arguments)
    os.makedirs(options.output, exist_ok=True)
    try:
        rows = summary(compare(options))
    except RuntimeError as error:
        print(f"experiments.bert_batches: {error}", file=sys.stderr)
        return 1
    with open(os.path.join(options.output, "table.md"), "w", encoding="utf-8") as file:
        file.write(table(rows))
    if rows:
        draw(rows, os.path.join(options.output, "curves.png"))
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
