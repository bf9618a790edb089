"""Arrays in files that a TensorFlow graph reads in parts, on any of TensorFlow's file systems.

A file is a TFRecord file. Each record is a page: `PAGE_BYTES` of the array, fewer in the last one.
As all pages but the last have one size, the place of each is known, and the checksum that
TFRecord keeps of each record finds damage when the page is read.
"""

import os
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from inputs.damage import Damage
from inputs.errors import InputError, first_line
from inputs.shards import FRAME_BYTES, records_op
from inputs.storage.files import atomic_folder, file_size, read_json, write_json

INDEX = "arrays.json"
PAGE_BYTES = 2**14
SPACE_FIX = "Free some space, and run the same command again."
PAGES_PER_BLOCK = 2**10  # read at a time by `blocks`


class PagesWriter:
    """Writes arrays, block by block, into a folder that is created atomically.

    A context manager. Only one process at a time may write a folder.

    Args:
        folder: path; an existing folder is replaced.
        dtypes: name -> NumPy dtype. The name of an array is that of its file.
        columns: name -> C, for arrays of shape [N, C]; the others are [N].
        fix: what to do if the folder cannot be written, for the error message.

    Attributes:
        facts: JSON values to store with the arrays; set them before the end of the block.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(
        self, folder: str, dtypes: dict, columns: dict | None = None, fix: str = SPACE_FIX
    ):
        self._folder = folder
        self._fix = fix
        self._arrays = {
            name: {
                "dtype": np.dtype(dtype).newbyteorder("<").str,
                "columns": (columns or {}).get(name),
                "length": 0,
            }
            for name, dtype in dtypes.items()
        }
        self.facts: dict = {}

    def __enter__(self):
        try:
            self._atomic = atomic_folder(self._folder, last=INDEX)
            self._new = self._atomic.__enter__()
            self._files = {
                name: tf.io.TFRecordWriter(os.path.join(self._new, name)) for name in self._arrays
            }
        except (OSError, tf.errors.OpError) as error:
            raise self._unwritable(error) from None
        self._pending = {name: b"" for name in self._arrays}
        return self

    def append(self, **blocks):
        """Appends values to arrays.

        Args:
            **blocks: name of an array -> [N] or [N, C] values, which are cast to its dtype.

        Raises:
            InputError: the file cannot be written.
        """
        for name, block in blocks.items():
            array = self._arrays[name]
            array["length"] += len(block)
            data = self._pending[name] + np.ascontiguousarray(block, array["dtype"]).tobytes()
            whole = len(data) // PAGE_BYTES * PAGE_BYTES
            for start in range(0, whole, PAGE_BYTES):
                self._write(name, data[start : start + PAGE_BYTES])
            self._pending[name] = data[whole:]

    def _write(self, name, page):
        try:
            self._files[name].write(page)
        except (OSError, tf.errors.OpError) as error:
            raise self._unwritable(error) from None

    def __exit__(self, kind, error, trace):
        try:
            for name, page in self._pending.items() if kind is None else ():
                if page:
                    self._write(name, page)
            for file in self._files.values():
                file.close()
            if kind is None:
                index = {"page_bytes": PAGE_BYTES, "arrays": self._arrays, "facts": self.facts}
                write_json(os.path.join(self._new, INDEX), index)
        except (OSError, tf.errors.OpError) as failure:
            failure = self._unwritable(failure)
            self._atomic.__exit__(type(failure), failure, None)
            raise failure from None
        except InputError as failure:
            self._atomic.__exit__(type(failure), failure, None)
            raise
        return self._atomic.__exit__(kind, error, trace)

    def _unwritable(self, error):
        reason = getattr(error, "strerror", None) or first_line(error)
        return InputError(f"{self._folder} cannot be written: {reason}. {self._fix}")


class Pages:
    """An array in a file.

    Args:
        path: the file.
        dtype: NumPy dtype, as a string.
        length: N, the number of rows.
        columns: C, for an array of shape [N, C]; None for [N].
        page_bytes: size of all pages but the last.

    Attributes:
        path, length, columns: as given.
        bytes: size of the file.
    """

    def __init__(self, path: str, dtype: str, length: int, columns: int | None, page_bytes: int):
        self.path = path
        self.length = length
        self._dtype = np.dtype(dtype)
        self.columns = columns
        self._page = page_bytes
        self._row = self._dtype.itemsize * (columns or 1)
        pages = -(-length * self._row // page_bytes)
        self.bytes = length * self._row + pages * FRAME_BYTES

    def __len__(self):
        return self.length

    def read(self, start, stop, damage: Damage, example, lost):
        """Reads rows in a graph.

        Args:
            start, stop: int64 scalars, the rows [start, stop).
            damage, example, lost: see `Damage.report`; for a page that cannot be read.

        Returns:
            A tuple of the rows, [stop - start] or [stop - start, C], 0 if a page cannot be read;
            and whether all could be read, a bool.
        """
        first = start * self._row // self._page
        last = tf.maximum(stop * self._row - 1, start * self._row) // self._page
        count = tf.where(stop > start, last - first + 1, 0)
        offset = first * (self._page + FRAME_BYTES)
        pages = read_consecutive(self.path, offset, count)
        found = tf.size(pages, tf.int64)
        data = tf.strings.reduce_join(pages)
        whole = tf.strings.length(data) >= tf.cast(stop * self._row - first * self._page, tf.int32)

        def rows():
            skipped = tf.cast(start * self._row - first * self._page, tf.int32)
            size = tf.cast((stop - start) * self._row, tf.int32)
            values = tf.io.decode_raw(tf.strings.substr(data, skipped, size), self._dtype.type)
            return tf.reshape(values, [-1, self.columns]) if self.columns else values

        def none():
            where = (first + tf.minimum(found, count - 1)) * (self._page + FRAME_BYTES)
            with tf.control_dependencies([damage.report(self.path, where, example, lost)]):
                shape = [stop - start, self.columns] if self.columns else [stop - start]
                return tf.zeros(shape, self._dtype.type)

        readable = (found == count) & whole
        return tf.cond(readable, rows, none), readable

    def read_block(self, size: int, block, examples, damage: Damage):
        """Reads rows of one block in a graph, of an array with a row for each example.

        Args:
            size: the number of rows of a block.
            block: int64 scalar.
            examples: [n] int64, rows in [`block` `size`, (`block` + 1) `size`).
            damage: told of a page that cannot be read.

        Returns:
            A tuple of the rows, [n] or [n, C], and whether they could be read, [n] bool.
        """
        first, stop = block * size, tf.minimum((block + 1) * size, self.length)
        rows, readable = self.read(first, stop, damage, first, stop - first)
        return tf.gather(rows, examples - first), tf.fill(tf.shape(examples), readable)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the whole array in parts, in order.

        Raises:
            InputError: a page is damaged.
        """
        found = 0
        records = tf.data.TFRecordDataset(self.path, buffer_size=2**20).batch(PAGES_PER_BLOCK)
        rest = b""
        try:
            for pages in records.as_numpy_iterator():
                data = rest + b"".join(pages)
                whole = len(data) // self._row * self._row
                rest = data[whole:]
                block = np.frombuffer(data[:whole], self._dtype)
                block = block.reshape(-1, self.columns) if self.columns else block
                found += len(block)
                yield block
        except tf.errors.OpError as error:
            raise InputError(f"{self.path} cannot be read: {error.message}") from None
        if found != self.length:
            raise InputError(
                f"{self.path} holds {found:,} values, but {INDEX} beside it says {self.length:,}: "
                "the file was truncated."
            )

    def slices(self, bounds) -> Iterator[np.ndarray]:
        """Yields the rows [start, stop) of each of `bounds`, whose starts and stops ascend.

        Raises:
            InputError: a page is damaged.
        """
        blocks = self.blocks()
        first, held = 0, next(blocks, np.zeros(0, self._dtype))
        for start, stop in bounds:
            parts = [held[start - first :]]
            have = first + len(held)
            while have < stop:
                held = next(blocks)
                first, have = have, have + len(held)
                parts.append(held)
            whole = np.concatenate(parts)
            yield whole[: stop - start]
            first, held = start, whole

    def all(self) -> np.ndarray:
        """The whole array."""
        shape = (0, self.columns) if self.columns else 0
        return np.concatenate([np.zeros(shape, self._dtype), *self.blocks()])


