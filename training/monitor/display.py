"""A run's progress as a person sees it: a bar on a terminal, plain lines in a file or a pipe."""

import contextlib
import datetime
import time

import rich.console
import rich.progress
import rich.text


def in_words(row: dict) -> str:
    """A row of the history as one line, what is not known left out.

    Args:
        row: as `Progress` writes it: `loss`, `learning_rate`, `examples_per_second` and perhaps
            `examples_per_second_per_replica`, `mfu`, `input_wait_share`, `skipped_steps`.
    """
    speed = f"{row['examples_per_second']:,.0f} examples/s"
    if "examples_per_second_per_replica" in row:
        speed += f" ({row['examples_per_second_per_replica']:,.0f} per replica)"
    parts = [f"loss {row['loss']:.4f}", f"rate {row['learning_rate']:.3e}", speed]
    for name, said in (("mfu", "MFU {:.1%}"), ("input_wait_share", "input wait {:.1%}")):
        if name in row:
            parts.append(said.format(row[name]))
    if row.get("skipped_steps"):
        parts.append(f"skipped {row['skipped_steps']}")
    return "  ".join(parts)


def time_left(seconds: float) -> str:
    """As "1 day, 2:03:04"."""
    return str(datetime.timedelta(seconds=round(seconds)))


class Lines:
    """Plain lines, not more often than every `every_seconds`.

    Args:
        total_steps: where the run ends.
        write: takes each line.
        every_seconds: least time between two lines; the last step always gets one.
    """

    def __init__(self, total_steps: int, write, every_seconds: float = 5.0):
        self._total, self._write, self._every = total_steps, write, every_seconds
        self._printed = -float("inf")

    def show(self, step: int, row: dict, seconds_left: float) -> None:
        """Takes a row of the history and what is left of the run."""
        now = time.perf_counter()
        if now - self._printed >= self._every or step >= self._total:
            self._printed = now
            left = time_left(seconds_left)
            self._write(f"step {step}/{self._total}  {in_words(row)}  left {left}")


class Bar:
    """A bar with the newest figures under it, redrawn in place.

    Args:
        total_steps: where the run ends.
        live: a started `_BarAndLine`.
    """

    def __init__(self, total_steps: int, live: "_BarAndLine"):
        self._total, self._live = total_steps, live
        self._task = live.add_task("", total=total_steps, left="compiling")

    def show(self, step: int, row: dict, seconds_left: float) -> None:
        """Takes a row of the history and what is left of the run."""
        self._live.line = in_words(row)
        self._live.update(self._task, completed=step, left=f"left {time_left(seconds_left)}")
        self._live.refresh()


class _BarAndLine(rich.progress.Progress):
    line = ""

    def get_renderables(self):
        yield self.make_tasks_table(self.tasks)
        yield rich.text.Text(self.line, overflow="ellipsis")


@contextlib.contextmanager
def display(total_steps: int, write, stream=None):
    """Yields a `Bar` on `stream` (standard error, or None) if that is a terminal, else `Lines`.

    What else is written to standard error meanwhile stands above the bar.
    """
    if stream is None or not stream.isatty():
        yield Lines(total_steps, write)
        return
    columns = (
        rich.progress.TextColumn("step {task.completed:,}/{task.total:,}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[left]}"),
    )
    # Redrawn when there is news, by no thread of its own. Standard output is the report's alone.
    live = _BarAndLine(
        *columns,
        console=rich.console.Console(file=stream),
        auto_refresh=False,
        redirect_stdout=False,
        expand=True,
    )
    with live:
        yield Bar(total_steps, live)
