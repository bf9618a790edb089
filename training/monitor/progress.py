"""Speed and losses of a run, measured per loop of steps, displayed, and saved as JSON lines."""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import reprlib
import time

import numpy as np
import rich.console
import rich.progress
import rich.text

from inputs.errors import InputError
from inputs.storage.files import atomic_write, is_remote, read_file
from training.monitor.terminal import STDERR, capture_stderr

HISTORY = "history.jsonl"  # one object per loop of steps
EVALUATIONS = "evaluations.jsonl"  # one object per evaluation
COMPILING_LOOPS = 1  # of a phase: they compile, and say nothing about the speed
SLOW_LOOPS = 2  # of a phase: caches and input threads are still filling in the last of them
HIGHER_IS_BETTER = "higher_is_better"  # in a row of an evaluation: the names of such metrics
FLUSH_SECONDS = 60.0  # between two writes of these to object storage, if no checkpoint is due


def read_rows(path) -> list[dict]:
    """Returns the rows of a JSON-lines file; [] if it does not exist.

    Skips lines that are not JSON, because a killed run may leave an incomplete one. NaN and
    infinity, which other programs write, are read as `Rows` would have written them, as null.

    Raises:
        InputError: a line is JSON, but not a row.
        OSError: it cannot be read.
    """
    rows = []
    try:
        content = read_file(path)
    except FileNotFoundError:
        return []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line, parse_constant=lambda name: None, parse_float=_finite)
        except (ValueError, RecursionError):
            continue
        wrong = _wrong_in(row)
        if wrong:
            raise InputError(f"{path}, line {number}: {wrong}. Correct or delete this line.")
        rows.append(row)
    return rows


def _finite(number: str | float) -> float | None:
    """Returns a number, or None for one that is NaN or infinite, as 1e400 is."""
    value = float(number)
    return value if math.isfinite(value) else None


