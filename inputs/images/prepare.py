"""Turns labelled images into shards: python -m inputs.images.prepare --source=PATH --output=DIR

The source may be
  a folder of ImageNet TFRecords, train-*-of-01024, as the TPU demos or TensorFlow Datasets have it;
  a folder of class folders of images, or one with train/ and val/ of them;
  a tar of images with a CSV of the same name (file, index) and classes.csv (index, wnid, name);
  CIFAR-10: its python or binary archive, what is in them, or strips of PNG with labels.npz.
DIR/train and DIR/validation then hold the splits that the source has, each with a manifest. The
same command goes on where it was stopped. Images that cannot be decoded are named and left out.
"""

import argparse
import concurrent.futures
import hashlib
import itertools
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: its start-up notices

import tensorflow as tf

from inputs.errors import InputError
from inputs.images import cifar, shards, tfrecords
from inputs.images import sources as image_sources
from inputs.images.sources import Class, Item, Source

KIND = "images"
SPLITS = {"train": "train", "validation": "validation", "val": "validation"}
CHECKED_AT_ONCE = 64


def find_sources(path: str, split: str, classes_csv: str, label_base: int | None) -> list[Source]:
    """The splits of what stands at a path, whatever its layout.

    Args:
        path: file or folder.
        split: what a source that does not say so is.
        classes_csv: a class list, or "".
        label_base: number of the first class in TFRecords; None for the layout's own.

    Raises:
        InputError: nothing there is known.
    """
    if not os.path.exists(path):
        raise InputError(f"--source: {path} is not there.")
    if cifar.is_cifar(path):
        return [cifar.cifar_source(path, name) for name in ("train", "validation")]
    if os.path.isfile(path):
        if path.endswith(".tar"):
            return [image_sources.tar_source(path, split, classes_csv)]
        raise InputError(f"--source: {path} is no .tar and no archive of CIFAR-10.")
    records = tfrecords.record_files(path)
    if "validation" in records:
        records.pop("test", None)  # ImageNet's has no labels
    if records:
        return [tfrecords.record_source(path, s, classes_csv, label_base) for s in records]
    folders = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    if not folders:
        raise InputError(
            f"--source: {path} is a folder without images: no class folders, no TFRecords "
            "(train-00000-of-01024), nothing of CIFAR-10."
        )
    if set(folders) <= set(SPLITS):
        return [
            image_sources.folder_source(os.path.join(path, name), SPLITS[name], classes_csv)
            for name in sorted(folders)
        ]
    return [image_sources.folder_source(path, split, classes_csv)]


def check_image(data: bytes) -> tuple[int, int, str]:
    """(height, width, what is wrong with it or "") of an image file."""
    try:
        image = tf.io.decode_image(data, channels=3, expand_animations=False)
    except tf.errors.OpError as error:
        return 0, 0, error.message.splitlines()[0]
    return image.shape[0], image.shape[1], ""


def encode(item: Item, height: int, width: int) -> bytes:
    """The stored record: a tf.train.Example, `inputs.images.examples.FEATURES`."""

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    values = {"image": item.data, "label": item.label, "height": height, "width": width}
    features = tf.train.Features(feature={name: feature(v) for name, v in values.items()})
    return tf.train.Example(features=features).SerializeToString(deterministic=True)


def records(source: Source, part, facts: dict, pool) -> Iterator[bytes]:
    """Yields a part's records, and fills `facts`: classes counted and named, damaged images."""
    facts |= {"class_counts": {}, "seen": {}, "damaged": []}
    items = iter(part.read())
    while block := list(itertools.islice(items, CHECKED_AT_ONCE)):
        if source.pixels:
            checks = [(*source.pixels[:2], "")] * len(block)
        else:
            checks = pool.map(check_image, (item.data for item in block))
        for item, (height, width, wrong) in zip(block, checks, strict=True):
            if wrong:
                facts["damaged"].append({"name": item.name, "reason": wrong})
                continue
            label = str(item.label)
            facts["class_counts"][label] = facts["class_counts"].get(label, 0) + 1
            facts["seen"].setdefault(label, [item.wnid, item.text, item.name])
            if item.wnid != facts["seen"][label][0]:
                raise InputError(
                    f"{item.name}: label {label} is {item.wnid} here and "
                    f"{facts['seen'][label][0]} before. The records mix label bases."
                )
            yield encode(item, height, width)


