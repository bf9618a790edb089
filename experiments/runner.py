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
from collections.abc import Iterable

from experiments import ROOT, children
from experiments.grid import Cell, Table, find_cell, progress
from inputs.errors import InputError
from inputs.storage.files import absolute, locked, read_json, write_json

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
    "JAX_PLATFORMS": "cpu",
}
PACKAGES = ("keras", "tensorflow", "tf_keras", "jax", "numpy")
IN_USE = 75  # exit status of --cell if another process runs the cell: EX_TEMPFAIL of sysexits.h
# A cell's process waits `children.STOP_SECONDS` for train.py, and then kills it.
STOP_SECONDS = children.STOP_SECONDS + 30
# The fields of a run file, except for those whose values are compared with those of its cell.
FIELDS = {
    "settings": dict,
    "date": str,
    "commit": str,
    "machine": str,
    "versions": dict,
    "processor_seconds": float,
    "curve": dict,
    "result": dict,
}
KINDS = {dict: "an object", str: "a text", float: "a number, 0 or above"}
# The numbers of images for training and for the test, as published.
COMPLETE = {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000)}
REPEAT = "Delete the file to repeat the run, or give another --output."


class InUse(InputError):
    """Another process is running the cell."""


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
        InputError: as in `read_run`; or two files are runs on different numbers of images.
    """
    paths = sorted(pathlib.Path(output).glob("*.json"))
    runs = {path.stem: read_run(table, str(path)) for path in paths}
    first: dict[tuple, str] = {}
    for name, run in runs.items():
        first.setdefault(images(run), name)
    if len(first) > 1:
        (one, name), (other, second) = [*first.items()][:2]
        raise InputError(
            f"--output: {output} has runs on different data: {name} on {_counts(one)}, {second} on "
            f"{_counts(other)}. Give another --output for a part of the data, and move the runs "
            "that do not belong here."
        )
    return runs


def images(run: dict) -> tuple[int, ...]:
    """Returns the numbers of images that a run of a Keras model was trained and tested on.

    Files from before 2026-11-27 do not have them; their data were complete. () for other runs.
    """
    complete = COMPLETE.get(run["settings"].get("data"), ())
    return tuple(run.get("images", complete))


def _counts(images):
    return f"{images[0]:,} images, tested on {images[1]:,}"


def read_run(table: Table, path: str) -> dict:
    """Returns the content of a run file.

    Raises:
        InputError: the file cannot be read; it is not the complete run of the cell that its name
            says; or its settings differ from those of the table.
    """
    try:
        cell = find_cell(table, pathlib.Path(path).stem)
    except ValueError as error:
        raise InputError(
            f"--output: {path}: {error} Remove the file, or give another --output."
        ) from None
    run = read_json(path, flag="--output", fix=REPEAT)
    if problem := _problem(table, cell, pathlib.Path(path).stem, run):
        raise InputError(f"--output: {path} {problem}. {REPEAT}")
    settings = json.loads(json.dumps(dict(cell.group.settings)))
    if run["settings"] != settings:
        raise InputError(
            f"--output: {path} is a run with other settings than the table has now "
            f"({_difference(run['settings'], settings)}). {REPEAT}"
        )
    return run


def _problem(table, cell, stem, run):
    """Says why the content of a run file is not the run of the cell that it is named after."""
    if not isinstance(run, dict):
        return "does not hold a run"
    identity = {"table": table.name, "cell": stem, "rate": cell.rate, "seed": cell.seed}
    for name, value in identity.items():
        if run.get(name) != value or isinstance(run[name], bool):
            return f"holds another run than its name says: {name} is {run.get(name)!r}"
    if cell.name != stem:
        return f"is named otherwise than the run that it holds, {cell.name}"
    for name, kind in FIELDS.items():
        value = run.get(name)
        if not (_is_number(value, 0) if kind is float else isinstance(value, kind)):
            return f"holds no complete run: {name} is not {KINDS[kind]}"
    if not all(isinstance(version, str) for version in run["versions"].values()):
        return "holds no complete run: a version is not a text"
    counts = run.get("images", [1, 1])
    if not (isinstance(counts, list) and [*map(type, counts)] == [int, int] and min(counts) > 0):
        return f"holds no complete run: images is {counts!r}, not two numbers"
    try:
        if not _same_run(cell, find_cell(table, run.get("same_as", stem))):
            return f"says that it is the same as {run['same_as']!r}, which has other settings"
    except (ValueError, AttributeError):
        return f"says that it is the same as {run['same_as']!r}, which is no cell of the table"
    result = run["result"]
    if not isinstance(result.get("diverged"), bool):
        return "holds no complete run: diverged is neither true nor false"
    if result["diverged"]:
        return ""
    if not _is_number(result.get(table.metric), 0, 1):
        return f"holds no complete run: {table.metric} is {result.get(table.metric)!r}"
    try:
        points = [*zip(*curves(run, table.metric), strict=True)]
        # An evaluation may lack the metric; the program writes NaN as null.
        complete = bool(points) and all(
            _is_number(step, 0) and all(value is None or _is_number(value) for value in values)
            for step, *values in points
        )
    except (LookupError, TypeError, AttributeError, ValueError):
        complete = False
    return "" if complete else "holds no complete run: its curve is damaged"


def _is_number(value, least=-math.inf, most=math.inf):
    """Whether a value is a finite number within limits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and least <= value <= most


