"""Packs several short sequences into one row, and sorts sequences into buckets by their length.

Both leave out padding, without a change of the loss: `models.packing` keeps the sequences of a row
apart, and the batch of a bucket is a shorter one of the same layout.

Which sequences share a row is planned once, before the training, from their lengths: so the rows of
a step do not depend on the number of hosts and replicas, no sequence is ever left out, and the
shapes are static.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow as tf

from inputs.pages import PagesWriter

ROWS = "rows"  # name of the array of a plan
GROUP = 64  # consecutive sequences that are packed with each other, and so are read together
# Keys of `inputs.text.batches.element_spec` -> what packing does with them.
PER_TOKEN = ("input_word_ids", "input_type_ids")
PER_PREDICTION = ("masked_lm_ids", "masked_lm_weights")
PER_SEQUENCE = ("next_sentence_labels", "next_sentence_weights", "example_weights")


def packed_spec(rows: int, row_length: int, predictions: int, per_row: int):
    """The shapes and dtypes of a batch of packed rows, as a dictionary of `tf.TensorSpec`.

    `sequence_ids` is k for the tokens of the row's k-th sequence, and 0 for padding. `positions`
    restart from 0 in each sequence. `sequence_starts` are the places of the first tokens of the
    sequences in the row. `masked_lm_positions` are places in the row. The weights of a sequence
    that is not there are 0. The other tensors are those of `inputs.text.batches.element_spec`.

    Args:
        rows: R, rows per batch.
        row_length: L, tokens per row.
        predictions: P, the maximum number of masked tokens per sequence.
        per_row: K, the maximum number of sequences in a row.
    """
    tokens = tf.TensorSpec([rows, row_length], tf.int32)
    picks = [rows, per_row * predictions]
    of_sequences = [rows, per_row]
    return {
        "input_word_ids": tokens,
        "input_type_ids": tokens,
        "sequence_ids": tokens,
        "positions": tokens,
        "sequence_starts": tf.TensorSpec(of_sequences, tf.int32),
        "masked_lm_positions": tf.TensorSpec(picks, tf.int32),
        "masked_lm_ids": tf.TensorSpec(picks, tf.int32),
        "masked_lm_weights": tf.TensorSpec(picks, tf.float32),
        "next_sentence_labels": tf.TensorSpec(of_sequences, tf.int32),
        "next_sentence_weights": tf.TensorSpec(of_sequences, tf.float32),
        "example_weights": tf.TensorSpec(of_sequences, tf.float32),
    }


def assign_rows(lengths, row_length: int, per_row: int) -> list[list[int]]:
    """Distributes sequences over rows, the longest first, each to the fullest row that has room.

    Args:
        lengths: [N] int array, tokens of each sequence.
        row_length: tokens of a row.
        per_row: the maximum number of sequences in a row.

    Returns:
        For each row the indices of its sequences.

    Raises:
        ValueError: a sequence is empty or longer than a row.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > row_length):
        bad = next(i for i, n in enumerate(lengths) if not 1 <= n <= row_length)
        raise ValueError(f"sequence {bad} has {lengths[bad]} tokens. Rows take 1 to {row_length}.")
    rows: list[list[int]] = []
    room: list[int] = []
    for index in np.argsort(-lengths, kind="stable"):
        fitting = [
            row
            for row, left in enumerate(room)
            if left >= lengths[index] and len(rows[row]) < per_row
        ]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
        else:
            rows.append([])
            room.append(row_length)
            row = len(rows) - 1
        rows[row].append(int(index))
        room[row] -= int(lengths[index])
    return rows


def plan_rows(lengths: Iterable[np.ndarray], row_length: int, per_row: int) -> Iterator[np.ndarray]:
    """Plans the rows of a data set.

    Args:
        lengths: parts of an int array, tokens of each sequence in order.
        row_length: tokens of a row.
        per_row: K, the maximum number of sequences in a row.

    Yields:
        [R, K] int64, the numbers of the sequences of R rows, -1 where there is none. Each sequence
        is in one row. Rows of the same `GROUP` of sequences lie together.

    Raises:
        ValueError: a sequence is empty or longer than a row.
    """
    first = 0
    rest = np.zeros(0, np.int64)
    for part in itertools.chain(lengths, [None]):
        rest = rest if part is None else np.concatenate([rest, part])
        whole = len(rest) if part is None else len(rest) // GROUP * GROUP
        rows = []
        for start in range(0, whole, GROUP):
            group = assign_rows(rest[start : min(start + GROUP, whole)], row_length, per_row)
            # Rows of neighbors are neighbors.
            rows += [[first + start + i for i in sorted(row)] for row in sorted(group, key=min)]
        if rows:
            plan = np.full([len(rows), per_row], -1, np.int64)
            for row, members in zip(plan, rows, strict=True):
                row[: len(members)] = members
            yield plan
        first, rest = first + whole, rest[whole:]


