"""Reads CIFAR-10 as raw pixels, from its published archives or from PNG strips.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import io
import os
import pickle
import tarfile
import zipfile
import zlib

import numpy as np

from inputs.errors import InputError
from inputs.images.sources import Class, Item, Part, Source
from inputs.storage.files import file_state, is_file, is_folder, list_names, open_bytes, read_file

SHAPE = (32, 32, 3)
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CLASSES = [Class(name, name) for name in NAMES]
BINARY_ROW = 1 + 3 * 32 * 32
PYTHON = {
    "train": [f"data_batch_{i}" for i in range(1, 6)],
    "validation": ["test_batch"],
}
BINARY = {split: [f"{name}.bin" for name in names] for split, names in PYTHON.items()}
STRIPS = {"train": [f"train-{i}.png" for i in range(5)], "validation": ["test.png"]}
LABELS = "labels.npz"  # of the strips
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
# Exceptions for a damaged file or archive, and for a file with other content.
DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError)
NOT_CIFAR = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    pickle.UnpicklingError,
)


def is_cifar(path: str) -> bool:
    """Whether a path is an archive of CIFAR-10, an unpacked one, or a folder of PNG strips.

    A folder may lack some of the files. PNG strips are recognized by the file of their labels,
    because test.png may be any picture.
    """
    if os.path.basename(path) in ARCHIVES:
        return True
    names = set(list_names(path)) if is_folder(path) else set()
    are_strips = LABELS in names and names & _names_of(STRIPS)
    return bool(are_strips or names & (_names_of(PYTHON) | _names_of(BINARY)))


def _names_of(form) -> set[str]:
    return {name for names in form.values() for name in names}


def cifar_source(path: str, split: str, flag: str = "--source") -> Source:
    """One split of CIFAR-10, with one part per file.

    Args:
        path: cifar-10-python.tar.gz, cifar-10-binary.tar.gz, the folder of an unpacked archive, or
            a folder of PNG strips: train-0.png to train-4.png and test.png (each with 10,000 images
            of 32x32 pixels in one column), and labels.npz with `y_train` and `y_test`.
        split: "train" or "validation".
        flag: the flag that named the path, for error messages.

    Raises:
        InputError: a file is missing, has other content than its name says, or has a label above 9.
            All but the first are raised when a part is read.
    """
    formats = ((PYTHON, _read_python), (BINARY, _read_binary), (STRIPS, _read_strip))
    members = _members(path, flag)
    # The format with the most files present, in both splits.
    names, read = max(formats, key=lambda form: len(members.keys() & _names_of(form[0])))
    files = names[split]
    needed = [*files, LABELS] if read is _read_strip else files
    missing = [name for name in needed if name not in members]
    if missing:
        raise InputError(f"{flag}: {path} lacks the file {missing[0]} of CIFAR-10.")

    def items(name, index):
        where = f"{path}:{name}" if is_file(path) else os.path.join(path, name)
        try:
            pixels, labels = read(path, members[name], index)
            images = np.asarray(pixels, np.uint8).reshape(-1, *SHAPE)
        except (*DAMAGE, *NOT_CIFAR) as error:
            raise InputError(
                f"{flag}: {where} is not CIFAR-10, although its name says so ({error})."
            ) from None
        if len(labels) != len(images):
            raise InputError(f"{flag}: {where} has {len(images)} images and {len(labels)} labels.")
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            if not 0 <= label < len(CLASSES):
                raise InputError(
                    f"{flag}: {where}, label of image {i}: {label} is outside the labels 0 to 9."
                )
            yield Item(f"{where}[{i}]", image.tobytes(), int(label))

    def state(name):
        used = [path] if is_file(path) else [os.path.join(path, name)]
        if read is _read_strip:
            used.append(os.path.join(path, LABELS))
        return repr((name, [file_state(file) for file in used]))

    parts = [
        Part(f"{split}-{index:05d}", lambda name=name, index=index: items(name, index), state(name))
        for index, name in enumerate(files)
    ]
    return Source(split, parts, CLASSES, SHAPE)


def _members(path, flag) -> dict[str, str]:
    """Base name -> name in the archive or folder."""
    if is_folder(path):
        return {name: name for name in list_names(path)}
    try:
        with open_bytes(path) as file, tarfile.open(fileobj=file) as archive:
            return {os.path.basename(name): name for name in archive.getnames()}
    except DAMAGE as error:
        raise InputError(f"{flag}: {path} cannot be read as a tar ({error}).") from None


def _content(path, name) -> bytes:
    if is_folder(path):
        return read_file(os.path.join(path, name))
    with open_bytes(path) as file, tarfile.open(fileobj=file) as archive:
        return archive.extractfile(name).read()


class _ArraysOnly(pickle.Unpickler):
    """Unpickles only NumPy arrays, because a pickle may run arbitrary code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        """The classes and functions that NumPy arrays need."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return self.ALLOWED[module, name]


def _read_python(path, name, index):
    del index
    batch = _ArraysOnly(io.BytesIO(_content(path, name)), encoding="bytes").load()
    return _channels_last(batch[b"data"]), batch[b"labels"]


def _read_binary(path, name, index):
    del index
    rows = np.frombuffer(_content(path, name), np.uint8).reshape(-1, BINARY_ROW)
    return _channels_last(rows[:, 1:]), rows[:, 0]


def _read_strip(path, name, index):
    import tensorflow as tf  # the archives are read without it: see experiments/datasets.py

    try:
        strip = tf.io.decode_png(_content(path, name), channels=3).numpy()
    except tf.errors.OpError as error:
        raise ValueError(error.message) from None
    with np.load(io.BytesIO(_content(path, LABELS))) as arrays:
        labels = arrays["y_test" if name == STRIPS["validation"][0] else "y_train"]
    size = len(strip) // SHAPE[0]
    return strip, labels[index * size : (index + 1) * size]


def _channels_last(rows):
    return np.asarray(rows).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