def open_pages(folder: str) -> tuple[dict[str, Pages], dict] | None:
    """Opens the arrays of a folder that `PagesWriter` wrote, without reading them.

    Returns:
        (name -> array, the writer's `facts`); None if the folder is missing, or if the size of a
        file is not as written.
    """
    try:
        index = read_json(os.path.join(folder, INDEX))
        arrays = {
            name: Pages(os.path.join(folder, name), page_bytes=index["page_bytes"], **array)
            for name, array in index["arrays"].items()
        }
        for array in arrays.values():
            if array.bytes != file_size(array.path):
                return None
        return arrays, index["facts"]
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return None


def read_consecutive(path, offset, count):
    """Reads records of a TFRecord file in a graph.

    Args:
        path: string scalar, the file.
        offset: int64 scalar, where the first record begins, in bytes.
        count: int64 scalar, the number of records.

    Returns:
        [M] strings, with M = `count`, or less if a record is damaged or missing.
    """
    # These are the operations of `tf.data`'s methods. A graph has several such readers, and the
    # methods take ten times as long to build them.
    of_strings = {"output_types": [tf.string], "output_shapes": [[]]}
    pages = records_op(path, offset)
    pages = tf.raw_ops.TakeDataset(input_dataset=pages, count=count, **of_strings)
    pages = tf.raw_ops.IgnoreErrorsDataset(input_dataset=pages, **of_strings)
    # A last element is added, because `DatasetToSingleElement` fails on an empty data set.
    last = tf.raw_ops.TensorDataset(components=[tf.constant("")], output_shapes=[[]])
    pages = tf.raw_ops.ConcatenateDataset(input_dataset=pages, another_dataset=last, **of_strings)
    of_strings["output_shapes"] = [[None]]
    batch = tf.raw_ops.BatchDatasetV2(
        input_dataset=pages, batch_size=count + 1, drop_remainder=False, **of_strings
    )
    return tf.raw_ops.DatasetToSingleElement(dataset=batch, **of_strings)[0][:-1]
