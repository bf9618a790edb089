"""Damaged records: reported, counted and skipped up to a limit."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from inputs.errors import InputError

MAX_NAMED = 10  # messages about single records; after that only the total is reported
# Damaged records may cluster at the start of the data, so during reading the share is not checked
# until this many have been found.
CHECKED_FROM = 1_000
# A file with a larger share of damaged records probably has another format.
MAX_SHARE_OF_FILE = 0.5
# What to do where the first damaged record ends the run.
REPAIR = "Repair it, or skip damaged records with --set on_bad_record=skip."


@dataclasses.dataclass
class _File:
    """The file being read: the counts before it, and the message of its first bad record."""

    good: int
    bad: int
    first: str = ""


class BadRecords:
    """Counts the damaged records of one data set and decides whether reading may go on.

    Args:
        max_share: the share of all records that may be damaged, in [0, 1].
        skip: if False, the first damaged record raises.
        log: receives one line for each of the first `MAX_NAMED` places with damaged records, and
            the total.
        limit_flag: the flag that sets `max_share`, for the error message.
        repair: what to do where the first damaged record ends the run, for the error message.
        worker: how lines about what this process finds begin, such as "worker 1: "; "" if it is the
            only one.
        chief: whether this process also names what other workers find, and reports their total.

    Raises:
        InputError: `max_share` is not in [0, 1].

    Attributes:
        skip, repair, worker, chief: as given.
        good: number of usable records so far.
        bad: number of damaged records so far.
    """

    def __init__(
        self,
        max_share: float,
        *,
        skip: bool,
        log: Callable[[str], object],
        limit_flag: str = "--set max_bad_record_share",
        repair: str = REPAIR,
        worker: str = "",
        chief: bool = True,
    ):
        if not 0 <= max_share <= 1:
            raise InputError(f"{limit_flag}={max_share:g}: give a share from 0 to 1.")
        self._max_share = max_share
        self.skip = skip
        self._log = log
        self._limit_flag = limit_flag
        self.repair = repair
        self.worker = worker
        self.chief = chief
        self._first = ""
        self._named: set[str] = set()
        self._expected = 0
        self._file: _File | None = None
        self.good = 0
        self.bad = 0

    @contextlib.contextmanager
    def of_file(self) -> Iterator[None]:
        """Returns a context manager that also counts the block's records as those of one file.

        A wrong file among many good ones may stay within the share that is allowed over all
        records. So a file whose records are mostly damaged is an error, unless `max_share` allows
        that many.

        Raises:
            InputError: more than `MAX_SHARE_OF_FILE` of the file's records were damaged.
        """
        self._file = _File(self.good, self.bad)
        try:
            yield
            self._check_file()
        finally:
            self._file = None

    def expect(self, count: int) -> None:
        """Announces that `count` records will be read in random order.

        The share is then relative to all announced records, and it is checked at every damaged
        record, because training may read without end.
        """
        self._expected += count

    def add_good(self, count: int = 1) -> None:
        """Counts usable records."""
        self.good += count

    def add_bad(self, message: str, count: int = 1, worker: str | None = None) -> None:
        """Counts damaged records.

        Args:
            message: one sentence with the file, the position in it and what is wrong.
            count: number of records lost (a lower bound).
            worker: the `worker` that found them; None for this process.

        Raises:
            InputError: the limit is exceeded, or `skip` is False.
        """
        if not self.skip:
            raise InputError(f"{message} {self.repair}")
        worker = self.worker if worker is None else worker
        self._first = self._first or worker + message
        if self._file and not self._file.first:
            self._file.first = message
        # A damaged page is reported with each block of examples that it belongs to.
        is_new = message not in self._named and len(self._named) < MAX_NAMED
        if is_new and (self.chief or worker == self.worker):
            self._named.add(message)
            self._log(f"{worker}Skipped: {message}")
        self.bad += count
        if self._expected or self.bad >= CHECKED_FROM:
            self._check()
        if self._file and self.bad - self._file.bad >= CHECKED_FROM:
            self._check_file()

    def end(self) -> None:
        """Checks the share and logs the total. Call it after every record was read once.

        Raises:
            InputError: the limit is exceeded.
        """
        if self.bad:
            self._check()
            # Of records that were announced, each worker reads a part, and the chief reports all.
            if not self._expected:
                self._log(f"{self.worker}{self._count} were damaged and skipped")
            elif self.chief:
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
                f"{self._first} Including it, {self._count} are damaged, more than the share of "
                f"{self._max_share:g} that may be skipped. Repair the data, or raise the limit "
                f"with {self._limit_flag}."
            )

    def _check_file(self) -> None:
        file = self._file
        bad, good = self.bad - file.bad, self.good - file.good
        if bad > max(MAX_SHARE_OF_FILE, self._max_share) * (bad + good):
            raise InputError(
                f"{file.first} Including it, {bad:,} of {bad + good:,} records of the file are "
                "damaged, so the file probably has another format. Repair it, or take it out of "
                "the data."
            )
