"""Random-access shards: ArrayRecord files, and a manifest that says what they hold.

A shard is written whole or not at all, and remembered beside itself, so that a preparation that
was stopped goes on with the first shard that is missing.
"""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterable

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from inputs.bad_records import BadRecords
from inputs.errors import InputError

MANIFEST, PLAN = "manifest.json", "plan.json"
# One record a chunk, for random access; what is stored is compressed already, or tiny.
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name, records, bytes, a hash of its records, and facts for the manifest."""

    file: str
    count: int
    bytes: int
    sha256: str
    facts: dict


def write_shard(folder: str, name: str, records: Iterable[bytes], facts: dict) -> Shard:
    """Writes one shard, unless a run before has; returns what it holds.

    Args:
        folder: exists.
        name: of the file, without a suffix.
        records: read once, and only if the shard is not there.
        facts: JSON values about the records, may fill up while they are read.
    """
    path = os.path.join(folder, f"{name}.arrayrecord")
    if os.path.exists(f"{path}.json"):
        return Shard(**read_json(f"{path}.json"))
    digest, count = hashlib.sha256(), 0
    with _writing(path):
        writer = array_record_module.ArrayRecordWriter(f"{path}.new", WRITER_OPTIONS)
    try:
        for record in records:
            with _writing(path):
                writer.write(record)
            digest.update(len(record).to_bytes(8, "little") + record)
            count += 1
    finally:
        with _writing(path):
            writer.close()
    with _writing(path):
        size = os.path.getsize(f"{path}.new")
        shard = Shard(os.path.basename(path), count, size, digest.hexdigest(), facts)
        os.replace(f"{path}.new", path)
        write_json(f"{path}.json", dataclasses.asdict(shard))
    return shard


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except (OSError, RuntimeError) as error:  # the writer's own is a RuntimeError
        raise InputError(
            f"--output: {path} cannot be written ({error}). Make room; the same command goes on."
        ) from None


def begin(folder: str, plan: dict) -> None:
    """Makes the folder, or goes on in one that the same plan began; without a shard, any plan.

    Raises:
        InputError: it cannot be made, or holds something else.
    """
    path = os.path.join(folder, PLAN)
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(path):
            if glob.glob(os.path.join(glob.escape(folder), "*.arrayrecord.json")):
                check_plan(folder, read_json(path), plan)
        elif os.listdir(folder):
            raise InputError(f"--output: {folder} is not empty. Give another folder.")
        write_json(path, plan)
    except OSError as error:
        raise InputError(
            f"--output: {folder} cannot be written ({error.strerror}). Give another folder."
        ) from None


def check_plan(folder: str, begun: dict, plan: dict) -> None:
    """Raises `InputError` unless a folder was made by the same plan."""
    plan = json.loads(json.dumps(plan))
    differing = [key for key in plan if begun.get(key) != plan[key]]
    if differing:
        raise InputError(
            f"--output: {folder} was made with other {' and '.join(differing)}. Give the same as "
            "then, another folder, or delete that one."
        )


def finish(folder: str, shards: list[Shard], notes: dict, **facts) -> dict:
    """Writes the manifest and takes the notes of the way away; returns the manifest.

    Args:
        folder: of the shards.
        shards: all of them, in order.
        notes: JSON values that say nothing of the records; the plan among them is kept.
        facts: JSON values; what makes two sets of records mean different things belongs here.
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
    """The records of a folder's shards, numbered from 0 through all of them.

    Args:
        folder: with a manifest.
        kind: what the manifest must say that the records are.
        bad_records: is told of each damaged record once.

    Raises:
        InputError: no such manifest, or a shard is missing or cut off.
    """

    def __init__(self, folder: str, kind: str, bad_records: BadRecords):
        path = os.path.join(folder, MANIFEST)
        if os.path.exists(os.path.join(folder, PLAN)) and not os.path.exists(path):
            raise InputError(
                f"--data_dir: {folder} is not finished. Give the command that prepares it again; "
                "it goes on where it stopped."
            )
        try:
            self.manifest = read_json(path)
            found, files = self.manifest["kind"], self.manifest["shards"]
            paths = [os.path.join(folder, file["file"]) for file in files]
            self.count = self.manifest["count"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--data_dir: {path} is no readable manifest of shards ({error}). Give a folder "
                "that `python -m inputs.images.prepare` has written."
            ) from None
        if found != kind:
            raise InputError(f"--data_dir: {path}, kind is {found!r}, and {kind!r} is needed here.")
        for file, shard in zip(files, paths, strict=True):
            size = os.path.getsize(shard) if os.path.exists(shard) else "no"
            if size != file["bytes"]:
                raise InputError(
                    f"--data_dir: {shard} has {size} bytes, and the manifest says "
                    f"{file['bytes']}. Copy or prepare the folder again."
                )
        self._source = array_record_data_source.ArrayRecordDataSource(
            [f"{shard}[0:{file['count']}]" for file, shard in zip(files, paths, strict=True)]
        )
        self._paths, self._ends = paths, np.cumsum([file["count"] for file in files])
        self._bad_records, self._damaged = bad_records, set()
        bad_records.expect(self.count)
        self._lock = threading.Lock()  # batches are read in several threads

    def read(self, numbers) -> tuple[np.ndarray, np.ndarray]:
        """The records of these numbers.

        Args:
            numbers: [B] integers.

        Returns:
            [B] bytes objects, and [B] bool: whether it is the record of that number. In place of
            a damaged one comes the next that is whole.

        Raises:
            InputError: more are damaged than is borne.
        """
        numbers = [int(number) for number in numbers]
        try:
            return np.array(self._source.__getitems__(numbers), object), np.ones(len(numbers), bool)
        except (RuntimeError, IndexError):  # it says of none which one it was
            found = [self._whole(number) for number in numbers]
        records, places = zip(*found, strict=True)
        return np.array(records, object), np.array(places) == numbers

    def _whole(self, number):
        """(record, its number): that of `number`, or the next one that can be read."""
        for place in itertools.chain(range(number, self.count), range(number)):
            try:
                return self._source[place], place
            except (RuntimeError, IndexError) as error:
                self._tell(place, str(error).split(";")[0])
        folder = os.path.dirname(self._paths[0])
        raise InputError(f"--data_dir: no record of {folder} can be read. Copy it again.")

    def _tell(self, number, reason):
        with self._lock:
            if number in self._damaged:
                return
            self._damaged.add(number)
            shard = int(np.searchsorted(self._ends, number, side="right"))
            place = number - (self._ends[shard - 1] if shard else 0)
            self._bad_records.add_bad(f"{self._paths[shard]}, record {place}: damaged ({reason}).")


def read_json(path: str):
    """What a JSON file holds."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, value) -> None:
    """Writes a JSON file, whole or not at all."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    os.replace(f"{path}.new", path)
