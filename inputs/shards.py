"""Shards: ArrayRecord files in a folder, with a manifest that describes them.

The formats of text and images are in `inputs.text.shards` and `inputs.images.shards`. ArrayRecord
keeps a hash of each record, so damage is found when the record is read.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator

from array_record.python import array_record_module

from inputs.errors import InputError
from inputs.files import atomic_file

MANIFEST = "manifest.json"
SUFFIX = ".arrayrecord"
# One record per chunk, for random access. Uncompressed text reads 2.5 times as fast as with zstd,
# which would save a quarter of the space; images are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"
# The (field, value) that identifies a manifest as one of this program, by the kind of data.
TEXT = ("format", "tf_lamb tokenised text")
IMAGES = ("kind", "images")
UNREADABLE = (RuntimeError, IndexError)  # what ArrayRecord raises for a damaged record


def is_prepared(folder: str) -> bool:
    """Whether the folder holds shards: a manifest of this program, or a damaged one beside shards.

    The file name alone does not decide, because other programs also write a manifest.json.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        return False
    if any(name.endswith(SUFFIX) for name in os.listdir(folder)):
        return True
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and any(manifest.get(k) == v for k, v in (TEXT, IMAGES))


@contextlib.contextmanager
def record_writer(path: str) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that appends a record to an ArrayRecord file.

    The file appears at `path` when the block ends without an error; otherwise it is removed.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(path) as new:
        with _write_errors(path):
            writer = array_record_module.ArrayRecordWriter(new, WRITER_OPTIONS)

        def write(record: bytes) -> None:
            with _write_errors(path):
                writer.write(record)

        try:
            yield write
        finally:
            with _write_errors(path):
                writer.close()


@contextlib.contextmanager
def _write_errors(path):
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
        raise InputError(
            f"--output: {path} cannot be written ({error}). Free some space and run the same "
            "command again: it continues after the last finished shard."
        ) from None


def damaged(path: str, index: int, reason) -> str:
    """Formats the message about a damaged record.

    Args:
        path: the shard.
        index: the record's position in it.
        reason: a string, or the exception that ArrayRecord raised.
    """
    return f"{path}, record {index}: damaged ({str(reason).split(';')[0]})."
