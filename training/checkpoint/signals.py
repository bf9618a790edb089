"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal came. Not an `Exception`, so that no library's handler of those swallows it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number  # as shells count it


class StopRequest:
    """Whether a signal has come; what `caught` yields.

    Called, as an action of Orbit's with its output, it raises `Interrupted` if one has. Outside
    of `deferred` the signal itself raises it, wherever the program is.

    number: that of the first signal, or None.
    """

    def __init__(self):
        self.number: int | None = None
        self._deferred = False

    def __call__(self, output=None):
        """Raises `Interrupted` if a signal has come."""
        del output
        if self.number is not None:
            raise Interrupted(self.number)

    def remember(self, number, frame):
        """The signal handler, which Python runs in its main thread between two instructions."""
        del frame
        self.number = self.number or number
        if not self._deferred:
            self()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, a signal only marks the request; a call of it, or the end, raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self()


@contextlib.contextmanager
def caught(say: Callable[[str], object]) -> Iterator[StopRequest]:
    """Yields a `StopRequest` for the signals that come while inside. For the main thread.

    Python runs handlers only between its own instructions, and a loop of steps on the device is
    one of them. So a thread listens too: it answers the first signal at once, and ends the process
    with the second.
    """
    request = StopRequest()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous_wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, request.remember) for number in NUMBERS}
    listener = threading.Thread(target=_listen, args=(reading, say), daemon=True)
    listener.start()
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_wakeup)
        os.close(writing)
        listener.join()
        os.close(reading)


def _listen(reading: int, say):
    """Reads the numbers of the signals that come, one byte each."""
    first = True
    while number := os.read(reading, 1):
        if number[0] not in NUMBERS:
            continue
        if not first:
            os._exit(128 + number[0])
        first = False
        say(f"{signal.Signals(number[0]).name}: stopping. A second signal does not wait for it.")
