"""Critical batch size by branching: python -m training.branch --model_dir=RUN --batches=32,64,128

A run is branched at a checkpoint into several batch sizes. Each branch starts from the same
weights and moments, sees the same number of examples, and has the constant learning rate of the
checkpoint times √k, where k is its batch size relative to the run's. The critical batch size is the
largest one whose held-out loss is not worse than that of the smallest one (Merrill et al.,
arXiv:2505.23971). Beside it stands the gradient noise scale of the branch with the run's own batch
size. Branches are runs of train.py: a command that was stopped resumes. Finished
branches are used again by a command with the same run, rate and data, and by no other.
"""

import argparse
import dataclasses
import hashlib
import math
import os
import subprocess
import sys

from inputs import process  # isort: split

import recipes
from inputs.errors import InputError, refuse_not_positive
from inputs.storage.files import absolute, is_remote, read_file, read_json, write_json
from recipes.overrides import NOT_SETTABLE
from training.checkpoint.compatibility import RUN_CONFIG
from training.checkpoint.manager import saved_steps
from training.monitor import noise_scale
from training.monitor.progress import HISTORY, read_rows

TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
REPORT = "branches.json"
RESULTS = "results.json"  # of a run of train.py
ORIGIN = "branch.json"  # in the folder of a branch: what it was made from, see `origin`
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

    @property
    def checkpoint(self) -> str:
        """The prefix of the checkpoint."""
        return os.path.join(self.model_dir, f"ckpt-{self.step}")


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
    steps = examples // batch
    rate = trunk.rate * math.sqrt(batch / trunk.batch)
    fields = {
        "init_from": trunk.checkpoint,
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


def origin(trunk: Trunk, data_dir: str) -> dict:
    """Returns what all branches of a command depend on, besides their batch size, as JSON values.

    The index of a checkpoint has a checksum of each tensor, so that its hash identifies the weights
    and moments.
    """
    index = read_file(f"{trunk.checkpoint}.index")
    paths = data_dir.split(",") if data_dir else []
    return {
        "rate": trunk.rate,
        "data": [absolute(path) for path in paths],
        "checkpoint": hashlib.sha256(index).hexdigest(),
        "settings": settings_flags(trunk),
    }


def check_origin(folder: str, expected: dict) -> None:
    """Checks that a branch that was trained before, if there is one, belongs to this command.

    Args:
        folder: the folder of the branch, which may not exist.
        expected: from `origin`.

    Raises:
        InputError: it does not.
    """
    if not any(os.path.exists(os.path.join(folder, name)) for name in (RESULTS, RUN_CONFIG)):
        return  # nothing was trained
    path = os.path.join(folder, ORIGIN)
    found = read_json(path) if os.path.exists(path) else {}
    if not isinstance(found, dict):
        found = {}
    reasons = {
        "rate": f"--rate ({found.get('rate')}, and now {expected['rate']})",
        "data": "--data_dir",
        "checkpoint": "weights in the checkpoint of --model_dir",
        "settings": "settings of the run in --model_dir",
    }
    other = [reason for name, reason in reasons.items() if found.get(name) != expected[name]]
    if other:
        reason = f"other {' and other '.join(other)}" if found else "a run that is not known"
        raise InputError(
            f"--output: {folder} holds a branch from {reason}. Give another --output, or delete "
            "that folder."
        )


def last_line(path: str, start: int) -> str:
    """Returns the last message of train.py in a file of its output, else the last line.

    Args:
        path: the file.
        start: where the output of the newest run begins, in bytes.
    """
    with open(path, "rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    own = [line for line in lines if line.startswith("train.py: ")]
    return (own or lines or [""])[-1].removeprefix("train.py: ")


def run_to_its_end(command: list[str], path: str) -> int:
    """Runs train.py, with its output added to a file; returns its exit status.

    When this process is interrupted, train.py saves a checkpoint and ends; a second interrupt does
    not wait for that.
    """
    with open(path, "a", encoding="utf-8") as file:
        # In a session of its own, it gets a Ctrl-C from here only: a second one would kill it.
        child = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    finally:
        if child.poll() is None:
            child.kill()


def run_branch(trunk, batch, examples, data_dir, folder, log=print) -> dict:
    """Runs one branch, or reads its result if it is finished; returns a row of the report.

    Raises:
        InputError: train.py failed, or the folder holds another branch.
    """
    results = os.path.join(folder, RESULTS)
    made_from = origin(trunk, data_dir)
    check_origin(folder, made_from)
    if not os.path.exists(results):
        os.makedirs(folder, exist_ok=True)
        write_json(os.path.join(folder, ORIGIN), made_from)
        path = os.path.join(folder, "train.log")
        log(f"batch {batch:,}: {examples:,} examples in {examples // batch:,} steps; {path}")
        start = os.path.getsize(path) if os.path.exists(path) else 0
        status = run_to_its_end(branch_command(trunk, batch, examples, data_dir, folder), path)
        if status:
            raise InputError(
                f"batch {batch}: train.py ended with status {status}; see {path}. Its last line: "
                f"{last_line(path, start)}"
            )
    own = read_json(os.path.join(folder, RUN_CONFIG), flag="--output", fix="Delete the folder.")
    if not isinstance(own, dict) or own.get("data") != trunk.settings.get("data"):
        raise InputError(
            f"--data_dir: the branch in {folder} was trained on other data than the run in "
            f"{trunk.model_dir}. Give the data of that run, and delete {folder}."
        )
    row = {
        "batch": batch,
        "steps": examples // batch,
        "learning_rate": trunk.rate * math.sqrt(batch / trunk.batch),
        "loss": read_json(results, flag="--output", fix="Delete the folder.")["loss"],
    }
    if batch == trunk.batch and trunk.settings.get("clip_each_replica"):
        log(
            f"No noise scale: {trunk.model_dir} clips the gradient of each replica, and the noise "
            "is measured in gradients that are not clipped. Branch a run with --set "
            "clip_each_replica=false."
        )
    elif batch == trunk.batch:
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
        if not row["loss"] <= rows[0]["loss"] + tolerance:  # also if a loss is NaN
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


def check_numbers(flags, batches: list[int]) -> None:
    """Checks --examples, --rate and --tolerance.

    Args:
        flags: the flags of the command.
        batches: the batch sizes, in ascending order.

    Raises:
        InputError: one is out of range, or the branches could not have as many examples each.
    """
    if flags.examples < 2 * batches[-1]:
        raise InputError(
            f"--examples={flags.examples}: the largest batch, {batches[-1]}, needs two steps or "
            "more."
        )
    other = next((batch for batch in batches if flags.examples % batch), None)
    if other:
        common = math.lcm(*batches)
        least = -(-2 * batches[-1] // common) * common
        near = max(least, round(flags.examples / common) * common)
        raise InputError(
            f"--examples={flags.examples} is not a multiple of the batch size {other}, so that the "
            f"branches would see different numbers of examples. Give a multiple of {common}, such "
            f"as --examples={near}."
        )
    refuse_not_positive(rate=flags.rate)
    if not 0 <= flags.tolerance < math.inf:
        raise InputError(
            f"--tolerance must be finite and at least 0. Received: --tolerance={flags.tolerance:g}."
        )


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
        "--examples",
        type=int,
        required=True,
        help="examples that each branch trains on, a multiple of each batch size",
    )
    parser.add_argument("--data_dir", default="", help="the run's text, as train.py takes it")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    parser.add_argument(
        "--rate", type=float, help="learning rate at the run's batch; default: the history's"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help="largest accepted increase of the held-out loss, in nats",
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
        check_numbers(flags, batches)
        trunk = read_trunk(flags.model_dir, flags.step, flags.rate)
        if trunk.batch not in batches:
            raise InputError(
                f"--batches={flags.batches}: add the run's own batch size, {trunk.batch}."
            )

        def log(line):
            print(line, file=sys.stderr, flush=True)

        rows = []
        name = f"step-{trunk.step}-{flags.examples}"
        with process.signals_as_interrupt():
            for batch in batches:
                folder = os.path.join(output, name, f"batch-{batch}")
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
