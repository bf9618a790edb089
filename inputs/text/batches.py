"""Pre-training batches of sequences that are read block by block, alone or joined."""

import abc
import functools

import tensorflow as tf

from inputs.bad_records import BadRecords
from inputs.damage import Damage
from inputs.order import Order, by_block, number_of_lanes, row_batches

# Sequences that lie together are read together, about this many tokens.
BLOCK_TOKENS = 2**15
MIN_BLOCK = 32  # sequences; of text, one may be the random second segment of another
WINDOW_BLOCKS = 8  # whose examples are mixed


def element_spec(batch_size: int, sequence_length: int, predictions: int):
    """The shapes and dtypes of a pre-training batch, as a dictionary of `tf.TensorSpec`.

    Args:
        batch_size: B, examples per batch.
        sequence_length: L, tokens per example.
        predictions: P, the maximum number of masked tokens per example.
    """
    row = tf.TensorSpec([batch_size, sequence_length], tf.int32)
    picks = tf.TensorSpec([batch_size, predictions], tf.int32)
    return {
        "input_word_ids": row,
        "input_mask": row,
        "input_type_ids": row,
        "masked_lm_positions": picks,
        "masked_lm_ids": picks,
        "masked_lm_weights": tf.TensorSpec([batch_size, predictions], tf.float32),
        "next_sentence_labels": tf.TensorSpec([batch_size], tf.int32),
        "next_sentence_weights": tf.TensorSpec([batch_size], tf.float32),
        "example_weights": tf.TensorSpec([batch_size], tf.float32),
    }


