"""Runs lowering and compilation in child processes, so that a crash does not end the pre-flight.

TensorFlow writes lowered programs to files, which the compiler reads. The compiler's results are
cached in `~/.cache/tf_lamb/preflight`, by program, compiler version, compiler flags and topology.
"""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import time

import psutil
import rich.console
import rich.progress
from rich.table import Column

from inputs.errors import InputError
from inputs.memory import describe_limit, free_memory, ran_out_of_memory
from inputs.process import describe_exit
from inputs.storage.files import cache_folder

ROOT = pathlib.Path(__file__).parents[2]
REQUIRED_VERSIONS = {"jax": "0.10.2", "libtpu": "0.0.42.1"}  # as the extra `preflight` in setup.cfg
TPU_PYTHON = ROOT / ".venv-tpu/bin/python"
TPU_INSTALLED = ROOT / ".venv-tpu/installed"  # written last by `make preflight-tpu` and `make tpu`
RESERVED_BYTES = 512 * 2**20  # host memory that a child must leave free
LINE_EVERY_SECONDS = 15
WAITING = "waiting for the pre-flight of"  # how a child says that another process is compiling
# The last line of a child that has no compiler: no jax or libtpu, or a damaged file of theirs.
NOT_LOADED = re.compile(
    r"failed: (ModuleNotFoundError|ImportError)\b"
    r"|TPU support not installed|Failed to open \S*libtpu"
)
MAX_PRINTED = 2**16  # bytes of a child's output that are searched for `WAITING`
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


class ProgressLines:
    """Shows progress as plain lines, for a file or a pipe.

    Args:
        write: function that takes a line.
        total: number of results to come.
    """

    def __init__(self, write, total: int = 1):
        self._write = write
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._last = 0.0

    def update(self, task: str, seconds: float) -> None:
        """Writes a line if the task starts, or if enough time has passed since its last line.

        Args:
            task: what is running.
            seconds: how long it has been running; 0 when it starts.
        """
        if seconds and seconds - self._last < LINE_EVERY_SECONDS:
            return
        self._last = seconds
        self._write(f"{task} ... {seconds:.0f} s" if seconds else f"{task} ...")

    def advance(self) -> None:
        """Writes how many results are complete, and how long the others may take."""
        self._done += 1
        if self._total > 1:
            spent = time.monotonic() - self._start
            left = spent / self._done * (self._total - self._done)
            line = f"{self._done} of {self._total} done in {spent:.0f} s"
            self._write(f"{line}, about {left:.0f} s left" if self._done < self._total else line)

    def title(self, text: str) -> None:
        """Writes the name of the group of tasks that follows."""
        self._write(text)


class ProgressBar:
    """Shows progress as a bar on a terminal; has the methods of `ProgressLines`.

    Args:
        live: a started `rich.progress.Progress`.
        total: number of results to come.
    """

    def __init__(self, live: rich.progress.Progress, total: int):
        self._live = live
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._bar = live.add_task("", total=total, left="")

    def update(self, task: str, seconds: float) -> None:
        """Shows the running task, and for how many seconds it has been running."""
        self._live.update(self._bar, description=f"{task}, {seconds:.0f} s")
        self._live.refresh()

    def advance(self) -> None:
        """Advances the bar by one result, and shows how long the others may take."""
        self._done += 1
        seconds = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        left = f"about {datetime.timedelta(seconds=round(seconds))} left" if seconds else ""
        self._live.update(self._bar, completed=self._done, left=left)

    def title(self, text: str) -> None:
        """Prints, above the bar, the name of the group of tasks that follows."""
        self._live.console.print(text)


