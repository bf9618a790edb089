"""Signals: the first one saves a checkpoint and stops the run, the second kills it."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import tensorflow as tf

from training.strategy import is_multi_worker

# Ctrl-C, the end of a job, and a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it


class Interrupted(BaseException):
    """A signal arrived. Not an `Exception`, so that libraries do not catch it as one."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum  # the shells' convention


class StopRequest:
    """Whether a signal has arrived; yielded by `handle_signals`.

    An instance is an Orbit action: when called, it raises `Interrupted` if a signal has arrived.
    Outside of `deferred`, the signal handler raises `Interrupted` immediately.

    signum: the number of the first signal, or None.
    """

    def __init__(self):
        self.signum: int | None = None
        self._deferred = False
        self._terminals = {os.fstat(fd).st_rdev for fd in (1, 2) if os.isatty(fd)}

    def __call__(self, output=None):
        """Raises `Interrupted` if a signal has arrived."""
        del output
        if self.signum is not None:
            raise Interrupted(self.signum)

    def handler(self, signum, frame):
        """The signal handler, which Python calls in its main thread between two instructions."""
        del frame
        self.leave_terminal(signum)
        self.signum = self.signum or signum
        if not self._deferred:
            self()

    def leave_terminal(self, signum: int) -> None:
        """After SIGHUP, makes all descriptors of the closed terminal lead nowhere.

        Writing to it would raise, before the checkpoint is saved. Progress bars hold copies.
        """
        if signum != signal.SIGHUP:
            return
        null = os.open(os.devnull, os.O_RDWR)
        for fd in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):  # that of the listing has been closed
                if os.fstat(fd).st_rdev in self._terminals:
                    os.dup2(null, fd, inheritable=fd <= 2)
        os.close(null)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets `signum`; `Interrupted` is raised by a call or at the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self()


@contextlib.contextmanager
def handle_signals(log: Callable[[str], object]) -> Iterator[StopRequest]:
    """Handles `SIGNALS` inside, and yields their `StopRequest`. Main thread only.

    Python runs signal handlers only between bytecode instructions, and a loop of steps on the
    device is a single call. Therefore a thread also reads the signals: it logs the first one
    immediately and ends the process at the second one, unless that is SIGHUP, which also stays
    ignored under `nohup`.

    Args:
        log: takes the line that acknowledges the first signal.
    """
    request = StopRequest()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    handled = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, request.handler) for signum in handled}
    listener = threading.Thread(target=_listen, args=(read_end, request, log), daemon=True)
    listener.start()
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(previous_wakeup)
        os.close(write_end)
        listener.join()
        os.close(read_end)


def _listen(read_end: int, request: StopRequest, log):
    """Logs the first signal and exits at the second; reads signal numbers, one byte each."""
    first = True
    while received := os.read(read_end, 1):
        signum = received[0]
        if signum not in SIGNALS:
            continue
        request.leave_terminal(signum)
        if signum == signal.SIGHUP and not first:
            continue  # the shell of a closed terminal and the system send one each
        if not first:
            # This thread may not wait for a lock that the main thread holds, so it does not log.
            # While a bar is shown, `training.monitor.terminal` shows the cursor and this line.
            show_cursor = SHOW_CURSOR if os.isatty(2) else ""
            name = signal.Signals(signum).name
            line = f"{show_cursor}\n{name} again: stopped at once, without a checkpoint.\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
            os._exit(128 + signum)
        first = False
        log(f"{signal.Signals(signum).name}: stopping. A second signal does not wait for it.")


def stop_together(strategy, request: StopRequest, save: Callable, folder: str) -> Callable:
    """Returns an Orbit action that raises `Interrupted` in all workers after the same step.

    Args:
        strategy: a `tf.distribute.Strategy`. With a single worker, `request` itself is returned.
        request: this process's request.
        save: function without arguments that all workers call before they stop.
        folder: a folder that no other process uses, for TensorFlow's handler.
    """
    if not is_multi_worker(strategy):
        return request

    def leave():
        raise Interrupted(request.signum or signal.SIGTERM)

    handler = tf.distribute.experimental.PreemptionCheckpointHandler(
        strategy.cluster_resolver,
        # Empty: the handler is used only to agree on a step; `save` writes the run's state.
        tf.train.Checkpoint(),
        os.path.join(folder, "preemption"),
        tf.distribute.experimental.TerminationConfig(
            termination_watcher_fn=lambda: request.signum is not None,
            exit_fn=leave,
            save_fn=save,
        ),
    )

    def action(output=None):
        del output
        handler.save_checkpoint_if_preempted()

    return action
