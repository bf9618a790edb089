"""Joins several short sequences into one example: packed into a row, or in buckets by length.

Both leave out padding, without a change of the loss. A packed row has room for several sequences,
which `models.packing` keeps apart. A group of buckets has one place for each of its sequences; the
places of one bucket are a batch of the usual layout, with shorter sequences.

Which sequences share an example is planned once, before the training, from their lengths: so the
examples of a step do not depend on the number of hosts and replicas, no sequence is ever left out,
and the shapes are static.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np
import tensorflow as tf

from inputs.pages import PagesWriter

ROWS = "rows"  # name of the array of a plan
# Other lengths of buckets are proposed if they leave out a twentieth of the tokens.
WORSE = 0.95
# Keys of `inputs.text.batches.element_spec` -> what is done with them.
PER_TOKEN = ("input_word_ids", "input_type_ids")
PER_PREDICTION = ("masked_lm_ids", "masked_lm_weights")
PER_SEQUENCE = ("next_sentence_labels", "next_sentence_weights", "example_weights")


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Examples that are rows of tokens, each with several sequences.

    Attributes:
        row_length: L, tokens of a row, and of its longest sequences.
        columns: K, the maximum number of sequences in a row.
        unit: what an example is called, in the plural.
        neighbors: the number of consecutive sequences that are packed with each other, and so are
            read together.
    """

    row_length: int
    columns: int
    unit: ClassVar[str] = "rows"
    neighbors: ClassVar[int] = 64

    @property
    def name(self) -> str:
        """The name of a plan's folder."""
        return f"rows-of-{self.columns}"

    @property
    def tokens(self) -> int:
        """The number of tokens of an example."""
        return self.row_length

    def facts(self, lengths: np.ndarray) -> dict:
        """What is kept with a plan, besides the rows; see `LengthBuckets.facts`."""
        del lengths
        return {}

    def describe(self, sequences: int, rows: int) -> str:
        """Formats how many sequences the rows of a plan hold, for a message."""
        mean = sequences / rows
        return (
            f"Packed: {sequences:,} sequences in {rows:,} rows of {self.row_length} tokens, "
            f"{mean:.2f} in a row on average, at most {self.columns}. A step has {mean:.2f} times "
            "the batch size in sequences"
        )

    def spec(self, rows: int, predictions: int):
        """The shapes and dtypes of a batch, as a dictionary of `tf.TensorSpec`.

        `sequence_ids` is k for the tokens of the row's k-th sequence, and 0 for padding.
        `positions` restart from 0 in each sequence. `sequence_starts` are the places of the first
        tokens of the sequences in the row. `masked_lm_positions` are places in the row. The weights
        of a sequence that is not there are 0. The other tensors are those of
        `inputs.text.batches.element_spec`.

        Args:
            rows: R, rows per batch.
            predictions: P, the maximum number of masked tokens per sequence.
        """
        tokens = tf.TensorSpec([rows, self.row_length], tf.int32)
        picks = [rows, self.columns * predictions]
        of_sequences = [rows, self.columns]
        return {
            "input_word_ids": tokens,
            "input_type_ids": tokens,
            "sequence_ids": tokens,
            "positions": tokens,
            "sequence_starts": tf.TensorSpec(of_sequences, tf.int32),
            **_labels_spec(picks, of_sequences),
        }

    def assign(self, lengths) -> np.ndarray:
        """Distributes sequences over rows, the longest first, each to the fullest one with room.

        Args:
            lengths: [N] int array, tokens of each sequence.

        Returns:
            [R, K] int64, for each row the indices of its sequences, in order; -1 where there is
            none. Rows of neighbors are neighbors.

        Raises:
            ValueError: a sequence is empty or longer than a row.
        """
        lengths = _checked(lengths, self.row_length)
        rows: list[list[int]] = []
        room: list[int] = []
        for index in np.argsort(-lengths, kind="stable"):
            fitting = [
                row
                for row, left in enumerate(room)
                if left >= lengths[index] and len(rows[row]) < self.columns
            ]
            if fitting:
                row = min(fitting, key=lambda row: room[row])
            else:
                rows.append([])
                room.append(self.row_length)
                row = len(rows) - 1
            rows[row].append(int(index))
            room[row] -= int(lengths[index])
        plan = np.full([len(rows), self.columns], -1, np.int64)
        for row, members in zip(plan, sorted(rows, key=min), strict=True):
            row[: len(members)] = sorted(members)
        return plan

    def join(self, batch: dict) -> dict:
        """Joins the sequences of each row, in a graph.

        Args:
            batch: tensors as `inputs.text.batches.element_spec` describes, of R·K sequences: those
                of the first row, then those of the second. Sequences with an example weight of 0
                are left out of the row.

        Returns:
            A dictionary of tensors as `spec` describes.
        """
        row_length, per_row = self.row_length, self.columns
        predictions = batch["masked_lm_ids"].shape[1]

        def of_rows(key, *shape):
            return tf.reshape(batch[key], [-1, *shape])

        present = of_rows("example_weights", per_row) > 0
        lengths = tf.reduce_sum(of_rows("input_mask", per_row, row_length), axis=2)
        lengths = tf.where(present, lengths, 0)
        ends = tf.cumsum(lengths, axis=1)
        starts = ends - lengths
        check = tf.debugging.assert_less_equal(
            ends, row_length, "the sequences of a row are too long"
        )
        with tf.control_dependencies([check]):
            place = tf.range(row_length)[tf.newaxis]
        # The number of sequences that end at or before a place is the index of the one there.
        which = tf.reduce_sum(
            tf.cast(place[:, :, tf.newaxis] >= ends[:, tf.newaxis], tf.int32), axis=2
        )
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


