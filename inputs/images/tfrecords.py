"""ImageNet as TFRecords: the TPU demos' layout and TensorFlow Datasets' one."""

import dataclasses
import glob
import os
import re
from collections.abc import Iterator

import tensorflow as tf
from google.protobuf.message import DecodeError

from inputs.errors import InputError
from inputs.images.sources import Class, Item, Part, Source, read_classes

FILE_NAME = re.compile(r"(?:.*[-_.])?(train|validation|test)(?:\.tfrecord)?-\d{5}-of-(\d{5})")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of an example's features, and the number of the first class."""

    image: str
    label: str
    name: str
    base: int


TPU_DEMO = Layout("image/encoded", "image/class/label", "image/filename", base=1)
TFDS = Layout("image", "label", "file_name", base=0)


def record_files(path: str) -> dict[str, list[str]]:
    """The TFRecord files of a folder, or of its folders train and validation, by split, in order.

    Raises:
        InputError: some of a split's files are missing.
    """
    splits: dict[str, list[str]] = {}
    own = glob.escape(path)
    patterns = (os.path.join(own, folder, "*") for folder in ("", "train", "validation"))
    for file in sorted(file for pattern in patterns for file in glob.glob(pattern)):
        match = FILE_NAME.fullmatch(os.path.basename(file))
        if match:
            splits.setdefault(match[1], []).append(file)
            total = int(match[2])
            if len(splits[match[1]]) > total:
                raise InputError(f"--source: {file} is one more than the {total} it speaks of.")
    for split, files in splits.items():
        total = int(files[0][-5:])
        if len(files) != total:
            raise InputError(
                f"--source: {path} has {len(files)} of the {total} {split} files. Copy the rest."
            )
    return splits


def record_source(path: str, split: str, classes_csv: str, label_base: int | None) -> Source:
    """One split of a folder of TFRecords; a file becomes a shard.

    Args:
        path: the folder.
        split: as the files are called.
        classes_csv: the class list; "" for the one that TensorFlow Datasets keeps beside the
            files, or what the records themselves say.
        label_base: number of the first class; None for the layout's own, 1 in the TPU demos'.
    """
    files = record_files(path)[split]
    listed = os.path.join(path, "label.labels.txt")
    classes = None
    if classes_csv:
        classes = read_classes(classes_csv)
    elif os.path.exists(listed):
        with open(listed, encoding="utf-8") as file:
            classes = [Class(name, name) for name in file.read().splitlines() if name]
    total = len(classes) if classes else None
    parts = [
        Part(
            f"{split}-{number:05d}",
            lambda file=file: read_records(file, label_base, total, classes),
            f"{os.path.basename(file)} {os.path.getsize(file)}",
        )
        for number, file in enumerate(files)
    ]
    return Source("validation" if split == "test" else split, parts, classes)


def read_records(path, label_base=None, total=None, classes=None) -> Iterator[Item]:
    """Yields a TFRecord file's images with labels from 0.

    Raises:
        InputError: a feature is missing, a label is out of range, or the file is damaged.
    """
    number, layout = 0, None
    try:
        for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
            where = f"{path}, record {number}"
            features = _features(record, where)
            layout = layout or _layout(features, path)
            for key in (layout.image, layout.label):
                if key not in features:
                    raise InputError(f"{where}: no {key!r}; {_found(features)}.")
            base = layout.base if label_base is None else label_base
            value = (features[layout.label].int64_list.value or [base - 1])[0]
            _check_label(value, base, total, f"{where}, {layout.label}")
            wnid = _text(features, "image/class/synset")
            if classes and wnid and classes[value - base].wnid != wnid:
                raise InputError(
                    f"{where}, {layout.label}: {value} is {classes[value - base].wnid} by the "
                    f"class list, and image/class/synset says {wnid}. The two count their labels "
                    "differently; give --label_base."
                )
            yield Item(
                f"{where} ({_text(features, layout.name)})",
                (features[layout.image].bytes_list.value or [b""])[0],
                value - base,
                wnid,
                _text(features, "image/class/text"),
            )
            number += 1
    except tf.errors.DataLossError as error:
        raise InputError(
            f"{path}, record {number}: the file is damaged from here on "
            f"({error.message.splitlines()[0]}). Copy it again."
        ) from None


def _features(record, where):
    try:
        return tf.train.Example.FromString(record).features.feature
    except DecodeError:
        raise InputError(f"{where} is no tf.train.Example.") from None


def _layout(features, path) -> Layout:
    for layout in (TPU_DEMO, TFDS):
        if layout.image in features and layout.label in features:
            return layout
    raise InputError(
        f"{path}, record 0 has neither {TPU_DEMO.image!r} and {TPU_DEMO.label!r} nor "
        f"{TFDS.image!r} and {TFDS.label!r}; {_found(features)}."
    )


def _found(features) -> str:
    return "it has " + (", ".join(sorted(map(repr, features))) or "no feature")


def _text(features, key) -> str:
    values = features[key].bytes_list.value if key in features else ()
    return values[0].decode(errors="replace") if values else ""


def _check_label(value, base, total, where):
    last = "" if total is None else f" to {base + total - 1}"
    if value < base or (total is not None and value >= base + total):
        raise InputError(
            f"{where}: {value} is outside the labels {base}{last} of this layout. If all labels "
            f"count from {1 - base} give --label_base={1 - base}; else bases are mixed."
        )
