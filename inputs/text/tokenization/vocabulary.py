"""WordPiece vocabularies: loaded from a file, or learned with tensorflow-text."""

import hashlib
import itertools
from collections.abc import Iterable

from inputs.errors import InputError
from inputs.storage.files import atomic_write, read_file
from inputs.text.files import check_beginning
from inputs.text.tokenization.characters import cleaned

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# The learning time grows with the numbers of distinct words and iterations. For a text of 29,000
# distinct words, using the 10,000 most frequent ones and 2 iterations (the default is 4) took a
# fifth of the time and changed the number of tokens by less than 0.3 %.
LEARNED_WORDS = 10_000
# tensorflow-text refuses longer pieces (without "##"), NULs, and U+0011 alone, which stands for the
# end of a word in its tree of pieces.
MAX_PIECE_BYTES = 256
END_OF_WORD = "\x11"
SHOWN_CHARACTERS = 40  # of a piece, in a message


def load_vocabulary(path: str, flag: str = "--vocab") -> list[str]:
    """Reads a `vocab.txt` with one word piece per line; ids are line numbers from 0.

    White space around a piece is dropped, as google-research/bert does.

    *Differs from* Google's and Hugging Face's programs: they accept blank lines, as pieces that
    never occur, and repeated pieces, which get the id of their last line.

    Args:
        path: path of the file.
        flag: the flag or argument that named it, for error messages.

    Raises:
        InputError: the file cannot be read, lacks a special token, or has a blank line, a repeated
            piece, or one that no text can have.
    """
    try:
        content = read_file(path)
        check_beginning(path, content, flag=flag)
        # Ids are line numbers, so only line ends may separate lines.
        lines = content.decode("utf-8-sig").replace("\r\n", "\n")
        pieces = [line.strip() for line in lines.rstrip("\n").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{flag}: {path} cannot be read as UTF-8 text ({error}). "
            "Give a vocab.txt with one word piece per line."
        ) from None
    missing = [token for token in SPECIAL_TOKENS if token not in pieces]
    if missing:
        raise InputError(
            f"{flag}: {path} lacks {', '.join(missing)}. A BERT vocabulary has each of "
            f"{', '.join(SPECIAL_TOKENS)} on its own line."
        )
    if len(pieces) == len(SPECIAL_TOKENS):
        raise InputError(f"{flag}: {path} has no word pieces besides the special tokens.")
    seen: dict[str, int] = {}
    for line, piece in enumerate(pieces, start=1):
        if not piece:
            raise InputError(
                f"{flag}: {path}, line {line} is blank, and no text has an empty word piece. "
                f"{_replace(line, pieces)}"
            )
        if piece in seen:
            raise InputError(
                f"{flag}: {path} has {piece!r} in line {seen[piece]} and in line {line}, but text "
                "gets only one id for it: with Google's and Hugging Face's programs that of the "
                f"last line. {_replace(seen[piece], pieces)}"
            )
        if wrong := _wrong(piece):
            raise InputError(
                f"{flag}: {path}, line {line}: {piece[:SHOWN_CHARACTERS]!r} {wrong}. "
                f"{_replace(line, pieces)}"
            )
        seen[piece] = line
    return pieces


def _wrong(piece: str) -> str:
    """Why a piece cannot be a part of a word; "" if it can."""
    if any(map(str.isspace, piece)):
        return "has white space inside, but a line holds one word piece and nothing else"
    if "\0" in piece or piece == END_OF_WORD:
        return "has a control character, which text does not keep"
    if len(piece.removeprefix("##").encode()) > MAX_PIECE_BYTES:
        return f"has more than the {MAX_PIECE_BYTES} bytes that tensorflow-text accepts"
    return ""


def _replace(line: int, pieces: list[str]) -> str:
    """Advice on how to remove a line without changing the ids of later pieces."""
    names = (f"[unused{i}]" for i in itertools.count(line))
    unused = next(name for name in names if name not in pieces)
    return (
        f"Ids are line numbers: without the line, the id of every later piece would be one lower, "
        f"and a checkpoint trained with this vocabulary would get wrong embeddings. Replace line "
        f"{line} by {unused}. Only a vocabulary that no checkpoint was trained with may lose it."
    )


def learn_vocabulary(texts: Iterable[str], size: int, *, lower_case: bool) -> list[str]:
    """Learns about `size` word pieces from the texts. The result is deterministic.

    All letters of the texts and all special tokens are in the vocabulary, even if they are more
    than `size`.

    Args:
        texts: any number of texts.
        size: number of pieces.
        lower_case: whether to lower-case the texts and drop their accents first.

    Raises:
        InputError: the texts contain no words.
    """
    # Imported here, so that loading a vocabulary does not import TensorFlow.
    import tensorflow as tf
    from tensorflow_text.tools.wordpiece_vocab import bert_vocab_from_dataset

    dataset = tf.data.Dataset.from_generator(
        lambda: map(cleaned, texts), output_signature=tf.TensorSpec([], tf.string)
    )
    parameters = {
        "lower_thresh": 2,
        "num_iterations": 2,
        "max_input_tokens": LEARNED_WORDS,
        "max_token_length": 24,
    }
    try:
        return bert_vocab_from_dataset.bert_vocab_from_dataset(
            dataset.batch(512), size, [*SPECIAL_TOKENS], {"lower_case": lower_case}, parameters
        )
    except StopIteration:
        raise InputError("--data_dir: the text has no word to learn a vocabulary from.") from None


def save_vocabulary(pieces: list[str], path: str) -> None:
    """Writes a `vocab.txt` atomically."""
    with atomic_write(path) as file:
        file.writelines(f"{piece}\n" for piece in pieces)


def vocabulary_hash(pieces: list[str]) -> str:
    """A short hash of the pieces in order; vocabularies with the same hash give the same ids."""
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest()[:16]
