"""Progress of the preparation commands: a bar on a terminal, plain lines everywhere else."""

import sys

from tqdm import tqdm


def log(line: str) -> None:
    """Prints a line on standard error, above the progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """Progress toward a known total, on standard error. A context manager.

    Args:
        total: amount of work.
        unit: its unit, such as "B" or " shards".
        enabled: if False, nothing is printed.
    """

    def __init__(self, total: int, unit: str, *, enabled: bool = True):
        self._total = total
        self._done = 0
        is_terminal = sys.stderr.isatty()
        self._lines = enabled and not is_terminal
        self._bar = tqdm(
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            disable=not (enabled and is_terminal),
            file=sys.stderr,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bar.close()

    def advance(self, amount: int) -> None:
        """Adds to the work done."""
        self._done += amount
        self._bar.update(amount)

    def note(self, text: str) -> None:
        """Shows a short text after the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def milestone(self, line: str) -> None:
        """Prints a line with the share of the work done, unless a bar is shown."""
        if self._lines:
            log(f"{line} ({self._done / max(self._total, 1):.0%})")
