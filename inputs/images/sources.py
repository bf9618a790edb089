"""Sources of labeled images, and sources that read folders of image files.

A source is read in parts, and each part becomes one shard. `tars.py`, `tfrecords.py` and `cifar.py`
make sources from tars, TFRecords and CIFAR-10.
"""

import csv
import dataclasses
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from inputs.errors import InputError
from inputs.storage.files import PassedOver, file_state, list_folder, open_bytes, read_bytes, walk

# Suffixes of image files, in lower case. TensorFlow decodes the formats of the first line, and
# `conversion.py` converts the others. The format itself is detected from the content.
SUFFIXES = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")
SUFFIXES += (".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".pbm")
IMAGES_PER_PART = 1_000
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
    "testing": "test",
}


class Item(NamedTuple):
    """One image.

    Attributes:
        name: where it comes from, for messages.
        data: bytes of the image file, or raw pixels.
        label: from 0.
        wnid: WordNet id of the class, if the record has it.
        text: name of the class, if the record has it.
    """

    name: str
    data: bytes
    label: int
    wnid: str = ""
    text: str = ""


class Part(NamedTuple):
    """The images of one shard.

    Attributes:
        name: name of the shard, without a suffix.
        read: function without arguments that yields the images.
        identity: names, sizes and modification times of the files, and the labels, to detect that a
            part changed since an earlier run.
    """

    name: str
    read: Callable[[], Iterator[Item]]
    identity: str


class Class(NamedTuple):
    """A class: its WordNet id (or another unique id) and its name."""

    wnid: str
    name: str


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Attributes:
        split: "train" or "validation".
        parts: in order.
        classes: in the order of their labels; None if only the records name them.
        pixels: [height, width, channels] of raw uint8 pixels; None for image files.
        passed_over: files that are not read.
    """

    split: str
    parts: list[Part]
    classes: list[Class] | None
    pixels: tuple[int, int, int] | None = None
    passed_over: PassedOver = dataclasses.field(default_factory=PassedOver)


def read_classes(path: str) -> list[Class]:
    """The classes of a CSV with the columns index (from 0, in order), wnid, name.

    Raises:
        InputError: the file cannot be read, lacks a column, or skips an index.
    """
    classes: list[Class] = []
    for line, row in read_csv(path, ("index", "wnid", "name")):
        if row["index"] != str(len(classes)):
            raise InputError(
                f"{path}, line {line}, index: {row['index']!r} where {len(classes)} is expected. "
                "Number the classes from 0, in order."
            )
        classes.append(Class(row["wnid"], row["name"]))
    if len({one.wnid for one in classes}) != len(classes):
        raise InputError(f"{path}, wnid: a class is listed twice. Remove one of the lines.")
    return classes


def read_csv(path: str, columns) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, row) of a CSV with a header.

    Raises:
        InputError: the file cannot be read, or a column or value is missing.
    """
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in columns if name not in (rows.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} lacks the column {missing[0]!r}. The first line must name the "
                    f"columns; it has {', '.join(rows.fieldnames or ['none'])}."
                )
            for row in rows:
                short = [name for name in columns if row[name] is None]
                if short:
                    raise InputError(f"{path}, line {rows.line_num}: no value for {short[0]}.")
                yield rows.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a UTF-8 CSV ({error}).") from None


def parse_label(text: str, classes, where: str) -> int:
    """Parses a label.

    Args:
        text: the label in decimal digits.
        classes: the class list.
        where: the file, line and field, for the error message.

    Returns:
        The label, in [0, len(classes)).

    Raises:
        InputError: `text` is not such a label.
    """
    if not text.isdecimal() or int(text) >= len(classes):
        raise InputError(
            f"{where}: {text!r} is outside the labels 0 to {len(classes) - 1} of the class list."
        )
    return int(text)


def check_same_classes(one, other, one_name: str, other_name: str) -> None:
    """Raises `InputError` unless two class lists agree; the message names the first difference."""
    one, other = ([tuple(c)[0] for c in classes] for classes in (one, other))
    if one == other:
        return
    pairs = itertools.zip_longest(one, other, fillvalue="nothing")
    label, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise InputError(
        f"{one_name} and {other_name} have different classes: label {label} is {a} in the first "
        f"and {b} in the second. Prepare both with the same --classes."
    )


def check_names(classes: list[Class], where: str) -> None:
    """Raises `InputError` if a class has a name that is not UTF-8, as a class folder may have."""
    for one in classes:
        for name in one:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{where}: the name of the class {name!r} is not UTF-8, so a model could not "
                    "return it. Rename its folder or tar."
                ) from None


def split_of(folder_name: str) -> str:
    """The split that a folder such as Train or val_set is named after, from `SPLITS`; else ""."""
    name = re.sub(r"[-_ ]?(set|images|data)$", "", folder_name.lower())
    return SPLITS.get(name, "")


def is_picture(name: str) -> bool:
    """Whether a file is an image, judging by its name."""
    return name.lower().endswith(SUFFIXES)