@contextlib.contextmanager
def show_progress(write, total: int, stream=None):
    """Yields a `ProgressBar` if `stream` is a terminal, else `ProgressLines`.

    Args:
        write: function that takes a line; used if `stream` is not a terminal.
        total: number of results to come.
        stream: text stream for the bar; standard error by default.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield ProgressLines(write, total)
        return
    # On a narrow terminal, the task is cut first, and the numbers are not.
    task = Column(ratio=4, no_wrap=True, overflow="ellipsis")
    columns = (
        rich.progress.BarColumn(bar_width=None, table_column=Column(ratio=1, width=5)),
        rich.progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        rich.progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
        rich.progress.TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
        rich.progress.TextColumn("{task.description}", table_column=task),
    )
    console = rich.console.Console(file=stream)
    # No refresh thread: `Children` updates the bar twice per second.
    live = rich.progress.Progress(
        *columns, console=console, auto_refresh=False, redirect_stdout=False, expand=True
    )
    with live:
        yield ProgressBar(live, total)


class ChildFailed(InputError):
    """A child process ended without a result; the message says why."""


class Children:
    """Lowers and compiles programs in child processes.

    Args:
        progress: from `show_progress`.
        folder: a temporary folder for the programs.

    Attributes:
        facts: dict with `parameters` (number of the model's trainable parameters), `weight_bytes`
            and `slot_bytes` (of a replica); None before the first call of `lower`.
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
            programs: pairs (examples per replica, or None for the update alone; number of
                micro-batches).

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
            "preflight.compiler.program.lower",
            f"phase {phase_index + 1}: tracing {len(job)} program(s)",
            {"recipe": recipe, "phase_index": phase_index, "programs": job},
        )
        self._lowered |= {
            (phase_index, *program): path for program, path in zip(missing, paths, strict=True)
        }

    def compile(
        self,
        phase_index: int,
        batch: int | None,
        accumulation: int,
        topology: str,
        *,
        quick: bool = False,
    ) -> dict:
        """Compiles a program that has been lowered.

        Args:
            phase_index: the phase, from 0.
            batch: examples per replica, or None for the update alone.
            accumulation: number of micro-batches.
            topology: such as "v3:32x32".
            quick: as for `preflight.compiler.compile.compile_program`.

        Returns:
            The result of `preflight.compiler.compile.compile_file`, or {"error": reason} if its
            process fails.

        Raises:
            InputError: the compiler cannot be loaded, or the host's memory or disk is not
                sufficient.
        """
        job = {"quick": quick}
        return self._compile("compile_file", phase_index, batch, accumulation, topology, job)

    def count_traffic(
        self, phase_index: int, batch: int | None, accumulation: int, topology: str
    ) -> dict:
        """Counts what a program that has been lowered moves, which takes less time than `compile`.

        Args and Raises are those of `compile`.

        Returns:
            The result of `preflight.compiler.compile.count_file`, or {"error": reason} if its
            process fails.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as dump:
            job = {"dump": dump}
            return self._compile("count_file", phase_index, batch, accumulation, topology, job)

    def _compile(self, function, phase_index, batch, accumulation, topology, job):
        """Runs a function of `preflight.compiler.compile`; `job` has its other arguments."""
        program = "the update" if batch is None else f"{batch} examples per replica"
        if accumulation > 1:
            program += f" in {accumulation} micro-batches"
        job |= {
            "path": self._lowered[phase_index, batch, accumulation],
            "topology": topology,
            "cache": str(CACHE),
        }
        try:
            task = f"phase {phase_index + 1}: compiling {program} for {topology}"
            return self._run(f"preflight.compiler.compile.{function}", task, job)
        except ChildFailed as error:
            if NOT_LOADED.search(str(error)):
                reason = str(error).partition("failed: ")[2].partition(". ")[0]
                raise InputError(
                    f"the TPU compiler of this Python cannot be loaded ({reason}); reinstall it "
                    "with pip install --force-reinstall --no-deps -c constraints.txt jax jaxlib "
                    "libtpu"
                ) from error
            return {"error": str(error)}

    def check_kernels(self, recipe, phase_index: int) -> dict:
        """Runs `preflight.compiler.strict.check_kernels`; arguments and result are the same.

        Raises:
            ChildFailed: its process failed.
        """
        return self._run(
            "preflight.compiler.strict.check_kernels",
            f"phase {phase_index + 1}: checking TensorFlow's TPU kernels",
            {"recipe": recipe, "phase_index": phase_index},
            python=str(TPU_PYTHON),
        )

    def _run(self, function: str, task: str, job: dict, python: str = sys.executable) -> dict:
        """Runs a function with `preflight.compiler.child` and returns what it returns.

        Args:
            function: with its module, such as "preflight.compiler.compile.compile_file".
            task: what the process does, for the progress and for error messages.
            job: its keyword arguments.
            python: the Python interpreter.

        Raises:
            ChildFailed: the exit status is not 0.
            InputError: the host's memory or disk is not sufficient.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            job_path = os.path.join(folder, "job")
            answer_path = os.path.join(folder, "answer")
            with open(job_path, "wb") as file:
                pickle.dump(job, file)
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "TF_CPP_MIN_LOG_LEVEL": "3",
            }
            # Importing JAX sets it to the libtpu of this Python, but each Python has its own.
            environment.pop("TPU_LIBRARY_PATH", None)
            with open(os.path.join(folder, "output"), "w+b") as output:
                child = subprocess.Popen(
                    [python, "-m", "preflight.compiler.child", function, job_path, answer_path],
                    env=environment,
                    stdin=subprocess.PIPE,  # whose end ends the child
                    stdout=output,
                    stderr=output,
                )
                try:
                    self._wait(child, task, output)
                finally:
                    child.kill()
                    child.wait()
                    child.stdin.close()
                output.seek(0)
                printed = output.read().decode(errors="replace").strip()
            if ran_out_of_memory(printed, child.returncode):
                raise _host_memory_error(task)
            if child.returncode and os.strerror(errno.ENOSPC) in printed:
                raise InputError(
                    f"{task} failed: the disk of this host is full. Free some space for temporary "
                    f"files ({tempfile.gettempdir()}) and in {CACHE}; the same command goes on."
                )
            if child.returncode:
                raise ChildFailed(f"{task} failed: {_reason(printed, child.returncode)}")
            with open(answer_path, encoding="utf-8") as file:
                return json.load(file)

    def _wait(self, child, task: str, output) -> None:
        """Waits for a child and shows progress.

        Args:
            child: its `subprocess.Popen`.
            task: what it does.
            output: the file that it prints to.

        Raises:
            InputError: the host's memory is not sufficient.
        """
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
                try:
                    used = psutil.Process(child.pid).memory_info().rss / 2**30
                except psutil.Error:  # it has just ended
                    continue
                raise _host_memory_error(task, f" The process used {used:.1f} GiB.")
            printed = os.pread(output.fileno(), MAX_PRINTED, 0).decode(errors="replace")
            last = printed.rpartition("\n")[0].rpartition("\n")[2]
            note = f" ({last})" if last.startswith(WAITING) else ""
            self._progress.update(task + note, time.monotonic() - start)


def _host_memory_error(task: str, used: str = "") -> InputError:
    free = free_memory()
    free_text = "" if free is None else f" {max(free, 0) / 2**30:.1f} GiB are free."
    return InputError(
        f"{task}: this host's memory is not sufficient.{used}{free_text}{describe_limit()} This "
        "says nothing about the memory of the TPU. End other programs, raise the limit, or use a "
        f"larger host; what has been compiled is kept in {CACHE}."
    )


def _reason(output: str, status: int) -> str:
    """Returns why a process failed.

    If it printed an exception, that is the first line of the last exception, which names the
    operation. The last line of the output may belong to a stack trace.
    """
    lines = output.splitlines()
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    said = (raised or lines or [""])[-1].removeprefix("inputs.errors.InputError: ")
    if status < 0:  # what was printed last may have nothing to do with it
        said = f"{describe_exit(status)}{said and f', after it printed {said!r}'}"
    return said or describe_exit(status)