@dataclasses.dataclass(frozen=True)
class LengthBuckets:
    """Examples that are groups of sequences, with a place of fixed length for each.

    So a step has the same shapes and the same number of sequences of each bucket every time, as a
    TPU needs it, and a batch is a sample of short and long sequences.

    Attributes:
        lengths: tokens of the K places of a group, in ascending order. Equal ones are one bucket.
        unit: what an example is called, in the plural.
        neighbors: the number of consecutive sequences that are grouped with each other, and so are
            read together. More of them fill the places better.
    """

    lengths: tuple[int, ...]
    unit: ClassVar[str] = "groups"
    neighbors: ClassVar[int] = 512

    @property
    def columns(self) -> int:
        """K, the number of sequences of a group."""
        return len(self.lengths)

    @property
    def name(self) -> str:
        """The name of a plan's folder."""
        counts = collections.Counter(self.lengths)
        return f"groups-of-{'-'.join(f'{n}x{counts[n]}' for n in counts)}"

    @property
    def tokens(self) -> int:
        """The number of tokens of an example."""
        return sum(self.lengths)

    def facts(self, lengths: np.ndarray) -> dict:
        """What is kept with a plan, besides the groups.

        Args:
            lengths: [N] int array, tokens of each sequence in order.

        Returns:
            `fitting`: the lengths of as many places that take the fewest tokens, in quarters of the
            longest, because the program of a step grows with each different length. `tokens`: the
            number of tokens of all groups of such a plan.
        """
        columns, longest = self.columns, self.lengths[-1]
        bounds = [max(5, math.ceil(longest * quarter / 4)) for quarter in (1, 2, 3)]
        starts = np.arange(0, len(lengths), self.neighbors)
        longer = np.stack(  # of each group of neighbors
            [np.add.reduceat(lengths > bound, starts, dtype=np.int64) for bound in (0, *bounds)], 1
        )
        # How many places are longer than each bound, if there are so many groups per sequence that
        # all places are filled, or those that are longer than one of the bounds.
        shares = longer.sum(0)[1:] / len(lengths)
        groups = {1.0, *(columns * share / n for share in shares for n in range(1, columns + 1))}
        wanted = {
            (columns, *(max(1, math.ceil(columns * share / some - 1e-9)) for share in shares))
            for some in groups
            if some >= 1
        }
        best = None
        for places in wanted:
            needed = np.max(-(-longer // np.array(places)), axis=1).sum()
            fewer = [*places[1:], 0]
            counts = [many - few for many, few in zip(places, fewer, strict=True)]
            fitting = [
                n for n, count in zip([*bounds, longest], counts, strict=True) for _ in range(count)
            ]
            best = min(best or (math.inf,), (int(needed) * sum(fitting), fitting))
        return {"fitting": best[1], "tokens": best[0]}

    def describe(self, sequences: int, groups: int) -> str:
        """Formats how well the groups of a plan are filled, for a message."""
        filled = sequences / (groups * self.columns)
        longest = self.lengths[-1]
        counts = collections.Counter(self.lengths)
        lengths = ", ".join(f"{counts[n]} x {n}" if counts[n] > 1 else str(n) for n in counts)
        return (
            f"In buckets: {sequences:,} sequences in {groups:,} groups of {self.columns} "
            f"({lengths} tokens). {filled:.1%} of the places are filled, and a sequence takes "
            f"{groups * self.tokens / (sequences * longest):.2f} times the {longest} tokens of a "
            f"padded one. A step has {self.columns * filled:.2f} times the batch size in sequences"
        )

    def propose(self, sequences: int, groups: int, facts: dict) -> str:
        """Formats which lengths would leave out more tokens, for a message; "" if none.

        Args:
            sequences, groups: their numbers in the plan.
            facts: of the plan, from `facts`.
        """
        padded = sequences * self.lengths[-1]
        if facts["tokens"] >= WORSE * min(groups * self.tokens, padded):
            if groups * self.tokens <= padded:
                return ""
            return "Buckets take more tokens than padding: leave out length_buckets"
        lengths = ",".join(map(str, facts["fitting"]))
        return (
            f"Lengths that fit better: length_buckets={lengths}, with "
            f"{facts['tokens'] / padded:.2f} times the tokens of padded sequences"
        )

    @property
    def _buckets(self) -> list[tuple[int, slice]]:
        """The length of each bucket, and its places in a group."""
        bounds = sorted(set(self.lengths))
        first = [self.lengths.index(bound) for bound in bounds]
        return [
            (bound, slice(start, stop))
            for bound, start, stop in zip(bounds, first, [*first[1:], self.columns], strict=True)
        ]

    def spec(self, rows: int, predictions: int):
        """The shapes and dtypes of a batch, as a dictionary of `tf.TensorSpec`.

        The tensors are those of `inputs.text.batches.element_spec` with the places of a group as a
        second dimension, but those of tokens, of which each bucket has its own: "NAME_LENGTH". The
        weights of a place without a sequence are 0.

        Args:
            rows: R, groups per batch.
            predictions: P, the maximum number of masked tokens per sequence.
        """
        spec = {}
        for length, places in self._buckets:
            tokens = tf.TensorSpec([rows, places.stop - places.start, length], tf.int32)
            spec |= {f"{key}_{length}": tokens for key in (*PER_TOKEN, "input_mask")}
        picks, of_sequences = [rows, self.columns, predictions], [rows, self.columns]
        return spec | _labels_spec(picks, of_sequences)

    def assign(self, lengths) -> np.ndarray:
        """Distributes sequences over as few groups as have places for all, the longest first.

        Args:
            lengths: [N] int array, tokens of each sequence.

        Returns:
            [R, K] int64, the index of the sequence at each place of a group; -1 where there is
            none. Sequences of one bucket are in their order.

        Raises:
            ValueError: a sequence is empty or longer than the longest bucket.
        """
        lengths = _checked(lengths, self.lengths[-1])
        # Sequences that are too long for the shorter buckets need as many places in the others.
        shorter = [0, *(bound for bound, _ in self._buckets[:-1])]
        groups = max(
            -(-np.sum(lengths > bound) // np.sum(np.array(self.lengths) > bound))
            for bound in shorter
        )
        plan = np.full([groups, self.columns], -1, np.int64)
        longest = np.argsort(-lengths, kind="stable")
        for _, places in reversed(self._buckets):
            members = np.full(plan[:, places].shape, -1, np.int64)
            taken = np.sort(longest[: members.size])
            members.ravel()[: len(taken)] = taken
            plan[:, places], longest = members, longest[members.size :]
        return plan

    def join(self, batch: dict) -> dict:
        """Arranges the sequences of each group in buckets, in a graph.

        Args:
            batch: tensors as `inputs.text.batches.element_spec` describes, of R·K sequences: those
                of the first group, then those of the second. A sequence with an example weight of
                0 may be longer than its place.

        Returns:
            A dictionary of tensors as `spec` describes.
        """
        columns = self.columns

        def of_groups(key):
            return tf.reshape(batch[key], [-1, columns, *batch[key].shape[1:]])

        joined = {
            key: of_groups(key) for key in ("masked_lm_positions", *PER_PREDICTION, *PER_SEQUENCE)
        }
        present = joined["example_weights"] > 0
        used = tf.where(present, tf.reduce_sum(of_groups("input_mask"), 2), 0)
        check = tf.debugging.assert_less_equal(
            used, tf.constant(self.lengths), "a sequence is longer than its bucket"
        )
        with tf.control_dependencies([check]):
            positions = joined["masked_lm_positions"]
            joined["masked_lm_positions"] = tf.where(present[..., tf.newaxis], positions, 0)
        for length, places in self._buckets:
            for key in (*PER_TOKEN, "input_mask"):
                joined[f"{key}_{length}"] = of_groups(key)[:, places, :length]
        return joined


def bucket_batches(batch: dict) -> list[dict]:
    """Splits a batch of `LengthBuckets` into one of the usual layout for each bucket.

    Args:
        batch: as `LengthBuckets.spec` describes.

    Returns:
        Dictionaries as `inputs.text.batches.element_spec` describes, with shorter sequences first.
        Each has all sequences of one bucket.
    """
    prefix = "input_mask_"
    bounds = sorted(int(key.removeprefix(prefix)) for key in batch if key.startswith(prefix))
    batches = []
    first = 0
    for bound in bounds:
        last = first + batch[f"{prefix}{bound}"].shape[1]
        part = {key: batch[f"{key}_{bound}"] for key in (*PER_TOKEN, "input_mask")}
        for key in ("masked_lm_positions", *PER_PREDICTION, *PER_SEQUENCE):
            part[key] = batch[key][:, first:last]
        batches.append({key: tf.reshape(x, [-1, *x.shape[2:]]) for key, x in part.items()})
        first = last
    return batches


def _labels_spec(picks: list[int], of_sequences: list[int]) -> dict:
    """The tensors of a layout besides tokens, by the shapes for masked tokens and for sequences."""
    return {
        "masked_lm_positions": tf.TensorSpec(picks, tf.int32),
        "masked_lm_ids": tf.TensorSpec(picks, tf.int32),
        "masked_lm_weights": tf.TensorSpec(picks, tf.float32),
        "next_sentence_labels": tf.TensorSpec(of_sequences, tf.int32),
        "next_sentence_weights": tf.TensorSpec(of_sequences, tf.float32),
        "example_weights": tf.TensorSpec(of_sequences, tf.float32),
    }


def _checked(lengths, longest: int) -> np.ndarray:
    """Returns `lengths` as an array.

    Raises:
        ValueError: one is 0, or is larger than `longest`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > longest):
        bad = next(i for i, n in enumerate(lengths) if not 1 <= n <= longest)
        raise ValueError(f"sequence {bad} has {lengths[bad]} tokens, and not 1 to {longest}.")
    return lengths


def plan_rows(lengths: Iterable[np.ndarray], layout) -> Iterator[np.ndarray]:
    """Plans the examples of a data set.

    Args:
        lengths: parts of an int array, tokens of each sequence in order.
        layout: a `PackedRows` or `LengthBuckets` of K sequences at most.

    Yields:
        [R, K] int64, the numbers of the sequences of R examples, -1 where there is none. Each
        sequence is in one example. Examples of the same `layout.neighbors` lie together.

    Raises:
        ValueError: see `layout.assign`.
    """
    first = 0
    rest = np.zeros(0, np.int64)
    for part in itertools.chain(lengths, [None]):
        rest = rest if part is None else np.concatenate([rest, part])
        whole = len(rest) if part is None else len(rest) // layout.neighbors * layout.neighbors
        for start in range(0, whole, layout.neighbors):
            plan = layout.assign(rest[start : min(start + layout.neighbors, whole)])
            yield np.where(plan >= 0, plan + first + start, -1)
        first, rest = first + whole, rest[whole:]


def write_plan(folder: str, lengths: Iterable[np.ndarray], layout, fix: str) -> None:
    """Writes `plan_rows` as the array `ROWS` of a folder, for `inputs.pages.open_pages`.

    `layout.facts` are its facts. See `PagesWriter` for `fix`.

    Raises:
        InputError: the folder cannot be written.
        ValueError: see `plan_rows`.
    """
    kept = []

    def keep():
        for part in lengths:
            kept.append(part.astype(np.int32))
            yield part

    with PagesWriter(folder, {ROWS: np.int64}, {ROWS: layout.columns}, fix) as writer:
        for rows in plan_rows(keep(), layout):
            writer.append(**{ROWS: rows})
        writer.facts = layout.facts(np.concatenate(kept))


def join_batch(batch: dict, layout) -> dict:
    """Joins the sequences of one batch, in as few examples as `layout.assign` finds.

    Args:
        batch: arrays as `inputs.text.batches.element_spec` describes.
        layout: a `PackedRows` or `LengthBuckets`.

    Returns:
        A dictionary of arrays as `layout.spec` describes.
    """
    plan = layout.assign(batch["input_mask"].sum(axis=1))
    # Sequence number -1, the last one, has only zeros, and so the weight 0.
    padded = {
        key: tf.constant(np.concatenate([value, np.zeros_like(value[:1])])[plan.ravel()])
        for key, value in batch.items()
    }
    return {key: value.numpy() for key, value in layout.join(padded).items()}
