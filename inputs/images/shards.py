"""Shards of images, and the manifest of a folder of them.

A record is a `tf.train.Example` with the features `image` (an image file, or raw uint8 pixels),
`label` (from 0), `height` and `width`. While a preparation is in
progress, the folder also holds plan.json, and SHARD.tfrecord.json for each finished shard, so
that a stopped preparation continues with the first missing shard.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator

import tensorflow as tf

from inputs.errors import InputError
from inputs.images.sources import check_names
from inputs.pages import Pages, open_pages
from inputs.progress import log
from inputs.record_index import INDEX, write_index
from inputs.shards import IMAGES, MANIFEST, OLD_SUFFIX, SUFFIX, record_writer
from inputs.storage.files import (
    NEW,
    absolute,
    check_writable,
    exists,
    file_size,
    file_sizes,
    is_left_over,
    is_remote,
    list_names,
    local_copy,
    parent,
    read_json,
    remove,
    write_json,
)

PLAN = "plan.json"
# The features of a record, and the label of the first class. Records that other programs wrote have
# their layout in the manifest.
OWN_LAYOUT = {"image": "image", "label": "label", "label_base": 0}


def _are_shards(value) -> bool:
    types = {"file": str, "count": int, "bytes": int}
    return all(isinstance(shard[key], kind) for shard in value for key, kind in types.items())


def _are_classes(value) -> bool:
    pairs = all(isinstance(one, list) and list(map(type, one)) == [str, str] for one in value)
    return isinstance(value, list) and bool(value) and pairs


def _is_layout(value) -> bool:
    return all(isinstance(value[key], type(own)) for key, own in OWN_LAYOUT.items())


# The fields of a manifest, and what their values must be.
FIELDS = {
    "shards": _are_shards,
    "count": lambda value: isinstance(value, int),
    "hash": lambda value: isinstance(value, str),
    "classes": _are_classes,
    "pixels": lambda value: value is None or list(map(type, value)) == [int, int, int],
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        file: base name of the file.
        count: number of records.
        bytes: size of the file in bytes.
        sha256: hash of its records.
        facts: JSON values about its records.
    """

    file: str
    count: int
    bytes: int
    sha256: str
    facts: dict


def write_shard(folder: str, name: str, records: Iterable[bytes], facts: dict) -> Shard:
    """Writes one shard, unless an earlier run finished it and its file is as it was then.

    Args:
        folder: an existing folder.
        name: name of the file, without a suffix.
        records: serialized records; read only if the shard is missing.
        facts: JSON values about the records; may be filled while `records` is read.

    Raises:
        InputError: the shard cannot be written.
    """
    path = os.path.join(folder, f"{name}{SUFFIX}")
    if exists(f"{path}.json"):
        with contextlib.suppress(InputError, TypeError, OSError):  # as after a loss of power
            shard = Shard(**read_json(f"{path}.json"))
            if file_size(path) == shard.bytes:
                return shard
        log(f"{path} is damaged or missing, and is written again")
    shard = _write_records(path, records, facts)
    write_json(f"{path}.json", dataclasses.asdict(shard))
    return shard


def _write_records(path, records, facts) -> Shard:
    digest = hashlib.sha256()
    count = 0
    with record_writer(path) as write:
        for record in records:
            write(record)
            digest.update(len(record).to_bytes(8, "little") + record)
            count += 1
    return Shard(os.path.basename(path), count, file_size(path), digest.hexdigest(), facts)


def check_content(folder: str, plan: dict) -> None:
    """Creates the folder if it is missing, and checks that this preparation may write there.

    The folder may be empty, or begun or finished with the same plan. If no shard is finished, it
    may also have been begun with another plan.

    Raises:
        InputError: the folder cannot be created, or has other content.
    """
    finished, begun = (os.path.join(folder, name) for name in (MANIFEST, PLAN))
    try:
        is_finished = exists(finished)  # perhaps on a disk that is read-only by now
    except OSError:  # `check_writable` reports it
        is_finished = False
    if not is_finished:
        check_writable(folder, "--output")
    if is_finished:
        manifest = read_manifest(folder, "--output", _other_folder(folder))
        check_plan(folder, manifest.get("plan"), plan)
    elif exists(begun):
        if any(name.endswith(f"{SUFFIX}.json") for name in list_names(folder)):
            check_plan(folder, read_json(begun, flag="--output", fix=_other_folder(folder)), plan)
    elif any(not is_left_over(name) and name != PLAN + NEW for name in list_names(folder)):
        raise InputError(f"--output: {folder} is not empty. Give another folder.")


