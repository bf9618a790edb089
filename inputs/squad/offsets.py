"""BERT's tokenizer, with the byte offsets of each word piece in the original text."""

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from inputs.text.tokenization.characters import dropped_ranges
from inputs.text.tokenization.unknown import MAX_WORD_BYTES
from inputs.text.tokenization.vocabulary import UNK


def sanitized(text):
    """Makes strings valid UTF-8: each malformed sequence becomes U+FFFD, as in Python."""
    return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")


class OffsetTokenizer(tf.Module):
    """The tokenizer `inputs.text.tokenization.word_pieces.WordPieces`, with byte offsets.

    A piece extends from the first byte of the first character that it comes from to the last byte
    of the last one, including accents that follow, so a span of pieces never splits a character.
    Several pieces may come from one character (BERT splits a Hangul syllable into two or three
    letters); each of them then has the offsets of the whole character.

    *Differs from* `FastBertTokenizer.tokenize_with_offsets`: there, if several pieces come from one
    character, all but the last of them end where that character begins.

    Args:
        vocabulary: word pieces, ids by position.
        lower_case: see `inputs.text.tokenization.word_pieces.WordPieces`.
    """

    def __init__(self, vocabulary: list[str], *, lower_case: bool):
        super().__init__()
        self._normalizer = tf_text.FastBertNormalizer(lower_case_nfd_strip_accents=lower_case)
        self._pieces = tf_text.FastWordpieceTokenizer(
            vocabulary,
            token_out_type=tf.int32,
            unknown_token=UNK,
            max_bytes_per_word=MAX_WORD_BYTES,
        )

    def tokenize(self, text):
        """Splits each string into word pieces.

        Args:
            text: [N] strings, valid UTF-8.

        Returns:
            ids, starts, ends: [N, (pieces)] int32 ragged tensors. Starts and ends are byte offsets
            in the string, and neither decreases from one piece to the next.
        """
        normal, origin = self._normalized(text)
        ids, first, end = self._pieces.tokenize_with_offsets(normal)
        # `origin` has, for each byte of the normalized string, the byte where its character begins
        # in the original, and at the end the length of the original. A character ends where the
        # next different one begins.
        row = origin.value_rowids()
        value = tf.cast(origin.flat_values, tf.int32)
        base = tf.cast(origin.row_starts(), tf.int64)
        is_new = tf.concat([[True], (value[1:] != value[:-1]) | (row[1:] != row[:-1])], axis=0)[
            : tf.size(value)
        ]
        character = tf.cumsum(tf.cast(is_new, tf.int32)) - 1
        begins = tf.boolean_mask(value, is_new)

        def flat_index(index, of_row):
            return tf.cast(index.flat_values, tf.int64) + tf.gather(base, of_row)

        of_row = ids.value_rowids()
        starts = tf.gather(value, flat_index(first, of_row))
        last = tf.gather(character, flat_index(end, of_row) - 1)
        ends = tf.gather(begins, last + 1)
        return ids, ids.with_flat_values(starts), ids.with_flat_values(ends)

    def _normalized(self, text):
        """The normalized strings [N], and for each of their bytes its origin in the original.

        The origin is an [N, (bytes + 1)] ragged tensor: for each byte, the byte where its character
        begins in the original; at the end, the length of the original.
        """
        kept, places = _without_dropped(text)
        normal, origin = self._normalizer.normalize_with_offsets(kept)
        # Maps bytes of `kept` to bytes of the original.
        index = tf.cast(origin.flat_values, tf.int64)
        index += tf.gather(places.row_starts(), origin.value_rowids())
        return normal, origin.with_flat_values(tf.gather(places.flat_values, index))


def _without_dropped(text):
    """The strings [N] without the characters that BERT drops, and the origin of each byte of them.

    The origin is as in `OffsetTokenizer._normalized`: [N, (bytes + 1)] int64 ragged tensor.
    """
    points, offsets = tf.strings.unicode_decode_with_offsets(text, "UTF-8")
    borders = np.array([(first, last + 1) for first, last in dropped_ranges()], np.int32).ravel()
    # A character is inside a range if an odd number of borders are at or below it.
    below = tf.searchsorted(borders, points.flat_values, side="right")
    is_kept = points.with_flat_values(below % 2 == 0)
    points, offsets = (tf.ragged.boolean_mask(x, is_kept) for x in (points, offsets))
    value = points.flat_values
    sizes = 1 + sum(tf.cast(value >= least, tf.int32) for least in (0x80, 0x800, 0x10000))
    bytes_of_row = tf.reduce_sum(points.with_flat_values(sizes), axis=1)
    origin = tf.RaggedTensor.from_row_lengths(
        tf.repeat(offsets.flat_values, sizes), tf.cast(bytes_of_row, tf.int64)
    )
    length = tf.cast(tf.strings.length(text), tf.int64)
    return (
        tf.strings.unicode_encode(points, "UTF-8"),
        tf.concat([origin, length[:, tf.newaxis]], axis=1),
    )
