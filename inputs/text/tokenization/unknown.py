"""Measures how much of a text is [UNK], the token for words that the vocabulary cannot spell."""

import collections
import unicodedata
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

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
        """Returns character -> count, without spaces and characters of Unicode category C.

        Args:
            texts: UTF-8. Texts without an [UNK] may be left out: they have no unknown characters.
        """
        text = tf.constant(b"\n".join(texts), tf.string)
        normal = self._normalizer.normalize([text]).numpy()[0].decode("utf-8", "replace")
        points = np.frombuffer(normal.encode("utf-32-le"), np.uint32)
        found, counts = np.unique(points[~self._known[points]], return_counts=True)
        counted = zip(map(chr, found.tolist()), counts.tolist(), strict=True)
        return {c: n for c, n in counted if not c.isspace() and unicodedata.category(c)[0] != "C"}


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
        else "All their characters are in the vocabulary: they are words of more than 100 bytes, "
        "or it lacks the pieces that continue a word (##)"
    )
    return f"Warning: {line}: words that the vocabulary cannot spell. {reason}"
