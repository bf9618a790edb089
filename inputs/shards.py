"""Tokenised documents in ArrayRecord files, with a manifest that says what they are.

A record is one document, little-endian: the number S of its sentences (uint32), their lengths in
tokens (S uint32), its ids (uint16, or int32 if the vocabulary is larger). Records stand in groups
of one and uncompressed, so that any of them is read alone: 2.5 times as fast as with zstd, which
would save a quarter of the space. ArrayRecord keeps a hash of each.
"""

import contextlib
import json
import os
from collections.abc import Iterator

import numpy as np
from array_record.python import array_record_module

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.text.document_keys import Fingerprint

MANIFEST = "manifest.json"
FORMAT, VERSION = "tf_lamb tokenised text", 2
WRITER_OPTIONS = "group_size:1,uncompressed"
RECORDS_PER_READ = 256
FIELDS = {
    "finished": bool,
    "vocabulary_hash": str,
    "vocabulary_size": int,
    "token_dtype": str,
    "shard_tokens": int,
    "inputs": list,
    "shards": list,
}
FINISHED_FIELDS = {"held_out_below": str, "fingerprint": str}
SHARD_FIELDS = {"file": str, "documents": int, "batches": int, "tokens": int, "fingerprint": str}
TOKEN_DTYPES = ("<u2", "<i4")


def token_dtype(vocabulary_size: int) -> str:
    """The smallest dtype that holds every id."""
    return TOKEN_DTYPES[vocabulary_size > 2**16]


def is_prepared(folder: str) -> bool:
    """Whether a manifest lies there."""
    return os.path.isfile(os.path.join(folder, MANIFEST))


def load_manifest(folder: str) -> dict:
    """Reads the manifest of a folder that `inputs.text.prepare` made.

    Raises:
        InputError: it cannot be read, is not ours, of another version, or lacks a field.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error}). Prepare the text again, into an empty "
            "folder."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} is no manifest of tokenised text: its `format` is not {FORMAT!r}. Give a "
            "folder that `python -m inputs.text.prepare` made."
        )
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path}: `version` is {manifest.get('version')!r}, and this program reads {VERSION}. "
            "Prepare the text again, into an empty folder."
        )
    _check_fields(path, manifest, FIELDS)
    if manifest["finished"]:
        _check_fields(path, manifest, FINISHED_FIELDS)
    for shard in manifest["shards"]:
        _check_fields(path, shard, SHARD_FIELDS)
    return manifest


def _check_fields(path, holder, fields):
    for field, kind in fields.items():
        if not isinstance(holder, dict) or not isinstance(holder.get(field), kind):
            raise InputError(
                f"{path}: `{field}` is missing or no {kind.__name__}. Prepare the text again, into "
                "an empty folder."
            )


def save_manifest(folder: str, manifest: dict) -> None:
    """Writes the manifest, whole or not at all."""
    path = os.path.join(folder, MANIFEST)
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "version": VERSION} | manifest, file, indent=1)
        file.write("\n")
    os.replace(f"{path}.new", path)


class ShardWriter:
    """Writes one shard, which gets its name when it is whole.

    A context manager; `facts` is what the manifest says of the shard. Where the disk is full it
    raises `InputError` and leaves nothing.
    """

    def __init__(self, folder: str, number: int, dtype: str):
        name = f"shard-{number:05d}.arrayrecord"
        self._path, self._dtype = os.path.join(folder, name), dtype
        self._fingerprint = Fingerprint()
        self.facts = {"file": name, "documents": 0, "sentences": 0, "tokens": 0}

    def __enter__(self):
        self._writer = array_record_module.ArrayRecordWriter(f"{self._path}.new", WRITER_OPTIONS)
        return self

    def add(self, key: int, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends a document: its key, [T] ids, [S] sentence lengths."""
        head = np.concatenate([[len(lengths)], lengths]).astype("<u4")
        self._writer.write(head.tobytes() + tokens.astype(self._dtype).tobytes())
        self._fingerprint.add(key, lengths)
        self.facts["documents"] += 1
        self.facts["sentences"] += len(lengths)
        self.facts["tokens"] += len(tokens)

    def __exit__(self, kind, error, trace):
        try:
            self._writer.close()
            if kind is None:
                os.replace(f"{self._path}.new", self._path)
                self.facts["fingerprint"] = self._fingerprint.hexdigest()
        except (RuntimeError, OSError) as failure:
            raise InputError(
                f"{self._path} cannot be written ({failure}). Make room; the same command goes on "
                "after the last finished shard."
            ) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{self._path}.new")


def read_shard(
    folder: str, shard: dict, dtype: str, records: BadRecords
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids [T], sentence lengths [S] uint32) of each document that can be read.

    Args:
        folder: where the manifest lies.
        shard: the manifest's entry.
        dtype: of the ids.
        records: counts them; what cannot be read is a damaged record, or many.

    Raises:
        InputError: from `records`.
    """
    path = os.path.join(folder, shard["file"])
    if not os.path.isfile(path):
        records.add_bad(f"{path} is missing. The manifest names it.", shard["documents"])
        return
    reader = array_record_module.ArrayRecordReader(path)
    try:
        yield from _documents(reader, path, shard["documents"], dtype, records)
    finally:
        with contextlib.suppress(RuntimeError):  # once more what was wrong with the file
            reader.close()


def _documents(reader, path, expected, dtype, records):
    """What `read_shard` yields."""
    number = reader.num_records()
    if number != expected:
        records.add_bad(
            f"{path} holds {number:,} records where the manifest counts {expected:,}: it was cut "
            "short, damaged or exchanged.",
            expected,
        )
        return
    for start in range(0, number, RECORDS_PER_READ):
        for place, record in _records(reader, start, min(start + RECORDS_PER_READ, number)):
            document = None if isinstance(record, str) else _decoded(record, dtype)
            if document is None:
                reason = record if isinstance(record, str) else "its lengths do not add up"
                records.add_bad(f"{path}, record {place}: damaged ({reason}).")
            else:
                records.add_good()
                yield document


def _records(reader, start, stop):
    """Yields (place, bytes, or a string that says why there are none)."""
    try:
        batch = reader.read(start, stop)
    except (RuntimeError, IndexError):
        batch = None
    if batch is not None:
        yield from zip(range(start, stop), batch, strict=True)
        return
    for place in range(start, stop):
        try:
            (record,) = reader.read([place])
        except (RuntimeError, IndexError) as error:
            record = str(error).split(";")[0]
        yield place, record


def _decoded(record, dtype):
    """(ids, sentence lengths), or None if the record is none of ours."""
    head = np.frombuffer(record, "<u4", count=len(record) // 4)
    number = int(head[0]) if len(head) else 0
    lengths, tokens = head[1 : 1 + number], np.frombuffer(record, np.uint8)[4 + 4 * number :]
    if number == 0 or lengths.sum(dtype=np.int64) * np.dtype(dtype).itemsize != len(tokens):
        return None
    return tokens.view(dtype), lengths
