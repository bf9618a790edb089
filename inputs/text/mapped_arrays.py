"""Memory-mapped arrays in files, which may be larger than memory and are read on demand."""

import contextlib
import json
import os
import zlib

import numpy as np
import tensorflow as tf

from inputs.errors import InputError
from inputs.files import atomic_folder, write_json

INDEX = "arrays.json"
CHECKSUM_BYTES = 2**26  # read at a time


class ArraysWriter:
    """Writes one-dimensional arrays, block by block, into a folder that is created atomically.

    A context manager. Only one process at a time may write a folder.

    Args:
        folder: path; an existing folder is replaced.
        dtypes: name -> NumPy dtype.

    Attributes:
        facts: JSON values to store with the arrays; set them before the end of the block.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: str, dtypes: dict):
        self._folder = folder
        self._arrays = {name: {"dtype": np.dtype(d).str, "crc32": 0} for name, d in dtypes.items()}
        self._files: dict = {}
        self.facts: dict = {}

    def __enter__(self):
        with self._write_errors(), contextlib.ExitStack() as stack:
            self._new = stack.enter_context(atomic_folder(self._folder))
            for name in self._arrays:
                file = open(os.path.join(self._new, name), "wb")
                self._files[name] = stack.enter_context(file)
            self._stack = stack.pop_all()
        return self

    def append(self, **blocks):
        """Appends values to arrays.

        Args:
            **blocks: name of an array -> [N] values, which are cast to its dtype.

        Raises:
            InputError: the file cannot be written.
        """
        for name, block in blocks.items():
            array = self._arrays[name]
            data = np.ascontiguousarray(block, array["dtype"]).data
            with self._write_errors():
                self._files[name].write(data)
            array["crc32"] = zlib.crc32(data, array["crc32"])

    def __exit__(self, kind, error, trace):
        with self._write_errors():
            if kind is not None:
                return self._stack.__exit__(kind, error, trace)
            with self._stack:
                index = {"arrays": self._arrays, "facts": self.facts}
                write_json(os.path.join(self._new, INDEX), index)

    @contextlib.contextmanager
    def _write_errors(self):
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self._folder} cannot be written: {error.strerror or error}. The tokens are "
                "written there once, to be memory-mapped. Free some space, or give another folder "
                "with --cache_dir."
            ) from None


def open_arrays(folder: str) -> tuple[dict[str, np.ndarray], dict] | None:
    """Maps the arrays of a folder into memory.

    Every byte is read once and its checksum compared. This finds damage before training, and
    brings the files into the page cache for random access.

    Returns:
        (name -> array, the writer's `facts`); None if the folder is missing or damaged.
    """
    try:
        with open(os.path.join(folder, INDEX), encoding="utf-8") as file:
            index = json.load(file)
        arrays = {}
        for name, array in index["arrays"].items():
            # Writable but private, because TensorFlow does not accept read-only memory.
            mapped = np.memmap(os.path.join(folder, name), array["dtype"], "c")
            if _crc32(mapped) != array["crc32"]:
                return None
            arrays[name] = mapped
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return arrays, index["facts"]


def _crc32(array: np.ndarray) -> int:
    bytes_ = array.view(np.uint8)
    value = 0
    for start in range(0, len(bytes_), CHECKSUM_BYTES):
        value = zlib.crc32(bytes_[start : start + CHECKSUM_BYTES], value)
    return value


def as_tensor(array: np.ndarray) -> tf.Tensor:
    """The array as a tensor on the host; a memory-mapped one is not copied."""
    if isinstance(array, np.memmap):
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    with tf.device("/cpu:0"):
        return tf.constant(array)


def dataset_options(array: np.ndarray) -> tf.data.Options:
    """The options of a data set whose functions read the array's tensor."""
    options = tf.data.Options()
    # tf.data's graph optimizations would copy a memory-mapped tensor into the graph.
    options.experimental_optimization.apply_default_optimizations = not isinstance(array, np.memmap)
    return options
