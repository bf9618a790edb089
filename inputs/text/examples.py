"""BERT pre-training batches from text: tokenised once, then masked and paired on the fly.

An example is a function of (seed, its number) and of nothing else: any step can be made without
the ones before it, by any host, in any order, and comes out the same.
"""

import numpy as np
import tensorflow as tf

from inputs import order, random_numbers
from inputs.random_numbers import below
from inputs.text.chunks import FULL, PAIRS
from inputs.text.mapped_arrays import as_tensor, options
from inputs.text.vocabulary import SPECIAL_TOKENS

MASKED_SHARE, AS_MASK, AS_RANDOM = 0.15, 0.8, 0.1  # Devlin et al., arXiv:1810.04805, section 3.1


def element_spec(batch_size: int, sequence_length: int, predictions: int):
    """What every pre-training pipeline yields; synthetic data is made from it."""
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
        corpus: tokenised text.
        vocabulary: its word pieces.
        sequence_length: tokens per example, special ones included.
        predictions: most masked tokens per example.
        whole_word: masks whole words instead of single pieces.
        seed: int; another seed gives another order, other pairs and masks.
        packing: `chunks.PAIRS` for two segments and next-sentence labels, `chunks.FULL` for one
            segment that fills the sequence, and next-sentence weights of 0.
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
        self.sequence_length, self.predictions = sequence_length, predictions
        self.whole_word, self.seed, self.packing = whole_word, seed, packing
        self.vocabulary = vocabulary
        chunks = corpus.chunks(sequence_length, packing)
        self.number = len(chunks["start"])
        self._tokens = as_tensor(corpus.tokens)
        self._chunks = {name: as_tensor(array) for name, array in chunks.items()}
        self._options = options(corpus.tokens)
        special = set(SPECIAL_TOKENS)
        ordinary = [i for i, piece in enumerate(vocabulary) if piece not in special]
        self._ordinary = tf.constant(ordinary, tf.int32)
        self._continues = tf.constant([piece.startswith("##") for piece in vocabulary])
        self._pad, self._unk, self._cls, self._sep, self._mask = map(
            vocabulary.index, SPECIAL_TOKENS
        )

    def training_batches(self, global_batch_size, context=None, first_step=0) -> tf.data.Dataset:
        """Endless batches, one per local replica and step, of the global batch's share.

        Args:
            global_batch_size: examples per step over all replicas.
            context: `tf.distribute.InputContext` of this host; None means one replica.
            first_step: the step to begin with; nothing before it is made.
        """
        local, numbers_of = order.share(global_batch_size, context)

        def batch(k):
            number = numbers_of(k)
            chunk = order.shuffled(number, self.number, self.seed)
            return self.batch(chunk, number, tf.ones_like(number, tf.float32))

        numbers = tf.data.Dataset.range(first_step * local, np.iinfo(np.int64).max)
        batches = numbers.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(4)
        return batches.with_options(self._options)

    def evaluation_batches(self, global_batch_size, limit, context=None) -> tf.data.Dataset:
        """Each of the first `limit` examples once, always masked alike.

        The last batch is filled up with examples of weight 0.
        """
        local, numbers_of = order.share(global_batch_size, context)
        total = min(limit, self.number)

        def batch(k):
            number = numbers_of(k)
            weights = tf.cast(number < total, tf.float32)
            return self.batch(tf.minimum(number, total - 1), number, weights)

        steps = -(-total // global_batch_size)
        batches = tf.data.Dataset.range(steps * local).map(batch).prefetch(4)
        return batches.with_options(self._options)

    def batch(self, chunk, number, weights):
        """The examples of the given chunks.

        Args:
            chunk: [B] int64, which chunk each example is made of.
            number: [B] int64, the examples' numbers, which choose their random numbers.
            weights: [B] float32, 0 for an example that does not count.

        Returns:
            A dictionary as `element_spec` describes.
        """
        segments = self._full if self.packing == FULL else self._pairs
        a_start, a_length, b_start, b_length, is_random = segments(chunk, number)
        place = tf.range(self.sequence_length, dtype=tf.int64)[tf.newaxis]
        a_end, b_end = a_length[:, tf.newaxis] + 1, (a_length + b_length)[:, tf.newaxis] + 2
        in_a = (place >= 1) & (place < a_end)
        in_b = (place > a_end) & (place < b_end)
        source = tf.where(
            in_a, a_start[:, tf.newaxis] + place - 1, b_start[:, tf.newaxis] + place - a_end - 1
        )
        is_text = in_a | in_b
        ids = tf.cast(tf.gather(self._tokens, tf.where(is_text, source, 0)), tf.int32)
        separator = tf.where((place == a_end) | (place == b_end), self._sep, self._pad)
        ids = tf.where(is_text, ids, tf.where(place == 0, self._cls, separator))
        # In a sequence packed full [SEP] stands between documents, too.
        is_text &= (ids != self._sep) & (ids != self._unk)
        masked, positions, labels, label_weights = self._masked(ids, is_text, number)
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

    def _full(self, chunk, number):
        """One segment alone: the whole chunk."""
        start, end = (tf.gather(self._chunks[name], chunk) for name in ("start", "end"))
        none = tf.zeros_like(start)
        return start, end - start, none, none - 1, none > 0  # B is not there, nor its [SEP]

    def _pairs(self, chunk, number):
        """Segments A and B: B continues A, or every other time comes from another document."""
        column = {
            name: tf.gather(values, chunk)
            for name, values in self._chunks.items()
            if name != "sentence_starts"
        }
        draws = self._uniform(number, 4, stream=0)
        start, end, sentences = column["start"], column["end"], column["sentences"]
        # A ends after one of the sentences but the last, or inside the only one there is.
        cut_sentence = column["first"] + 1 + below(draws[:, 0], sentences - 1)
        sentence_starts = self._chunks["sentence_starts"]
        at_sentence = tf.gather(
            sentence_starts, tf.minimum(cut_sentence, tf.size(sentence_starts, tf.int64) - 1)
        )
        inside = start + 1 + below(draws[:, 0], end - start - 1)
        a_end = tf.where(sentences > 1, at_sentence, inside)
        is_random = draws[:, 1] < 0.5
        others = self.number - column["document_chunks"]
        other = (column["next_document"] + below(draws[:, 2], others)) % self.number
        other_sentence = tf.gather(self._chunks["first"], other) + below(
            draws[:, 3], tf.gather(self._chunks["sentences"], other)
        )
        random_start = tf.gather(sentence_starts, other_sentence)
        room = self.sequence_length - 3 - (a_end - start)
        random_length = tf.gather(self._chunks["document_end"], other) - random_start
        b_start = tf.where(is_random, random_start, a_end)
        b_length = tf.where(is_random, tf.minimum(room, random_length), end - a_end)
        return start, a_end - start, b_start, b_length, is_random

    def _masked(self, ids, is_text, number):
        """Chooses 15 % of the text's pieces: 80 % become [MASK], 10 % another, 10 % stay."""
        draws = self._uniform(number, self.sequence_length, stream=1)
        pieces = tf.reduce_sum(tf.cast(is_text, tf.float32), axis=1)
        # 15 % on average
        wanted = tf.floor(MASKED_SHARE * pieces + self._uniform(number, 1, stream=2)[:, 0])
        wanted = tf.clip_by_value(wanted, 1.0, float(self.predictions))
        # What the vocabulary knows nothing of has no pieces to mask.
        wanted = tf.minimum(wanted, pieces)[:, tf.newaxis]
        if self.whole_word:
            chosen, weights = self._whole_words(ids, is_text, draws, wanted, number)
        else:
            _, chosen = tf.math.top_k(tf.where(is_text, draws, -1.0), self.predictions)
            weights = tf.cast(tf.range(self.predictions), tf.float32)[tf.newaxis] < wanted
        # In the order of the text; the places that do not count come last, as position 0.
        chosen = tf.sort(tf.where(weights, chosen, self.sequence_length), axis=1)
        counts = chosen < self.sequence_length
        positions = tf.where(counts, chosen, 0)
        labels = tf.where(counts, tf.gather(ids, positions, batch_dims=1), 0)
        kind = self._uniform(number, self.predictions, stream=3)
        index = below(
            self._uniform(number, self.predictions, stream=4), tf.size(self._ordinary, tf.int64)
        )
        replacement = tf.where(kind < AS_MASK, self._mask, tf.gather(self._ordinary, index))
        replacement = tf.where(kind < AS_MASK + AS_RANDOM, replacement, labels)
        # One column more takes the writes of the places that do not count.
        rows = tf.range(tf.shape(ids)[0])[:, tf.newaxis] + tf.zeros_like(chosen)
        padded = tf.pad(ids, [[0, 0], [0, 1]])
        written = tf.tensor_scatter_nd_update(
            padded, tf.stack([rows, chosen], axis=-1), replacement
        )
        masked = tf.ensure_shape(written[:, : self.sequence_length], [None, self.sequence_length])
        return masked, positions, labels, tf.cast(counts, tf.float32)

    def _whole_words(self, ids, is_text, draws, wanted, number):
        """Whole words in random order, about `wanted` pieces of them: (places, which count)."""
        goes_on = tf.gather(self._continues, ids) & is_text
        word = tf.cumsum(tf.cast(~goes_on, tf.int32), axis=1) - 1  # each piece's, from 0
        draw = tf.where(is_text, tf.gather(draws, word, batch_dims=1), -1.0)
        # Pieces of a word share its draw, and a stable order keeps them together.
        order = tf.argsort(draw, axis=1, direction="DESCENDING", stable=True)
        ordered_word = tf.gather(word, order, batch_dims=1)
        taken = tf.range(1, self.sequence_length + 1)[tf.newaxis]
        ends = tf.concat(
            [ordered_word[:, 1:] != ordered_word[:, :-1], tf.ones_like(word[:, :1], tf.bool)],
            axis=1,
        )
        # Between the word ends on either side of the budget, chance keeps 15 % on average.
        piece = tf.cast(taken, tf.float32)
        below = tf.reduce_max(tf.where(ends & (piece <= wanted), piece, 0.0), 1, keepdims=True)
        above = tf.reduce_min(tf.where(ends & (piece > wanted), piece, 1e9), 1, keepdims=True)
        chance = (wanted - below) / (above - below)
        reach = self._uniform(number, 1, stream=5) < chance
        above = tf.where(wanted > 0, above, 1e9)
        limit = tf.where(reach & (above <= self.predictions), above, below)
        limit = tf.where(limit > 0, limit, wanted)  # a first word beyond every budget is cut
        return order[:, : self.predictions], (piece <= limit)[:, : self.predictions]

    def _uniform(self, number, columns, *, stream):
        return random_numbers.uniform(self.seed, stream, number, columns)