def _wrong_in(row) -> str:
    """Returns what keeps a value from being a row, in words; "" if nothing does."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return f"a row must be an object with an integer step. Received: {reprlib.repr(row)}"
    for name, value in row.items():
        if name != HIGHER_IS_BETTER and not isinstance(value, int | float | None):
            return f"{name} must be a number or null. Received: {reprlib.repr(value)}"
        if isinstance(value, int) and not abs(value) < 2**63:
            return f"{name} must be below 2**63. Received: {reprlib.repr(value)}"
    names = row.get(HIGHER_IS_BETTER, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return f"{HIGHER_IS_BETTER} must be a list of names. Received: {reprlib.repr(names)}"
    return ""


class Rows:
    """The JSON lines of a run: each row has a step, and rows after a step can be dropped.

    On a disk each row is appended at once. On object storage, where an append writes the object
    again, rows are kept, and `flush` writes all of them.

    Args:
        path: of the file.
        check: raises if this process must not write any more; see `inputs.storage.files.locked`.
    """

    def __init__(self, path, check=lambda: None):
        self._path = os.fspath(path)
        self._check = check
        self._remote = is_remote(self._path)
        self._rows = read_rows(path) if self._remote else []
        self._written = True
        self._time = time.perf_counter()

    def append(self, row: dict) -> None:
        """Appends a row. NaN and infinity, which JSON does not have, are written as null."""
        finite = {
            key: _finite(value) if isinstance(value, float) else value for key, value in row.items()
        }
        if self._remote:
            self._rows.append(finite)
            self._written = False
            if time.perf_counter() - self._time > FLUSH_SECONDS:
                self.flush()
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line(finite))

    def drop_after(self, step: int) -> None:
        """Removes the rows of steps after `step`, from which the run resumes."""
        if self._remote:
            kept = [row for row in self._rows if row["step"] <= step]
            self._written = self._written and len(kept) == len(self._rows)
            self._rows = kept
        elif os.path.exists(self._path):
            kept = [row for row in read_rows(self._path) if row["step"] <= step]
            with atomic_write(self._path) as file:
                file.writelines(map(_line, kept))

    def flush(self) -> None:
        """Writes the rows that are not written yet."""
        if self._written:
            return
        self._check()
        with atomic_write(self._path) as file:
            file.writelines(map(_line, self._rows))
        self._written = True
        self._time = time.perf_counter()


def _line(row: dict) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


@dataclasses.dataclass(frozen=True)
class Machine:
    """The number of replicas and their peak speed, for the speed per replica and MFU.

    replicas: how many replicas share a global batch.
    peak_flops: peak FLOP/s of all devices together, or None if unknown.
    """

    replicas: int = 1
    peak_flops: float | None = None


class Progress:
    """Measures the speed of each loop of steps, displays it and appends a row to the history.

    An Orbit action: the controller calls it after each loop of steps, and writes the values that it
    adds to the loop's output to TensorBoard. `evaluated` is the action after an evaluation.

    Args:
        step: int `tf.Variable`, steps done so far.
        total_steps: the run's last step.
        model_dir: folder of `history.jsonl` and `evaluations.jsonl`.
        display: from `make_display`.
        machine: see `Machine`.
        flops_per_step: function without arguments that returns the model's FLOPs in one step. It is
            called once per phase, after the first loop, if `machine.peak_flops` is known.
        higher_is_better: names of the metrics of an evaluation of which a higher value is better;
            recorded with each evaluation.
        check_lock: raises if this process must not write to `model_dir` any more.
    """

    def __init__(
        self,
        step,
        total_steps,
        model_dir,
        display,
        *,
        machine=Machine(),  # noqa: B008, frozen
        flops_per_step=lambda: None,
        higher_is_better=(),
        check_lock=lambda: None,
    ):
        self._step = step
        self._total_steps = total_steps
        self._history = Rows(os.path.join(model_dir, HISTORY), check_lock)
        self._evaluations = Rows(os.path.join(model_dir, EVALUATIONS), check_lock)
        self._display = display
        self._machine = machine
        self._higher_is_better = [*higher_is_better]
        self._measure_flops = flops_per_step

    def begin_phase(self, phase: int, batch_size: int) -> None:
        """Starts the clock, and removes rows of steps after the current one.

        Args:
            phase: number of the phase, counted from 1.
            batch_size: examples per step.
        """
        self._phase = phase
        self._batch_size = batch_size
        self._flops_per_step = functools.cache(self._measure_flops)
        self._loops = 0
        self._examples = 0  # these two exclude the first loops
        self._seconds = 0.0
        self._last_step = int(self._step.numpy())
        self._last_time = time.perf_counter()
        for rows in (self._history, self._evaluations):
            rows.drop_after(self._last_step)

    def flush(self) -> None:
        """Writes all rows; called before a checkpoint is written, and after an evaluation."""
        for rows in (self._history, self._evaluations):
            rows.flush()

    def __call__(self, output):
        """Adds the loop's speed to its output, and displays and saves it."""
        step = int(self._step.numpy())
        now = time.perf_counter()
        seconds = now - self._last_time
        steps = step - self._last_step
        waited = float(output.pop("input_wait_seconds"))
        values = {name: np.asarray(value).item() for name, value in output.items()}
        measured = {"loss": values.pop("loss")} | self._measure_speed(steps, seconds)
        self._loops += 1
        if self._loops > COMPILING_LOOPS:
            measured["input_wait_share"] = waited / seconds
            if self._loops <= SLOW_LOOPS + 1:  # the mean begins again with each of the first loops
                self._examples = 0
                self._seconds = 0.0
            self._examples += steps * self._batch_size
            self._seconds += seconds
        output |= measured
        row = {"step": step, "phase": self._phase} | measured | values
        self._history.append(row)
        per_second = self.examples_per_second
        examples_left = (self._total_steps - step) * self._batch_size
        self._display.show(step, row, examples_left / per_second if per_second else None)
        # The next loop's time includes that for display and files, so that no time is left out.
        self._last_step = step
        self._last_time = now

    def evaluated(self, output):
        """Appends an evaluation's means; excludes its time from that of the next loop."""
        values = {name: np.asarray(value).item() for name, value in output.items()}
        step = int(self._step.numpy())
        self._evaluations.drop_after(step - 1)  # a finished run is evaluated again
        row = {"step": step, "phase": self._phase} | values
        self._evaluations.append(row | {HIGHER_IS_BETTER: self._higher_is_better})
        self.flush()
        self._last_time = time.perf_counter()

    def _measure_speed(self, steps, seconds):
        speed = self._batch_size * steps / seconds
        measured = {"examples_per_second": speed}
        if self._machine.replicas > 1:
            measured["examples_per_second_per_replica"] = speed / self._machine.replicas
        if self._machine.peak_flops:
            flops_per_second = self._flops_per_step() * steps / seconds
            measured["mfu"] = flops_per_second / self._machine.peak_flops
        return measured

    @property
    def examples_per_second(self) -> float | None:
        """The mean over the phase's loops except the first two; None after the first one.

        After the second loop, it is the speed of that loop.
        """
        return self._examples / self._seconds if self._seconds else None

    def describe_speed(self) -> str:
        """Returns the mean speed, or why there is none, for the report."""
        if not self._loops:
            return "not measured: nothing was left to train"
        if not self._seconds:
            return "not measured: there was only one loop of steps, which includes compilation"
        speed = f"{self.examples_per_second:,.0f} examples/s"
        if self._loops <= SLOW_LOOPS:
            speed += " in the second loop of steps; later ones are usually faster"
        return speed


