"""Decides whether text is lower-cased before it is split into word pieces.

BERT has two kinds of vocabulary. For an uncased one, text is lower-cased and its accents are
removed (NFD separates them). For a cased one, such as that of a multilingual model that keeps
accents, text is not changed. Both kinds split text at punctuation and around Chinese characters.

The value is that of the data or the checkpoint, else the one that the user asked for, else it
depends on the vocabulary.
"""

import os
import unicodedata

from inputs.errors import InputError
from inputs.storage.files import exists, read_json

# A vocabulary is cased if lower-casing changes more than this share of its pieces: it changes none
# of bert-base-uncased, 30 % of bert-base-cased, and 0.1 % of Chinese vocabularies to which 26
# capitals were added.
CHANGED_SHARE = 0.01
SHOWN_PIECES = 3
RECIPE = "recipe.json"  # of a run of train.py
TOKENIZER = "tokenizer_config.json"  # of an export, and of Hugging Face's models


def changed_pieces(vocabulary: list[str]) -> list[str]:
    """The pieces that can never occur in lower-cased text without accents."""
    return [piece for piece in vocabulary if not _is_special(piece) and _lowered(piece) != piece]


def is_cased(vocabulary: list[str]) -> bool:
    """Whether more than `CHANGED_SHARE` of the pieces have capitals or accents."""
    ordinary = sum(not _is_special(piece) for piece in vocabulary)
    return len(changed_pieces(vocabulary)) > CHANGED_SHARE * ordinary


def of_checkpoint(folder: str) -> tuple[bool, str] | None:
    """Whether the checkpoint in a folder was trained on lower-cased text, for `choose`.

    Reads `lower_case` from the recipe.json of a run, or else `do_lower_case` from a
    tokenizer_config.json.

    Returns:
        (whether text was lower-cased, a clause that names the source); None if it is not known.

    Raises:
        InputError: the file cannot be read.
    """
    path = os.path.join(folder, RECIPE)
    if exists(path):
        recipe = read_json(path)
        # Runs of earlier versions do not have the field; all of them were lower-cased.
        value = recipe.get("lower_case", True) if isinstance(recipe, dict) else None
    else:
        path = os.path.join(folder, TOKENIZER)
        if not exists(path):
            return None
        settings = read_json(path)
        value = settings.get("do_lower_case") if isinstance(settings, dict) else None
    if not isinstance(value, bool):
        return None
    return value, f"the checkpoint in {folder}, according to {path}"


def choose(
    asked: bool | None, vocabulary: list[str], known: tuple[bool, str] | None = None
) -> bool:
    """Returns whether to lower-case text.

    Args:
        asked: the value of `lower_case` in the recipe or on the command line; None if not given.
        vocabulary: word pieces, which decide if the value is neither given nor known.
        known: (whether the text of the data or the checkpoint was lower-cased, a clause that names
            the source), or None.

    Raises:
        InputError: `asked` contradicts `known`.
    """
    if known is None:
        return not is_cased(vocabulary) if asked is None else asked
    if asked not in (None, known[0]):
        raise InputError(
            f"lower_case={str(asked).lower()} contradicts {known[1]}. Leave lower_case out to use "
            f"{str(known[0]).lower()}."
        )
    return known[0]


def describe(lower_case: bool) -> str:
    """Describes what happens to text, for a log line or a model card."""
    if lower_case:
        return "lower-cased, accents dropped (uncased vocabulary)"
    return "capitals and accents kept (cased vocabulary)"


def report(lower_case: bool, vocabulary: list[str]) -> str:
    """Formats a line about what happens to text, and about pieces that can never occur."""
    line = f"Text: {describe(lower_case)}"
    if lower_case and is_cased(vocabulary):
        lost = changed_pieces(vocabulary)
        line += (
            f". Warning: {len(lost):,} of the {len(vocabulary):,} word pieces can never occur in "
            f"such text, for example {', '.join(map(repr, lost[:SHOWN_PIECES]))}: the vocabulary "
            "is for lower_case=false"
        )
    return line


def _is_special(piece):
    return len(piece) > 2 and piece[0] == "[" and piece[-1] == "]"


def _lowered(piece):
    parts = unicodedata.normalize("NFD", piece.lower())
    return "".join(part for part in parts if unicodedata.category(part) != "Mn")
