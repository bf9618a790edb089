"""BERT's tokenizer with the byte offsets of each word piece in the original text."""

import tensorflow as tf
import tensorflow_text as tf_text

from inputs.text.vocabulary import UNK


def sanitized(text):
    """Makes strings valid UTF-8: each malformed sequence becomes U+FFFD, as in Python."""
    return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")


class OffsetTokenizer(tf.Module):
    """The uncased BERT tokenizer, with the byte offsets of each word piece.

    A piece extends from the first byte of the first character that it comes from to the last byte
    of the last one, including following accents, so a span of pieces never splits a character.
    Several pieces may come from one character (BERT splits a Hangul syllable into two or three
    letters); each of them then has the offsets of the whole character.

    *Differs from* `FastBertTokenizer.tokenize_with_offsets`: there, if several pieces come from a
    character, all but the last one end where that character begins.

    Args:
        vocabulary: word pieces, ids by position.
    """

    def __init__(self, vocabulary: list[str]):
        super().__init__()
        self._normalizer = tf_text.FastBertNormalizer(lower_case_nfd_strip_accents=True)
        self._pieces = tf_text.FastWordpieceTokenizer(
            vocabulary, token_out_type=tf.int32, unknown_token=UNK
        )

    def tokenize(self, text):
        """Splits each string into word pieces.

        Args:
            text: [N] strings, valid UTF-8.

        Returns:
            ids, starts, ends: [N, (pieces)] int32 ragged tensors. Starts and ends are byte offsets
            in the string, and neither decreases from one piece to the next.
        """
        normal, origin = self._normalizer.normalize_with_offsets(text)
        ids, first, end = self._pieces.tokenize_with_offsets(normal)
        # `origin` has, for each byte of the normalised string, the byte where its character begins
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
