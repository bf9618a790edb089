"""Reads ImageNet from TFRecords, in the layout of the TPU demos or of TensorFlow Datasets.

The files may be compressed with gzip or zlib.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator

import tensorflow as tf
from google.protobuf.message import DecodeError

from inputs import shards
from inputs.errors import InputError, first_line
from inputs.images.conversion import check_image
from inputs.images.sources import SPLITS, Class, Item, Part, Source, read_classes, split_of
from inputs.storage.files import (
    PassedOver,
    exists,
    file_size,
    file_state,
    list_folder,
    read_bytes,
)

FILE_NAME = re.compile(
    r"(?:.*[-_.])?(train|val|validation|test)(?:\.tfrecords?)?-(\d{5})-of-(\d{5})"
    r"(?:\.tfrecords?)?(?:\.gz)?"
)
NUMBER = re.compile(r"-\d{5}-of-\d{5}")  # of a file
LABELS = "label.labels.txt"  # the class list of TensorFlow Datasets
VERSION = re.compile(r"\d+\.\d+\.\d+")  # a folder of TensorFlow Datasets
COMPRESSIONS = ("", "GZIP", "ZLIB")  # of `tf.data.TFRecordDataset`


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of the features in a layout of TFRecords.

    Attributes:
        image: name of the feature with the image file.
        label: name of the feature with the label.
        name: name of the feature with the file name.
        base: label of the first class.
    """

    image: str
    label: str
    name: str
    base: int


TPU_DEMO = Layout("image/encoded", "image/class/label", "image/filename", base=1)
TFDS = Layout("image", "label", "file_name", base=0)


def version_folder(path: str) -> str:
    """The folder of a data set's only version of TensorFlow Datasets, or else `path` itself.

    Raises:
        InputError: there are several versions.
    """
    folders, files = list_folder(path, "--source")
    if any(FILE_NAME.fullmatch(file.name) for file in files):
        return path
    versions = [
        folder.path
        for folder in folders
        if VERSION.fullmatch(folder.name) and record_files(folder.path)
    ]
    if len(versions) > 1:
        raise InputError(
            f"--source: {path} has {len(versions)} versions of a data set. Give the folder of one: "
            f"{', '.join(versions)}."
        )
    return versions[0] if versions else path


def labeled_splits(path: str, log: Callable[[str], object]) -> dict[str, list[str]]:
    """`record_files`, without a test split beside one of validation.

    Args:
        path: the folder.
        log: receives lines about what is read and what is passed over.
    """
    passed_over = PassedOver()
    splits = record_files(path, passed_over)
    if "validation" in splits and splits.pop("test", None):  # that of ImageNet has no labels
        log(f"{path}: the test split is passed over, as there is a validation split")
    if splits:
        rest = passed_over.describe()
        count = sum(map(len, splits.values()))
        log(f"{path}: {count:,} file{'s' * (count != 1)} to read{rest and f'; {rest}'}")
    return splits


def record_files(path: str, passed_over: PassedOver | None = None) -> dict[str, list[str]]:
    """The TFRecord files in a folder and in its folders of splits, as split -> paths.

    Args:
        path: the folder.
        passed_over: counts the other files, except a class list of TensorFlow Datasets.

    Raises:
        InputError: some of a split's files are missing, or one exists twice.
    """
    folders, files = list_folder(path, "--source", passed_over)
    for folder in folders:
        if split_of(folder.name):
            files += list_folder(folder.path, "--source", passed_over)[1]
    splits: dict[str, dict[int, str]] = {}
    totals: dict[str, int] = {}
    for file in files:
        match = FILE_NAME.fullmatch(file.name)
        if match:
            split = SPLITS[match[1]]
            found = splits.setdefault(split, {})
            total = totals.setdefault(split, int(match[3]))
            other = found.setdefault(int(match[2]), file.path)
            if total != int(match[3]) or other != file.path:
                raise InputError(
                    f"--source: {file.path} and {other} belong to two copies of the {split} split. "
                    "Remove one of the copies."
                )
        elif passed_over is not None and file.name != LABELS:
            passed_over.add(NUMBER.sub("", file.name))  # a thousand files are of one kind
    for split, found in splits.items():
        if len(found) != totals[split]:
            raise InputError(
                f"--source: {path} has {len(found)} of the {totals[split]} {split} files. Copy the "
                "others."
            )
    return {split: [found[i] for i in sorted(found)] for split, found in splits.items()}


