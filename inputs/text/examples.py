"""BERT pre-training batches from a corpus; examples are paired and masked on the fly."""

import tensorflow as tf

from inputs.batching import integers_below, random_bits, uniform, unit_floats
from inputs.text.batches import Batches
from inputs.text.chunks import COLUMNS, FULL, PAIRS, SENTENCE_STARTS, TABLE
from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS

# The fields of a row before its tokens: whether the example could be read, lengths of A and B,
# whether B is random, and the two halves of its id.
FIELDS = 6
# Devlin et al., arXiv:1810.04805, section 3.1.
MASKED_SHARE = 0.15
AS_MASK = 0.8
AS_RANDOM = 0.1


class Examples(Batches):
    """Masked-LM and next-sentence examples of one corpus at one sequence length.

    *Differs from* google-research/bert's `create_pretraining_data.py`:

    - [UNK] is never masked; there, only [CLS] and [SEP] are not.
    - A random piece in place of a masked one is no special token; there, it may be any piece.
    - 15 % of the pieces of the text are masked, rounded at random; there, 15 % of all pieces with
      [CLS] and [SEP], rounded.
    - No sequences are made shorter than they could be (`short_seq_prob`).

    Args:
        corpus: an `inputs.text.corpus.Corpus`.
        vocabulary: its word pieces.
        sequence_length: L, tokens per example, special ones included.
        predictions: P, the maximum number of masked tokens per example.
        whole_word: if True, masks whole words instead of single pieces.
        seed: int, decides the order, the pairs and the masks.
        packing: `chunks.PAIRS` for two segments and next-sentence labels, `chunks.FULL` for one
            segment that fills the sequence, and next-sentence weights of 0.
        layout: see `Batches`. If there is one, a random second segment is no longer than the one
            that it replaces, so that the length of a sequence is known before.
        **reading: `lanes`, `bad_records` and `damage_folder` of `Batches`.
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
        layout=None,
        **reading,
    ):
        self.whole_word = whole_word
        self.packing = packing
        self.vocabulary = vocabulary
        chunks = corpus.chunks(sequence_length, packing)
        self._tokens = corpus.tokens
        self._table = chunks[TABLE]
        self._sentence_starts = chunks.get(SENTENCE_STARTS)
        special = set(SPECIAL_TOKENS)
        ordinary = [i for i, piece in enumerate(vocabulary) if piece not in special]
        self._ordinary = tf.constant(ordinary, tf.int32)
        self._continues = tf.constant([piece.startswith("##") for piece in vocabulary])
        self._pad, self._unk, self._cls, self._sep, self._mask = map(
            vocabulary.index, SPECIAL_TOKENS
        )
        super().__init__(
            sequence_length=sequence_length,
            predictions=predictions,
            num_examples=len(self._table),
            width=FIELDS + sequence_length,
            seed=seed,
            layout=layout,
            plan=corpus.plan(sequence_length, packing, layout) if layout else (None, None),
            **reading,
        )

    @property
    def files(self) -> set[str]:
        """The files of the corpus; a host reads pages of each of them."""
        parts = self._tokens, self._table, self._sentence_starts, self.plan
        return {part.path for part in parts if part is not None}

    def make_rows(self, size, first, stop, chunks, ids):
        """See `Batches.make_rows`: `FIELDS`, then the tokens with [CLS], [SEP] and [PAD].

        No piece is masked yet.
        """
        table, tokens, base, starts, readable = self._read(first, stop)
        chunks -= first
        if self.packing == FULL:
            start, end = (tf.gather(column, chunks) for column in tf.unstack(table, axis=1))
            a_start = start
            a_length = end - start
            b_start = tf.zeros_like(start)
            b_length, is_random = b_start - 1, b_start > 0  # length -1: no [SEP] of B either
            a_start -= base
        else:
            (a_start, a_length, b_start, b_length, is_random), tokens, others_readable = (
                self._pairs(size, table, starts, tokens, base, chunks, ids)
            )
            readable &= others_readable
        place = tf.range(self.sequence_length, dtype=tf.int64)[tf.newaxis]
        a_end = a_length[:, tf.newaxis] + 1
        b_end = (a_length + b_length)[:, tf.newaxis] + 2
        in_a = (place >= 1) & (place < a_end)
        in_b = (place > a_end) & (place < b_end)
        source = tf.where(
            in_a, a_start[:, tf.newaxis] + place - 1, b_start[:, tf.newaxis] + place - a_end - 1
        )
        is_text = (in_a | in_b) & readable
        pieces = tf.cast(tf.gather(tokens, tf.where(is_text, source, 0)), tf.int32)
        separator = tf.where((place == a_end) | (place == b_end), self._sep, self._pad)
        pieces = tf.where(is_text, pieces, tf.where(place == 0, self._cls, separator))
        fields = [tf.fill(tf.shape(ids), readable), a_length, b_length, is_random]
        fields = tf.stack([tf.cast(field, tf.int32) for field in fields], 1)
        return tf.concat([fields, tf.bitcast(ids, tf.int32), pieces], 1)

    def _read(self, first, stop):
        """Reads what the examples of a block need.

        Args:
            first, stop: int64 scalars: the block has the chunks [first, stop).

        Returns:
            A tuple of the block's rows of the table of chunks; its tokens, and what comes after
            them up to a sequence's length; the place of the first of these tokens in the corpus;
            with pairs, the starts of its sentences, else None; and whether all could be read.
        """
        lost = self.damage, first, stop - first
        table, readable = self._table.read(first, stop, *lost)
        base = table[0, 0]
        end = tf.minimum(table[-1, 1] + self.sequence_length, len(self._tokens))
        tokens, tokens_readable = self._tokens.read(base, end, *lost)
        # So that there is a token to gather where none could be read.
        tokens = tf.concat([tokens, tf.zeros([1], tokens.dtype)], 0)
        readable &= tokens_readable
        if self.packing == FULL:
            return table, tokens, base, None, readable
        first_sentence, sentences = COLUMNS[PAIRS].index("first"), COLUMNS[PAIRS].index("sentences")
        starts, starts_readable = self._sentence_starts.read(
            table[0, first_sentence], table[-1, first_sentence] + table[-1, sentences], *lost
        )
        starts = tf.concat([starts, [0]], 0)
        return table, tokens, base, starts, readable & starts_readable

    def _pairs(self, size, table, starts, tokens, base, chunks, ids):
        """Segments A and B. B continues A or, with probability 1/2, is from another document.

        Args:
            size: the number of chunks of a block.
            table, starts, tokens, base: of the block, from `_read`.
            chunks: [B] int64, rows of `table`.
            ids: [B] int64.

        Returns:
            A tuple of (start of A, length of A, start of B, length of B: [B] int64, in tokens;
            whether B is from another document: [B] bool); the tokens that the starts refer to; and
            whether they could be read.
        """
        # The other documents are those of the block. If it has only one, as in a long text, they
        # are those of the block in which the next document begins.
        next_document = table[0, -1]
        is_one = next_document == table[-1, -1]
        next_first = next_document % self.num_examples // size * size
        others, other_tokens, other_base, other_starts, readable = tf.cond(
            is_one,
            lambda: self._read(next_first, tf.minimum(next_first + size, self.num_examples)),
            lambda: (table, tokens[:0], base, starts, tf.constant(True)),
        )
        other_base -= tf.where(is_one, tf.size(tokens, tf.int64), 0)  # they lie behind the tokens

        def columns(rows):
            return dict(zip(COLUMNS[PAIRS], tf.unstack(rows, axis=1), strict=True))

        own, other_columns = columns(tf.gather(table, chunks)), columns(others)
        draws = random_bits(self.seed, 0, ids, 4)
        start = own["start"]
        end = own["end"]
        sentences = own["sentences"]
        # A ends after any sentence but the last, or inside it if there is only one.
        cut_sentence = own["first"] + 1 + integers_below(draws[:, 0], sentences - 1)
        at_sentence = tf.gather(
            starts,
            tf.minimum(cut_sentence - table[0, 2], tf.size(starts, tf.int64) - 1),
        )
        inside = start + 1 + integers_below(draws[:, 0], end - start - 1)
        a_end = tf.where(sentences > 1, at_sentence, inside)
        # The chunks of a document lie together, so the others are those after it, cyclically.
        count = tf.size(other_columns["next_document"], tf.int64)
        low, high = (
            tf.searchsorted(other_columns["next_document"], own["next_document"], side, tf.int64)
            for side in ("left", "right")
        )
        others_of_each = count - (high - low)
        other = (high + integers_below(draws[:, 2], others_of_each)) % count
        is_random = (unit_floats(draws[:, 1]) < 0.5) & (others_of_each > 0)
        other_sentence = tf.gather(other_columns["first"], other) + integers_below(
            draws[:, 3], tf.gather(other_columns["sentences"], other)
        )
        random_start = tf.gather(other_starts, other_sentence - others[0, 2])
        room = end - a_end
        if self.plan is None:
            room = self.sequence_length - 3 - (a_end - start)
        random_length = tf.gather(other_columns["document_end"], other) - random_start
        b_start = tf.where(is_random, random_start - other_base, a_end - base)
        b_length = tf.where(is_random, tf.minimum(room, random_length), end - a_end)
        segments = start - base, a_end - start, b_start, b_length, is_random
        return segments, tf.concat([tokens, other_tokens], 0), readable

    def make_batch(self, rows):
        """See `Batches.make_batch`."""
        place = tf.range(self.sequence_length)[tf.newaxis]
        counts, a_length, b_length, is_random = tf.unstack(rows[:, :4], axis=1)
        ids = tf.bitcast(rows[:, 4:FIELDS], tf.int64)
        tokens = rows[:, FIELDS:]
        weights = tf.cast(counts, tf.float32)
        a_end = a_length[:, tf.newaxis] + 1
        b_end = (a_length + b_length)[:, tf.newaxis] + 2
        is_text = ((place >= 1) & (place < a_end)) | ((place > a_end) & (place < b_end))
        # A full sequence also has a [SEP] between documents.
        is_text &= (tokens != self._sep) & (tokens != self._unk) & (tokens != self._pad)
        masked, positions, labels, label_weights = self._masked(tokens, is_text, ids)
        return {
            "input_word_ids": masked,
            "input_mask": tf.cast(place <= b_end, tf.int32),
            "input_type_ids": tf.cast((place > a_end) & (place <= b_end), tf.int32),
            "masked_lm_positions": positions,
            "masked_lm_ids": labels,
            "masked_lm_weights": label_weights * weights[:, tf.newaxis],
            "next_sentence_labels": is_random,
            "next_sentence_weights": weights * float(self.packing == PAIRS),
            "example_weights": weights,
        }

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
