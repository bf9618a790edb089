"""Shows what libraries write to standard error above a progress bar, instead of through it.

TensorFlow's C++ code and the loggers that were made before the bar write to file descriptor 2,
which Python's redirection of `sys.stderr` does not reach.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

STDERR = 2
POLL_SECONDS = 0.1
# Runs in a separate process: if this process dies, it writes the lines that have not been shown,
# such as the message of a crash, and shows the cursor, which the bar has hidden. Its standard input
# is a pipe that ends with this process. Its argument is a descriptor of the captured lines, whose
# position is that of the first line that has not been shown.
GUARD = """
import os, sys
if not os.read(0, 1):
    os.write(1, b"\\x1b[?25h\\n")
    while data := os.read(int(sys.argv[1]), 65536):
        os.write(1, data)
"""


@contextlib.contextmanager
def capture_stderr(show: Callable[[str], object], terminal: int) -> Iterator[None]:
    """Passes each line that is written to file descriptor 2 inside the block to `show`.

    The lines go through a temporary file, so that none is lost if this process crashes.

    Args:
        show: takes a line without its end; called in another thread.
        terminal: a copy of descriptor 2, which still leads to the terminal.
    """
    try:
        written, path = tempfile.mkstemp(prefix="tf_lamb-stderr-")
    except OSError:  # no temporary files here: the lines stay where they are
        yield
        return
    lines = os.open(path, os.O_RDONLY)
    appended = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.close(written)
    os.remove(path)
    alive_read, alive_write = os.pipe()
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", GUARD, str(lines)],
        stdin=alive_read,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        pass_fds=[lines],
        start_new_session=True,  # Ctrl-C is not for it
    )
    os.close(alive_read)
    ended = threading.Event()
    reader = threading.Thread(target=_show_lines, args=(lines, show, ended), daemon=True)
    reader.start()
    os.dup2(appended, STDERR)
    os.close(appended)
    try:
        yield
    finally:
        os.dup2(terminal, STDERR)
        ended.set()
        reader.join()
        os.write(alive_write, b"1")
        guard.wait()
        os.close(alive_write)
        os.close(lines)


def _show_lines(lines: int, show, ended: threading.Event) -> None:
    """Shows the lines that are appended to a file, until `ended` is set and no line is left."""
    place = 0
    while True:
        last = ended.wait(POLL_SECONDS)
        while data := os.pread(lines, 65536, place):
            whole = data if last else data[: data.rfind(b"\n") + 1]
            if not whole:
                break  # the rest of the line is still to come
            for line in whole.decode(errors="replace").splitlines():
                show(line)
            place += len(whole)
            os.lseek(lines, place, os.SEEK_SET)  # moves the position of the guard, too
        if last:
            return