def record_sources(
    path: str,
    splits: dict[str, list[str]],
    classes_csv: str,
    label_base: int | None,
    log: Callable[[str], object],
) -> list[Source]:
    """The splits of a folder of TFRecords; each file becomes a shard.

    Args:
        path: the folder.
        splits: from `labeled_splits`.
        classes_csv: the class list; "" for label.labels.txt of TensorFlow Datasets, or else for
            the classes that the records name.
        label_base: label of the first class; None to infer it from the records.
        log: receives a line about what was inferred.

    Raises:
        InputError: the class list cannot be read.
    """
    classes = listed_classes(path, classes_csv)
    if label_base is None:
        files = [file for split in splits.values() for file in split]
        label_base = find_label_base(files, len(classes) if classes else None, log)
    return [
        Source(
            "validation" if split == "test" else split,
            [
                Part(
                    f"{split}-{index:05d}",
                    lambda file=file: read_records(file, label_base, classes),
                    repr((os.path.basename(file), file_state(file))),
                )
                for index, file in enumerate(files)
            ],
            classes,
        )
        for split, files in splits.items()
    ]


def listed_classes(path: str, classes_csv: str) -> list[Class] | None:
    """The classes of a CSV, or else of label.labels.txt in a folder; None if there is neither.

    Raises:
        InputError: the CSV cannot be read, or label.labels.txt is not UTF-8.
    """
    if classes_csv:
        return read_classes(classes_csv)
    listed = os.path.join(path, LABELS)
    if not exists(listed):
        return None
    try:
        names = read_bytes(listed, flag="--source").decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"--source: {listed} is not UTF-8 ({error}). Convert it.") from None
    return [Class(name, name) for name in names if name]


def layout_of(path: str) -> Layout:
    """The layout of a file's records, by the first that can be read; the file is not empty.

    Raises:
        InputError: no record can be read, or the file has another layout.
        OSError: the file cannot be read.
    """
    where, record = f"{path}, record 0", None
    with contextlib.suppress(tf.errors.DataLossError):
        record = _first(path, _compression(path))  # alone, as others are read many at a time
    if record is None:
        readable = (found for found in _records(path) if found[1] is not None)
        where, record = next(readable, (where, None))
    if record is None:
        raise InputError(f"{path}: no record can be read. Copy it again.")
    return _layout(_features(record, where), where)


def find_label_base(
    files: list[str], num_classes: int | None, log: Callable[[str], object]
) -> int | None:
    """Infers the label of the first class in records with the layout of TensorFlow Datasets.

    TensorFlow Datasets counts labels from 0, but other programs write the same layout with labels
    from 1. Labels are read until one is 0 or `num_classes`. If there is neither, labels count from
    1 if `num_classes` is not known and the lowest label is 1, otherwise from 0.

    Args:
        files: paths of all splits, because a small split may lack a class.
        num_classes: None if not known.
        log: receives a line if the labels count from 1.

    Returns:
        0, 1, or None for another layout or damaged records.
    """
    lowest = None
    for file in files:
        try:
            for _, record in _records(file):
                if record is None:
                    continue
                features = tf.train.Example.FromString(record).features.feature
                if TFDS.label not in features or TFDS.image not in features:
                    return None
                for label in features[TFDS.label].int64_list.value:
                    lowest = label if lowest is None else min(label, lowest)
                    if label == num_classes:
                        log(f"Labels count from 1: {file} has {label}, of {num_classes} classes")
                        return 1
                    if label <= 0:
                        return 0
        except (InputError, DecodeError):
            return None  # reading reports the damage
    if lowest == 1 and num_classes is None:
        log(
            "Labels count from 1: no record has the label 0. If class 0 is only missing, give "
            "--label_base=0"
        )
        return 1
    return 0


def _compression(path: str) -> str:
    """How a file is compressed, whatever its name; "" also if its first record is damaged."""
    for compression in COMPRESSIONS:
        with contextlib.suppress(tf.errors.DataLossError):
            _first(path, compression)
            return compression
    return ""


def _first(path, compression):
    """The first record of a file; None if it has none."""
    return next(shards.elements(path, tf.data.TFRecordDataset(path, compression)), None)


def _records(path: str) -> Iterator[tuple[str, bytes | None]]:
    """Yields (place for messages, record, or None if it is damaged) of a file, compressed or not.

    Raises:
        InputError: the file is damaged from some place on.
        OSError: the file cannot be read.
    """
    index = 0
    if compression := _compression(path):
        try:
            for record in shards.elements(path, tf.data.TFRecordDataset(path, compression)):
                yield f"{path}, record {index}", record
                index += 1
        except tf.errors.DataLossError as error:
            raise _damaged_from(path, index, first_line(error)) from None
        return
    end: int | None = 0  # of the last record
    readable = 0
    for offset, record, end in shards.record_spans(path):
        if end is None:
            break
        where = f"{path}, record {index}"
        if record is None:
            yield f"{where}, byte {offset}", None
        else:
            yield where, record
            readable += 1
        index += 1
    size = file_size(path)
    if size and not readable:
        raise _damaged_from(path, 0, "no record can be read")
    if end is None:
        raise _damaged_from(path, index, f"no record is found after byte {offset}")
    if end < size:
        raise _damaged_from(path, index, f"it ends {size - end:,} bytes after the record's start")


