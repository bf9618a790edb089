"""Damaged records: reported, counted and skipped up to a limit."""

from collections.abc import Callable

from inputs.errors import InputError

MAX_REPORTED = 10  # messages about single records; after that only the total is reported
# Damaged records may come in a cluster at the start, so the share is checked while reading only
# after this many of them.
CHECKED_FROM = 1_000


class BadRecords:
    """Counts the damaged records of one data set and decides whether reading may go on.

    Args:
        max_share: the share of all records that may be damaged, in [0, 1].
        skip: if False, the first damaged record raises.
        log: receives one line for each of the first `MAX_REPORTED` damaged records, and the total.
        limit_flag: the flag that sets `max_share`, for the error message.
    """

    def __init__(
        self,
        max_share: float,
        *,
        skip: bool,
        log: Callable[[str], object],
        limit_flag: str = "--set max_bad_record_share",
    ):
        self._max_share = max_share
        self._skip = skip
        self._log = log
        self._limit_flag = limit_flag
        self._first = ""
        self._expected = 0
        self.good = 0
        self.bad = 0

    def expect(self, count: int) -> None:
        """Announces `count` records that are read at random.

        The share is then checked at every damaged record, because reading may never end.
        """
        self._expected += count

    def add_good(self, count: int = 1) -> None:
        """Counts usable records."""
        self.good += count

    def add_bad(self, message: str, count: int = 1) -> None:
        """Counts damaged records.

        Args:
            message: one sentence with the file, the position in it and what is wrong.
            count: how many records are lost, at least.

        Raises:
            InputError: the limit is exceeded, or `skip` is False.
        """
        if not self._skip:
            raise InputError(
                f"{message} Repair it, or skip damaged records with --set on_bad_record=skip."
            )
        self._first = self._first or message
        if self.bad < MAX_REPORTED:
            self._log(f"Skipped: {message}")
        self.bad += count
        if self._expected or self.bad >= CHECKED_FROM:
            self._check()

    def end(self) -> None:
        """Checks the share and logs the total. Call it when every record was read once.

        Raises:
            InputError: the limit is exceeded.
        """
        if self.bad:
            self._check()
            self._log(f"{self._count} were damaged and skipped")

    @property
    def _count(self) -> str:
        return f"{self.bad:,} of {self._total:,} records"

    @property
    def _total(self) -> int:
        return self._expected or self.good + self.bad

    def _check(self) -> None:
        if self.bad > self._max_share * self._total:
            raise InputError(
                f"{self._first} With it {self._count} are damaged, more than the share of "
                f"{self._max_share:g} that may be skipped. Repair the data, or raise the limit "
                f"with {self._limit_flag}."
            )
