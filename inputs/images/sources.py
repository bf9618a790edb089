"""Sources of labelled images: class folders, and a tar with a CSV.

A source is read in parts, and each part becomes one shard. `tfrecords.py` and `cifar.py` make
sources of TFRecords and of CIFAR-10.
"""

import csv
import dataclasses
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from inputs.errors import InputError
from inputs.files import read_bytes

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif")
IMAGES_PER_PART = 1_000


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
        name: of the shard.
        read: yields the images.
        identity: identifies the images and labels, to recognise the same part again.
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
        classes: by label; None if only the records name them.
        pixels: [height, width, channels] of raw uint8 pixels; None for image files.
    """

    split: str
    parts: list[Part]
    classes: list[Class] | None
    pixels: tuple[int, int, int] | None = None


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
    """Yields (line number, row) of a CSV with a header; `InputError` if a column is missing."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
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
    """Parses a label, in [0, len(classes)); `where` is the file, line and field, for the error."""
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


def tar_source(path: str, split: str, classes_csv: str) -> Source:
    """A tar of image files. A CSV of the same name beside it has the columns file and index.

    Args:
        path: of the tar.
        split: "train" or "validation".
        classes_csv: the class list; "" for classes.csv beside the tar.

    Raises:
        InputError: a file, column or member is missing, or a label is outside the classes.
    """
    table = f"{path.removesuffix('.tar')}.csv"
    classes = read_classes(classes_csv or os.path.join(os.path.dirname(path), "classes.csv"))
    try:
        with tarfile.open(path) as archive:
            members = {member.name for member in archive if member.isfile()}
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"--source: {path} cannot be read as a tar ({error}).") from None
    rows: list[tuple[str, int]] = []
    for line, row in read_csv(table, ("file", "index")):
        label = parse_label(row["index"], classes, f"{table}, line {line}, index")
        if row["file"] not in members:
            raise InputError(f"{table}, line {line}, file: {row['file']!r} is not in {path}.")
        if row.get("wnid", classes[label].wnid) != classes[label].wnid:
            raise InputError(
                f"{table}, line {line}, wnid: {row['wnid']!r}, but class {label} of the class "
                f"list is {classes[label].wnid!r}. The two count their labels differently."
            )
        rows.append((row["file"], label))

    def read(chosen):
        with tarfile.open(path) as archive:
            for name, label in chosen:
                yield Item(f"{path}:{name}", archive.extractfile(name).read(), label)

    return Source(split, _parts(split, rows, read, table), classes)


def folder_source(path: str, split: str, classes_csv: str) -> Source:
    """A folder of class folders of image files, PATH/n01440764/*.JPEG.

    Args:
        path: the folder.
        split: "train" or "validation".
        classes_csv: the class list, which gives the labels; "" to label the class folders in
            alphabetical order.

    Raises:
        InputError: a class folder has no images, or is not in the class list.
    """
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    classes = read_classes(classes_csv) if classes_csv else [Class(name, name) for name in names]
    labels = {one.wnid: label for label, one in enumerate(classes)}
    rows = []
    for name in names:
        folder = os.path.join(path, name)
        if name not in labels:
            raise InputError(f"--source: {folder} is not a class in {classes_csv}.")
        files = sorted(f for f in os.listdir(folder) if f.lower().endswith(SUFFIXES))
        if not files:
            raise InputError(
                f"--source: {folder} has no image, that is, no file that ends in "
                f"{', '.join(SUFFIXES)}. Add images or remove the folder."
            )
        rows += [(os.path.join(folder, file), labels[name]) for file in files]

    def read(chosen):
        for file, label in chosen:
            data = read_bytes(file, flag="--source", fix="Repair or remove it.")
            yield Item(file, data, label)

    return Source(split, _parts(split, rows, read, path), classes)


def _parts(split, rows, read, where) -> list[Part]:
    if not rows:
        raise InputError(f"--source: {where} lists no image.")
    blocks = [rows[i : i + IMAGES_PER_PART] for i in range(0, len(rows), IMAGES_PER_PART)]
    return [
        Part(f"{split}-{index:05d}", lambda block=block: read(block), repr(block))
        for index, block in enumerate(blocks)
    ]
