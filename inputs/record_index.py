"""An index of TFRecord files: where each record begins."""

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable

import numpy as np

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.pages import PagesWriter
from inputs.shards import record_offsets
from inputs.storage.files import ROUND_TRIPS

INDEX = "index"  # folder, and name of the array in it
LEFT_OUT = "left_out"  # fact of the array: the number of records left out, about
# Records that are checked. If one record in a thousand is wrong, 86 % of such samples have one.
CHECKED = 2_000


def write_index(
    folder: str,
    files: list[str],
    counts: list[int] | None = None,
    progress: Callable[[int], object] = lambda files: None,
    *,
    fix: str,
    bad_records: BadRecords | None = None,
    check: Callable[[str, int], object] | None = None,
    at_end: Callable[[], object] = lambda: None,
) -> list[int]:
    """Writes where each record of the files begins, into FOLDER/index; reads lengths only.

    If it raises, an earlier index is not changed.

    Args:
        folder: a folder.
        files: paths of TFRecord files, which are not compressed.
        counts: the number of records that each file must have.
        progress: called with 1 after each file.
        fix: what to do about a damaged file, for the error message.
        bad_records: counts the records of each file, and about how many are left out because a
            length is damaged. If None, the first such length is an error.
        check: called with (file, where a record begins in it) for about `CHECKED` records, evenly
            spaced in each file; in several threads.
        at_end: called when all files were searched, before an earlier index is replaced.

    Returns:
        The number of records of each file.

    Raises:
        InputError: a file cannot be read or is damaged; or from `bad_records`, `check` or
            `at_end`.
    """
    checked_per_file = -(-CHECKED // len(files))
    found = []
    left_out = 0
    stop = threading.Event()

    def find(path):
        lost: list[tuple[str, int]] = []
        on_damage = (lambda *gap: lost.append(gap)) if bad_records else None
        offsets = record_offsets(path, fix, on_damage, stop)
        for offset in offsets[:: max(1, -(-len(offsets) // checked_per_file))] if check else ():
            if stop.is_set():
                break
            check(path, int(offset))
        return offsets, lost

    with (
        PagesWriter(os.path.join(folder, INDEX), {INDEX: np.int64}, {INDEX: 2}) as writer,
        concurrent.futures.ThreadPoolExecutor(ROUND_TRIPS) as pool,
        _set_at_end(stop),  # before the end of the pool, which waits for what runs in it
    ):
        for first in range(0, len(files), ROUND_TRIPS):  # so that few results wait in memory
            some = files[first : first + ROUND_TRIPS]
            results = [pool.submit(find, path) for path in some]
            for result in concurrent.futures.as_completed(results):
                result.result()  # an error in any of the files ends the search in the others
                progress(1)
            for number, result in enumerate(results, first):
                offsets, lost = result.result()
                if counts and len(offsets) != counts[number]:
                    raise InputError(
                        f"{files[number]} has {len(offsets):,} records, not {counts[number]:,}: it "
                        f"was truncated or replaced. {fix}"
                    )
                if bad_records:
                    bad_records.add_good(len(offsets))
                    for message, count in lost:
                        bad_records.add_bad(message, count)
                left_out += sum(count for _, count in lost)
                found.append(len(offsets))
                writer.append(**{INDEX: np.stack([np.full_like(offsets, number), offsets], axis=1)})
        at_end()
        writer.facts = {LEFT_OUT: left_out}
    return found


@contextlib.contextmanager
def _set_at_end(stop):
    try:
        yield
    finally:
        stop.set()
