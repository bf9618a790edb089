"""What a run measures while it runs: for the display, for TensorBoard and for its history."""

import dataclasses
import functools
import os
import time

import numpy as np

from training.monitor.history import EVALUATIONS, HISTORY, append_row, drop_rows_after


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run's speed is compared with.

    replicas: how many share each batch.
    peak_flops: of all devices together; None where it is not known.
    """

    replicas: int = 1
    peak_flops: float | None = None


class Progress:
    """Measures each inner loop of steps, shows it and keeps it.

    It is a train action: Orbit calls it once per inner loop, and writes what it adds to the
    loop's output to TensorBoard, too. `evaluated` is the eval action. Call `begin` before, when
    the step that the run goes on from is restored.

    Args:
        step: int `tf.Variable`, steps done so far.
        total_steps: where the run ends.
        batch_size: examples per step.
        model_dir: folder of `history.jsonl` and `evaluations.jsonl`.
        display: see `training.monitor.display`.
        phase: which one of the recipe's, from 1.
        machine: see `Machine`.
        flops_per_step: function without arguments, of the model; asked once, after the first
            loop, if `machine.peak_flops` is known.
    """

    def __init__(
        self,
        step,
        total_steps,
        batch_size,
        model_dir,
        display,
        *,
        phase=1,
        machine=Machine(),  # noqa: B008, frozen
        flops_per_step=lambda: None,
    ):
        self._step, self._total, self._batch_size = step, total_steps, batch_size
        self._history = os.path.join(model_dir, HISTORY)
        self._evaluations = os.path.join(model_dir, EVALUATIONS)
        self._display, self._phase, self._machine = display, phase, machine
        self._flops_per_step = functools.cache(flops_per_step)
        self._warm = False
        self.examples, self.seconds = 0, 0.0  # without the first loop, which compiles

    def begin(self):
        """Starts the clock, and drops the history of steps that come again."""
        self._last_step, self._last_time = int(self._step.numpy()), time.perf_counter()
        for path in (self._history, self._evaluations):
            drop_rows_after(path, self._last_step)

    def __call__(self, output):
        """Takes the output of an inner loop; a mean is NaN where every step was skipped."""
        step, now = int(self._step.numpy()), time.perf_counter()
        taken, steps = now - self._last_time, step - self._last_step
        waited = float(output.pop("input_wait_seconds"))
        values = {name: value.item() for name, value in _arrays(output)}
        loss = sum(value for name, value in values.items() if name.endswith("_loss"))
        measured = {"loss": loss} | self._speed_of(steps, taken)
        if self._warm:
            self.examples += steps * self._batch_size
            self.seconds += taken
            measured["input_wait_share"] = waited / taken
        self._warm = True
        output |= measured
        row = {"step": step, "phase": self._phase} | measured | values
        append_row(self._history, row)
        per_second = self.examples_per_second or row["examples_per_second"]
        self._display.show(step, row, (self._total - step) * self._batch_size / per_second)
        # Showing and writing is part of the next loop, so that no time goes uncounted.
        self._last_step, self._last_time = step, now

    def evaluated(self, output):
        """Keeps what an evaluation measured; its time is not the next loop's."""
        values = {name: value.item() for name, value in _arrays(output)}
        step = int(self._step.numpy())
        drop_rows_after(self._evaluations, step - 1)  # a finished run is evaluated again
        append_row(self._evaluations, {"step": step, "phase": self._phase} | values)
        self._last_time = time.perf_counter()

    def _speed_of(self, steps, seconds):
        speed = self._batch_size * steps / seconds
        measured = {"examples_per_second": speed}
        if self._machine.replicas > 1:
            measured["examples_per_second_per_replica"] = speed / self._machine.replicas
        if self._machine.peak_flops:
            per_second = self._flops_per_step() * steps / seconds
            measured["mfu"] = per_second / self._machine.peak_flops
        return measured

    @property
    def examples_per_second(self) -> float | None:
        """Over all loops but the first; None before the second has run."""
        return self.examples / self.seconds if self.seconds else None

    @property
    def speed(self) -> str:
        """The same in words."""
        if not self._warm:
            return "not measured: nothing was left to train"
        if not self.seconds:
            return "not measured: there was one loop of steps, which compiles"
        return f"{self.examples_per_second:,.0f} examples/s"


def _arrays(output):
    return [(name, np.asarray(value)) for name, value in output.items()]
