"""Whether text is lower-cased before it is cut into word pieces: asked for, known, or found out.

BERT knows two kinds of vocabulary. For an uncased one, text is lower-cased and loses its accents
(they are separated by NFD and dropped). For a cased one, which all multilingual models have that
keep accents, text stays as it is. Both split at punctuation and around Chinese characters.
"""

import os
import unicodedata

from inputs.errors import InputError
from inputs.files import read_json

# bert-base-uncased has no piece that lower-casing changes, bert-base-cased has 30 %. Chinese
# vocabularies with 26 capitals that were added later have 0.1 %.
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
    """What the checkpoint in a folder was trained with, for `choose`.

    It is `lower_case` in the recipe.json of a run, or `do_lower_case` in a tokenizer_config.json.

    Returns:
        (whether text was lower-cased, a clause that says so); None if neither file says it.
    """
    path = os.path.join(folder, RECIPE)
    if os.path.exists(path):
        recipe = read_json(path)
        # Runs of earlier versions do not have the field; all of them were lower-cased.
        value = recipe.get("lower_case", True) if isinstance(recipe, dict) else None
    else:
        path = os.path.join(folder, TOKENIZER)
        if not os.path.exists(path):
            return None
        settings = read_json(path)
        value = settings.get("do_lower_case") if isinstance(settings, dict) else None
    if not isinstance(value, bool):
        return None
    return value, f"the checkpoint in {folder}, according to {path}"


def choose(
    asked: bool | None, vocabulary: list[str], known: tuple[bool, str] | None = None
) -> bool:
    """Whether to lower-case.

    Args:
        asked: the value of `lower_case` in the recipe or on the command line; None: found out.
        vocabulary: word pieces, which decide if nothing else does.
        known: what the data or the checkpoint was made with, and a clause that says so.

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
    """What happens to text, for a log line or a model card."""
    if lower_case:
        return "lower-cased, accents dropped (uncased vocabulary)"
    return "capitals and accents kept (cased vocabulary)"


def report(lower_case: bool, vocabulary: list[str]) -> str:
    """A line about what happens to text, and about pieces that can never occur."""
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