def prepare(source: Source, output: str, request: dict, pool, say) -> dict:
    """Writes a split's shards and manifest; returns the manifest.

    Args:
        source: what to read.
        output: folder of all splits.
        request: JSON values, what was asked for; a stopped preparation goes on for the same.
        pool: an executor that decodes.
        say: takes lines about progress and damaged images.

    Raises:
        InputError: from the source, or its classes are not those of the other split.
    """
    folder = os.path.join(output, source.split)
    plan = request | {
        "files": _hash([part.holds for part in source.parts]),
        "classes": _hash(source.classes),
    }
    finished = os.path.join(folder, shards.MANIFEST)
    if os.path.exists(finished):
        manifest = shards.read_json(finished)
        shards.check_plan(folder, manifest.get("plan", plan), plan)
        say(f"{folder} is finished already")
        return manifest
    shards.begin(folder, plan)
    written = []
    for number, part in enumerate(source.parts, start=1):
        facts: dict = {}
        shard = shards.write_shard(folder, part.name, records(source, part, facts, pool), facts)
        written.append(shard)
        for damaged in shard.facts["damaged"]:
            say(f"Left out {damaged['name']}: {damaged['reason']}")
        say(f"{folder}: shard {number} of {len(source.parts)}, {shard.count:,} images")
    if not any(shard.count for shard in written):
        raise InputError(f"--source: not one image for {folder} could be decoded.")
    classes = source.classes or _classes_seen(written, folder)
    _check_other_split(output, source.split, classes)
    counts = [0] * len(classes)
    for shard in written:
        for label, count in shard.facts["class_counts"].items():
            counts[int(label)] += count
    return shards.finish(
        folder,
        written,
        kind=KIND,
        pixels=source.pixels,
        classes=classes,
        class_counts=counts,
        notes={"damaged": [damaged for shard in written for damaged in shard.facts["damaged"]]},
    )


def _hash(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _classes_seen(written, folder) -> list[Class]:
    """What the records say of their classes, which must leave no label out."""
    seen: dict[int, Class] = {}
    for shard in written:
        for label, (wnid, text, _) in shard.facts["seen"].items():
            known = seen.setdefault(int(label), Class(wnid or label, text or wnid or label))
            if wnid and known.wnid != wnid:
                raise InputError(
                    f"{folder}/{shard.file}: label {label} is {wnid} here and {known.wnid} in a "
                    "file before. The files mix label bases."
                )
    labels = sorted(seen)
    gap = next((i for i, label in enumerate(labels) if i != label), None)
    twice = len({one.wnid for one in seen.values()}) != len(seen)
    if gap is not None or twice:
        what = "a class has two labels"
        if gap is not None:
            last = str(labels[-1])
            (name, *_) = (s.facts["seen"][last][2] for s in written if last in s.facts["seen"])
            what = f"counted from 0, label {last} ({name}) is among them and label {gap} is not"
        raise InputError(
            f"{folder}: the records do not say what the classes are, for {what}. Name them with "
            "--classes=classes.csv (index, wnid, name)."
        )
    return [seen[label] for label in range(len(seen))]


def _check_other_split(output, split, classes):
    other = {"train": "validation", "validation": "train"}[split]
    path = os.path.join(output, other, shards.MANIFEST)
    if os.path.exists(path):
        image_sources.check_same_classes(
            shards.read_json(path)["classes"], classes, path, f"{output}/{split}"
        )


def main(arguments=None) -> int:
    """Prepares all splits of the source; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="what to read")
    parser.add_argument("--output", required=True, help="folder for train/ and validation/")
    parser.add_argument("--classes", default="", help="CSV with index, wnid, name")
    parser.add_argument("--split", default="train", choices=("train", "validation"))
    parser.add_argument("--label_base", type=int, choices=(0, 1), help="first label of TFRecords")
    flags = parser.parse_args(arguments)

    def say(line):
        print(line, file=sys.stderr, flush=True)

    request = {"source": os.path.abspath(flags.source), "label_base": flags.label_base}
    try:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            sources = find_sources(flags.source, flags.split, flags.classes, flags.label_base)
            splits = [source.split for source in sources]
            if len(set(splits)) < len(splits):
                raise InputError(
                    f"--source: {flags.source} has two {max(splits, key=splits.count)} splits. "
                    "Leave one of them there."
                )
            for source in sources:
                manifest = prepare(source, flags.output, request, pool, say)
                print(
                    f"{flags.output}/{source.split}: {manifest['count']:,} images of "
                    f"{len(manifest['classes']):,} classes, {len(manifest['damaged'])} damaged and "
                    f"left out, hash {manifest['hash']}"
                )
    except InputError as error:
        say(f"prepare_images: {error}")
        return 1
    except OSError as error:
        say(f"prepare_images: {error.filename or flags.output}: {error.strerror or error}.")
        return 1
    except KeyboardInterrupt:
        say("prepare_images: stopped. The same command goes on with the next shard.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
