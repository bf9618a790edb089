"""Shards of tokenized documents, and the manifest of a folder of them.

A record is one document, little-endian: the number S of its sentences (uint32), their lengths in
tokens (S uint32), and its ids (uint16, or int32 if the vocabulary is larger).
"""

import os
from collections.abc import Iterator

import numpy as np

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.shards import (
    MANIFEST,
    OLD_SUFFIX,
    SUFFIX,
    TEXT,
    damaged,
    read_records,
    record_writer,
)
from inputs.storage.files import exists, local_copy, read_json, write_json

FORMAT = TEXT[1]
VERSION = 3
ARRAY_RECORD_VERSION = 2  # the same documents, in ArrayRecord files; still read
FIELDS = {
    "finished": bool,
    "vocabulary_hash": str,
    "vocabulary_size": int,
    "lower_case": bool,
    "token_dtype": str,
    "shard_tokens": int,
    "inputs": list,
    "shards": list,
}
FINISHED_FIELDS = {"held_out_below": str, "fingerprint": str}
SHARD_FIELDS = {"file": str, "documents": int, "batches": int, "tokens": int, "fingerprint": str}
TOKEN_DTYPES = ("<u2", "<i4")
PREPARE_AGAIN = "Prepare the text again, into an empty folder."


def token_dtype(vocabulary_size: int) -> str:
    """The smallest NumPy dtype, as a string, that holds every id."""
    return TOKEN_DTYPES[vocabulary_size > 2**16]


def load_manifest(folder: str) -> dict:
    """Reads the manifest of a folder that `inputs.text.prepare` made.

    Raises:
        InputError: the manifest cannot be read, has another format or version, or lacks a field.
    """
    path = os.path.join(folder, MANIFEST)
    manifest = read_json(path, fix=PREPARE_AGAIN)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a manifest of tokenized text: its `format` is not {FORMAT!r}. Give a "
            "folder that `python -m inputs.text.prepare` made."
        )
    if manifest.get("version") not in (ARRAY_RECORD_VERSION, VERSION):
        raise InputError(
            f"{path}: `version` is {manifest.get('version')!r}, but this program reads {VERSION}. "
            f"{PREPARE_AGAIN}"
        )
    manifest.setdefault("lower_case", True)  # as all text was before the field existed
    _check_fields(path, manifest, FIELDS)
    if manifest["finished"]:
        _check_fields(path, manifest, FINISHED_FIELDS)
    for shard in manifest["shards"]:
        _check_fields(path, shard, SHARD_FIELDS)
    return manifest


def _check_fields(path, values, fields):
    for field, kind in fields.items():
        if not isinstance(values, dict) or not isinstance(values.get(field), kind):
            raise InputError(
                f"{path}: `{field}` is missing or not of type {kind.__name__}. {PREPARE_AGAIN}"
            )


def save_manifest(folder: str, manifest: dict) -> None:
    """Writes the manifest atomically."""
    header = {"format": FORMAT, "version": VERSION}
    write_json(os.path.join(folder, MANIFEST), header | manifest)


class ShardWriter:
    """Writes one shard, which gets its name when it is complete. A context manager.

    Args:
        folder: folder of the shards.
        index: position of the shard among them.
        dtype: NumPy dtype of the ids, from `token_dtype`.

    Attributes:
        facts: the manifest's entry for the shard, as far as the writer knows it.

    Raises:
        InputError: the shard cannot be written.
    """

    def __init__(self, folder: str, index: int, dtype: str):
        name = f"shard-{index:05d}{SUFFIX}"
        self._writer = record_writer(os.path.join(folder, name))
        self._dtype = dtype
        self.facts = {"file": name, "documents": 0, "sentences": 0, "tokens": 0}

    def __enter__(self):
        self._write = self._writer.__enter__()
        return self

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends a document: its ids [T], and its sentence lengths [S] in tokens."""
        header = np.concatenate([[len(lengths)], lengths]).astype("<u4")
        self._write(header.tobytes() + tokens.astype(self._dtype).tobytes())
        self.facts["documents"] += 1
        self.facts["sentences"] += len(lengths)
        self.facts["tokens"] += len(tokens)

    def __exit__(self, *error):
        return self._writer.__exit__(*error)


def read_shard(
    folder: str, shard: dict, dtype: str, records: BadRecords
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids [T], sentence lengths [S] uint32) of each readable document.

    Args:
        folder: folder of the shards.
        shard: the manifest's entry for the shard.
        dtype: NumPy dtype of the ids.
        records: counts the documents, also those that are missing according to the manifest.

    Raises:
        InputError: from `records`.
    """
    path = os.path.join(folder, shard["file"])
    with records.of_file():
        yield from _read_documents(path, shard, dtype, records)


def _read_documents(path, shard, dtype, records):
    if not exists(path):
        records.add_bad(f"{path} is missing, but the manifest lists it.", shard["documents"])
        return
    seen = 0
    read = _read_array_record if path.endswith(OLD_SUFFIX) else read_records
    for place, record in read(path):
        seen += 1
        document = None if record is None else _decode(record, dtype)
        if document is None:
            sizes = "" if record is None else "its sentence lengths do not add up to its size"
            records.add_bad(damaged(path, place, sizes))
        else:
            records.add_good()
            yield document
    expected = shard["documents"]
    if seen != expected:
        records.add_bad(
            f"{path} holds {seen:,} records, but the manifest says {expected:,}: the "
            "file was truncated, damaged or replaced.",
            max(expected - seen, 1),
        )


def _read_array_record(path):
    """`inputs.shards.read_records` for a file of version 0.1.0; places are numbers of records."""
    from array_record.python import array_record_module

    with local_copy(path) as local:
        try:
            reader = array_record_module.ArrayRecordReader(local)
            count = reader.num_records()
        except RuntimeError:
            return
        for index in range(count):
            try:
                (record,) = reader.read([index])
            except (RuntimeError, IndexError):
                record = None
            yield index, record


def _decode(record, dtype):
    """(ids, sentence lengths), or None if the record has another format."""
    header = np.frombuffer(record, "<u4", count=len(record) // 4)
    sentences = int(header[0]) if len(header) else 0
    lengths = header[1 : 1 + sentences]
    tokens = np.frombuffer(record, np.uint8)[4 + 4 * sentences :]
    if sentences == 0 or lengths.sum(dtype=np.int64) * np.dtype(dtype).itemsize != len(tokens):
        return None
    return tokens.view(dtype), lengths
