"""Runs lowering and compilation in processes of their own, so that neither can take the run down.

What TensorFlow lowers is handed to the compiler as a file. Results of the compiler are kept in
`~/.cache/tf_lamb/preflight`, by program, compiler version and topology.
"""

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

from inputs.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent
CACHE = pathlib.Path("~/.cache/tf_lamb/preflight").expanduser()
WANTED = {"jax": "0.10.2", "libtpu": "0.0.42.1"}  # as the extra `preflight` pins them
TPU_PYTHON = ROOT / ".venv-tpu/bin/python"
TPU_INSTALLED = ROOT / ".venv-tpu/installed"  # made last by `make preflight-tpu` and `make tpu`
SPARE_BYTES = 512 * 2**20  # of the host's memory, left to the others
SAY_EVERY_SECONDS = 15


def check_installed() -> None:
    """Raises `InputError` unless the TPU compiler is installed, in the version that was tried."""
    for name, wanted in WANTED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            raise InputError(
                f"--preflight needs {name} {wanted}, and finds {found}. Install the extra: "
                "pip install -c constraints.txt -e .[train,preflight] (0.3 GB to load, 1.1 GB on "
                "the disk)."
            )


def check_strict_installed() -> None:
    """Raises `InputError` unless there is the environment of `preflight_strict`."""
    if not TPU_INSTALLED.exists():
        raise InputError(
            "--preflight_strict needs tensorflow-tpu in an environment of its own, and there is no "
            f"{TPU_INSTALLED}. Make it: make preflight-tpu (3.1 GB on the disk)."
        )


class ChildFailed(InputError):
    """A process ended without an answer; the message says why."""


class Children:
    """Lowers and compiles; remembers what it has lowered.

    Args:
        log: takes lines of progress.
        folder: where programs are written; a temporary one.

    Attributes:
        facts: about the model: `parameters`, and the bytes of a replica's `weight_bytes` and
            `slot_bytes`; None before `lower`.
    """

    def __init__(self, log, folder: str):
        self._log, self._folder = log, pathlib.Path(folder)
        self._lowered = {}
        self.facts = None

    def lower(self, recipe, number: int, programs: list[tuple[int | None, int]]) -> None:
        """Lowers programs of one phase in one process, those that were not lowered before.

        Args:
            recipe: a checked recipe.
            number: the phase's, from 0.
            programs: (examples of a replica, or None for the update alone; micro-batches).

        Raises:
            ChildFailed: they cannot be lowered.
            InputError: the host's memory does not suffice.
        """
        missing = [p for p in dict.fromkeys(programs) if (number, *p) not in self._lowered]
        if not missing:
            return
        paths = [
            str(self._folder / f"phase{number}-{batch}-{parts}.hlo") for batch, parts in missing
        ]
        job = [(*program, path) for program, path in zip(missing, paths, strict=True)]
        said = f"phase {number + 1}: tracing {len(job)} program(s)"
        self.facts = self._run(
            "preflight.program",
            said,
            {"recipe": recipe, "number": number, "programs": job},
        )
        self._lowered |= {(number, *p): path for p, path in zip(missing, paths, strict=True)}

    def compile(self, number: int, batch: int | None, parts: int, topology: str) -> dict:
        """The figures of a program that was lowered, or {"error": why there are none}."""
        what = "the update" if batch is None else f"{batch} examples a replica"
        if parts > 1:
            what += f" in {parts} micro-batches"
        job = {
            "path": self._lowered[number, batch, parts],
            "topology": topology,
            "cache": str(CACHE),
        }
        try:
            said = f"phase {number + 1}: compiling {what} for {topology}"
            return self._run("preflight.compile", said, job)
        except ChildFailed as error:
            return {"error": str(error)}

    def ask_kernels(self, recipe, number: int) -> dict:
        """What `preflight_strict.examine` says of phase `number`, from 0."""
        return self._run(
            "preflight.strict",
            f"phase {number + 1}: asking TensorFlow's own TPU kernels",
            {"recipe": recipe, "number": number},
            python=str(TPU_PYTHON),
        )

    def _run(self, module: str, what: str, job: dict, python: str = sys.executable) -> dict:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            task, answer = os.path.join(folder, "job"), os.path.join(folder, "answer")
            with open(task, "wb") as file:
                pickle.dump(job, file)
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "TF_CPP_MIN_LOG_LEVEL": "3",
            }
            environment.pop("TPU_LIBRARY_PATH", None)  # JAX sets it; each Python has a libtpu
            with open(os.path.join(folder, "errors"), "w+b") as errors:
                child = subprocess.Popen(
                    [python, "-m", module, task, answer],
                    env=environment,
                    stdout=errors,
                    stderr=errors,
                )
                try:
                    self._watch(child, what)
                finally:
                    child.kill()
                    child.wait()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()
            if child.returncode:
                raise ChildFailed(f"{what} failed: {_reason(said, child.returncode)}")
            with open(answer, encoding="utf-8") as file:
                return json.load(file)

    def _watch(self, child, what: str) -> None:
        """Waits for the child, says what it does, and ends it before the host is out of memory."""
        start = said = time.monotonic()
        self._log(f"{what} ...")
        while True:
            try:
                child.wait(timeout=0.5)
                return
            except subprocess.TimeoutExpired:
                pass
            free = psutil.virtual_memory().available
            if free < SPARE_BYTES:
                used = psutil.Process(child.pid).memory_info().rss / 2**30
                raise InputError(
                    f"{what}: the host's memory does not suffice; it took {used:.1f} GiB and "
                    f"{free / 2**30:.1f} GiB were left. End other programs, or take a larger host."
                )
            now = time.monotonic()
            if now - said >= SAY_EVERY_SECONDS:
                said = now
                self._log(f"{what} ... {now - start:.0f} s")


def _reason(said: str, status: int) -> str:
    """The first line of the exception that ended a process, which names the operation."""
    if status == -signal.SIGKILL:
        return "it was killed, most likely because the host's memory did not suffice"
    lines = said.splitlines()
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    last = (raised or lines or [f"status {status}"])[-1]
    return last.removeprefix("inputs.errors.InputError: ")
