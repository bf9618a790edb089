"""Runs lowering and compilation in child processes, so that a crash there does not end the run.

TensorFlow's lowered programs are passed to the compiler as files. The compiler's results are
cached in `~/.cache/tf_lamb/preflight`, by program, compiler version and topology.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import rich.console
import rich.progress

from inputs.errors import InputError
from inputs.files import cache_folder
from inputs.memory import free_memory

ROOT = pathlib.Path(__file__).parent.parent
REQUIRED_VERSIONS = {"jax": "0.10.2", "libtpu": "0.0.42.1"}  # the extra `preflight` pins the same
TPU_PYTHON = ROOT / ".venv-tpu/bin/python"
TPU_INSTALLED = ROOT / ".venv-tpu/installed"  # written last by `make preflight-tpu` and `make tpu`
RESERVED_BYTES = 512 * 2**20  # host memory that a child must leave free
LINE_EVERY_SECONDS = 15
CACHE = pathlib.Path(cache_folder(), "preflight")


def check_installed() -> None:
    """Raises `InputError` unless the tested version of the TPU compiler is installed."""
    for name, wanted in REQUIRED_VERSIONS.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "none"
        if installed != wanted:
            raise InputError(
                f"--preflight needs {name} {wanted}; installed: {installed}. Install the extra: "
                "pip install -c constraints.txt -e .[train,preflight] (0.3 GB to download, 1.1 GB "
                "on disk)."
            )


def check_strict_installed() -> None:
    """Raises `InputError` unless the environment for `--preflight_strict` exists."""
    if not TPU_INSTALLED.exists():
        raise InputError(
            "--preflight_strict needs tensorflow-tpu in a separate environment, and "
            f"{TPU_INSTALLED} does not exist. Run: make preflight-tpu (3.1 GB on disk)."
        )


class Lines:
    """Shows progress as plain lines, for a file or a pipe.

    Args:
        write: function that takes a line.
    """

    def __init__(self, write):
        self._write = write
        self._last = 0.0

    def update(self, task: str, seconds: float) -> None:
        """Reports that a task has been running for so many seconds; 0 when it starts."""
        if seconds and seconds - self._last < LINE_EVERY_SECONDS:
            return
        self._last = seconds
        self._write(f"{task} ... {seconds:.0f} s" if seconds else f"{task} ...")

    def advance(self) -> None:
        """Reports that one of the results is complete."""

    def title(self, text: str) -> None:
        """Names the group of tasks that follows."""
        self._write(text)


class Bar:
    """Shows progress as a bar on a terminal; methods as those of `Lines`.

    Args:
        live: a started `rich.progress.Progress`.
        total: number of results to come.
    """

    def __init__(self, live: rich.progress.Progress, total: int):
        self._live = live
        self._bar = live.add_task("", total=total)

    def update(self, task: str, seconds: float) -> None:
        """Shows the running task and its seconds."""
        self._live.update(self._bar, description=f"{task}, {seconds:.0f} s")
        self._live.refresh()

    def advance(self) -> None:
        """Advances the bar by one result."""
        self._live.advance(self._bar)

    def title(self, text: str) -> None:
        """Prints the name of the group of tasks that follows above the bar."""
        self._live.console.print(text)


@contextlib.contextmanager
def show_progress(write, total: int, stream=None):
    """Yields a `Bar` if `stream` is a terminal, else `Lines`.

    Args:
        write: function that takes a line; used where there is no terminal.
        total: number of results to come.
        stream: where the bar goes; standard error by default.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield Lines(write)
        return
    columns = (
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.description}"),
    )
    console = rich.console.Console(file=stream)
    # No refresh thread: `Children` updates the bar twice per second.
    live = rich.progress.Progress(
        *columns, console=console, auto_refresh=False, redirect_stdout=False
    )
    with live:
        yield Bar(live, total)


class ChildFailed(InputError):
    """A child process ended without a result; the message says why."""