def write_plan(folder: str, lengths: Iterable[np.ndarray], row_length: int, per_row: int) -> None:
    """Writes `plan_rows` as the array `ROWS` of a folder, for `inputs.pages.open_pages`.

    Raises:
        InputError: the folder cannot be written.
        ValueError: a sequence is empty or longer than a row.
    """
    with PagesWriter(folder, {ROWS: np.int64}, {ROWS: per_row}) as writer:
        for rows in plan_rows(lengths, row_length, per_row):
            writer.append(**{ROWS: rows})


def pack_rows(batch: dict, per_row: int) -> dict:
    """Joins the sequences of each row, in a graph.

    Args:
        batch: tensors as `inputs.text.batches.element_spec` describes, of R·K sequences: those of
            the first row, then those of the second. Sequences with an example weight of 0 are left
            out of the row.
        per_row: K.

    Returns:
        A dictionary of tensors as `packed_spec` describes.
    """
    row_length = batch["input_word_ids"].shape[1]
    predictions = batch["masked_lm_ids"].shape[1]

    def of_rows(key, *shape):
        return tf.reshape(batch[key], [-1, *shape])

    present = of_rows("example_weights", per_row) > 0
    lengths = tf.reduce_sum(of_rows("input_mask", per_row, row_length), axis=2)
    lengths = tf.where(present, lengths, 0)
    ends = tf.cumsum(lengths, axis=1)
    starts = ends - lengths
    check = tf.debugging.assert_less_equal(ends, row_length, "the sequences of a row are too long")
    with tf.control_dependencies([check]):
        place = tf.range(row_length)[tf.newaxis]
    # The number of sequences that end at or before a place is the index of the one that is there.
    which = tf.reduce_sum(tf.cast(place[:, :, tf.newaxis] >= ends[:, tf.newaxis], tf.int32), axis=2)
    is_text = which < per_row
    which = tf.minimum(which, per_row - 1)
    positions = tf.where(is_text, place - tf.gather(starts, which, batch_dims=1), 0)
    source = which * row_length + positions
    packed = {}
    for key in PER_TOKEN:
        tokens = tf.gather(of_rows(key, per_row * row_length), source, batch_dims=1)
        packed[key] = tf.where(is_text, tokens, 0)
    # The number of a sequence in its row, and not its slot, so that the first one is 1.
    number = tf.gather(tf.cumsum(tf.cast(present, tf.int32), axis=1), which, batch_dims=1)
    packed["sequence_ids"] = tf.where(is_text, number, 0)
    packed["positions"] = positions
    starts = tf.where(present, starts, 0)
    packed["sequence_starts"] = starts
    # Unused predictions have position 0, which would be another sequence's first token; their
    # weight is 0.
    places = of_rows("masked_lm_positions", per_row, predictions) + starts[:, :, tf.newaxis]
    packed["masked_lm_positions"] = tf.reshape(places, [-1, per_row * predictions])
    packed |= {key: of_rows(key, per_row * predictions) for key in PER_PREDICTION}
    return packed | {key: of_rows(key, per_row) for key in PER_SEQUENCE}


def pack(batch: dict, *, per_row: int) -> dict:
    """Packs the sequences of one batch, in as few rows as `assign_rows` finds.

    Args:
        batch: arrays as `inputs.text.batches.element_spec` describes.
        per_row: the maximum number of sequences in a row.

    Returns:
        A dictionary of arrays as `packed_spec` describes.
    """
    count, row_length = batch["input_word_ids"].shape
    plan = assign_rows(batch["input_mask"].sum(axis=1), row_length, per_row)
    members = np.full([len(plan), per_row], count)
    for row, indices in zip(members, plan, strict=True):
        row[: len(indices)] = indices
    # Sequence number `count` has only zeros, and so the weight 0.
    padded = {
        key: np.concatenate([value, np.zeros_like(value[:1])])[members.ravel()]
        for key, value in batch.items()
    }
    return {key: value.numpy() for key, value in pack_rows(padded, per_row).items()}


def bucket(batch: dict, bounds: list[int]) -> dict[int, dict]:
    """Sorts the sequences of a batch into buckets by length, and cuts off the padding.

    Args:
        batch: as for `pack`.
        bounds: ascending lengths of the buckets; the last one is the length of the batch.

    Returns:
        Length of a bucket -> its batch, of the same layout and that length. Empty ones are left
        out.

    Raises:
        ValueError: the bounds do not ascend, or the last one is not the batch's length.
    """
    length = batch["input_word_ids"].shape[1]
    if sorted(set(bounds)) != list(bounds) or not bounds or bounds[-1] != length:
        raise ValueError(
            f"bounds must ascend to the length of the batch, {length}. Received: {list(bounds)}."
        )
    which = np.searchsorted(bounds, batch["input_mask"].sum(axis=1))
    buckets = {}
    for number, bound in enumerate(bounds):
        rows = which == number
        if rows.any():
            cut = (*PER_TOKEN, "input_mask")
            buckets[bound] = {
                key: value[rows][:, :bound] if key in cut else value[rows]
                for key, value in batch.items()
            }
    return buckets
