"""Packs several short sequences into one row, and sorts sequences into buckets by their length.

Both leave out padding, without a change of the loss: `models.packing` keeps the sequences of a row
apart, and the batch of a bucket is a shorter one of the same layout. Functions on NumPy arrays.
"""

import numpy as np

# Keys of `inputs.text.examples.element_spec` -> what packing does with them.
PER_TOKEN = ("input_word_ids", "input_type_ids")
PER_PREDICTION = ("masked_lm_ids", "masked_lm_weights")
PER_SEQUENCE = ("next_sentence_labels", "next_sentence_weights", "example_weights")


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


def pack(batch: dict, *, per_row: int, rows: int | None = None) -> dict:
    """Returns a batch with several sequences in each row.

    Args:
        batch: arrays as `inputs.text.examples.element_spec` describes, N sequences of L tokens with
            P predictions.
        per_row: K, the maximum number of sequences in a row.
        rows: R, the number of rows of the result, of which the last may be empty; None for as many
            as are needed.

    Returns:
        A dictionary of arrays. As in `batch`, but of R rows: `input_word_ids`, `input_type_ids`
        [R, L]; `masked_lm_positions` (in the row), `masked_lm_ids`, `masked_lm_weights` [R, K·P].
        In addition `sequence_ids` [R, L] int32, k for the tokens of the row's k-th sequence and 0
        for padding; `positions` [R, L] int32, which restart from 0 in each sequence; and
        `sequence_starts` [R, K] int32, the first token of each sequence. `next_sentence_labels`,
        `next_sentence_weights` and `example_weights` are [R, K], with weight 0 where there is no
        sequence.

    Raises:
        ValueError: `rows` are too few.
    """
    lengths = batch["input_mask"].sum(axis=1)
    count, row_length = batch["input_word_ids"].shape
    predictions = batch["masked_lm_ids"].shape[1]
    plan = assign_rows(lengths, row_length, per_row)
    if rows is None:
        rows = len(plan)
    if len(plan) > rows:
        raise ValueError(f"{count} sequences need {len(plan)} rows. Received: rows={rows}.")

    def zeros(key, *shape):
        return np.zeros(shape, batch[key].dtype)

    packed = {key: zeros(key, rows, row_length) for key in PER_TOKEN}
    packed |= {
        name: np.zeros([rows, row_length], np.int32) for name in ("sequence_ids", "positions")
    }
    names = (*PER_PREDICTION, "masked_lm_positions")
    packed |= {key: zeros(key, rows, per_row * predictions) for key in names}
    packed |= {key: zeros(key, rows, per_row) for key in PER_SEQUENCE if key in batch}
    packed["sequence_starts"] = np.zeros([rows, per_row], np.int32)
    for row, members in enumerate(plan):
        start = 0
        for k, index in enumerate(members):
            length = int(lengths[index])
            place = slice(start, start + length)
            for key in PER_TOKEN:
                packed[key][row, place] = batch[key][index, :length]
            packed["sequence_ids"][row, place] = k + 1
            packed["positions"][row, place] = np.arange(length)
            masks = slice(k * predictions, (k + 1) * predictions)
            for key in PER_PREDICTION:
                packed[key][row, masks] = batch[key][index]
            # Unused predictions have position 0, which would be another sequence's first token;
            # their weight is 0.
            packed["masked_lm_positions"][row, masks] = start + batch["masked_lm_positions"][index]
            for key in PER_SEQUENCE:
                if key in batch:
                    packed[key][row, k] = batch[key][index]
            packed["sequence_starts"][row, k] = start
            start += length
    return packed


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
