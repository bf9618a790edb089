"""Times the training engine, the bare step and Keras: python -m benchmarks.engine

One process trains four copies of a BERT on one strategy with one synthetic batch. Blocks of their
steps take turns, so that other load on the machine affects all of them. If other programs use the
cores, compare CPU seconds.

- The engine: Orbit's loop, TensorBoard, history, trust ratios, and a checkpoint every 500 steps.
- The bare step: the same compiled step, called from Python; nothing is read or written.
- `tf_keras` `model.fit` without callbacks: once with `jit_compile=True` and as many steps per
  execution as the engine's loop has, once with default arguments.

Then `train.py` is started, stopped after its first step, and started again.
"""

import argparse
import contextlib
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from inputs import process  # isort: split

import numpy as np
import psutil
import tensorflow as tf
import tf_keras

from benchmarks.contenders import bare_block, fit_block, make_parts, make_recipe, make_task
from inputs.errors import InputError, refuse_below
from inputs.storage.files import check_file_writable, write_json
from models import bert
from training import strategy
from training.checkpoint import manager
from training.run import Run

ROOT = pathlib.Path(__file__).parents[1]
SAVE_EVERY = 500
WARM_UP = 2  # blocks; the first one compiles, the second one saves and writes histograms


class Done(Exception):
    """Ends training when enough blocks are timed."""


def clocks():
    """[2] seconds: wall time, and CPU time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


class TimedRun(Run):
    """Records the time of each loop of steps on the device, until its results are read."""

    device_seconds: list = []

    def _start_data(self, phase_index, first_step):
        super()._start_data(phase_index, first_step)
        train_loop = self._train_loop

        def timed(num_steps):
            begun = clocks()
            results = train_loop(num_steps)
            tf.nest.map_structure(lambda value: value.numpy(), results)
            self.device_seconds.append(clocks() - begun)
            return results

        self._train_loop = timed


class Turns:
    """Called by the engine after each loop of steps; then runs a block of each other program.

    Args:
        others: name -> function that runs a block.
        blocks: number of blocks to time, after the warm-up.
        steps: steps per block.
        model_dir: where the engine saves.
    """

    def __init__(self, others, blocks, steps, model_dir):
        self._others = others
        self._blocks = blocks
        self._steps = steps
        self._model_dir = model_dir
        self._begun = None
        self.seconds = {name: [] for name in ("engine", *others)}
        self.saved = []  # whether each block of the engine starts with a checkpoint

    deferred = contextlib.nullcontext
    signum = None

    def __call__(self, output=None):
        """Records the engine's time since its last turn; raises `Done` after enough blocks."""
        now = clocks()
        if output is None:
            self._begun = now
            return
        self.seconds["engine"].append(now - self._begun)
        before = (len(self.seconds["engine"]) - 1) * self._steps
        self.saved.append(bool(before) and manager.saved_step(self._model_dir) == before)
        for name, block in self._others.items():
            begun = clocks()
            block()
            self.seconds[name].append(clocks() - begun)
        done = len(self.saved) - WARM_UP
        print(f"block {max(0, done)} of {self._blocks}", file=sys.stderr, flush=True)
        if done >= self._blocks:
            raise Done
        self._begun = clocks()


def run_engine(recipe, where, turns, steps, model_dir):
    """Runs the engine, as train.py calls it, until `turns` raises `Done`."""
    tf_keras.utils.set_random_seed(1)
    run = TimedRun(
        make_task(recipe),
        recipe,
        where,
        model_dir=model_dir,
        seed=1,
        steps_per_loop=steps,
        stop=turns,
    )
    with contextlib.suppress(Done):
        run.fit()


def time_blocks(options):
    """Times the blocks.

    Returns:
        Name -> [2] seconds per step (wall, CPU); [2] the host's share of the engine's time; [2]
        seconds per checkpoint.
    """
    steps = options.steps_per_loop
    with tempfile.TemporaryDirectory() as folder:
        where = strategy.connect("")
        recipe = make_recipe(options.global_batch_size, SAVE_EVERY)
        made = {name: make_parts(recipe, where) for name in ("bare", "jit", "fit")}
        turns = Turns(
            {
                "bare": bare_block(made["bare"], steps),
                "jit": fit_block(made["jit"], steps, jit_compile=True, steps_per_execution=steps),
                "fit": fit_block(made["fit"], steps),
            },
            options.rounds * SAVE_EVERY // steps,
            steps,
            folder,
        )
        run_engine(recipe, where, turns, steps, folder)
    blocks = {name: np.array(seconds[WARM_UP:]) for name, seconds in turns.seconds.items()}
    device = np.array(TimedRun.device_seconds[WARM_UP:])
    saved = np.array(turns.saved[WARM_UP:])
    median = {name: np.median(seconds, axis=0) for name, seconds in blocks.items()}
    quiet = np.median(blocks["engine"][~saved], axis=0)
    per_save = np.median(blocks["engine"][saved], axis=0) - quiet
    results = {
        "the bare step": median["bare"] / steps,
        "engine without checkpoints": quiet / steps,
        "engine": quiet / steps + per_save / SAVE_EVERY,
        "model.fit, jit_compile": median["jit"] / steps,
        "model.fit, default": median["fit"] / steps,
    }
    return results, np.median((1 - device / blocks["engine"])[~saved], axis=0), per_save


