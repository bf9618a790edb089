"""Damaged records: named, counted, passed over up to a limit."""

from collections.abc import Callable

from inputs.errors import InputError

SHOWN = 10  # lines about single records; the count is told in the end
# Damage may come in one lump: only beyond so many records is its share judged before the end.
JUDGED_EARLY = 1_000


class BadRecords:
    """What all readers of one run's data tell about the records that they cannot use.

    Args:
        max_share: the share of all records that may be damaged.
        skip: False ends the run at the first one.
        say: takes a line about each of the first damaged records.
        limit_flag: how the user sets `max_share`.
    """

    def __init__(
        self,
        max_share: float,
        *,
        skip: bool,
        say: Callable[[str], object],
        limit_flag: str = "--set max_bad_record_share",
    ):
        self._max_share, self._skip, self._say = max_share, skip, say
        self._limit_flag = limit_flag
        self._first = ""
        self.good = self.bad = self._expected = 0

    def expect(self, count: int) -> None:
        """So many records will be read, some perhaps never: each damaged one is judged at once."""
        self._expected += count

    def add_good(self, count: int = 1) -> None:
        """Counts records that could be used."""
        self.good += count

    def add_bad(self, what: str, count: int = 1) -> None:
        """Counts damaged ones.

        Args:
            what: one sentence with file, place and flaw.
            count: how many records are lost by it, at the least.

        Raises:
            InputError: too many, or one where none is borne.
        """
        if not self._skip:
            raise InputError(
                f"{what} Mend it, or pass over damaged records with --set on_bad_record=skip."
            )
        self._first = self._first or what
        if self.bad < SHOWN:
            self._say(f"Passed over: {what}")
        self.bad += count
        if self._expected or self.bad >= JUDGED_EARLY:
            self._judge()

    def end(self) -> None:
        """To be called when all was read once; tells the count.

        Raises:
            InputError: too many.
        """
        if self.bad:
            self._judge()
            self._say(f"{self._count} were damaged and passed over")

    @property
    def _count(self) -> str:
        return f"{self.bad:,} of {self._total:,} records"

    @property
    def _total(self) -> int:
        return self._expected or self.good + self.bad

    def _judge(self) -> None:
        if self.bad > self._max_share * self._total:
            raise InputError(
                f"{self._first} With it {self._count} are damaged, more than the share of "
                f"{self._max_share:g} that is passed over. Mend the data, or raise the limit with "
                f"{self._limit_flag}."
            )