def _damaged_from(path, index, reason) -> InputError:
    return InputError(
        f"{path}, record {index}: the file is damaged from here on ({reason}). Copy it again."
    )


def read_records(path, label_base=None, classes=None) -> Iterator[Item]:
    """Yields the images of a TFRecord file, with labels from 0; without data for a damaged record.

    Args:
        path: the file.
        label_base: label of the first class; None for the layout's own.
        classes: the class list; None if not known.

    Raises:
        InputError: a feature is missing or has several values, a label is out of range, or the file
            is damaged such that the records after that place are lost.
    """
    layout = None
    for where, record in _records(path):
        if record is None:
            yield Item(f"{where}: damaged", b"", 0)
            continue
        features = _features(record, where)
        layout = layout or _layout(features, where)
        yield _item(features, where, layout, label_base, classes)


def check_record(path, offset, layout, label_base, classes) -> str:
    """Checks the features, the label and the image of a record, unless it is damaged.

    Args:
        path: the file, which is not compressed.
        offset: where the record begins in it, in bytes.
        layout: of the file's records.
        label_base: label of the first class.
        classes: the class list.

    Returns:
        "", or a sentence about an image that TensorFlow does not decode as it is.

    Raises:
        InputError: a feature is missing or has several values, or the label contradicts the class
            list.
        OSError: the file cannot be read.
    """
    record = shards.read_record(path, offset)
    if record is None:
        return ""
    where = f"{path}, byte {offset}"
    item = _item(_features(record, where), where, layout, label_base, classes)
    *_, kind, error = check_image(item.data)
    if kind:
        error = f"a {kind} that `python -m inputs.images.prepare` converts"
    return error and f"{where}: the image cannot be decoded ({error})."


def _item(features, where, layout, label_base, classes) -> Item:
    for key in (layout.image, layout.label):
        if key not in features:
            raise InputError(f"{where}: no {key!r}; {_found(features)}.")
    base = layout.base if label_base is None else label_base
    image = _only_value(features, layout.image, "bytes_list", where)
    value = _only_value(features, layout.label, "int64_list", where)
    _check_label(value, base, len(classes) if classes else None, f"{where}, {layout.label}")
    wnid = _text(features, "image/class/synset")
    if classes and wnid and classes[value - base].wnid != wnid:
        raise InputError(
            f"{where}, {layout.label}: {value} is {classes[value - base].wnid} in the class list, "
            f"but image/class/synset is {wnid}. The two count their labels differently; give "
            "--label_base."
        )
    return Item(
        f"{where} ({_text(features, layout.name)})",
        image,
        value - base,
        wnid,
        _text(features, "image/class/text"),
    )


def _only_value(features, key, kind, where):
    """The value of a feature that must have exactly one, of the given kind."""
    found = features[key].WhichOneof("kind") or kind
    if found != kind:
        raise InputError(
            f"{where}: {key} is of the type {found}, not {kind}. Write the records again."
        )
    values = getattr(features[key], kind).value
    if len(values) != 1:
        raise InputError(
            f"{where}: {key} has {len(values):,} values; one is needed. Write the records again."
        )
    return values[0]


def _features(record, where):
    try:
        return tf.train.Example.FromString(record).features.feature
    except DecodeError:
        raise InputError(f"{where} is not a tf.train.Example.") from None


def _layout(features, where) -> Layout:
    for layout in (TPU_DEMO, TFDS):
        if layout.image in features and layout.label in features:
            return layout
    raise InputError(
        f"{where} has neither {TPU_DEMO.image!r} and {TPU_DEMO.label!r} nor "
        f"{TFDS.image!r} and {TFDS.label!r}; {_found(features)}."
    )


def _found(features) -> str:
    return "it has " + (", ".join(sorted(map(repr, features))) or "no feature")


def _text(features, key) -> str:
    values = features[key].bytes_list.value if key in features else ()
    return values[0].decode(errors="replace") if values else ""


def _check_label(value, base, num_classes, where):
    last = "" if num_classes is None else f" to {base + num_classes - 1}"
    if value < base or (num_classes is not None and value >= base + num_classes):
        other = 1 - base
        fix = f"The records mix label bases{last and ', or the class list lacks classes'}."
        if value >= other and (num_classes is None or value < other + num_classes):
            fix = (
                f"If all labels count from {other}, give --label_base={other}; otherwise "
                f"{fix[0].lower()}{fix[1:]}"
            )
        elif value < 0:
            fix = "A label below 0 often means that there is none. Leave such records out."
        raise InputError(
            f"{where}: {value} is outside the labels {base}{last} of this layout. {fix}"
        )
