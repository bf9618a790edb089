"""BERT pre-training batches from a corpus; examples are paired and masked on the fly.

An example is a function of (seed, example id) alone: any host can make any step, in any order,
without the steps before it.
"""

import numpy as np
import tensorflow as tf

from inputs.batching import (
    host_batches,
    integers_below,
    random_bits,
    shuffled,
    uniform,
    unit_floats,
)
from inputs.text.chunks import FULL, PAIRS
from inputs.text.mapped_arrays import as_tensor, dataset_options
from inputs.text.vocabulary import SPECIAL_TOKENS

MASKED_SHARE, AS_MASK, AS_RANDOM = 0.15, 0.8, 0.1  # Devlin et al., arXiv:1810.04805, section 3.1


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


class Examples:
    """Masked-LM and next-sentence examples of one corpus at one sequence length.

    Args:
        corpus: an `inputs.text.corpus.Corpus`.
        vocabulary: its word pieces.
        sequence_length: L, tokens per example, special ones included.
        predictions: P, the maximum number of masked tokens per example.
        whole_word: if True, masks whole words instead of single pieces.
        seed: int, decides the order, the pairs and the masks.
        packing: `chunks.PAIRS` for two segments and next-sentence labels, `chunks.FULL` for one
            segment that fills the sequence, and next-sentence weights of 0.

    Attributes:
        num_examples: examples per epoch.
    """

    def __init__(
        self,
        corpus,
        vocabulary,
        *,
        sequence_length,
        predictions,
        whole_word,
        seed,
        packing=PAIRS,
    ):
        self.sequence_length = sequence_length
        self.predictions = predictions
        self.whole_word = whole_word
        self.seed = seed
        self.packing = packing
        self.vocabulary = vocabulary
        chunks = corpus.chunks(sequence_length, packing)
        self.num_examples = len(chunks["start"])
        self._tokens = as_tensor(corpus.tokens)
        self._chunks = {name: as_tensor(array) for name, array in chunks.items()}
        self._options = dataset_options(corpus.tokens)
        special = set(SPECIAL_TOKENS)
        ordinary = [i for i, piece in enumerate(vocabulary) if piece not in special]
        self._ordinary = tf.constant(ordinary, tf.int32)
        self._continues = tf.constant([piece.startswith("##") for piece in vocabulary])
        self._pad, self._unk, self._cls, self._sep, self._mask = map(
            vocabulary.index, SPECIAL_TOKENS
        )

    def training_batches(self, global_batch_size, context=None, first_step=0) -> tf.data.Dataset:
        """Infinite data set of this host's batches: one per step for each of its replicas.

        Args:
            global_batch_size: examples per step over all replicas.
            context: `tf.distribute.InputContext` of this host; None means a single replica.
            first_step: the step to begin with; the steps before it are not computed.
        """
        local, ids_of = host_batches(global_batch_size, context)

        def batch(k):
            ids = ids_of(k)
            chunk = shuffled(ids, self.num_examples, self.seed)
            return self.batch(chunk, ids, tf.ones_like(ids, tf.float32))

        indices = tf.data.Dataset.range(first_step * local, np.iinfo(np.int64).max)
        batches = indices.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(4)
        return batches.with_options(self._options)

    def evaluation_batches(self, global_batch_size, limit, context=None) -> tf.data.Dataset:
        """Each of the first `limit` examples once, with the same masks each time.

        The last batch is filled up with examples of weight 0.

        Args:
            global_batch_size: examples per step over all replicas.
            limit: maximum number of examples.
            context: as in `training_batches`.
        """
        local, ids_of = host_batches(global_batch_size, context)
        total = min(limit, self.num_examples)

        def batch(k):
            ids = ids_of(k)
            weights = tf.cast(ids < total, tf.float32)
            return self.batch(tf.minimum(ids, total - 1), ids, weights)

        steps = -(-total // global_batch_size)
        batches = tf.data.Dataset.range(steps * local).map(batch).prefetch(4)
        return batches.with_options(self._options)

    def batch(self, chunk, ids, weights):
        """Makes examples of the given chunks.

        Args:
            chunk: [B] int64, the chunk that each example is made of.
            ids: [B] int64, example ids, which select the random numbers.
            weights: [B] float32, 0 for an example that does not count.

        Returns:
            A dictionary as described by `element_spec`.
        """
        segments = self._full if self.packing == FULL else self._pairs
        a_start, a_length, b_start, b_length, is_random = segments(chunk, ids)
        place = tf.range(self.sequence_length, dtype=tf.int64)[tf.newaxis]
        a_end, b_end = a_length[:, tf.newaxis] + 1, (a_length + b_length)[:, tf.newaxis] + 2
        in_a = (place >= 1) & (place < a_end)
        in_b = (place > a_end) & (place < b_end)
        source = tf.where(
            in_a, a_start[:, tf.newaxis] + place - 1, b_start[:, tf.newaxis] + place - a_end - 1
        )
        is_text = in_a | in_b
        tokens = tf.cast(tf.gather(self._tokens, tf.where(is_text, source, 0)), tf.int32)
        separator = tf.where((place == a_end) | (place == b_end), self._sep, self._pad)
        tokens = tf.where(is_text, tokens, tf.where(place == 0, self._cls, separator))
        # A full sequence also has a [SEP] between documents.
        is_text &= (tokens != self._sep) & (tokens != self._unk)
        masked, positions, labels, label_weights = self._masked(tokens, is_text, ids)
        return {
            "input_word_ids": masked,
            "input_mask": tf.cast(place <= b_end, tf.int32),
            "input_type_ids": tf.cast((place > a_end) & (place <= b_end), tf.int32),
            "masked_lm_positions": positions,
            "masked_lm_ids": labels,
            "masked_lm_weights": label_weights * weights[:, tf.newaxis],
            "next_sentence_labels": tf.cast(is_random, tf.int32),
            "next_sentence_weights": weights * float(self.packing == PAIRS),
            "example_weights": weights,
        }

    def _full(self, chunk, ids):
        """A single segment, the whole chunk. Returns the same as `_pairs`."""
        del ids
        start, end = (tf.gather(self._chunks[name], chunk) for name in ("start", "end"))
        none = tf.zeros_like(start)
        return start, end - start, none, none - 1, none > 0  # length -1: no [SEP] of B either

    def _pairs(self, chunk, ids):
        """Segments A and B. B continues A or, with probability 1/2, is from another document.

        Returns:
            (start of A, length of A, start of B, length of B: [B] int64, in tokens; whether B is
            from another document: [B] bool).
        """
        column = {
            name: tf.gather(values, chunk)
            for name, values in self._chunks.items()
            if name != "sentence_starts"
        }
        draws = random_bits(self.seed, 0, ids, 4)
        start, end, sentences = column["start"], column["end"], column["sentences"]
        # A ends after any sentence but the last, or inside it if there is only one.
        cut_sentence = column["first"] + 1 + integers_below(draws[:, 0], sentences - 1)
        sentence_starts = self._chunks["sentence_starts"]
        at_sentence = tf.gather(
            sentence_starts, tf.minimum(cut_sentence, tf.size(sentence_starts, tf.int64) - 1)
        )
        inside = start + 1 + integers_below(draws[:, 0], end - start - 1)
        a_end = tf.where(sentences > 1, at_sentence, inside)
        is_random = unit_floats(draws[:, 1]) < 0.5
        others = self.num_examples - column["document_chunks"]
        other = (column["next_document"] + integers_below(draws[:, 2], others)) % self.num_examples
        other_sentence = tf.gather(self._chunks["first"], other) + integers_below(
            draws[:, 3], tf.gather(self._chunks["sentences"], other)
        )
        random_start = tf.gather(sentence_starts, other_sentence)
        room = self.sequence_length - 3 - (a_end - start)
        random_length = tf.gather(self._chunks["document_end"], other) - random_start
        b_start = tf.where(is_random, random_start, a_end)
        b_length = tf.where(is_random, tf.minimum(room, random_length), end - a_end)
        return start, a_end - start, b_start, b_length, is_random

    def _masked(self, tokens, is_text, ids):
        """Selects 15 % of the pieces: 80 % become [MASK], 10 % a random piece, 10 % stay.

        Args:
            tokens: [B, L] int32.
            is_text: [B, L] bool, whether each piece may be masked.
            ids: [B] int64, example ids.

        Returns:
            (masked tokens [B, L] int32, positions [B, P] int32, labels [B, P] int32, weights
            [B, P] float32).
        """
        draws = self._uniform(ids, self.sequence_length, stream=1)
        pieces = tf.reduce_sum(tf.cast(is_text, tf.float32), axis=1)
        # Rounded at random, so that the average is 15 %.
        wanted = tf.floor(MASKED_SHARE * pieces + self._uniform(ids, 1, stream=2)[:, 0])
        wanted = tf.clip_by_value(wanted, 1.0, float(self.predictions))
        # A text that consists of [UNK] only has no pieces to mask.
        wanted = tf.minimum(wanted, pieces)[:, tf.newaxis]
        if self.whole_word:
            chosen, weights = self._whole_words(tokens, is_text, draws, wanted, ids)
        else:
            _, chosen = tf.math.top_k(tf.where(is_text, draws, -1.0), self.predictions)
            weights = tf.cast(tf.range(self.predictions), tf.float32)[tf.newaxis] < wanted
        # In the order of the text; unused positions are 0 and come last.
        chosen = tf.sort(tf.where(weights, chosen, self.sequence_length), axis=1)
        counts = chosen < self.sequence_length
        positions = tf.where(counts, chosen, 0)
        labels = tf.where(counts, tf.gather(tokens, positions, batch_dims=1), 0)
        kind = self._uniform(ids, self.predictions, stream=3)
        index = integers_below(
            random_bits(self.seed, 4, ids, self.predictions), tf.size(self._ordinary, tf.int64)
        )
        replacement = tf.where(kind < AS_MASK, self._mask, tf.gather(self._ordinary, index))
        replacement = tf.where(kind < AS_MASK + AS_RANDOM, replacement, labels)
        # An extra column receives the writes of the unused positions.
        rows = tf.range(tf.shape(tokens)[0])[:, tf.newaxis] + tf.zeros_like(chosen)
        padded = tf.pad(tokens, [[0, 0], [0, 1]])
        written = tf.tensor_scatter_nd_update(
            padded, tf.stack([rows, chosen], axis=-1), replacement
        )
        masked = tf.ensure_shape(written[:, : self.sequence_length], [None, self.sequence_length])
        return masked, positions, labels, tf.cast(counts, tf.float32)

    def _whole_words(self, tokens, is_text, draws, wanted, ids):
        """Selects whole words in random order, about `wanted` pieces in all.

        Returns:
            (positions [B, P] int32, whether each is selected [B, P] bool).
        """
        continues = tf.gather(self._continues, tokens) & is_text
        word = tf.cumsum(tf.cast(~continues, tf.int32), axis=1) - 1  # of each piece, from 0
        draw = tf.where(is_text, tf.gather(draws, word, batch_dims=1), -1.0)
        # The pieces of a word share its draw, and a stable sort keeps them together.
        order = tf.argsort(draw, axis=1, direction="DESCENDING", stable=True)
        ordered_word = tf.gather(word, order, batch_dims=1)
        taken = tf.range(1, self.sequence_length + 1)[tf.newaxis]
        ends = tf.concat(
            [ordered_word[:, 1:] != ordered_word[:, :-1], tf.ones_like(word[:, :1], tf.bool)],
            axis=1,
        )
        # The selection ends at the last word end up to `wanted` or at the first one after it,
        # chosen at random such that the average is `wanted`.
        piece = tf.cast(taken, tf.float32)
        before = tf.reduce_max(tf.where(ends & (piece <= wanted), piece, 0.0), 1, keepdims=True)
        after = tf.reduce_min(tf.where(ends & (piece > wanted), piece, 1e9), 1, keepdims=True)
        probability = (wanted - before) / (after - before)
        is_after = self._uniform(ids, 1, stream=5) < probability
        after = tf.where(wanted > 0, after, 1e9)
        limit = tf.where(is_after & (after <= self.predictions), after, before)
        limit = tf.where(limit > 0, limit, wanted)  # cuts the first word if it is too long
        return order[:, : self.predictions], (piece <= limit)[:, : self.predictions]

    def _uniform(self, ids, columns, *, stream):
        return uniform(self.seed, stream, ids, columns)
