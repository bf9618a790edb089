"""Critical batch size by branching: python -m training.branch --model_dir=RUN --batches=32,64,128

A run is branched at a checkpoint into several batch sizes. Each branch starts from the same
weights and moments, sees the same number of examples, and has the constant learning rate of the
checkpoint times √k, where k is its batch size relative to the run's. The critical batch size is the
largest one whose held-out loss is not worse than that of the smallest one (Merrill et al.,
arXiv:2505.23971). Beside it stands the gradient noise scale of the branch with the run's own batch
size. Branches are runs of train.py: a command that was stopped goes on where it was.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys

from inputs import process  # isort: split

import recipes
from inputs.errors import InputError
from inputs.storage.files import absolute, is_remote, read_json, write_json
from recipes.overrides import NOT_SETTABLE
from training.checkpoint.compatibility import RUN_CONFIG
from training.checkpoint.manager import saved_steps
from training.monitor import noise_scale
from training.monitor.progress import HISTORY, read_rows

TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
REPORT = "branches.json"
LEAST_RATE = 0.01  # of the peak: a branch with a lower rate would learn nothing
# Fields of a recipe that the command sets itself in each branch.
OWN_FIELDS = (
    "evaluate_every_steps",
    "evaluate_every_examples",
    "init_from",
    "init_slots",
    "measure_noise_scale",
    "profile",
    "save_every_steps",
    "target",
    "telemetry",
)


@dataclasses.dataclass(frozen=True)
class Trunk:
    """The run that is branched.

    Attributes:
        model_dir: Its folder.
        settings: The content of its recipe.json.
        step: The step of the checkpoint.
        rate: The learning rate of the branch with the run's batch size.
    """

    model_dir: str
    settings: dict
    step: int
    rate: float

    @property
    def batch(self) -> int:
        """Examples per step."""
        return self.settings["phases"][0]["global_batch_size"]


def read_trunk(model_dir: str, step: int | None, rate: float | None) -> Trunk:
    """Reads the run that is to be branched.

    Args:
        model_dir: its folder.
        step: the step of the checkpoint; None for the newest.
        rate: the learning rate; None for that of the history at this step.

    Raises:
        InputError: the folder holds no run, no such checkpoint, or a run that cannot be branched.
    """
    steps = saved_steps(model_dir)
    if not steps:
        raise InputError(f"--model_dir: {model_dir} holds no checkpoint of a run.")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise InputError(
            f"--step={step}: {model_dir} has no such checkpoint. There are: "
            f"{', '.join(map(str, steps))}."
        )
    settings = read_json(
        os.path.join(model_dir, RUN_CONFIG), flag="--model_dir", fix="Give the folder of a run."
    )
    if settings.get("task") != "bert" or settings.get("optimizer") != "lamb":
        raise InputError(
            "--model_dir: a run of BERT pre-training with LAMB can be branched. Received: "
            f"{settings.get('task')} with {settings.get('optimizer')}."
        )
    if len(settings["phases"]) != 1:
        raise InputError(
            f"--model_dir: {model_dir} holds a run of {len(settings['phases'])} phases. Give one "
            "with one phase."
        )
    rows = [row for row in read_rows(os.path.join(model_dir, HISTORY)) if row["step"] <= step]
    if rate is None:
        rate = rows[-1]["learning_rate"] if rows else 0.0
        peak = settings["phases"][0]["peak_learning_rate"]
        if rate < LEAST_RATE * peak:
            raise InputError(
                f"--step={step}: the learning rate is {rate:.3g} there, less than "
                f"{LEAST_RATE:.0%} of its peak. Choose an earlier checkpoint, or give --rate."
            )
    return Trunk(model_dir, settings, step, rate)


def settings_flags(trunk: Trunk) -> list[str]:
    """Returns the `--set` flags that make the named recipe that of the run."""
    recipe = recipes.find_recipe(trunk.settings["name"])
    (phase,), (own,) = recipe.phases, trunk.settings["phases"]
    flags = []
    for values, known in ((trunk.settings, recipe), (own, phase)):
        for name in (field.name for field in dataclasses.fields(known)):
            if name in NOT_SETTABLE or name in OWN_FIELDS or name not in values:
                continue
            value = values[name]
            default = getattr(known, name)
            if isinstance(value, list):
                value = tuple(value)
            if value != default and name not in ("steps", "reference", "expected"):
                if isinstance(value, tuple):
                    text = ",".join(map(str, value))
                else:
                    text = "none" if value is None else str(value)
                flags.append(f"--set={name}={text}")
    return flags


def branch_command(trunk: Trunk, batch: int, examples: int, data_dir: str, folder: str):
    """Returns the command of one branch, a list of arguments."""
    steps = round(examples / batch)
    rate = trunk.rate * math.sqrt(batch / trunk.batch)
    fields = {
        "init_from": os.path.join(trunk.model_dir, f"ckpt-{trunk.step}"),
        "init_slots": "true",
        "global_batch_size": batch,
        "peak_learning_rate": f"{rate:.9g}",
        "end_learning_rate": f"{rate:.9g}",
        "warmup_steps": 0,
        "warmup_from": 0,
        "decay_from": "none",
        "save_every_steps": steps,
        "telemetry": "false",
    }
    if batch == trunk.batch and not trunk.settings.get("clip_each_replica"):
        accumulation = max(2, trunk.settings["accumulation"])
        fields |= {"measure_noise_scale": "true", "accumulation": accumulation}
    return [
        *(sys.executable, TRAIN, f"--recipe={trunk.settings['name']}", f"--model_dir={folder}"),
        *([f"--data_dir={data_dir}"] if data_dir else []),
        f"--vocab={os.path.join(trunk.model_dir, 'vocab.txt')}",
        f"--steps={steps}",
        f"--steps_per_loop={max(1, min(50, steps // 4))}",
        *settings_flags(trunk),
        *(f"--set={name}={value}" for name, value in fields.items()),
    ]


def run_branch(trunk, batch, examples, data_dir, folder, log=print) -> dict:
    """Runs one branch, or reads its result if it is finished; returns a row of the report.

    Raises:
        InputError: train.py failed.
    """
    results = os.path.join(folder, "results.json")
    if not os.path.exists(results):
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "train.log")
        log(f"batch {batch:,}: {examples:,} examples in {round(examples / batch):,} steps; {path}")
        with open(path, "a", encoding="utf-8") as file:
            command = branch_command(trunk, batch, examples, data_dir, folder)
            status = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
        if status:
            raise InputError(f"--batches: train.py ended with status {status}; see {path}.")
    row = {
        "batch": batch,
        "steps": round(examples / batch),
        "learning_rate": trunk.rate * math.sqrt(batch / trunk.batch),
        "loss": read_json(results, flag="--output", fix="Delete the folder.")["loss"],
    }
    if batch == trunk.batch:
        try:
            row["noise_scale"] = noise_scale.measured(folder)
        except InputError as error:
            log(f"No noise scale: {error}")
    return row


def critical_batch(rows: list[dict], tolerance: float) -> int:
    """Returns the largest batch size up to which no loss is worse than that of the smallest one.

    Args:
        rows: rows of the report, in the order of their batch sizes.
        tolerance: in nats; a loss that is larger by more than this is worse.
    """
    best = rows[0]["batch"]
    for row in rows[1:]:
        if row["loss"] > rows[0]["loss"] + tolerance:
            break
        best = row["batch"]
    return best


def report(trunk: Trunk, rows: list[dict], examples: int, tolerance: float) -> str:
    """Returns the table of the branches and the critical batch size."""
    lines = [
        f"Branches of {trunk.model_dir} at step {trunk.step:,}, {examples:,} examples each",
        "batch    steps    learning rate  held-out loss  against the smallest",
    ]
    for row in rows:
        lines.append(
            f"{row['batch']:<8,} {row['steps']:<8,} {row['learning_rate']:<14.4g} "
            f"{row['loss']:<14.4f} {row['loss'] - rows[0]['loss']:+.4f}"
        )
    found = critical_batch(rows, tolerance)
    more = "" if found < rows[-1]["batch"] else " or more: no branch lost anything"
    lines.append(f"Critical batch size by branching, within {tolerance:g} nats: {found:,}{more}")
    for row in rows:
        if "noise_scale" in row:
            lines.append(f"Gradient noise scale at the same checkpoint: {row['noise_scale']:,.0f}")
    return "\n".join(lines)


def parse_batches(text: str) -> list[int]:
    """Reads `--batches`: at least two batch sizes, returned in ascending order.

    Raises:
        InputError: the text is something else.
    """
    try:
        batches = sorted({int(part) for part in text.split(",")})
    except ValueError:
        batches = []
    if len(batches) < 2 or batches[0] < 1:
        raise InputError(
            f"--batches={text}: give at least two batch sizes, such as 32,64,128, the smallest one "
            "being what the others are compared with."
        )
    return batches


def main(arguments) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: the command's arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.branch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model_dir", required=True, help="the run to branch")
    parser.add_argument("--batches", required=True, help="batch sizes, comma-separated")
    parser.add_argument(
        "--examples", type=int, required=True, help="examples that each branch trains on"
    )
    parser.add_argument("--data_dir", default="", help="the run's text, as train.py takes it")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    parser.add_argument(
        "--rate", type=float, help="learning rate at the run's batch; default: the history's"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="a loss larger by this is worse, in nats"
    )
    parser.add_argument("--output", help="folder of the branches; default: MODEL_DIR-branches")
    flags = parser.parse_args(arguments)
    output = flags.output or f"{absolute(flags.model_dir)}-branches"
    try:
        if is_remote(output):
            raise InputError(
                f"--output={output}: the output of each branch is appended to a file there. Give a "
                "folder on a local disk."
            )
        batches = parse_batches(flags.batches)
        if flags.examples < 2 * batches[-1]:
            raise InputError(
                f"--examples={flags.examples}: the largest batch, {batches[-1]}, needs two steps "
                "or more."
            )
        trunk = read_trunk(flags.model_dir, flags.step, flags.rate)
        if trunk.batch not in batches:
            raise InputError(
                f"--batches={flags.batches}: add the run's own batch size, {trunk.batch}."
            )

        def log(line):
            print(line, file=sys.stderr, flush=True)

        rows = []
        for batch in batches:
            folder = os.path.join(output, f"step-{trunk.step}-{flags.examples}", f"batch-{batch}")
            rows.append(run_branch(trunk, batch, flags.examples, flags.data_dir, folder, log))
        print(report(trunk, rows, flags.examples, flags.tolerance))
        found = critical_batch(rows, flags.tolerance)
        write_json(
            os.path.join(output, REPORT),
            {
                "step": trunk.step,
                "examples": flags.examples,
                "critical_batch": found,
                "branches": rows,
            },
        )
    except (InputError, OSError) as error:
        print(f"training.branch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    process.run(main, sys.argv[1:])
