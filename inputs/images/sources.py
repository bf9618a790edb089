"""Labelled images as they are handed around: class folders, a tar with a CSV, and their kin.

A source is read in parts, each of which becomes one shard; `record_images.py` reads TFRecords,
`cifar.py` CIFAR-10.
"""

import csv
import dataclasses
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from inputs.errors import InputError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif")
IMAGES_PER_PART = 1_000


class Item(NamedTuple):
    """One image: where it came from, its file's bytes (or raw pixels), its label from 0."""

    name: str
    data: bytes
    label: int
    wnid: str = ""  # if the record itself says it
    text: str = ""


class Part(NamedTuple):
    """What becomes one shard; `holds` tells it from one of other images or labels."""

    name: str
    read: Callable[[], Iterator[Item]]
    holds: str


class Class(NamedTuple):
    """A class by its WordNet id, or what stands for one, and its name."""

    wnid: str
    name: str


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Attributes:
        split: "train" or "validation".
        parts: in order.
        classes: by label; None if only the records tell.
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
                f"{path}, line {line}, index: {row['index']!r} where {len(classes)} is next. "
                "Number the classes from 0, in order."
            )
        classes.append(Class(row["wnid"], row["name"]))
    if len({one.wnid for one in classes}) != len(classes):
        raise InputError(f"{path}, wnid: a class stands there twice. Take one line out.")
    return classes


def read_csv(path: str, columns) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, row) of a CSV with a header; `InputError` if a column is missing."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in columns if name not in (rows.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} lacks the column {missing[0]!r}; it has "
                    f"{', '.join(rows.fieldnames or ['none'])}. The first line names the columns."
                )
            for row in rows:
                short = [name for name in columns if row[name] is None]
                if short:
                    raise InputError(f"{path}, line {rows.line_num}: no value for {short[0]}.")
                yield rows.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a UTF-8 CSV ({error}).") from None


def label_in(classes, text: str, where: str) -> int:
    """`text` as a label of one of `classes`, from 0; `where` is file, line and field."""
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
        f"{one_name} and {other_name} differ in their classes: label {label} is {a} in the first "
        f"and {b} in the second. Prepare both with the same --classes."
    )


def tar_source(path: str, split: str, classes_csv: str) -> Source:
    """A tar of image files; a CSV of the same name beside it has the columns file and index.

    The classes stand in `classes_csv`, or in classes.csv beside it.

    Raises:
        InputError: a file, column or member is missing, or a label outside the classes.
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
        label = label_in(classes, row["index"], f"{table}, line {line}, index")
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

    A class's label is its folder's place in the alphabet, or its line in `classes_csv`.

    Raises:
        InputError: a class folder without images, or that is not in the class list.
    """
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    classes = read_classes(classes_csv) if classes_csv else [Class(name, name) for name in names]
    labels = {one.wnid: label for label, one in enumerate(classes)}
    rows = []
    for name in names:
        folder = os.path.join(path, name)
        if name not in labels:
            raise InputError(f"--source: {folder} is a class that {classes_csv} does not list.")
        files = sorted(f for f in os.listdir(folder) if f.lower().endswith(SUFFIXES))
        if not files:
            raise InputError(
                f"--source: {folder} holds no image, no file that ends in {', '.join(SUFFIXES)}. "
                "Fill it or take it away."
            )
        rows += [(os.path.join(folder, file), labels[name]) for file in files]

    def read(chosen):
        for file, label in chosen:
            try:
                with open(file, "rb") as opened:
                    data = opened.read()
            except OSError as error:
                raise InputError(
                    f"--source: {file} cannot be read ({error.strerror}). Mend it or take it away."
                ) from None
            yield Item(file, data, label)

    return Source(split, _parts(split, rows, read, path), classes)


def _parts(split, rows, read, where) -> list[Part]:
    if not rows:
        raise InputError(f"--source: {where} names no image.")
    blocks = [rows[i : i + IMAGES_PER_PART] for i in range(0, len(rows), IMAGES_PER_PART)]
    return [
        Part(f"{split}-{number:05d}", lambda block=block: read(block), repr(block))
        for number, block in enumerate(blocks)
    ]
