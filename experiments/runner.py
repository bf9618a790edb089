"""Runs the cells of a table, several at a time, and keeps one file for each run."""

import collections
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

from experiments import ROOT
from experiments.grid import Cell, Table, find_cell, progress
from inputs.errors import InputError
from inputs.storage.files import locked, read_json, write_json

PROGRAMS = {
    "keras": "experiments.keras_run",
    "train": "experiments.train_run",
    "one_batch": "experiments.one_batch",
}
# Each run uses one core. oneDNN is several times faster for small convolutions, but TensorFlow does
# not enable it by default on AMD processors.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}
PACKAGES = ("keras", "tensorflow", "tf_keras", "jax", "numpy")


@dataclasses.dataclass(frozen=True)
class Places:
    """The folders that a table reads and writes.

    Attributes:
        data_dir: the data, as the table's program expects it.
        runs: the folder of logs and checkpoints; those of a run are in RUNS/TABLE/CELL. What JAX
            compiles is kept in RUNS/compiled.
        output: the folder of the run files, one JSON file per finished run.
        train_flags: further flags of train.py, such as --tpu=NAME.
    """

    data_dir: str
    runs: str
    output: str
    train_flags: tuple[str, ...] = ()

    def run_file(self, cell: Cell) -> str:
        """The path of a cell's run file."""
        return os.path.join(self.output, f"{cell.name}.json")

    def folder(self, table: Table, cell: Cell) -> str:
        """The path of a cell's folder of logs and checkpoints."""
        return os.path.join(self.runs, table.name, cell.name)


def load_runs(table: Table, output: str) -> dict[str, dict]:
    """Returns the contents of a table's run files, by the name of their cell.

    Raises:
        InputError: a file cannot be read, or its settings differ from those of the table.
    """
    runs = {}
    for path in sorted(pathlib.Path(output).glob("*.json")):
        run = read_json(str(path), flag="--output", fix="Delete the file to repeat the run.")
        try:
            cell = find_cell(table, path.stem)
        except ValueError as error:
            raise InputError(f"--output: {path}: {error}") from None
        settings = json.loads(json.dumps(dict(cell.group.settings)))
        if run["settings"] != settings:
            raise InputError(
                f"--output: {path} is a run with other settings than the table has now "
                f"({_difference(run['settings'], settings)}). Delete the file to repeat the run, "
                "or give another --output."
            )
        runs[path.stem] = run
    return runs


def _difference(old, new):
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name}: {old.get(name)}, now {new.get(name)}" for name in names)


def metrics(table: Table, runs: dict[str, dict]) -> dict[str, float]:
    """Returns the metric of each run; `-inf` for one that diverged."""
    return {
        name: -math.inf if run["result"]["diverged"] else run["result"][table.metric]
        for name, run in runs.items()
    }


def run_cell(table: Table, cell: Cell, places: Places) -> dict:
    """Runs one cell in this process and writes its run file, unless it exists; returns its content.

    A run of another group with the same settings, rate and seed is not repeated: its file is copied
    under the name of this cell, with `same_as` and no processor time.

    Raises:
        InputError: the data cannot be read, or another process is running the cell.
        RuntimeError: the run failed.
    """
    path = places.run_file(cell)
    folder = places.folder(table, cell)
    os.makedirs(folder, exist_ok=True)
    os.makedirs(places.output, exist_ok=True)
    with locked(folder, "--runs"):
        if not os.path.exists(path) and (twin := _finished_twin(table, cell, places)):
            run = {**twin, "cell": cell.name, "same_as": twin["cell"], "processor_seconds": 0.0}
            write_json(path, run, indent=None)
        if not os.path.exists(path):
            backend = cell.group.settings.get("backend", "tensorflow")
            one_core = table.one_core or (table.program, backend) == ("keras", "tensorflow")
            os.environ.update(ENVIRONMENT if one_core else {}, KERAS_BACKEND=backend)
            if not one_core:
                # Runs that differ in the seed or the rate share what XLA compiles, or at least the
                # kernels that it chooses, which takes a GPU minutes.
                compiled = os.path.join(os.path.abspath(places.runs), "compiled")
                os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
            program = importlib.import_module(PROGRAMS[table.program])
            start, processor = time.perf_counter(), _processor_seconds()
            extra = {"flags": places.train_flags} if places.train_flags else {}
            outcome = program.run(cell, places.data_dir, folder, **extra)
            seconds = time.perf_counter() - start
            about = {
                "table": table.name,
                "cell": cell.name,
                "settings": dict(cell.group.settings),
                "rate": cell.rate,
                "seed": cell.seed,
                "date": datetime.date.today().isoformat(),
                "commit": _commit(),
                "machine": f"{platform.system()} {platform.machine()}, {_device(one_core, places)}",
                "versions": {"python": platform.python_version(), **_versions()},
                "seconds": round(seconds, 1),  # since the last start, if the run was resumed
                "processor_seconds": round(_processor_seconds() - processor, 1),
            }
            write_json(path, {**about, **outcome}, indent=None)
    return read_json(path)


