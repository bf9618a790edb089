"""Shards of images, and the manifest of a folder of them.

A record is a `tf.train.Example` with `inputs.images.examples.FEATURES`. While a preparation is in
progress, the folder also holds plan.json, and SHARD.arrayrecord.json for each finished shard, so
that a stopped preparation continues with the first missing shard.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterable

import numpy as np
from array_record.python import array_record_data_source

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.files import LOCK, NEW, read_json, write_json
from inputs.shards import MANIFEST, SUFFIX, UNREADABLE, damaged, record_writer

PLAN = "plan.json"


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
    """Writes one shard, unless an earlier run finished it.

    Args:
        folder: an existing folder.
        name: name of the file, without a suffix.
        records: serialised records; read only if the shard is missing.
        facts: JSON values about the records; may be filled while `records` is read.

    Raises:
        InputError: the shard cannot be written.
    """
    path = os.path.join(folder, f"{name}{SUFFIX}")
    if os.path.exists(f"{path}.json"):
        return Shard(**read_json(f"{path}.json"))
    digest = hashlib.sha256()
    count = 0
    with record_writer(path) as write:
        for record in records:
            write(record)
            digest.update(len(record).to_bytes(8, "little") + record)
            count += 1
    size = os.path.getsize(path)
    shard = Shard(os.path.basename(path), count, size, digest.hexdigest(), facts)
    write_json(f"{path}.json", dataclasses.asdict(shard))
    return shard


def check_content(folder: str, plan: dict) -> None:
    """Creates the folder if it is missing, and checks that this preparation may write there.

    The folder may be empty, or begun or finished with the same plan. If no shard is finished, it
    may also have been begun with another plan.

    Raises:
        InputError: the folder cannot be created, or has other content.
    """
    finished, begun = (os.path.join(folder, name) for name in (MANIFEST, PLAN))
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(finished):
            check_plan(folder, read_json(finished).get("plan", plan), plan)
        elif os.path.exists(begun):
            if glob.glob(os.path.join(glob.escape(folder), f"*{SUFFIX}.json")):
                check_plan(folder, read_json(begun), plan)
        elif set(os.listdir(folder)) - {LOCK, PLAN + NEW}:
            raise InputError(f"--output: {folder} is not empty. Give another folder.")
    except OSError as error:
        raise InputError(
            f"--output: {folder} cannot be written ({error.strerror}). Give another folder."
        ) from None


def begin(folder: str, plan: dict) -> None:
    """Checks the folder with `check_content` and writes the plan. The caller holds the lock."""
    check_content(folder, plan)
    write_json(os.path.join(folder, PLAN), plan)


def check_plan(folder: str, begun: dict, plan: dict) -> None:
    """Raises `InputError` if the folder was made with another plan."""
    plan = json.loads(json.dumps(plan))
    differing = [key for key in plan if begun.get(key) != plan[key]]
    if differing:
        raise InputError(
            f"--output: {folder} was made with different {' and '.join(differing)}. Give the same "
            "as then, give another folder, or delete this one."
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
    manifest = (
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
    write_json(os.path.join(folder, MANIFEST), manifest)
    for shard in shards:
        os.remove(os.path.join(folder, f"{shard.file}.json"))
        if not shard.count:
            os.remove(os.path.join(folder, shard.file))
    os.remove(os.path.join(folder, PLAN))
    return manifest


class ShardReader:
    """Random access to the records of a folder, numbered from 0 over all its shards.

    Args:
        folder: folder with a manifest.
        kind: the `kind` that the manifest must have.
        bad_records: each damaged record is reported to it once.

    Attributes:
        manifest: content of the manifest, a dictionary.
        count: number of records.

    Raises:
        InputError: the manifest is missing or of another kind, or a shard is missing or truncated.
    """

    def __init__(self, folder: str, kind: str, bad_records: BadRecords):
        path = os.path.join(folder, MANIFEST)
        if os.path.exists(os.path.join(folder, PLAN)) and not os.path.exists(path):
            raise InputError(
                f"--data_dir: {folder} is not finished. Run the command that prepares it again: "
                "it continues where it stopped."
            )
        fix = "Give a folder that `python -m inputs.images.prepare` wrote."
        self.manifest = read_json(path, flag="--data_dir", fix=fix)
        try:
            found = self.manifest["kind"]
            files = self.manifest["shards"]
            paths = [os.path.join(folder, file["file"]) for file in files]
            self.count = self.manifest["count"]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"--data_dir: {path} is not a manifest of shards ({error!r}). {fix}"
            ) from None
        if found != kind:
            raise InputError(
                f"--data_dir: {path}, `kind` is {found!r}, but {kind!r} is needed here."
            )
        for file, shard in zip(files, paths, strict=True):
            size = os.path.getsize(shard) if os.path.exists(shard) else "no"
            if size != file["bytes"]:
                raise InputError(
                    f"--data_dir: {shard} has {size} bytes, but the manifest says "
                    f"{file['bytes']}. Copy or prepare the folder again."
                )
        self._source = array_record_data_source.ArrayRecordDataSource(
            [f"{shard}[0:{file['count']}]" for file, shard in zip(files, paths, strict=True)]
        )
        self._paths = paths
        self._ends = np.cumsum([file["count"] for file in files])
        self._bad_records = bad_records
        self._damaged: set[int] = set()
        bad_records.expect(self.count)
        self._lock = threading.Lock()  # several threads read batches

    def read(self, indices) -> tuple[np.ndarray, np.ndarray]:
        """Reads records; a damaged one is replaced by the next readable one.

        Args:
            indices: [B] integers in [0, `count`).

        Returns:
            ([B] bytes objects, [B] bool: False where the record was replaced).

        Raises:
            InputError: too many records are damaged.
        """
        indices = [int(index) for index in indices]
        try:
            return np.array(self._source.__getitems__(indices), object), np.ones(len(indices), bool)
        except UNREADABLE:  # does not tell which record is damaged
            found = [self._read_from(index) for index in indices]
        records, positions = zip(*found, strict=True)
        return np.array(records, object), np.array(positions) == indices

    def _read_from(self, start):
        """(record, index) of the first readable record at or after `start`, cyclically."""
        for index in itertools.chain(range(start, self.count), range(start)):
            try:
                return self._source[index], index
            except UNREADABLE as error:
                self._report(index, error)
        folder = os.path.dirname(self._paths[0])
        raise InputError(f"--data_dir: no record of {folder} can be read. Copy it again.")

    def _report(self, index, error):
        with self._lock:
            if index in self._damaged:
                return
            self._damaged.add(index)
            shard = int(np.searchsorted(self._ends, index, side="right"))
            in_shard = index - (self._ends[shard - 1] if shard else 0)
            self._bad_records.add_bad(damaged(self._paths[shard], in_shard, error))
