"""Shards: TFRecord files in a folder, with a manifest that describes them.

The formats of text and images are in `inputs.text.shards` and `inputs.images.shards`. TFRecord
keeps a checksum of each record, so damage is found when the record is read.
"""

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from inputs.errors import InputError, first_line
from inputs.storage.files import (
    atomic_file,
    file_size,
    is_file,
    list_names,
    open_bytes,
    open_sparse,
    read_json,
)
from inputs.storage.remote import os_errors

MANIFEST = "manifest.json"
SUFFIX = ".tfrecord"
OLD_SUFFIX = ".arrayrecord"  # of versions up to 0.1.0
# The (field, value) that identifies a manifest as one of this program, by the kind of data.
TEXT = ("format", "tf_lamb tokenised text")
IMAGES = ("kind", "images")
FRAME_BYTES = 16  # of each record: its length, and the checksums of length and data
HEADER_BYTES = 12  # the length, and its checksum
RECORDS_PER_READ = 256
LONG_RECORD = 2**13  # bytes, from which it pays to read the lengths of records alone
SEARCHED_BYTES = 2**20  # at a time, for the next record after one whose length is damaged


def is_prepared(folder: str, flag: str = "--data_dir") -> bool:
    """Whether the folder holds shards: a manifest of this program, or a damaged one beside shards.

    The file name alone does not decide, because other programs also write a manifest.json.

    Raises:
        InputError: the folder is on object storage that cannot be read.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        if not is_file(path):
            return False
        if any(name.endswith((SUFFIX, OLD_SUFFIX)) for name in list_names(folder)):
            return True
    except OSError as error:
        raise InputError(f"{flag}: {folder} cannot be read ({error.strerror}).") from None
    try:
        manifest = read_json(path)
    except InputError:
        return False
    return isinstance(manifest, dict) and any(manifest.get(k) == v for k, v in (TEXT, IMAGES))


@contextlib.contextmanager
def record_writer(path: str) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that appends a record to a TFRecord file.

    The file appears at `path` when the block ends without an error; otherwise it is removed.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(path) as new:
        with _write_errors(path):
            writer = tf.io.TFRecordWriter(new)

        def write(record: bytes) -> None:
            with _write_errors(path):
                writer.write(record)

        try:
            yield write
        finally:
            with _write_errors(path):
                writer.close()


@contextlib.contextmanager
def _write_errors(path):
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{path} cannot be written ({reason}). Free some space and run the same "
            "command again: it continues after the last finished shard."
        ) from None


def read_records(path: str) -> Iterator[tuple[int, bytes | None]]:
    """Yields (offset in bytes, record) of each record of a TFRecord file, in order.

    The record is None if it is damaged. A record that the end of the file cuts is left out.

    Raises:
        OSError: the file cannot be read.
    """
    for offset, record, _ in record_spans(path):
        yield offset, record


def read_record(path: str, offset: int) -> bytes | None:
    """The record that begins at a place of a TFRecord file, in bytes; None if it is damaged.

    Raises:
        OSError: the file cannot be read.
    """
    with os_errors(path):
        try:
            return _first_record(tf.constant(path), tf.constant(offset, tf.int64)).numpy()
        except tf.errors.DataLossError:
            return None


@tf.function(
    input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int64)], autograph=False
)
def _first_record(path, offset):
    return records_from(path, offset).take(1).get_single_element()


def record_spans(path: str) -> Iterator[tuple[int, bytes | None, int | None]]:
    """`read_records`, also with where each record ends.

    The end is None if a damaged length has no further record: the rest of the file is lost.
    """
    size = file_size(path)
    offset = 0
    while offset < size:
        for record in _readable(path, offset):
            end = offset + len(record) + FRAME_BYTES
            yield offset, record, end
            offset = end
        if offset < size:
            with open_bytes(path) as file:
                length = record_length(file, offset)
                following = _next_record(file, offset, size)
            if length is not None:
                following = offset + length + FRAME_BYTES
            if following > size:
                return
            lost = length is None and following == size
            yield offset, None, None if lost else following
            offset = following


def _next_record(file, offset, size) -> int:
    """Where the next record begins after a place, as its length has the right checksum."""
    start = offset + 1
    while start < size:
        file.seek(start)
        data = np.frombuffer(file.read(SEARCHED_BYTES), np.uint8)
        count = len(data) - HEADER_BYTES + 1
        if count < 1:
            break
        crc = np.full(count, 0xFFFFFFFF, np.uint32)
        for byte in range(8):
            crc = crc >> 8 ^ _CRC_TABLE[(crc ^ data[byte : byte + count]) & 255]
        crc ^= np.uint32(0xFFFFFFFF)
        masked = (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)
        kept = np.ascontiguousarray(
            np.lib.stride_tricks.sliding_window_view(data[8:], 4)[:count]
        ).view("<u4")[:, 0]
        for place in np.flatnonzero(masked == kept) + start:
            length = record_length(file, int(place))
            if length is not None and place + length + FRAME_BYTES <= size:
                return int(place)
        start += count
    return size


def _readable(path, offset):
    """Yields the records from `offset` on, up to the first that is damaged."""

    def records():
        # Within `flat_map`, as TensorFlow 2.20 cannot serialize a data set that begins with the op.
        return tf.data.Dataset.from_tensors(tf.constant(offset, tf.int64)).flat_map(
            lambda start: records_from(path, start, buffer_bytes=2**20)
        )

    try:
        for some in elements(path, records().batch(RECORDS_PER_READ)):
            yield from some
            offset += sum(map(len, some)) + len(some) * FRAME_BYTES
    except tf.errors.DataLossError:
        with contextlib.suppress(tf.errors.DataLossError):
            yield from elements(path, records())  # of the batch that the damaged one is in


def elements(path: str, records: tf.data.Dataset) -> Iterator:
    """Yields the elements of a data set that reads a file.

    Raises:
        tf.errors.DataLossError: an element is damaged.
        OSError: the file cannot be read.
    """
    with os_errors(path):
        try:
            yield from records.as_numpy_iterator()
            return
        except tf.errors.DataLossError as error:
            damage = error
    raise damage


def record_offsets(
    path: str,
    fix: str = "Copy it again.",
    on_damage: Callable[[str, int], object] | None = None,
    stop: threading.Event | None = None,
) -> np.ndarray:
    """Where each record of a TFRecord file begins, in bytes, [N] int64; reads lengths only.

    Args:
        path: the file.
        fix: what to do about a damaged file, for the error message.
        on_damage: called for each record whose length is damaged, with a message and the number of
            records that are left out. What lies between it and the next record is left out; the
            number follows from the mean size of the file's other records. If None, the first one
            is an error.
        stop: when it is set, the search ends at the next record.

    Raises:
        InputError: the file cannot be read, is compressed, or is damaged or truncated such that no
            further record is found.
        concurrent.futures.CancelledError: `stop` was set.
    """
    offsets = []
    gaps = []  # (offset, bytes) of what is left out
    try:
        size = file_size(path)
        offset = 0
        with _open_for_lengths(path) as file:
            while offset < size:
                if stop and stop.is_set():
                    raise concurrent.futures.CancelledError
                length = record_length(file, offset)
                if length is not None and offset + length + FRAME_BYTES <= size:
                    offsets.append(offset)
                    offset += length + FRAME_BYTES
                    continue
                following = size
                if on_damage:
                    with open_bytes(path) as whole:
                        following = _next_record(whole, offset, size)
                if following == size:
                    raise InputError(
                        f"{path}, byte {offset}: no record of an uncompressed TFRecord file begins "
                        f"here; the file is compressed, damaged or truncated. {fix}"
                    )
                gaps.append((offset, following - offset))
                offset = following
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    if on_damage and gaps:
        mean = (size - sum(length for _, length in gaps)) / len(offsets)
        for offset, length in gaps:
            message = damaged(path, offset, f"its length; {length:,} bytes are left out")
            on_damage(message, max(1, round(length / mean)))
    return np.array(offsets, np.int64)


def _open_for_lengths(path):
    """Opens a file without a buffer if its records seem to be long, by the first of them."""
    file = open_sparse(path, HEADER_BYTES)
    try:
        length = record_length(file, 0)
    except BaseException:
        file.close()
        raise
    if length is not None and length >= LONG_RECORD:
        return file
    file.close()
    return open_bytes(path)


def record_length(file, offset: int) -> int | None:
    """The length of a record's data in bytes, or None if its checksum is wrong.

    Args:
        file: an open file.
        offset: where the record begins, in bytes.
    """
    file.seek(offset)
    header = file.read(HEADER_BYTES)
    length = int.from_bytes(header[:8], "little")
    if len(header) < HEADER_BYTES or _masked_crc(header[:8]) != header[8:]:
        return None
    return length


def _crc_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # the polynomial of CRC-32C
    return crc


_CRC_TABLE = np.array([_crc_of_byte(byte) for byte in range(256)], np.uint32)


def _masked_crc(data: bytes) -> bytes:
    """The checksum of TFRecord: CRC-32C, rotated and with a constant added; little-endian."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ int(_CRC_TABLE[(crc ^ byte) & 255])
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little")


def records_from(path, offset, buffer_bytes: int = 0) -> tf.data.Dataset:
    """The records of a TFRecord file from a place on.

    Args:
        path: string scalar.
        offset: int64 scalar, where a record begins, in bytes.
        buffer_bytes: read at a time; 0 for what a record needs.
    """
    records = records_op(path, offset, buffer_bytes)
    return tf.data.experimental.from_variant(records, tf.TensorSpec([], tf.string))


def records_op(path, offset, buffer_bytes: int = 0):
    """The operation of `records_from`."""
    # `tf.data.TFRecordDataset` has no argument for the offset (TensorFlow 2.20).
    return tf.raw_ops.TFRecordDatasetV2(
        filenames=tf.reshape(path, [1]),
        compression_type="",
        buffer_size=tf.constant(buffer_bytes, tf.int64),
        byte_offsets=tf.reshape(offset, [1]),
    )


def damaged(path: str, offset: int, reason: str = "") -> str:
    """Formats the message about a damaged record.

    Args:
        path: the shard.
        offset: where the record begins in it, in bytes.
        reason: what is wrong, if it is not the checksum.
    """
    return f"{path}, byte {offset}: damaged{reason and f' ({reason})'}."
