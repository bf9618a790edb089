"""Reads ImageNet from TFRecords, in the layout of the TPU demos or of TensorFlow Datasets."""

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
    """Features of an example.

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


def record_files(path: str) -> dict[str, list[str]]:
    """The TFRecord files of a folder and of its folders train and validation: split -> paths.

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
                raise InputError(f"--source: {file}: its split has more than {total} files.")
    for split, files in splits.items():
        total = int(files[0][-5:])
        if len(files) != total:
            raise InputError(
                f"--source: {path} has {len(files)} of the {total} {split} files. Copy the others."
            )
    return splits


def record_source(path: str, split: str, classes_csv: str, label_base: int | None) -> Source:
    """One split of a folder of TFRecords; each file becomes a shard.

    Args:
        path: the folder.
        split: as in the file names.
        classes_csv: the class list; "" for label.labels.txt of TensorFlow Datasets, or else for
            the classes that the records name.
        label_base: label of the first class; None for the layout's own.
    """
    files = record_files(path)[split]
    listed = os.path.join(path, "label.labels.txt")
    classes = None
    if classes_csv:
        classes = read_classes(classes_csv)
    elif os.path.exists(listed):
        with open(listed, encoding="utf-8") as file:
            classes = [Class(name, name) for name in file.read().splitlines() if name]
    num_classes = len(classes) if classes else None
    parts = [
        Part(
            f"{split}-{index:05d}",
            lambda file=file: read_records(file, label_base, num_classes, classes),
            f"{os.path.basename(file)} {os.path.getsize(file)}",
        )
        for index, file in enumerate(files)
    ]
    return Source("validation" if split == "test" else split, parts, classes)


def read_records(path, label_base=None, num_classes=None, classes=None) -> Iterator[Item]:
    """Yields the images of a TFRecord file, with labels from 0.

    Args:
        path: the file.
        label_base: label of the first class; None for the layout's own.
        num_classes: None if not known.
        classes: the class list; None if not known.

    Raises:
        InputError: a feature is missing, a label is out of range, or the file is damaged.
    """
    index = 0
    layout = None
    try:
        for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
            where = f"{path}, record {index}"
            features = _features(record, where)
            layout = layout or _layout(features, path)
            for key in (layout.image, layout.label):
                if key not in features:
                    raise InputError(f"{where}: no {key!r}; {_found(features)}.")
            base = layout.base if label_base is None else label_base
            value = (features[layout.label].int64_list.value or [base - 1])[0]
            _check_label(value, base, num_classes, f"{where}, {layout.label}")
            wnid = _text(features, "image/class/synset")
            if classes and wnid and classes[value - base].wnid != wnid:
                raise InputError(
                    f"{where}, {layout.label}: {value} is {classes[value - base].wnid} in the "
                    f"class list, but image/class/synset is {wnid}. The two count their labels "
                    "differently; give --label_base."
                )
            yield Item(
                f"{where} ({_text(features, layout.name)})",
                (features[layout.image].bytes_list.value or [b""])[0],
                value - base,
                wnid,
                _text(features, "image/class/text"),
            )
            index += 1
    except tf.errors.DataLossError as error:
        raise InputError(
            f"{path}, record {index}: the file is damaged from here on "
            f"({error.message.splitlines()[0]}). Copy it again."
        ) from None


def _features(record, where):
    try:
        return tf.train.Example.FromString(record).features.feature
    except DecodeError:
        raise InputError(f"{where} is not a tf.train.Example.") from None


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


def _check_label(value, base, num_classes, where):
    last = "" if num_classes is None else f" to {base + num_classes - 1}"
    if value < base or (num_classes is not None and value >= base + num_classes):
        raise InputError(
            f"{where}: {value} is outside the labels {base}{last} of this layout. If all labels "
            f"count from {1 - base}, give --label_base={1 - base}; otherwise the records mix label "
            "bases."
        )