def _device(one_core, places):
    """Describes the devices of a run, for its file."""
    if one_core:
        return "one core"
    devices = [f"{os.cpu_count()} cores"]
    if os.environ["KERAS_BACKEND"] == "jax":
        import jax

        kinds = collections.Counter(
            device.device_kind for device in jax.devices() if device.platform != "cpu"
        )
        devices += [f"{count} x {kind}" for kind, count in kinds.items()]
    return ", ".join([*devices, *places.train_flags])


def _finished_twin(table, cell, places):
    """Returns the run of another group with the same settings, rate and seed; None if none is."""
    for group in table.groups:
        twin = Cell(group, cell.rate, cell.seed)
        path = places.run_file(twin)
        if group != cell.group and _same_run(cell, twin) and os.path.exists(path):
            return read_json(path)
    return None


def _processor_seconds():
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _commit():
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _versions():
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a table: which runs are done and which are not.

    Attributes:
        runs: the contents of the run files, by the name of their cell.
        todo: the cells that can be run now.
        later: the minimum number of cells that follow after them.
    """

    runs: dict[str, dict]
    todo: list[Cell]
    later: int

    def seconds_left(self, jobs: int) -> float:
        """Estimates the time for the remaining runs, in seconds; NaN if no run is done.

        Args:
            jobs: number of runs at the same time.
        """
        own = [run for run in self.runs.values() if "same_as" not in run]
        if not own:
            return math.nan
        by_group: dict[str, list[float]] = {}
        for run in own:
            group = run["cell"].rpartition("-rate")[0]
            by_group.setdefault(group, []).append(run["processor_seconds"])
        usual = statistics.mean(run["processor_seconds"] for run in own)
        seconds = [statistics.mean(by_group.get(c.group.name, [usual])) for c in self.todo]
        return (sum(seconds) + self.later * usual) / jobs


def state(table: Table, output: str, names=()) -> State:
    """Returns the state of a table, from its run files.

    Args:
        table: the table.
        output: the folder of the run files.
        names: the groups whose cells are still to be run; () for all.

    Raises:
        InputError: as in `load_runs`.
    """
    runs = load_runs(table, output)
    values = metrics(table, runs)
    wanted = [group for group in table.groups if not names or group.name in names]
    groups = [progress(table, group, values) for group in wanted]
    todo = [cell for group in groups for cell in group.todo]
    return State(runs, todo, sum(group.later for group in groups))


def run_table(table: Table, places: Places, jobs: int, limit: int, names=(), say=print) -> State:
    """Runs the cells that the tuning rule asks for, each in its own process.

    Args:
        table: the table.
        places: the folders to read and write.
        jobs: number of runs at the same time.
        limit: maximum number of runs; negative for all.
        names: as in `state`.
        say: receives a line when a run begins and when it ends.

    Returns:
        The state after the last run.

    Raises:
        InputError: as in `load_runs`.
        RuntimeError: a run failed. Runs that had already begun are finished first.
    """
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    failed: list[str] = []
    now = state(table, places.output, names)
    while True:
        waiting = [cell for cell in now.todo if not _is_running(table, cell, running)]
        while waiting and len(running) < jobs and limit and not failed:
            cell = waiting.pop(0)
            running[cell.name] = (_start(table, cell, places), time.monotonic())
            limit -= 1
            say(f"{time.strftime('%H:%M:%S')} {cell.name} begins")
        if not running:
            break
        time.sleep(0.5)
        for name, (process, start) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode:
                failed.append(f"{name} (status {process.returncode})")
                continue
            now = state(table, places.output, names)
            result = now.runs[name]["result"]
            value = "diverged" if result["diverged"] else f"{result[table.metric]:.4f}"
            seconds = time.monotonic() - start
            say(f"{time.strftime('%H:%M:%S')} {name}: {table.metric} {value}, {seconds:.0f} s")
    if failed:
        logs = os.path.join(places.runs, table.name, "CELL", "log.txt")
        raise RuntimeError(f"failed: {', '.join(failed)}; see {logs}")
    return now


def _is_running(table, cell, running):
    """Whether a cell is running, or one of another group that is the same run."""
    cells = [find_cell(table, name) for name in running]
    return any(_same_run(cell, other) for other in cells)


def _same_run(one, other):
    own, others = (cell.group.settings for cell in (one, other))
    return (one.rate, one.seed) == (other.rate, other.seed) and own == others


def _start(table, cell, places):
    folder = places.folder(table, cell)
    os.makedirs(folder, exist_ok=True)
    command = [sys.executable, "-m", "experiments", table.name, f"--cell={cell.name}"]
    command += [f"--data_dir={os.path.abspath(places.data_dir)}"]
    command += [f"--runs={os.path.abspath(places.runs)}"]
    command += [f"--output={os.path.abspath(places.output)}"]
    command += [f"--train_flag={flag}" for flag in places.train_flags]
    with open(os.path.join(folder, "log.txt"), "a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