def folder_source(path: str, split: str, classes: list[Class] | None) -> Source:
    """A folder of class folders of image files, PATH/n01440764/*.JPEG.

    The images of a class may be in folders below its folder.

    Args:
        path: the folder.
        split: "train" or "validation".
        classes: the class list, which gives the labels; None to label the class folders in
            alphabetical order.

    Raises:
        InputError: a class folder has no images, or is not in the class list; or the folders seem
            to be splits or a single parent folder, with the class folders below them.
    """
    passed_over = PassedOver()
    folders, loose = list_folder(path, "--source", passed_over)
    for entry in loose:
        passed_over.add(entry.name)
    if classes is None:
        _check_depth(path, folders)
    known = classes or [Class(folder.name, folder.name) for folder in folders]
    labels = labels_of(known)
    rows = []
    for folder in folders:
        if folder.name not in labels:
            raise InputError(f"--source: {folder.path} is not a class of the class list.")
        before = len(rows)
        for file in sorted(entry.path for entry in walk(folder.path, "--source", passed_over)):
            if is_picture(file):
                rows.append((file, labels[folder.name]))
            else:
                passed_over.add(file)
        if len(rows) == before:
            raise InputError(
                f"--source: {folder.path} has no image, that is, no file that ends in "
                f"{', '.join(SUFFIXES)}. Add images or remove the folder."
            )
    return file_source(path, split, rows, known, passed_over)


def flat_source(path: str, split: str, wnids: dict[str, str], classes: list[Class]) -> Source:
    """A folder of image files without class folders.

    Args:
        path: the folder.
        split: "train" or "validation".
        wnids: the class of each file, by its name without suffix.
        classes: the class list.

    Raises:
        InputError: a file has no class, or one that is not in the class list.
    """
    labels = labels_of(classes)
    passed_over = PassedOver()
    rows = []
    for file in sorted(entry.path for entry in walk(path, "--source", passed_over)):
        if is_picture(file):
            rows.append((file, label_of(file, wnids, labels)))
        else:
            passed_over.add(file)
    return file_source(path, split, rows, classes, passed_over)


def labels_of(classes: list[Class]) -> dict[str, int]:
    """The label of each class by its WordNet id."""
    return {one.wnid: label for label, one in enumerate(classes)}


def stem(file: str) -> str:
    """The name of a file, without its folder and suffix."""
    return os.path.splitext(os.path.basename(file))[0]


def label_of(file: str, wnids: dict[str, str], labels: dict[str, int]) -> int:
    """The label of a file.

    Args:
        file: path of the file.
        wnids: file name without suffix -> WordNet id of the class.
        labels: WordNet id -> label, from `labels_of`.

    Raises:
        InputError: the file has no class, or one that is not in `labels`.
    """
    wnid = wnids.get(stem(file))
    if wnid not in labels:
        problem = f"its class {wnid} is not in the class list" if wnid else "its label is not known"
        raise InputError(f"--source: {file}: {problem}.")
    return labels[wnid]


def file_source(path, split, rows, classes, passed_over) -> Source:
    """Makes a source of image files; `rows` are (path, label) of files below `path`."""

    def read(chosen):
        for name, label, _ in chosen:
            file = os.path.join(path, name)
            data = read_bytes(file, flag="--source", fix="Repair or remove it.")
            yield Item(file, data, label)

    known = [(os.path.relpath(file, path), label, _state(file)) for file, label in rows]
    return Source(split, make_parts(split, known, read, path), classes, passed_over=passed_over)


def _state(file):
    try:
        return file_state(file)
    except OSError as error:
        raise InputError(
            f"--source: {file} cannot be read ({error.strerror}). Repair or remove it."
        ) from None


def has_picture(folder: str) -> bool:
    """Whether a folder directly contains an image, judging by the file names."""
    return any(is_picture(entry.name) for entry in list_folder(folder, "--source")[1])


def _check_depth(path, folders):
    """Raises `InputError` if `folders` seem to hold class folders instead of being classes."""
    if not folders or any(has_picture(folder.path) for folder in folders):
        return
    below = [{e.name for e in list_folder(folder.path, "--source")[0]} for folder in folders]
    shared = sorted(set.intersection(*below))
    if len(folders) == 1 and shared:
        raise InputError(
            f"--source: {path} has one class folder, {folders[0].name}, whose images are all in "
            f"folders below it ({shared[0]}). Give --source={folders[0].path}."
        )
    if len(shared) > 1:
        raise InputError(
            f"--source: {path} has the folders {', '.join(folder.name for folder in folders)}, "
            f"and each has {' and '.join(shared[:2])} below it. If those below are the classes, "
            f"give one folder at a time, such as --source={folders[0].path} --split=train; "
            "otherwise give the classes with --classes."
        )


def make_parts(split: str, rows: list, read, where: str) -> list[Part]:
    """Splits rows into parts of `IMAGES_PER_PART` images.

    Args:
        split: "train" or "validation".
        rows: one tuple per image, with a `repr` that identifies the image and its label.
        read: function that takes a list of rows and yields their `Item`s.
        where: path of the source, for the error message.

    Raises:
        InputError: there are no rows.
    """
    if not rows:
        raise InputError(f"--source: {where} lists no image.")
    blocks = [rows[i : i + IMAGES_PER_PART] for i in range(0, len(rows), IMAGES_PER_PART)]
    return [
        Part(f"{split}-{index:05d}", lambda block=block: read(block), repr(block))
        for index, block in enumerate(blocks)
    ]
