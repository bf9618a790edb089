"""An index of TFRecord files: where each record begins."""

import os
from collections.abc import Callable

import numpy as np

from inputs.errors import InputError
from inputs.pages import PagesWriter
from inputs.shards import record_offsets

INDEX = "index"  # folder, and name of the array in it
LEFT_OUT = "left_out"  # fact of the array: the number of records whose length is damaged


def write_index(
    folder: str,
    files: list[str],
    counts: list[int] | None = None,
    progress: Callable[[int], object] = lambda files: None,
    *,
    fix: str,
    on_damage: Callable[[str], object] | None = None,
) -> list[int]:
    """Writes where each record of the files begins, into FOLDER/index; reads lengths only.

    Args:
        folder: a folder.
        files: paths of TFRecord files, which are not compressed.
        counts: the number of records that each file must have.
        progress: called with 1 after each file.
        fix, on_damage: see `inputs.shards.record_offsets`.

    Returns:
        The number of records of each file.

    Raises:
        InputError: a file cannot be read, or is damaged.
    """
    found = []
    lost = []

    def leave_out(message):
        lost.append(message)
        on_damage(message)

    with PagesWriter(os.path.join(folder, INDEX), {INDEX: np.int64}, {INDEX: 2}) as writer:
        for number, path in enumerate(files):
            offsets = record_offsets(path, fix, on_damage and leave_out)
            if counts and len(offsets) != counts[number]:
                raise InputError(
                    f"{path} has {len(offsets):,} records, not {counts[number]:,}: it was "
                    f"truncated or replaced. {fix}"
                )
            found.append(len(offsets))
            progress(1)
            writer.append(**{INDEX: np.stack([np.full_like(offsets, number), offsets], axis=1)})
        writer.facts = {LEFT_OUT: len(lost)}
    return found
