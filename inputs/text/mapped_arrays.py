"""Arrays in files that are mapped into memory: as large as the disk, read where they are needed."""

import json
import os
import shutil
import zlib

import numpy as np
import tensorflow as tf

from inputs.errors import InputError

INDEX = "arrays.json"
CHECKED_BYTES = 2**26  # at a time


class ArraysWriter:
    """Writes one-dimensional arrays block by block into a folder that appears whole or not at all.

    A context manager. One process at a time may write a folder.

    Args:
        folder: path; one that is there is replaced.
        dtypes: name -> NumPy dtype.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: str, dtypes: dict):
        self._folder, self._new = folder, f"{folder}.new"
        self._arrays = {name: {"dtype": np.dtype(d).str, "crc32": 0} for name, d in dtypes.items()}
        self.facts: dict = {}
        self._files: dict = {}

    def __enter__(self):
        try:
            shutil.rmtree(self._new, ignore_errors=True)
            os.makedirs(self._new)
            for name in self._arrays:
                self._files[name] = open(os.path.join(self._new, name), "wb")
        except OSError as error:
            raise self._failed(error) from None
        return self

    def append(self, **blocks):
        """Appends to each of the named arrays."""
        for name, block in blocks.items():
            array = self._arrays[name]
            data = np.ascontiguousarray(block, array["dtype"]).data
            try:
                self._files[name].write(data)
            except OSError as error:
                raise self._failed(error) from None
            array["crc32"] = zlib.crc32(data, array["crc32"])

    def __exit__(self, kind, error, trace):
        try:
            for file in self._files.values():
                file.close()
            if kind is None:
                index = {"arrays": self._arrays, "facts": self.facts}
                with open(os.path.join(self._new, INDEX), "w", encoding="utf-8") as file:
                    json.dump(index, file)
                shutil.rmtree(self._folder, ignore_errors=True)
                os.rename(self._new, self._folder)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            shutil.rmtree(self._new, ignore_errors=True)

    def _failed(self, error):
        return InputError(
            f"{self._folder} cannot be written: {error.strerror or error}. The text is laid out "
            "there to be mapped into memory; make room, or copy the folder where you may write."
        )


def open_arrays(folder: str) -> tuple[dict[str, np.ndarray], dict] | None:
    """(name -> array mapped from its file, the writer's facts); None if there are none, or damaged.

    Every byte is read once and held against its checksum: that finds damage before it is trained
    on, and leaves in the page cache what random access will want.
    """
    try:
        with open(os.path.join(folder, INDEX), encoding="utf-8") as file:
            index = json.load(file)
        arrays = {}
        for name, array in index["arrays"].items():
            # Mapped for writing but private: TensorFlow takes no memory that is read-only.
            mapped = np.memmap(os.path.join(folder, name), array["dtype"], "c")
            if _crc32(mapped) != array["crc32"]:
                return None
            arrays[name] = mapped
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return arrays, index["facts"]


def _crc32(array: np.ndarray) -> int:
    bytes_, value = array.view(np.uint8), 0
    for start in range(0, len(bytes_), CHECKED_BYTES):
        value = zlib.crc32(bytes_[start : start + CHECKED_BYTES], value)
    return value


def as_tensor(array: np.ndarray) -> tf.Tensor:
    """The array as a tensor on the host; one that is mapped stays in its file, uncopied."""
    if isinstance(array, np.memmap):
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    with tf.device("/cpu:0"):
        return tf.constant(array)


def options(array: np.ndarray) -> tf.data.Options:
    """For a data set whose functions read the array's tensor."""
    chosen = tf.data.Options()
    # To rewrite its graph tf.data would copy into it, and into memory, all that is mapped.
    chosen.experimental_optimization.apply_default_optimizations = not isinstance(array, np.memmap)
    return chosen
