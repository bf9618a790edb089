"""BERT's tokenizer with the place of each word piece in the original text, to the byte."""

import tensorflow as tf
import tensorflow_text as tf_text

from inputs.text.vocabulary import UNK


def sanitized(text):
    """The strings as valid UTF-8: each malformed sequence becomes U+FFFD, as in Python."""
    return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")


class OffsetTokenizer(tf.Module):
    """The uncased BERT tokenizer, with the place of each word piece in the text.

    A piece reaches from the first byte of the first character that it comes from to the last byte
    of the last one, the accents after it included, so that a span of pieces cuts the text between
    characters. Several pieces may come from one character (a Hangul syllable is two or three
    letters to BERT); then each of them has the place of the whole character.

    *Differs from* `FastBertTokenizer.tokenize_with_offsets`: there a piece ends where the
    character that its last byte comes from *begins* if another piece of that character follows.

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
        """Word pieces of each string, and where they are.

        Args:
            text: [N] strings, valid UTF-8.

        Returns:
            ids, starts, ends: [N, (pieces)] int32 ragged tensors; starts and ends in bytes of the
            string. Neither ever falls from a piece to the next.
        """
        normal, origin = self._normalizer.normalize_with_offsets(text)
        ids, first, end = self._pieces.tokenize_with_offsets(normal)
        # origin: for each byte of the normalised string the byte where its character begins, and
        # the length of the original at the end. The byte behind a character is where the next
        # different one begins.
        row = origin.value_rowids()
        value, base = tf.cast(origin.flat_values, tf.int32), tf.cast(origin.row_starts(), tf.int64)
        is_new = tf.concat([[True], (value[1:] != value[:-1]) | (row[1:] != row[:-1])], axis=0)[
            : tf.size(value)
        ]
        character = tf.cumsum(tf.cast(is_new, tf.int32)) - 1
        begins = tf.boolean_mask(value, is_new)

        def places(index, of_row):
            return tf.cast(index.flat_values, tf.int64) + tf.gather(base, of_row)

        of_row = ids.value_rowids()
        starts = tf.gather(value, places(first, of_row))
        last = tf.gather(character, places(end, of_row) - 1)
        ends = tf.gather(begins, last + 1)
        return ids, ids.with_flat_values(starts), ids.with_flat_values(ends)
