"""Checks that a run killed many times ends like an uninterrupted run: make soak, or

    python tests/soak.py [--kills=20] [--seed=0] [--folder=FOLDER] [--storage=disk|file|ram]
        -- [flags of train.py]

Runs train.py once without interruption. Then, in another folder, starts it repeatedly and kills it
with `kill -9` at random times: during start-up, compilation and training. Losses, evaluations,
weights, slots and counters of the two runs must be bit-identical.

With --storage=file the folders are file://FOLDER, which the program reaches as it reaches a bucket.
With --storage=ram they are ram://, which lives as long as its process: all runs are in this one.
Instead of being killed they are stopped in the middle of a random operation of a storage that shows
half-written objects and old listings (`faulty_storage`), after which they can do nothing more.
"""

import argparse
import contextlib
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from inputs.storage import files  # noqa: E402
from training.checkpoint.manager import saved_step, saved_steps  # noqa: E402
from training.monitor.progress import read_rows  # noqa: E402  the path comes first

STARTING = 100  # operations of the storage before the first step of a run, about
ROOT = pathlib.Path(__file__).parents[1]
DEFAULT = "--synthetic --steps=3000 --steps_per_loop=20 --global_batch_size=8"
SETTINGS = (
    "vocabulary_size=100",
    "max_sequence_length=16",
    "sequence_length=16",
    "predictions=2",
    "save_every_steps=100",
    "evaluate_every_steps=500",
    "dropout=0.1",
)


def start(flags, folder, log):
    """Starts train.py with its output written to `log`; returns the process."""
    command = [sys.executable, str(ROOT / "train.py"), *flags, f"--model_dir={folder}"]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def last_step(folder) -> int:
    """Returns the last step in the history."""
    rows = read_rows(f"{folder}/history.jsonl")
    return rows[-1]["step"] if rows else 0


def check(process, log) -> None:
    """Exits with an error unless the process succeeded or was killed by `kill_often`."""
    if process.returncode not in (0, -9):
        raise SystemExit(f"train.py: status {process.returncode}:\n{log.read_text()[-2000:]}")


def whole(flags, folder, log) -> float:
    """Runs train.py to its end; returns the seconds until the end of its first loop of steps."""
    begun = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = start(flags, folder, file)
        while process.poll() is None and not last_step(folder):
            time.sleep(0.1)
        seconds = time.monotonic() - begun
        process.wait()
    check(process, log)
    return seconds


def kill_often(flags, folder, log, kills, total, seconds, rng) -> None:
    """Kills `kills` processes: every fourth one during start-up, the others during training."""
    for number in range(1, kills + 1):
        begun, done = time.monotonic(), last_step(folder)
        early = number % 4 == 0
        goal = done if early else done + rng.uniform(0, 2) * (total - done) / (kills - number + 1)
        wait = rng.uniform(0, seconds if early else 1)
        with open(log, "w", encoding="utf-8") as file:
            process = start(flags, folder, file)
            # `last_step` may fall first: resuming removes the history after the newest checkpoint.
            while process.poll() is None and not early and last_step(folder) < min(goal, total):
                time.sleep(0.05)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=wait)
            process.kill()
            process.wait()
        check(process, log)
        print(
            f"{number:2}  after {time.monotonic() - begun:5.1f} s  at step {last_step(folder)}, "
            f"saved {saved_step(folder)}",
            flush=True,
        )


def numbers(folder):
    """Returns name -> bytes of all numeric tensors in the last checkpoint."""
    import tensorflow as tf

    prefix = f"{folder}/ckpt-{saved_steps(folder)[-1]}"
    reader = tf.compat.v1.train.NewCheckpointReader(prefix)
    names = (n for n in reader.get_variable_to_shape_map() if not n.startswith(("_", "settings")))
    return {name: reader.get_tensor(name).tobytes() for name in names}


def losses(folder):
    """Returns (step, loss) of each row of the history, and the rows of the evaluations."""
    rows = [(row["step"], row["loss"]) for row in read_rows(f"{folder}/history.jsonl")]
    # A run that is started again after its end evaluates again.
    evaluations = {row["step"]: row for row in read_rows(f"{folder}/evaluations.jsonl")}
    return rows + list(evaluations.values())


def stop_often(flags, one, other, kills, rng) -> None:
    """Runs train.py in this process twice: in `one`, and in `other` with `kills` stops.

    A stop is in an operation of the storage.
    """
    import pytest
    from faulty_storage import Killed, faulty_storage, lease_times
    from program import run_train

    patch = pytest.MonkeyPatch()
    # The lease of a run that was stopped in this process, which goes on, is soon stale.
    lease_times(patch, stale=0.2, poll=0.05)
    with faulty_storage(patch, stale=0, slow=0) as storage:
        if run_train([*flags, f"--model_dir={one}"]):
            raise SystemExit("the run without a stop failed")
        total = storage.operations
    print(f"{total} operations of the storage in a run without a stop", flush=True)
    folder, arguments = other, [*flags, f"--model_dir={other}"]
    with faulty_storage(patch, seed=rng.random(), stale=0.3) as storage:
        for number in range(1, kills + 1):
            before = storage.operations
            storage.kill_at(rng.randrange(1, STARTING + 3 * total // (2 * kills)))
            with contextlib.suppress(Killed):
                if run_train(arguments) == 0:
                    raise SystemExit(f"the run ended before stop {number}: fewer --kills, please")
            storage.restart()
            print(
                f"{number:2}  after {storage.operations - before:3} operations of the storage at "
                f"step {last_step(folder)}, saved {saved_step(folder)}",
                flush=True,
            )
        if run_train(arguments):
            raise SystemExit("the last run failed")


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="where the runs go; a temporary one that is deleted")
    parser.add_argument("--storage", choices=("disk", "file", "ram"), default="disk")
    parser.add_argument("flags", nargs="*", help="of train.py, without --model_dir")
    arguments = parser.parse_args()
    flags = arguments.flags or DEFAULT.split() + [p for s in SETTINGS for p in ("--set", s)]
    folder = pathlib.Path(arguments.folder or tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(exist_ok=True)
    log = folder / "train.log"
    place = {"disk": folder, "file": f"file://{folder.absolute()}", "ram": "ram://soak"}
    one, other = (f"{place[arguments.storage]}/{name}" for name in ("whole", "killed"))
    print("train.py", *flags)
    rng = random.Random(arguments.seed)
    if arguments.storage == "ram":
        stop_often(flags, one, other, arguments.kills, rng)
    else:
        seconds = whole(flags, one, log)
        print(f"{seconds:.0f} s to the first loop of steps", flush=True)
        kill_often(flags, other, log, arguments.kills, last_step(one), seconds, rng)
        whole(flags, other, log)
    agree = losses(one) == losses(other) and numbers(one) == numbers(other)
    damaged = files.list_names(f"{other}/damaged") if files.is_folder(f"{other}/damaged") else []
    print(f"{len(losses(one))} losses and evaluations, {len(numbers(one))} tensors at the end:")
    print("bit-identical" if agree else "they DIFFER", *map(str, damaged))
    if not arguments.folder:
        shutil.rmtree(folder)
    return 0 if agree and not damaged else 1


if __name__ == "__main__":
    sys.exit(main())
