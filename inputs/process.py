"""Sets up the process of a command: environment and output. Import this before TensorFlow.

TensorFlow and Keras read environment variables when they are imported. `tensorflow_text` and
`tf_lamb.tf_keras` import Keras 3, whose backend must be TensorFlow here, whatever KERAS_BACKEND or
~/.keras/keras.json selects for the user's other programs.
"""

import contextlib
import gc
import io
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable

from inputs import memory
from inputs.errors import InputError, first_line, refuse_misspelled

ASKED_BACKEND = os.environ.get("KERAS_BACKEND", "")  # what the user set; ignored

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages
os.environ["KERAS_BACKEND"] = "tensorflow"

# Imports and graphs create millions of objects that stay. Scanning them as often as Python does by
# default takes 7 % of the processor time of a small run.
gc.set_threshold(50_000, 10, 10)


INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell


def run(main: Callable[..., int | None], *arguments) -> None:
    """Calls the `main` function of a command and exits with the status that it returns.

    An empty argument or flag, usually from a shell variable that is not set, is refused: it would
    be taken for the default. So is a path such as gs:/bucket, which would be one on the disk. See
    `call` for the rest.
    """
    for before, argument in itertools.pairwise(sys.argv):
        flag, _, value = argument.rpartition("=")
        flag = flag or (before if re.fullmatch(r"--?[\w-]+", before) else "an argument")
        try:
            if re.fullmatch(r"(--?[\w-]+=)?\s*", argument):
                raise InputError(
                    f"{flag} is empty, perhaps because a shell variable is not set. Give a value, "
                    "or leave it out."
                )
            refuse_misspelled(value, flag)
        except InputError as error:
            _complain(str(error))
            sys.exit(1)
    call(main, *arguments)


def call(main: Callable[..., int | None], *arguments) -> None:
    """Calls `main`, and exits with the status that it returns.

    Bad input that `main` does not report itself, Ctrl-C, and standard output that cannot be written
    end the command in one line, without a traceback.
    """
    sys.unraisablehook = _repeat_interrupt
    prepare_output()
    try:
        status = main(*arguments)
    except InputError as error:
        _complain(str(error))
        status = 1
    except KeyboardInterrupt:
        _complain("stopped.")
        status = INTERRUPTED
    finally:
        sys.stdout.flush()  # also after the `SystemExit` of --help
    sys.exit(status)


@contextlib.contextmanager
def signals_as_interrupt():
    """Inside, SIGTERM and SIGHUP raise `KeyboardInterrupt`, as Ctrl-C does: cleanup code runs.

    SIGHUP, by which a closed terminal ends its commands, stays ignored under `nohup`. A second one
    is ignored, too, because its shell and the system send one each.
    """

    def interrupt(signum, frame):
        if signum == signal.SIGHUP:
            signal.signal(signum, signal.SIG_IGN)
        signal.default_int_handler(signum, frame)

    if threading.current_thread() is not threading.main_thread():  # where Python runs no handlers
        yield
        return
    caught = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    previous = {signum: signal.signal(signum, interrupt) for signum in caught}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def prepare_output() -> None:
    r"""Makes `print` escape characters that standard output cannot encode, for example as \u4e2d.

    By default `print` raises `UnicodeEncodeError` for them, as for Chinese text in the C locale or
    for a file name that is not UTF-8. Standard error escapes them by default.

    If standard output is closed, the process exits. If it cannot be written, the process exits when
    it writes.
    """
    if sys.stdout is None:
        _complain("standard output is closed. Redirect it to a file, or to /dev/null.")
        sys.exit(1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout = _Output(sys.stdout)  # type: ignore[assignment]


class _Output:
    """A text stream that exits with one line on standard error if it cannot be written.

    An `OSError` would be taken for one of another file by the command, or be ignored by argparse.
    """

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._exit_on_error():
            return self._stream.write(text)

    def writelines(self, lines) -> None:
        with self._exit_on_error():
            self._stream.writelines(lines)

    def flush(self) -> None:
        with self._exit_on_error():
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _exit_on_error(self):
        try:
            yield
        except OSError as error:
            # Python flushes the stream again at its exit; what is left goes nowhere.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            _complain(f"standard output cannot be written ({error.strerror}).")
            sys.exit(1)


def describe_exit(status: int) -> str:
    """Describes an exit status of `subprocess`, which is negative if a signal ended the process."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # most of the real-time signals have no name
        return f"killed by signal {-status}"


def _complain(text: str) -> None:
    """Prints a line with the command's name to standard error."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = (spec.name if spec else os.path.basename(sys.argv[0])).removesuffix(".__main__")
    print(f"{name}: {text}", file=sys.stderr, flush=True)


def _chain(error) -> list[BaseException]:
    """Returns an error and the earlier ones that it was raised from, or while they were handled."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:  # an error can be its own cause
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _is_interrupt(error) -> bool:
    """Whether an error is a Ctrl-C, or what an extension module made of it during its imports."""
    first = next((e for e in _chain(error) if not isinstance(e, ImportError | SystemError)), None)
    return isinstance(first, KeyboardInterrupt)


def _is_memory(error) -> bool:
    """Whether the reason for an error is that there is no more memory."""
    said = "\n".join(f"{type(e).__name__}: {e}" for e in _chain(error))
    return memory.ran_out_of_memory(said, status=1)


def _exit_on_interrupt(next_hook):
    """Returns a hook of `sys` that ends the process after a Ctrl-C before `call`.

    TensorFlow's imports take seconds, and some callbacks in them ignore an interrupt.
    """

    def hook(*arguments):
        error = arguments[1] if len(arguments) > 1 else arguments[0].exc_value
        if not _is_interrupt(error):
            next_hook(*arguments)
            return
        limit = memory.binding_limit()
        if limit and limit.is_tight:  # OpenBLAS raises the same signal if it cannot start threads
            _complain(
                f"stopped. If that was not by Ctrl-C, there was not enough memory: {limit}. Raise "
                "the limit."
            )
        else:
            _complain("stopped.")
        os._exit(INTERRUPTED)  # Python itself would raise the signal again

    return hook


def _exit_on_memory(next_hook):
    """Returns a hook of `sys` that ends the process in one line if there is no more memory."""

    def hook(kind, error, trace):
        if not _is_memory(error):
            next_hook(kind, error, trace)
            return
        reason = first_line(error)
        name = kind.__name__
        _complain(
            f"out of memory ({reason if reason == name else f'{name}: {reason}'})."
            f"{memory.describe_limit()} End other programs, or raise the limit of the shell, "
            "container or job."
        )
        os._exit(1)  # without the cleanup of modules that are half imported, which may crash

    return hook


_UNRAISABLE_HOOK = sys.unraisablehook


def _repeat_interrupt(unraisable):
    """Hook of `sys` that repeats an interrupt which Python ignores because a callback cannot raise.

    JAX, for one, has a callback of Python's garbage collector.
    """
    caught = [s for s in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(s))]
    if not (_is_interrupt(unraisable.exc_value) and caught):
        _UNRAISABLE_HOOK(unraisable)
        return
    again = threading.Timer(0.1, os.kill, (os.getpid(), caught[0]))  # after the callback has ended
    again.daemon = True
    again.start()


sys.excepthook = _exit_on_interrupt(_exit_on_memory(sys.excepthook))
sys.unraisablehook = _exit_on_interrupt(sys.unraisablehook)
