"""The characters that BERT drops from text before it is split into words."""

import functools
import sys
import unicodedata

REPLACEMENT = "\ufffd"  # stands for bytes that could not be decoded


def is_dropped(character: str) -> bool:
    """Whether google-research/bert drops a character: controls, format characters, U+FFFD.

    Tabs and line ends are white space, although Unicode calls them controls.
    """
    if character in "\t\n\r":
        return False
    return character == REPLACEMENT or unicodedata.category(character) in ("Cc", "Cf")


@functools.cache
def dropped_ranges() -> list[tuple[int, int]]:
    """The ranges (first, last) of code points that are dropped, in ascending order."""
    points = [i for i in range(sys.maxunicode + 1) if is_dropped(chr(i))]
    known = set(points)
    firsts = [point for point in points if point - 1 not in known]
    lasts = [point for point in points if point + 1 not in known]
    return list(zip(firsts, lasts, strict=True))


def cleaned(text: str) -> str:
    """The text without these characters, and with one space in place of any white space."""
    return " ".join(text.translate(_nothing()).split())


@functools.cache
def _nothing() -> dict[int, None]:
    return {i: None for first, last in dropped_ranges() for i in range(first, last + 1)}
