"""An index of TFRecord files: where each record begins."""

import os
from collections.abc import Callable

import numpy as np

from inputs.errors import InputError
from inputs.pages import PagesWriter
from inputs.shards import record_offsets

INDEX = "index"  # folder, and name of the array in it


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
    with PagesWriter(os.path.join(folder, INDEX), {INDEX: np.int64}, {INDEX: 2}) as writer:
        for number, path in enumerate(files):
            offsets = record_offsets(path, fix, on_damage)
            if counts and len(offsets) != counts[number]:
                raise InputError(
                    f"{path} has {len(offsets):,} records, not {counts[number]:,}: it was "
                    f"truncated or replaced. {fix}"
                )
            found.append(len(offsets))
            progress(1)
            writer.append(**{INDEX: np.stack([np.full_like(offsets, number), offsets], axis=1)})
    return found
