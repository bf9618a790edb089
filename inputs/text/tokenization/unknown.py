"""Measures how much of a text is [UNK], the token for words that the vocabulary cannot spell."""

import collections
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from inputs.text.tokenization.characters import is_dropped

# Longer words are [UNK]. google-research/bert allows 200 characters, which have up to 4 bytes each:
# Thai, for example, has no spaces between words.
MAX_WORD_BYTES = 800
WARNED_SHARE = 0.01
SHOWN_CHARACTERS = 10


class UnknownCharacters:
    """Counts the characters of texts that are not word pieces, neither alone nor after "##".

    Args:
        vocabulary: word pieces.
        lower_case: whether the texts are lower-cased before they are tokenized.
    """

    def __init__(self, vocabulary: list[str], *, lower_case: bool):
        self._normalizer = tf_text.FastBertNormalizer(lower_case_nfd_strip_accents=lower_case)
        self._known = np.zeros(0x110000, bool)
        for piece in vocabulary:
            character = piece.removeprefix("##")
            if len(character) == 1:
                self._known[ord(character)] = True

    def __call__(self, texts: Iterable[bytes]) -> dict[str, int]:
        """Returns character -> count, without spaces and characters that are dropped.

        Args:
            texts: UTF-8. Texts without an [UNK] may be left out: they have no unknown characters.
        """
        text = tf.constant(b"\n".join(texts), tf.string)
        normal = self._normalizer.normalize([text]).numpy()[0].decode("utf-8", "replace")
        points = np.frombuffer(normal.encode("utf-32-le"), np.uint32)
        found, counts = np.unique(points[~self._known[points]], return_counts=True)
        counted = zip(map(chr, found.tolist()), counts.tolist(), strict=True)
        return {c: n for c, n in counted if not c.isspace() and not is_dropped(c)}


def report(unknown: int, tokens: int, characters: Mapping[str, int]) -> str:
    """Formats a line about the share of [UNK].

    Above `WARNED_SHARE` the line is a warning that names the most common unknown characters.

    Args:
        unknown: number of [UNK].
        tokens: number of all word pieces.
        characters: character -> count, from `UnknownCharacters`.
    """
    line = f"{unknown:,} of {tokens:,} tokens are [UNK] ({unknown / max(tokens, 1):.2%})"
    if unknown <= WARNED_SHARE * tokens:
        return line
    common = collections.Counter(characters).most_common(SHOWN_CHARACTERS)
    shown = ", ".join(f"{c!r} U+{ord(c):04X} ({n:,})" for c, n in common)
    reason = (
        f"The commonest characters that the vocabulary lacks: {shown}"
        if shown
        else "All their characters are in the vocabulary: they are words of more than "
        f"{MAX_WORD_BYTES} bytes, or it lacks the pieces that continue a word (##)"
    )
    return f"Warning: {line}: words that the vocabulary cannot spell. {reason}"