def curves(run: dict, metric: str) -> tuple[list, list, list]:
    """Returns (steps, loss, metric) of a run: held out if it was evaluated on the way."""
    if run.get("evaluations", {}).get("step"):
        found = run["evaluations"]
        loss = run["settings"]["evaluations"][0]
        return found["step"], found[loss], found[metric]
    curve = run["curve"]
    return curve["step"], curve["loss"], curve.get(f"test_{metric}", curve.get(metric))


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
        InputError: the data cannot be read, or as in `read_run`.
        InUse: another process is running the cell.
        RuntimeError: the run failed.
    """
    path = places.run_file(cell)
    folder = places.folder(table, cell)
    os.makedirs(folder, exist_ok=True)
    os.makedirs(places.output, exist_ok=True)

    def refuse(holder):
        raise InUse(f"--runs: {folder} is in use by {holder}.")

    with locked(folder, "--runs", wait=True, waiting=refuse):
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
    return read_run(table, path)


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
            return read_run(table, path)
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

    A cell that another process is running is passed over.

    Args:
        table: the table.
        places: the folders to read and write.
        jobs: number of runs at the same time.
        limit: maximum number of runs; negative for all.
        names: as in `state`.
        say: receives a line when a run begins, when it ends and when it is passed over.

    Returns:
        The state after the last run.

    Raises:
        InputError: as in `load_runs`.
        RuntimeError: a run failed. Runs that had already begun are finished first.
    """
    running: dict[str, tuple[children.Child, float]] = {}
    passed_over: list[str] = []
    failed: list[str] = []
    now = state(table, places.output, names)

    def report(text):
        say(f"{time.strftime('%H:%M:%S')} {text}")

    try:
        while True:
            taken = [find_cell(table, name) for name in [*running, *passed_over]]
            waiting = [cell for cell in now.todo if not _is_taken(cell, taken)]
            if waiting and len(running) < jobs and limit and not failed:
                cell = waiting[0]
                running[cell.name] = (_start(table, cell, places), time.monotonic())
                limit -= 1
                report(f"{cell.name} begins")
                continue
            if not running:
                break
            time.sleep(0.5)
            for name, (child, start) in list(running.items()):
                status = child.process.poll()
                if status is None:
                    continue
                del running[name]
                if status == IN_USE:
                    passed_over.append(name)
                    limit += 1
                    report(f"{name} is passed over: another process is running it")
                    continue
                if status:
                    failed.append(f"{name}: {child.describe_failure()}")
                    continue
                now = state(table, places.output, names)
                value = format_result(table, now.runs[name])
                report(f"{name}: {table.metric} {value}, {time.monotonic() - start:.0f} s")
    finally:
        children.end((child for child, _ in running.values()), STOP_SECONDS)
    if failed:
        raise RuntimeError(f"failed: {'; '.join(failed)}")
    return now


def format_result(table: Table, run: dict) -> str:
    """Returns the metric of a run as text."""
    result = run["result"]
    return "diverged" if result["diverged"] else f"{result[table.metric]:.4f}"


def _is_taken(cell: Cell, taken: Iterable[Cell]) -> bool:
    """Whether a cell is among others, or is the same run as one of them."""
    return any(_same_run(cell, other) for other in taken)


def _same_run(one, other):
    own, others = (cell.group.settings for cell in (one, other))
    return (one.rate, one.seed) == (other.rate, other.seed) and own == others


def _start(table, cell, places):
    folder = places.folder(table, cell)
    os.makedirs(folder, exist_ok=True)
    command = [sys.executable, "-m", "experiments", table.name, f"--cell={cell.name}"]
    command += [f"--data_dir={absolute(places.data_dir)}"]
    command += [f"--runs={os.path.abspath(places.runs)}"]
    command += [f"--output={os.path.abspath(places.output)}"]
    command += [f"--train_flag={flag}" for flag in places.train_flags]
    return children.Child(command, os.path.join(folder, "log.txt"), cwd=str(ROOT))
