"""A profiler trace of some steps, and how long the inner loops must be for it."""

import tensorflow as tf


class Profiler:
    """Traces the steps after `first` up to `last`; a train action, called after each inner loop.

    Args:
        step: int `tf.Variable`, steps done so far.
        window: (first, last) as `recipes.types.profile_window` gives them.
        log_dir: TensorBoard's folder.
    """

    def __init__(self, step, window: tuple[int, int], log_dir: str):
        self._step, self._window, self._log_dir = step, window, log_dir
        self._running = False

    def begin(self):
        """Starts the trace if the run goes on from within the window."""
        self(None)

    def __call__(self, output):
        """Starts or ends the trace, if this is the step for it."""
        del output
        first, last = self._window
        inside = first <= int(self._step.numpy()) < last
        if inside and not self._running:
            tf.profiler.experimental.start(self._log_dir)
        elif self._running and not inside:
            tf.profiler.experimental.stop()
        self._running = inside

    def close(self):
        """Ends a trace that the run ended in."""
        if self._running:
            tf.profiler.experimental.stop()
            self._running = False


def loop_lengths(steps_per_loop: int, window: tuple[int, int]):
    """`step -> steps of the inner loop from there`, so that one ends where a trace does."""

    def length(step):
        ahead = [edge - int(step) for edge in window if edge > step]
        return min([steps_per_loop, *ahead])

    return length
