"""Shards of tokenised documents, and the manifest of a folder of them.

A record is one document, little-endian: the number S of its sentences (uint32), their lengths in
tokens (S uint32), and its ids (uint16, or int32 if the vocabulary is larger).
"""

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from array_record.python import array_record_module

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.files import read_json, write_json
from inputs.shards import MANIFEST, SUFFIX, TEXT, UNREADABLE, damaged, record_writer

FORMAT, VERSION = TEXT[1], 2
RECORDS_PER_READ = 256
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
            f"{path} is not a manifest of tokenised text: its `format` is not {FORMAT!r}. Give a "
            "folder that `python -m inputs.text.prepare` made."
        )
    if manifest.get("version") != VERSION:
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
        records: counts the documents. If the shard is missing, or the manifest gives another number
            of records, all records of the manifest count as damaged, which is an error unless
            `records` allows it.

    Raises:
        InputError: from `records`.
    """
    path = os.path.join(folder, shard["file"])
    with records.of_file():
        yield from _read_documents(path, shard, dtype, records)


def _read_documents(path, shard, dtype, records):
    if not os.path.isfile(path):
        records.add_bad(f"{path} is missing, but the manifest lists it.", shard["documents"])
        return
    reader = array_record_module.ArrayRecordReader(path)
    try:
        yield from _documents(reader, path, shard["documents"], dtype, records)
    finally:
        with contextlib.suppress(RuntimeError):  # repeats the error of a damaged file
            reader.close()


def _documents(reader, path, expected, dtype, records):
    count = reader.num_records()
    if count != expected:
        records.add_bad(
            f"{path} holds {count:,} records, but the manifest says {expected:,}: the file was "
            "truncated, damaged or replaced.",
            expected,
        )
        return
    for start in range(0, count, RECORDS_PER_READ):
        for index, record, error in _read(reader, start, min(start + RECORDS_PER_READ, count)):
            document = None if error else _decode(record, dtype)
            if document is None:
                reason = error or "its sentence lengths do not add up to its size"
                records.add_bad(damaged(path, index, reason))
            else:
                records.add_good()
                yield document


def _read(reader, start, stop):
    """Yields (index, bytes, None), or (index, None, error) for a damaged record."""
    try:
        batch = reader.read(start, stop)
    except UNREADABLE:  # does not tell which record is damaged
        batch = None
    if batch is not None:
        yield from ((start + i, record, None) for i, record in enumerate(batch))
        return
    for index in range(start, stop):
        try:
            (record,) = reader.read([index])
        except UNREADABLE as error:
            yield index, None, error
        else:
            yield index, record, None


def _decode(record, dtype):
    """(ids, sentence lengths), or None if the record has another format."""
    header = np.frombuffer(record, "<u4", count=len(record) // 4)
    sentences = int(header[0]) if len(header) else 0
    lengths = header[1 : 1 + sentences]
    tokens = np.frombuffer(record, np.uint8)[4 + 4 * sentences :]
    if sentences == 0 or lengths.sum(dtype=np.int64) * np.dtype(dtype).itemsize != len(tokens):
        return None
    return tokens.view(dtype), lengths