def format_row(row: dict) -> str:
    """Formats a row of the history as one line; leaves out values that the row does not have.

    Args:
        row: has `loss`, `learning_rate` and `examples_per_second`; may have
            `examples_per_second_per_replica`, `mfu`, `input_wait_share` and `skipped_steps`.
    """
    speed = f"{row['examples_per_second']:,.0f} examples/s"
    if "examples_per_second_per_replica" in row:
        speed += f" ({row['examples_per_second_per_replica']:,.0f} per replica)"
    parts = [f"loss {row['loss']:.4f}", f"lr {row['learning_rate']:.3e}", speed]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    if "input_wait_share" in row:
        parts.append(f"input wait {row['input_wait_share']:.1%}")
    if row.get("skipped_steps"):
        parts.append(f"skipped {row['skipped_steps']}")
    return "  ".join(parts)


def format_left(seconds: float | None) -> str:
    """Formats the time left, for example as "time left: 1 day, 2:03:04"; None is unknown."""
    if seconds is None:
        return "time left: unknown"
    return f"time left: {datetime.timedelta(seconds=round(seconds))}"


class LineDisplay:
    """Logs plain lines, for output to a file or a pipe.

    Args:
        total_steps: the run's last step.
        log: takes each line.
        min_seconds: least time between two lines; the last step always gets one.
    """

    def __init__(self, total_steps: int, log, min_seconds: float = 5.0):
        self._total_steps = total_steps
        self._log = log
        self._min_seconds = min_seconds
        self._last_time = -float("inf")

    def show(self, step: int, row: dict, seconds_left: float | None) -> None:
        """Shows a row of the history and the time left, None if it is not known yet."""
        now = time.perf_counter()
        if now - self._last_time >= self._min_seconds or step >= self._total_steps:
            self._last_time = now
            line = f"step {step}/{self._total_steps}  {format_row(row)}"
            self._log(f"{line}  {format_left(seconds_left)}")


class BarDisplay:
    """A progress bar with the newest row under it, redrawn in place.

    Args:
        total_steps: the run's last step.
        live: a started `_BarAndLine`.
    """

    def __init__(self, total_steps: int, live: "_BarAndLine"):
        self._live = live
        self._task = live.add_task("", total=total_steps, left="compiling")

    def show(self, step: int, row: dict, seconds_left: float | None) -> None:
        """Shows a row of the history and the time left, None if it is not known yet."""
        self._live.line = format_row(row)
        self._live.update(self._task, completed=step, left=format_left(seconds_left))
        self._live.refresh()


class _BarAndLine(rich.progress.Progress):
    line = ""

    def print_line(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(rich.text.Text(line), soft_wrap=True)

    def get_renderables(self):
        yield self.make_tasks_table(self.tasks)
        yield rich.text.Text(self.line, overflow="ellipsis")


@contextlib.contextmanager
def make_display(total_steps: int, log, stream=None):
    """Yields a `BarDisplay` if `stream` is a terminal, else a `LineDisplay` that calls `log`.

    Other lines written to standard error while the bar is shown appear above it, also those of
    TensorFlow's C++ code.

    Args:
        total_steps: the run's last step.
        log: takes lines.
        stream: standard error, or None.
    """
    if stream is None or not stream.isatty():
        yield LineDisplay(total_steps, log)
        return
    columns = (
        rich.progress.TextColumn("step {task.completed:,}/{task.total:,}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[left]}"),
    )
    with contextlib.ExitStack() as stack:
        file, terminal = stream, _descriptor(stream)
        if terminal == STDERR:
            terminal = os.dup(STDERR)
            file = stack.enter_context(open(terminal, "w", encoding=stream.encoding, newline=""))
        # `show` redraws it without a thread. Standard output is not captured: it is for the report.
        live = _BarAndLine(
            *columns,
            console=rich.console.Console(file=file),
            auto_refresh=False,
            redirect_stdout=False,
            expand=True,
        )
        stack.enter_context(live)
        if file is not stream:
            stack.enter_context(capture_stderr(live.print_line, terminal))
        yield BarDisplay(total_steps, live)


def _descriptor(stream) -> int | None:
    """Returns the file descriptor of a stream, None if it has none."""
    try:
        return stream.fileno()
    except (OSError, AttributeError):
        return None