def begin(folder: str, plan: dict) -> None:
    """Checks the folder with `check_content` and writes the plan. The caller holds the lock."""
    check_content(folder, plan)
    write_json(os.path.join(folder, PLAN), plan)


def check_plan(folder: str, begun, plan: dict) -> None:
    """Raises `InputError` if the folder was made with another plan, or without one."""
    if not isinstance(begun, dict):
        raise InputError(
            f"--output: {folder} was not made by this command. Give another folder, or delete this "
            "one."
        )
    plan = json.loads(json.dumps(plan))
    differing = [key for key in plan if begun.get(key) != plan[key]]
    if "files" in differing and set(differing) <= {"files", "classes"}:
        raise InputError(
            f"--output: --source has other {' and '.join(differing)} than when {folder} was begun: "
            "they were added, removed or changed since, or have other labels. Delete this folder "
            "to prepare them as they are now, or give another one."
        )
    if differing:
        raise InputError(
            f"--output: {folder} was made with other values of: {', '.join(differing)}. Give the "
            "same values as then, give another folder, or delete this one."
        )


def _other_folder(folder) -> str:
    return f"Delete {folder} and run the same command again, or give another folder."


def read_manifest(folder: str, flag: str, fix: str) -> dict:
    """The manifest of a finished folder.

    Args:
        folder: the folder of a split.
        flag: the flag that named it, for error messages.
        fix: what to do about it, for error messages.

    Raises:
        InputError: it cannot be read, or is of another kind, or a field is missing or wrong.
    """
    path = os.path.join(folder, MANIFEST)
    manifest = read_json(path, flag=flag, fix=fix)
    try:
        if manifest["kind"] != IMAGES[1]:
            raise InputError(
                f"{flag}: {path}, `kind` is {manifest['kind']!r}, but {IMAGES[1]!r} is needed here."
            )
        wrong = [name for name, is_right in FIELDS.items() if not is_right(manifest[name])]
        if not _is_layout(manifest.get("layout", OWN_LAYOUT)):
            wrong.append("layout")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{flag}: {path} is not a manifest of shards ({error!r}). {fix}") from None
    if wrong:
        raise InputError(f"{flag}: {path}, `{wrong[0]}` is not what the preparation writes. {fix}")
    check_names(manifest["classes"], f"{flag}: {path}")
    return manifest


def damaged_shards(folder: str, manifest: dict) -> list[dict]:
    """The entries in the manifest of the shards that are missing or have another size."""
    paths = [os.path.join(folder, shard["file"]) for shard in manifest["shards"]]
    sizes = zip(manifest["shards"], file_sizes(paths), strict=True)
    return [shard for shard, size in sizes if size != shard["bytes"]]


def repair_shard(folder: str, shard: dict, records: Iterable[bytes]) -> None:
    """Writes a shard of a finished folder again.

    Args:
        folder: the folder.
        shard: the entry in the manifest.
        records: those that the shard had.

    Raises:
        InputError: the shard cannot be written, or had other records.
    """
    path = os.path.join(folder, shard["file"])
    log(f"{path} is damaged or missing, and is written again")
    if _write_records(path, records, {}).sha256 != shard["sha256"]:
        remove(path)
        raise InputError(
            f"--output: {path} gets other records than the manifest says, as other versions of "
            f"programs were installed then. {_other_folder(folder)}"
        )


def has_index(folder: str, manifest: dict) -> bool:
    """Whether a folder has the index of its shards, undamaged as far as sizes tell."""
    return _open_index(folder, manifest["count"]) is not None


def _open_index(folder, count) -> Pages | None:
    index = open_pages(os.path.join(folder, INDEX))
    pages = index and index[0].get(INDEX)
    return pages if pages is not None and len(pages) == count else None


def index_shards(folder: str, shards: list[dict]) -> None:
    """Writes the index of shards, which are entries of a manifest."""
    write_index(
        folder,
        [os.path.join(folder, shard["file"]) for shard in shards],
        [shard["count"] for shard in shards],
        fix="Prepare or copy it again.",
    )