class Children:
    """Lowers and compiles programs in child processes.

    Args:
        progress: from `show_progress`.
        folder: a temporary folder for the programs.

    Attributes:
        facts: about the model: `parameters`, and `weight_bytes` and `slot_bytes` of a replica;
            None before `lower`.
    """

    def __init__(self, progress, folder: str):
        self._progress = progress
        self._folder = pathlib.Path(folder)
        self._lowered = {}
        self.facts = None

    def lower(self, recipe, phase_index: int, programs: list[tuple[int | None, int]]) -> None:
        """Lowers programs of one phase in one process; skips those that are lowered already.

        Args:
            recipe: a checked recipe.
            phase_index: the phase, from 0.
            programs: (examples per replica, or None for the update alone; micro-batches).

        Raises:
            ChildFailed: a program cannot be lowered.
            InputError: the host's memory is not sufficient.
        """
        missing = [p for p in dict.fromkeys(programs) if (phase_index, *p) not in self._lowered]
        if not missing:
            return
        paths = [
            str(self._folder / f"phase{phase_index}-{batch}-{accumulation}.hlo")
            for batch, accumulation in missing
        ]
        job = [(*program, path) for program, path in zip(missing, paths, strict=True)]
        self.facts = self._run(
            "preflight.program",
            f"phase {phase_index + 1}: tracing {len(job)} program(s)",
            {"recipe": recipe, "phase_index": phase_index, "programs": job},
        )
        self._lowered |= {
            (phase_index, *program): path for program, path in zip(missing, paths, strict=True)
        }

    def compile(
        self, phase_index: int, batch: int | None, accumulation: int, topology: str
    ) -> dict:
        """Compiles a program that has been lowered.

        Args:
            phase_index: the phase, from 0.
            batch: examples per replica, or None for the update alone.
            accumulation: micro-batches.
            topology: such as "v3:32x32".

        Returns:
            As `preflight.compile.compile_file`: the compiler's figures or {"error": reason}.
        """
        program = "the update" if batch is None else f"{batch} examples per replica"
        if accumulation > 1:
            program += f" in {accumulation} micro-batches"
        job = {
            "path": self._lowered[phase_index, batch, accumulation],
            "topology": topology,
            "cache": str(CACHE),
        }
        try:
            task = f"phase {phase_index + 1}: compiling {program} for {topology}"
            return self._run("preflight.compile", task, job)
        except ChildFailed as error:
            return {"error": str(error)}

    def check_kernels(self, recipe, phase_index: int) -> dict:
        """`preflight.strict.check_kernels` of a phase, from 0."""
        return self._run(
            "preflight.strict",
            f"phase {phase_index + 1}: checking TensorFlow's TPU kernels",
            {"recipe": recipe, "phase_index": phase_index},
            python=str(TPU_PYTHON),
        )

    def _run(self, module: str, task: str, job: dict, python: str = sys.executable) -> dict:
        """Runs `python -m module JOB ANSWER`; returns the answer."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            job_path = os.path.join(folder, "job")
            answer_path = os.path.join(folder, "answer")
            with open(job_path, "wb") as file:
                pickle.dump(job, file)
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "TF_CPP_MIN_LOG_LEVEL": "3",
            }
            environment.pop("TPU_LIBRARY_PATH", None)  # JAX sets it; each Python has its own libtpu
            with open(os.path.join(folder, "output"), "w+b") as output:
                child = subprocess.Popen(
                    [python, "-m", module, job_path, answer_path],
                    env=environment,
                    stdout=output,
                    stderr=output,
                )
                try:
                    self._wait(child, task)
                finally:
                    child.kill()
                    child.wait()
                output.seek(0)
                printed = output.read().decode(errors="replace").strip()
            if child.returncode:
                raise ChildFailed(f"{task} failed: {_reason(printed, child.returncode)}")
            with open(answer_path, encoding="utf-8") as file:
                return json.load(file)

    def _wait(self, child, task: str) -> None:
        """Waits for a child and shows progress; raises if the host runs out of memory."""
        start = time.monotonic()
        self._progress.update(task, 0)
        while True:
            try:
                child.wait(timeout=0.5)
                return
            except subprocess.TimeoutExpired:
                pass
            free = free_memory()
            if free is not None and free < RESERVED_BYTES:
                used = psutil.Process(child.pid).memory_info().rss / 2**30
                raise InputError(
                    f"{task}: the host's memory is not sufficient. The process used {used:.1f} GiB "
                    f"and {free / 2**30:.1f} GiB were free. End other programs, or use a larger "
                    "host."
                )
            self._progress.update(task, time.monotonic() - start)


def _reason(output: str, status: int) -> str:
    """Why a process ended: the first line of its exception, which names the operation."""
    if status == -signal.SIGKILL:
        return "the process was killed, most likely because the host ran out of memory"
    lines = output.splitlines()
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    last = (raised or lines or [f"exit status {status}"])[-1]
    return last.removeprefix("inputs.errors.InputError: ")