class Batches(abc.ABC):
    """The batches of a data set of sequences.

    An example of a training batch is a sequence, or, with a layout, several that are joined. It
    is a function of the seed and its id alone, so that any host can make any step without the
    steps before it.

    Args:
        sequence_length: L, tokens per sequence, special ones included, and of a row.
        predictions: P, the maximum number of masked tokens per sequence.
        num_examples: N, sequences per epoch.
        width: C, the number of values that `make_rows` returns for a sequence.
        seed: int, decides the order.
        layout: how sequences are joined, a `packing.PackedRows` or `packing.LengthBuckets`; None
            for one sequence in each example.
        plan: with a layout, what `packing.write_plan` wrote: [R, K] int64 `Pages` of the sequences
            that are joined, and a dictionary of facts.
        lanes: the largest number of hosts that each read their own part of the data; None for
            `order.number_of_lanes` of the batch.
        bad_records: counts damaged examples, which get weight 0; None: the first raises an error.
        damage_folder: see `inputs.damage.Damage`.

    Attributes:
        damage: the `Damage` found so far.

    The other arguments are attributes, too.
    """

    def __init__(
        self,
        *,
        sequence_length,
        predictions,
        num_examples,
        width,
        seed,
        layout=None,
        plan=(None, None),
        lanes=None,
        bad_records=None,
        damage_folder="",
    ):
        self.sequence_length = sequence_length
        self.predictions = predictions
        self.num_examples = num_examples
        self.seed = seed
        self.layout = layout
        self.plan, self._plan_facts = plan
        self._width = width
        self._lanes = lanes
        bad_records = bad_records or BadRecords(0.0, skip=False, log=print)
        self.damage = Damage(bad_records, num_examples, damage_folder)
        # Traced once for all data sets, which would each take a second or two for it.
        number, numbers = (tf.TensorSpec(shape, tf.int64) for shape in ([], [None]))
        signature = [number, number, numbers, numbers]
        self._block_sequences = tf.function(self._make_block_sequences, signature, autograph=False)
        self._block_rows = tf.function(self._make_block_rows, signature, autograph=False)
        self._batch = tf.function(self.make_batch, autograph=False)

    @property
    @abc.abstractmethod
    def files(self) -> set[str]:
        """The files of the data set; a host reads pages of each of them."""

    @abc.abstractmethod
    def make_rows(self, size, first, stop, sequences, ids):
        """Reads sequences that lie together.

        Args:
            size: int64 scalar, the number of sequences of a block.
            first, stop: int64 scalars: the block has the sequences [first, stop).
            sequences: [n] int64, in this range.
            ids: [n] int64, which select the random numbers.

        Returns:
            [n, C] int32. The first value is 1 for a sequence that counts, 0 for one that could not
            be read.
        """

    @abc.abstractmethod
    def make_batch(self, rows):
        """A batch, as described by `element_spec`, of [B, C] rows of `make_rows`."""

    def describe_plan(self) -> str:
        """See `layout.describe`."""
        return self.layout.describe(self.num_examples, len(self.plan))

    def propose_lengths(self) -> str:
        """See `packing.LengthBuckets.propose`."""
        return self.layout.propose(self.num_examples, len(self.plan), self._plan_facts)

    def order(self, global_batch_size) -> Order:
        """The order of the training examples."""
        count = self.num_examples if self.plan is None else len(self.plan)
        lanes = self._lanes or number_of_lanes(global_batch_size, count)
        # Of a small data set, a lane's share should still consist of several blocks.
        share = count // (lanes * WINDOW_BLOCKS)
        tokens = self.layout.tokens if self.layout else self.sequence_length
        block = max(MIN_BLOCK, min(BLOCK_TOKENS // tokens, share))
        return Order(count, global_batch_size, lanes, block, WINDOW_BLOCKS, self.seed)

    def training_batches(self, global_batch_size, context=None, first_step=0) -> tf.data.Dataset:
        """Infinite data set of this host's batches: one per step for each of its replicas.

        Args:
            global_batch_size: examples per step over all replicas.
            context: `tf.distribute.InputContext` of this host; None means a single replica.
            first_step: the step to begin with; the text of the steps before it is not read.

        Returns:
            Batches as described by `element_spec`, or, with a layout, by its `spec`.
        """
        order = self.order(global_batch_size)
        make = self._sequences if self.plan is None else self._rows
        make_rows = functools.partial(make, order.block)
        make_batch = self._batch if self.plan is None else self._joined
        return row_batches(order, context, first_step, make_rows, make_batch).prefetch(4)

    def evaluation_batches(self, global_batch_size, limit, context=None) -> tf.data.Dataset:
        """Each of the first `limit` sequences once, not joined, with the same masks each time.

        The last batch is filled up with examples of weight 0.

        Args:
            global_batch_size: examples per step over all replicas.
            limit: maximum number of examples.
            context: as in `training_batches`.
        """
        total = min(limit, self.num_examples)
        block = max(MIN_BLOCK, BLOCK_TOKENS // self.sequence_length)  # for any batch size

        def rows(sequences, ids):
            del ids  # depend on the batch
            counts = tf.cast(sequences < total, tf.int32)
            sequences = tf.minimum(sequences, total - 1)
            made = self._sequences(block, sequences, sequences)
            return tf.concat([made[:, :1] * counts[:, tf.newaxis], made[:, 1:]], 1)

        lanes = self._lanes or number_of_lanes(global_batch_size, total)
        order = Order(total, global_batch_size, lanes, block, 1, None)
        return row_batches(order, context, 0, rows, self._batch).prefetch(4)

    @tf.autograph.experimental.do_not_convert
    def _sequences(self, size, sequences, ids):
        """Makes sequences; those of one block of `size` lie together in `sequences`."""
        make = functools.partial(self._block_sequences, tf.constant(size, tf.int64))
        return by_block(size, sequences, ids, make, self._width)

    def _make_block_sequences(self, size, block, sequences, ids):
        first = block * size
        stop = tf.minimum(first + size, self.num_examples)
        return self.make_rows(size, first, stop, sequences, ids)

    @tf.autograph.experimental.do_not_convert
    def _rows(self, size, rows, ids):
        """Makes rows of the plan, [n, K C]; those of one block of `size` lie together in `rows`."""
        make = functools.partial(self._block_rows, tf.constant(size, tf.int64))
        return by_block(size, rows, ids, make, self.plan.columns * self._width)

    def _make_block_rows(self, size, block, rows, ids):
        per_row = self.plan.columns
        first, stop = block * size, tf.minimum(block * size + size, len(self.plan))
        planned, readable = self.plan.read(first, stop, self.damage, first, stop - first)
        present = (planned >= 0) & readable
        # Always reads all that the block needs, even for a few rows, so that random segments are
        # chosen from the same documents.
        start = tf.reduce_min(tf.where(present, planned, self.num_examples - 1))
        end = tf.reduce_max(tf.where(present, planned, start)) + 1
        members, present = (tf.gather(values, rows - first) for values in (planned, present))
        members = tf.where(present, members, start)
        sequence_ids = ids[:, tf.newaxis] * per_row + tf.range(per_row, dtype=tf.int64)
        flat = tf.reshape(members, [-1]), tf.reshape(sequence_ids, [-1])
        made = self.make_rows(end - start, start, end, *flat)
        counts = made[:, :1] * tf.cast(tf.reshape(present, [-1, 1]), tf.int32)
        made = tf.concat([counts, made[:, 1:]], 1)
        return tf.reshape(made, [-1, per_row * self._width])

    @tf.autograph.experimental.do_not_convert
    def _joined(self, rows):
        return self.layout.join(self._batch(tf.reshape(rows, [-1, self._width])))