def finish(folder: str, shards: list[Shard], notes: dict, **facts) -> dict:
    """Writes the manifest, and removes the plan, the JSON files of the shards, and empty shards.

    Args:
        folder: folder of the shards.
        shards: all shards, in order.
        notes: JSON values for the manifest that are not part of its hash.
        **facts: JSON values that are part of the hash, because they define what the records mean.

    Returns:
        The manifest.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.sha256.encode())
    kept = [shard for shard in shards if shard.count]
    manifest: dict = (
        facts
        | notes
        | {
            "plan": read_json(os.path.join(folder, PLAN)),
            "count": sum(shard.count for shard in kept),
            "hash": digest.hexdigest()[:16],
            "shards": [
                {"file": s.file, "count": s.count, "bytes": s.bytes, "sha256": s.sha256}
                for s in kept
            ],
        }
    )
    index_shards(folder, manifest["shards"])
    write_json(os.path.join(folder, MANIFEST), manifest)
    for shard in shards:
        remove(os.path.join(folder, f"{shard.file}.json"))
        if not shard.count:
            remove(os.path.join(folder, shard.file))
    remove(os.path.join(folder, PLAN))
    return manifest


@dataclasses.dataclass(frozen=True)
class PreparedImages:
    """The files of one split.

    Attributes:
        manifest: content of the manifest, a dictionary.
        paths: the TFRecord files.
        index: for each record, [N, 2] int64: its file, and where it begins in it, in bytes.
    """

    manifest: dict
    paths: list[str]
    index: Pages


def open_images(folder: str) -> PreparedImages:
    """Opens the folder of a split.

    Raises:
        InputError: the manifest is missing or of another kind, or a file is missing or truncated.
    """
    path = os.path.join(folder, MANIFEST)
    if exists(os.path.join(folder, PLAN)) and not exists(path):
        raise InputError(
            f"--data_dir: {folder} is not finished. Run the command that prepares it again: "
            "it continues where it stopped."
        )
    fix = "Give a folder that `python -m inputs.images.prepare` or `inputs.images.index` wrote."
    is_split = os.path.basename(absolute(folder)) in ("train", "validation")
    if is_split and not exists(path) and (problem := missing_split(parent(folder))):
        raise InputError(f"--data_dir: {problem}")
    manifest = read_manifest(folder, "--data_dir", fix)
    files = manifest["shards"]
    names = [file["file"] for file in files]  # with their folder, if they lie elsewhere
    paths = [name if is_remote(name) else os.path.join(folder, name) for name in names]
    sizes = [file["bytes"] for file in files]
    if any(path.endswith(OLD_SUFFIX) for path in paths):
        raise InputError(
            f"--data_dir: {folder} was prepared by version 0.1.0, in a format that hosts cannot "
            "read by themselves. Convert it: python -m inputs.images.prepare "
            f"--source={parent(folder)} --output=NEW_FOLDER"
        )
    for shard, expected, size in zip(paths, sizes, file_sizes(paths), strict=True):
        if size != expected:
            found = "no" if size is None else size
            raise InputError(
                f"--data_dir: {shard} has {found} bytes, but the manifest says {expected}. Copy or "
                "prepare the folder again."
            )
    index = _open_index(folder, manifest["count"])
    if index is None:
        raise InputError(
            f"--data_dir: {os.path.join(folder, INDEX)} is missing or damaged. Copy the whole "
            "folder again, or run the command that prepared it again."
        )
    return PreparedImages(manifest, paths, index)


def missing_split(folder: str) -> str:
    """Says what a folder with only one of the two splits needs; "" for any other folder."""
    splits = ("train", "validation")
    missing = [split for split in splits if not exists(os.path.join(folder, split, MANIFEST))]
    if len(missing) != 1:
        return ""
    return (
        f"{folder} has no {missing[0]} split, which training needs. Give its images to `python -m "
        f"inputs.images.prepare --split={missing[0]} --output={folder}`, or a --source with both "
        "splits to the command that made the other one."
    )


def old_splits(folder: str) -> list[str]:
    """The splits in a folder that version 0.1.0 prepared, in ArrayRecord files."""
    return [
        split
        for split in ("train", "validation")
        if exists(os.path.join(folder, split, MANIFEST))
        and any(name.endswith(OLD_SUFFIX) for name in list_names(os.path.join(folder, split)))
    ]


def old_records(path: str) -> Iterator[tuple[bytes, int]]:
    """Yields (image, label) of a shard of version 0.1.0.

    Raises:
        InputError: the shard is damaged.
    """
    from array_record.python import array_record_module

    with local_copy(path) as local:
        try:
            reader = array_record_module.ArrayRecordReader(local)
            for index in range(reader.num_records()):
                (record,) = reader.read([index])
                features = tf.train.Example.FromString(record).features.feature
                yield features["image"].bytes_list.value[0], features["label"].int64_list.value[0]
        except (RuntimeError, IndexError) as error:
            raise InputError(f"{path} is damaged ({str(error).split(';')[0]}).") from None