def first_step(model_dir, batch):
    """[2] seconds (wall, CPU) from the command to the first progress line; then stops the run."""
    command = [
        *(sys.executable, str(ROOT / "train.py"), "--synthetic", "--steps=100"),
        *("--steps_per_loop=1", f"--model_dir={model_dir}", f"--global_batch_size={batch}"),
    ]
    begun = time.perf_counter()
    said = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            said = line.strip() or said
            if line.startswith("step "):
                used = psutil.Process(process.pid).cpu_times()
                seconds = np.array([time.perf_counter() - begun, used.user + used.system])
                process.send_signal(signal.SIGTERM)
                break
        else:
            raise InputError(f"train.py ended before its first step: {said}")
        process.stderr.read()
    return seconds


def time_starts(options):
    """Median [2] seconds to the first step of a new run and of a resumed run."""
    fresh = []
    resumed = []
    for _ in range(options.starts):
        with tempfile.TemporaryDirectory() as folder:
            fresh.append(first_step(folder, options.global_batch_size))
            resumed.append(first_step(folder, options.global_batch_size))
    return np.median(fresh, axis=0), np.median(resumed, axis=0)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of 500 steps each; 0 for none"
    )
    parser.add_argument(
        "--steps_per_loop",
        type=int,
        default=100,
        help="training steps in one call on the device; a divisor of 500, at most 250",
    )
    parser.add_argument("--global_batch_size", type=int, default=64, help="sequences per step")
    parser.add_argument(
        "--starts", type=int, default=3, help="pairs of a new and a resumed run; 0 for none"
    )
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    check(options)
    size = bert.SIZES["tiny"]
    figures = {}
    print(f"BERT-tiny ({size.layers} x {size.width}), {options.global_batch_size} sequences of 64")
    if options.rounds:
        steps, host, save = time_blocks(options)
        show_steps(steps, host, save, options.steps_per_loop)
        figures = {name: list(seconds) for name, seconds in steps.items()}
        figures |= {"host": list(host), "checkpoint": list(save)}
    if options.starts:
        fresh, resumed = time_starts(options)
        print(
            f"command to first step {fresh[0]:.1f} s ({fresh[1]:.1f} s of CPU); resumed "
            f"{resumed[0]:.1f} s ({resumed[1]:.1f}), ratio {resumed[0] / fresh[0]:.2f} "
            f"({resumed[1] / fresh[1]:.2f})"
        )
        figures |= {"fresh": list(fresh), "resumed": list(resumed)}
    if options.json:
        write_json(options.json, figures)


def check(options) -> None:
    """Checks the command line, before seconds are spent on it.

    Raises:
        InputError: a number is out of range, nothing is left to time, or the file of `--json`
            cannot be written.
    """
    refuse_below(0, rounds=options.rounds, starts=options.starts)
    steps = options.steps_per_loop
    refuse_below(1, steps_per_loop=steps, global_batch_size=options.global_batch_size)
    if not options.rounds and not options.starts:
        raise InputError("--rounds=0 --starts=0 leave nothing to time. Give at least 1 for one.")
    if SAVE_EVERY % steps or steps == SAVE_EVERY:
        raise InputError(
            f"--steps_per_loop={steps}: give a divisor of {SAVE_EVERY}, at most {SAVE_EVERY // 2}. "
            "The engine saves between blocks of so many steps, and blocks without are timed, too."
        )
    if options.json:
        check_file_writable(options.json, f"--json={options.json}")


def show_steps(steps, host, save, steps_per_loop):
    """Prints the results of `time_blocks`."""
    bare = steps["the bare step"]
    print(f"{'one step':28} {'ms':>7} {'/ bare':>8} {'CPU ms':>8} {'/ bare':>8}")
    for name, (wall, cpu) in steps.items():
        beside = wall / bare[0], cpu / bare[1]
        print(f"{name:28} {1e3 * wall:7.1f} {beside[0]:8.3f} {1e3 * cpu:8.1f} {beside[1]:8.3f}")
    print(
        f"host, {steps_per_loop} steps per loop: {host[0]:.2%} of the engine's time, "
        f"{host[1]:.2%} of its CPU time; a checkpoint: {save[0]:.2f} s, {save[1]:.2f} of CPU"
    )


if __name__ == "__main__":
    process.run(main)
