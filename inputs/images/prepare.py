"""Turns labeled images into shards: python -m inputs.images.prepare --source=PATH --output=DIR

The source may be
  a folder of ImageNet TFRecords, train-*-of-01024, in the layout of the TPU demos or of
    TensorFlow Datasets, gzipped or not;
  a folder of class folders of images, or a folder with train/ and val/ of them;
  ImageNet as Kaggle has it: the folder with ILSVRC/ and LOC_val_solution.csv;
  ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar, or the folder of both;
  a tar of images, with a CSV of the same name (file, index) and classes.csv (index, wnid, name);
  CIFAR-10: its python or binary archive, unpacked or not, or PNG strips with labels.npz;
  what this command of version 0.1.0 wrote.
Writes DIR/train and DIR/validation, as far as the source has these splits, each with a manifest. If
it is stopped, the same command continues with the next shard. Images that cannot be read or
decoded, and files that are not read, are reported and left out.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator

from inputs import process  # isort: split

import tensorflow as tf

from inputs.errors import InputError, refuse_empty
from inputs.images import cifar, imagenet, shards, sources, tars, tfrecords
from inputs.images.conversion import check_image
from inputs.images.sources import Class, Item, Source, read_classes
from inputs.progress import Progress, log
from inputs.shards import IMAGES, MANIFEST, SUFFIX
from inputs.storage.files import (
    absolute,
    exists,
    is_file,
    is_folder,
    is_inside,
    list_folder,
    locked,
    read_json,
)

NAME = "inputs.images.prepare"
OFFICIAL = {imagenet.TRAIN_TAR: "train", imagenet.VALIDATION_TAR: "validation"}
CHECKED_AT_ONCE = 64  # images decoded in parallel


def find_sources(
    path: str, split: str | None, classes_csv: str, label_base: int | None, log=log
) -> list[Source]:
    """Recognizes the layout of a file or folder.

    Args:
        path: file or folder.
        split: the split of a source that does not name it; None for the one that the file or folder
            is named after, or else "train".
        classes_csv: a class list, or "".
        label_base: label of the first class in TFRecords; None to infer it from the records.
        log: receives lines about what was inferred, and about folders that are passed over.

    Returns:
        A source for each split.

    Raises:
        InputError: no layout is recognized, or a file, label or class is missing.
    """
    if not exists(path):
        raise InputError(f"--source: {path} does not exist.")
    if cifar.is_cifar(path):
        return [cifar.cifar_source(path, name) for name in ("train", "validation")]
    if is_file(path):
        if path.lower().endswith(".tar"):
            name = os.path.basename(path)
            split = OFFICIAL.get(name) or split or _split_of_name(path, name[: -len(".tar")], log)
            return [tars.tar_source(path, split, classes_csv)]
        raise InputError(
            f"--source: {path} is neither a .tar nor an archive of CIFAR-10. If it is a compressed "
            "archive, unpack it and give the folder."
        )
    if old := shards.old_splits(path):
        return [_converted_source(path, name) for name in old]
    found: list[Source] = []
    for name, tar_split in OFFICIAL.items():
        tar = os.path.join(path, name)
        if is_file(tar):
            classes = found[0].classes if found else None
            found.append(tars.tar_source(tar, tar_split, classes_csv, classes))
    if found:
        return found
    path = tfrecords.version_folder(path)
    if records := tfrecords.labeled_splits(path, log):
        return tfrecords.record_sources(path, records, classes_csv, label_base, log)
    return _folder_sources(path, split, classes_csv, log)


def _converted_source(path, split) -> Source:
    """A split that version 0.1.0 prepared."""
    folder = os.path.join(path, split)
    manifest = read_json(os.path.join(folder, MANIFEST))

    def items(path):
        for number, (data, label) in enumerate(shards.old_records(path)):
            yield Item(f"{path}, record {number}", data, label)

    parts = [
        sources.Part(
            os.path.splitext(shard["file"])[0],
            functools.partial(items, os.path.join(folder, shard["file"])),
            shard["sha256"],
        )
        for shard in manifest["shards"]
    ]
    classes = [Class(*one) for one in manifest["classes"]]
    return Source(split, parts, classes, manifest["pixels"])


def _folder_sources(path, split, classes_csv, log) -> list[Source]:
    """The splits in a folder of image files, or the whole folder as one split."""
    for below in imagenet.KAGGLE_FOLDERS:
        if is_folder(os.path.join(path, below)):
            path = os.path.join(path, below)
            break
    folders = [entry.path for entry in list_folder(path, "--source")[0]]
    if not folders and not sources.has_picture(path):
        raise InputError(
            f"--source: {path} is a folder without images: it has no class folders, no TFRecords "
            "(train-00000-of-01024) and no files of CIFAR-10."
        )
    classes = read_classes(classes_csv) if classes_csv else imagenet.find_classes(path)
    if not folders:  # as CLS-LOC/val
        return [_flat_source(path, classes)]
    splits, others = _splits(path, folders)
    if not splits:
        split = split or _split_of_name(path, os.path.basename(absolute(path)), log)
        return [sources.folder_source(path, split, classes)]
    for folder in others:
        name = sources.split_of(os.path.basename(folder))
        if name == "validation" and sources.has_picture(folder):
            _flat_source(folder, classes)  # raises, as there are no labels
        if name != "test" and sources.has_picture(folder):
            raise InputError(
                f"--source: {path} has folders of splits ({', '.join(splits)}), but {folder} has "
                "images that are in no class folder. Give the folder of one split at a time, such "
                f"as --source={next(iter(splits.values()))}."
            )
        log(f"{folder} is passed over: it is not a split with labels")
    found = []
    for name, folder in splits.items():
        if _is_nested(folder):
            found.append(sources.folder_source(folder, name, classes))
        else:
            found.append(_flat_source(folder, classes or (found[0].classes if found else None)))
    return found


def _split_of_name(path, name, log):
    """The split that a source is named after, else "train"; a line says if it is another one."""
    split = {"test": "validation"}.get(found := sources.split_of(name), found) or "train"
    if split != "train":
        log(f"{path} is taken as the {split} split, because of its name; --split overrides this")
    return split


def _splits(path, folders):
    """Returns (split -> its folder, other folders) for the folders in a folder.

    A folder that is named after a split counts as one only if its images have labels: from class
    folders or, for validation, from a file.
    """
    splits: dict[str, str] = {}
    others = []
    for folder in folders:
        name = sources.split_of(os.path.basename(folder))
        is_labeled = name == "validation" and imagenet.find_labels(folder) is not None
        if not name or not (_is_nested(folder) or is_labeled):
            others.append(folder)
        elif name in splits:
            raise InputError(
                f"--source: {path} has two {name} splits, {splits[name]} and {folder}. Remove one "
                "of them."
            )
        else:
            splits[name] = folder
    if not splits and all(sources.split_of(os.path.basename(folder)) for folder in others):
        raise InputError(
            f"--source: {others[0]} has no class folders, so the labels of its images are not "
            f"known. Put the images into class folders, {others[0]}/cat/1.jpg."
        )
    if "test" in splits:
        test = splits.pop("test")
        if "validation" in splits:
            others.append(test)
        else:
            splits["validation"] = test
    return dict(sorted(splits.items())), others


def _is_nested(folder):
    return bool(list_folder(folder, "--source")[0]) and not sources.has_picture(folder)


def _flat_source(folder, classes):
    """The validation images of ImageNet in one folder, with a file of their labels."""
    wnids = imagenet.find_labels(folder)
    if wnids is None:
        raise InputError(
            f"--source: {folder} has no class folders, so the labels of its images are not known. "
            f"Put them into class folders; for ImageNet, put {' or '.join(imagenet.LABELS)} beside "
            f"{folder}. To prepare another split by itself, give its folder."
        )
    classes = classes or imagenet.sorted_classes(wnids.values())
    return sources.flat_source(folder, "validation", wnids, classes)


def encode(item: Item, height: int, width: int) -> bytes:
    """Serializes a record: a `tf.train.Example` with the features below."""

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    values = {"image": item.data, "label": item.label, "height": height, "width": width}
    features = tf.train.Features(feature={name: feature(v) for name, v in values.items()})
    return tf.train.Example(features=features).SerializeToString(deterministic=True)


def records(source: Source, part, facts: dict, pool) -> Iterator[bytes]:
    """Yields the records of a part, and fills `facts` with its classes and damaged images."""
    facts |= {"class_counts": {}, "seen": {}, "damaged": [], "converted": {}}
    items = iter(part.read())
    while block := list(itertools.islice(items, CHECKED_AT_ONCE)):
        if source.pixels:
            checks = [(item.data, *source.pixels[:2], "", "") for item in block]
        else:
            checks = pool.map(check_image, (item.data for item in block))
        for item, (data, height, width, kind, error) in zip(block, checks, strict=True):
            if error:
                facts["damaged"].append({"name": item.name, "reason": error})
                continue
            if kind:
                facts["converted"][kind] = facts["converted"].get(kind, 0) + 1
            label = str(item.label)
            facts["class_counts"][label] = facts["class_counts"].get(label, 0) + 1
            facts["seen"].setdefault(label, [item.wnid, item.text, item.name])
            if item.wnid != facts["seen"][label][0]:
                raise InputError(
                    f"{item.name}: label {label} is {item.wnid} here, but "
                    f"{facts['seen'][label][0]} before. The records mix label bases."
                )
            yield encode(item._replace(data=data), height, width)


def prepare(source: Source, output: str, request: dict, pool) -> dict:
    """Writes the shards and the manifest of a split; reports on standard error.

    Args:
        source: the split.
        output: folder of all splits.
        request: JSON values of the flags; a stopped preparation continues only if they are the
            same.
        pool: `concurrent.futures.Executor` that decodes images.

    Returns:
        The manifest.

    Raises:
        InputError: the source cannot be read, no image can be decoded, the classes that the records
            name differ from those of the other split, or another process is preparing the same
            folder.
    """
    folder = os.path.join(output, source.split)
    plan = request | {
        "files": _hash([part.identity for part in source.parts]),
        "classes": _hash(source.classes),
    }
    if source.passed_over:
        log(f"--source, {source.split} split: {source.passed_over.describe()}")
    shards.check_content(folder, plan)
    if not exists(os.path.join(folder, MANIFEST)):
        with locked(folder, "--output"):
            # Another process may have finished it in the meantime.
            if not exists(os.path.join(folder, MANIFEST)):
                return _write(source, folder, output, plan, pool)
        shards.check_content(folder, plan)
    manifest = read_json(os.path.join(folder, MANIFEST))
    if shards.damaged_shards(folder, manifest) or not shards.has_index(folder, manifest):
        with locked(folder, "--output"):
            _repair(source, folder, manifest, pool)
    else:
        log(f"{folder} is finished already")
    return manifest


def _repair(source, folder, manifest, pool):
    """Writes the shards of a finished folder that are damaged or missing again, and its index."""
    parts = {f"{part.name}{SUFFIX}": part for part in source.parts}
    for shard in shards.damaged_shards(folder, manifest):
        shards.repair_shard(folder, shard, records(source, parts[shard["file"]], {}, pool))
    shards.index_shards(folder, manifest["shards"])
    log(f"{folder} was finished already, and is repaired")


def _write(source, folder, output, plan, pool):
    """Writes the missing shards and the manifest; returns the manifest."""
    shards.begin(folder, plan)
    written = []
    with Progress(len(source.parts), " shards") as progress:
        for part in source.parts:
            facts: dict = {}
            shard = shards.write_shard(folder, part.name, records(source, part, facts, pool), facts)
            written.append(shard)
            for damaged in shard.facts["damaged"]:
                log(f"Left out {damaged['name']}: {damaged['reason']}")
            progress.advance(1)
            progress.note(f"{sum(shard.count for shard in written):,} images")
            progress.milestone(f"{folder}/{shard.file}: {shard.count:,} images")
    if not any(shard.count for shard in written):
        raise InputError(f"--source: no image for {folder} could be decoded.")
    classes = source.classes
    if classes is None:
        classes = _classes_of_records(written, folder)
        _check_other_split(output, source.split, classes)
    counts = [0] * len(classes)
    for shard in written:
        for label, count in shard.facts["class_counts"].items():
            counts[int(label)] += count
    converted = sum((Counter(shard.facts["converted"]) for shard in written), Counter())
    if converted:
        kinds = ", ".join(f"{count:,} × {kind}" for kind, count in converted.most_common())
        log(f"{folder}: stored as PNG, because TensorFlow does not decode them correctly: {kinds}")
    return shards.finish(
        folder,
        written,
        kind=IMAGES[1],
        pixels=source.pixels,
        classes=classes,
        class_counts=counts,
        notes={"damaged": [damaged for shard in written for damaged in shard.facts["damaged"]]},
    )


def _hash(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _classes_of_records(written, folder) -> list[Class]:
    """The classes that the records name; their labels must be 0, 1, 2, ... without a gap."""
    seen: dict[int, Class] = {}
    for shard in written:
        for label, (wnid, text, _) in shard.facts["seen"].items():
            known = seen.setdefault(int(label), Class(wnid or label, text or wnid or label))
            if wnid and known.wnid != wnid:
                raise InputError(
                    f"{folder}/{shard.file}: label {label} is {wnid} here, but {known.wnid} in "
                    "an earlier file. The files mix label bases."
                )
    labels = sorted(seen)
    gap = next((i for i, label in enumerate(labels) if i != label), None)
    twice = len({one.wnid for one in seen.values()}) != len(seen)
    if gap is not None or twice:
        problem = "a class has two labels"
        if gap is not None:
            last = str(labels[-1])
            (name, *_) = (s.facts["seen"][last][2] for s in written if last in s.facts["seen"])
            problem = f"counted from 0, they have label {last} ({name}), but not label {gap}"
        raise InputError(
            f"{folder}: the records do not define the classes, because {problem}. Give the classes "
            "with --classes=classes.csv (index, wnid, name)."
        )
    return [seen[label] for label in range(len(seen))]


def _check_classes(found, output):
    """Compares the class lists that are known before an image is read."""
    known = [source for source in found if source.classes]
    for source in known:
        sources.check_names(source.classes, "--source")
        _check_other_split(output, source.split, source.classes)
    for one, other in itertools.pairwise(known):
        names = f"--source: the {one.split} split", f"the {other.split} split"
        sources.check_same_classes(one.classes, other.classes, *names)


def _check_other_split(output, split, classes):
    other = {"train": "validation", "validation": "train"}[split]
    path = os.path.join(output, other, MANIFEST)
    try:
        is_finished = exists(path)
    except OSError:  # `shards.check_content` reports it
        is_finished = False
    if is_finished:
        sources.check_same_classes(read_json(path)["classes"], classes, path, f"{output}/{split}")


def _check_apart(source, output):
    """Raises `InputError` if a later run would take what is written for a part of the source."""
    if is_inside(output, source):
        raise InputError(f"--output: {output} is inside of --source. Give a folder outside of it.")


def main(arguments=None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, help="file or folder of images, see above")
    parser.add_argument("--output", required=True, help="folder for train/ and validation/")
    parser.add_argument(
        "--classes", default="", help="CSV of the classes with the columns index, wnid, name"
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        help="the split of a source that does not name it (default: the one that the file or "
        "folder is named after, such as photos/val, or else train)",
    )
    parser.add_argument(
        "--label_base",
        type=int,
        choices=(0, 1),
        help="label of the first class in TFRecords (default: 1 in the layout of the TPU demos; in "
        "that of TensorFlow Datasets it is found out from the labels)",
    )
    flags = parser.parse_args(arguments)
    request = {"source": absolute(flags.source), "label_base": flags.label_base}
    try:
        refuse_empty(source=flags.source, output=flags.output)
        _check_apart(flags.source, flags.output)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            found = find_sources(flags.source, flags.split, flags.classes, flags.label_base)
            _check_classes(found, flags.output)
            for source in found:
                manifest = prepare(source, flags.output, request, pool)
                print(
                    f"{os.path.join(flags.output, source.split)}: {manifest['count']:,} images of "
                    f"{len(manifest['classes']):,} classes, {len(manifest['damaged'])} damaged and "
                    f"left out, hash {manifest['hash']}"
                )
            if problem := shards.missing_split(flags.output):
                log(problem)
    except InputError as error:
        log(f"{NAME}: {error}")
        return 1
    except OSError as error:
        log(f"{NAME}: {error.filename or flags.output}: {error.strerror or error}.")
        return 1
    except KeyboardInterrupt:
        log(f"{NAME}: stopped. The same command continues with the next shard.")
        return process.INTERRUPTED
    return 0


if __name__ == "__main__":
    process.run(main)
