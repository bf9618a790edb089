"""Processes that a command starts, and that end with it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable

from inputs.process import describe_exit

STOP_SECONDS = 60  # in which train.py saves a checkpoint


class Child:
    """A process in a session of its own: Ctrl-C is for this process, which then ends the child.

    Attributes:
        process: the process.
    """

    def __init__(self, command: list[str], log: str | None = None, cwd: str | None = None):
        """Starts the process.

        Args:
            command: the program and its arguments.
            log: the file that its output is appended to; None for the output of this process.
            cwd: its current folder; None for that of this process.
        """
        self._log = log
        with open(log or os.devnull, "ab") as file:
            self._begin = file.tell()
            output = file if log else None
            self.process = subprocess.Popen(
                command, cwd=cwd, stdout=output, stderr=output, start_new_session=True
            )

    def describe_failure(self) -> str:
        """Describes how the process ended, with the last line of its output and its log."""
        said = describe_exit(self.process.returncode)
        if self._log is None:
            return said
        with open(self._log, "rb") as file:
            file.seek(self._begin)
            lines = file.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{said}{last and f': {last}'} (see {self._log})"


def end(children: Iterable[Child], seconds: float = STOP_SECONDS) -> None:
    """Ends processes by SIGTERM; kills those that need longer, or all at another Ctrl-C."""
    processes = [child.process for child in children]
    for process in processes:
        process.terminate()  # does nothing if it has ended
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(seconds)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run(command: list[str], log: str | None = None, cwd: str | None = None) -> Child:
    """Runs a process until it ends, or ends it if this process is interrupted; see `Child`."""
    child = Child(command, log, cwd)
    try:
        child.process.wait()
    finally:
        end([child])
    return child
