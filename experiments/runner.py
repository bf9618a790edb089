"""Runs the cells of a table, several at a time, and keeps one file for each run."""

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
from inputs.files import locked, read_json, write_json

PROGRAMS = {
    "keras": "experiments.keras_run",
    "train": "experiments.train_run",
    "one_batch": "experiments.one_batch",
}
# A run has a core of its own. On AMD processors TensorFlow does not choose oneDNN by itself, whose
# small convolutions are several times faster.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
PACKAGES = ("keras", "tensorflow", "tf_keras", "jax", "numpy")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a table reads and writes.

    Attributes:
        data_dir: the data, as the table's program takes it.
        runs: the folder of logs and checkpoints; each run has its own in RUNS/TABLE.
        output: the folder of the run files, which are kept.
    """

    data_dir: str
    runs: str
    output: str

    def run_file(self, cell: Cell) -> str:
        """The path of a cell's run file."""
        return os.path.join(self.output, f"{cell.name}.json")

    def folder(self, table: Table, cell: Cell) -> str:
        """The path of a cell's folder."""
        return os.path.join(self.runs, table.name, cell.name)


def load_runs(table: Table, output: str) -> dict[str, dict]:
    """Returns the run files of a table by the name of their cell.

    Raises:
        InputError: a file cannot be read, or is of other settings than the table has now.
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
    """Runs one cell in this process and writes its file, unless there is one; returns its content.

    Raises:
        InputError: the data cannot be read, or another process runs the cell.
        RuntimeError: the run failed.
    """
    path = places.run_file(cell)
    folder = places.folder(table, cell)
    os.makedirs(folder, exist_ok=True)
    os.makedirs(places.output, exist_ok=True)
    with locked(folder, "--runs"):
        if not os.path.exists(path):
            backend = cell.group.settings.get("backend", "tensorflow")
            os.environ.update(ENVIRONMENT, KERAS_BACKEND=backend)
            program = importlib.import_module(PROGRAMS[table.program])
            start, processor = time.perf_counter(), time.process_time()
            outcome = program.run(cell, places.data_dir, folder)
            seconds = time.perf_counter() - start
            about = {
                "table": table.name,
                "cell": cell.name,
                "settings": dict(cell.group.settings),
                "rate": cell.rate,
                "seed": cell.seed,
                "date": datetime.date.today().isoformat(),
                "commit": _commit(),
                "machine": f"{platform.system()} {platform.machine()}, one core",
                "versions": {"python": platform.python_version(), **_versions()},
                "seconds": round(seconds, 1),  # of the last start
                "processor_seconds": round(time.process_time() - processor, 1),
            }
            write_json(path, {**about, **outcome}, indent=None)
    return read_json(path)


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
    """What of a table is done and what is not.

    Attributes:
        runs: the run files, by the name of their cell.
        todo: the cells that can be run now.
        later: the number of cells that follow at the least.
    """

    runs: dict[str, dict]
    todo: list[Cell]
    later: int

    def seconds_left(self, jobs: int) -> float:
        """The time still needed, by the runs that are done: of the same group, or of all."""
        if not self.runs:
            return math.nan
        by_group: dict[str, list[float]] = {}
        for run in self.runs.values():
            by_group.setdefault(run["cell"].rpartition("-rate")[0], []).append(run["seconds"])
        usual = statistics.mean(run["seconds"] for run in self.runs.values())
        seconds = [statistics.mean(by_group.get(c.group.name, [usual])) for c in self.todo]
        return (sum(seconds) + self.later * usual) / jobs


def state(table: Table, output: str) -> State:
    """Returns what of a table is done, by its run files.

    Raises:
        InputError: as in `load_runs`.
    """
    runs = load_runs(table, output)
    values = metrics(table, runs)
    groups = [progress(table, group, values) for group in table.groups]
    todo = [cell for group in groups for cell in group.todo]
    return State(runs, todo, sum(group.later for group in groups))


def run_table(table: Table, places: Places, jobs: int, limit: int, say=print) -> State:
    """Runs the cells that the rule asks for, each in a process of its own.

    Args:
        table: the table.
        places: where to read and write.
        jobs: how many runs at a time.
        limit: how many runs at the most; negative for all.
        say: receives a line when a run begins and when it ends.

    Returns:
        The state after the last run.

    Raises:
        InputError: as in `load_runs`.
        RuntimeError: a run failed. Those that had begun are finished first.
    """
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    failed: list[str] = []
    while True:
        now = state(table, places.output)
        waiting = [cell for cell in now.todo if cell.name not in running]
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
            result = load_runs(table, places.output)[name]["result"]
            value = "diverged" if result["diverged"] else f"{result[table.metric]:.4f}"
            seconds = time.monotonic() - start
            say(f"{time.strftime('%H:%M:%S')} {name}: {table.metric} {value}, {seconds:.0f} s")
    if failed:
        logs = os.path.join(places.runs, table.name, "CELL", "log.txt")
        raise RuntimeError(f"failed: {', '.join(failed)}; see {logs}")
    return now


def _start(table, cell, places):
    folder = places.folder(table, cell)
    os.makedirs(folder, exist_ok=True)
    command = [sys.executable, "-m", "experiments", table.name, f"--cell={cell.name}"]
    command += [f"--data_dir={os.path.abspath(places.data_dir)}"]
    command += [f"--runs={os.path.abspath(places.runs)}"]
    command += [f"--output={os.path.abspath(places.output)}"]
    with open(os.path.join(folder, "log.txt"), "a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
