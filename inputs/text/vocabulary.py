"""WordPiece vocabularies: loaded from a file, or learned by tensorflow-text's own tool."""

import hashlib
import os
from collections.abc import Iterable

from inputs.errors import InputError

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# The learner's time grows with the distinct words it sees and with its iterations. The rarest
# words give it no piece: of 29,000 words the 10,000 commonest, and 2 iterations for its 4, gave
# the same number of tokens within 0.3 % in a fifth of the time.
LEARNED_WORDS = 10_000


def load_vocabulary(path: str) -> list[str]:
    """Reads a `vocab.txt`, one word piece a line; a piece's id is its line number from 0.

    Raises:
        InputError: a file that cannot be read, without the special tokens, or with a piece twice.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            pieces = file.read().rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--vocab: {path} cannot be read as UTF-8 text ({error}). "
            "Give a vocab.txt, one word piece a line."
        ) from None
    missing = [token for token in SPECIAL_TOKENS if token not in pieces]
    if missing:
        raise InputError(
            f"--vocab: {path} lacks {', '.join(missing)}. A BERT vocabulary holds each of "
            f"{', '.join(SPECIAL_TOKENS)} on a line of its own."
        )
    if len(pieces) == len(SPECIAL_TOKENS):
        raise InputError(f"--vocab: {path} holds no word piece but the special tokens.")
    if "" in pieces:
        line = pieces.index("") + 1
        raise InputError(f"--vocab: {path}, line {line} is blank. Take the line out.")
    if len(set(pieces)) != len(pieces):
        twice = next(piece for piece in pieces if pieces.count(piece) > 1)
        raise InputError(f"--vocab: {path} holds {twice!r} twice. Take one of the lines out.")
    return pieces


def learn_vocabulary(texts: Iterable[str], size: int) -> list[str]:
    """Learns about `size` lower-cased word pieces from the texts; the same texts, the same ones.

    The letters that occur and the special tokens are always kept, also where these are more.

    Raises:
        InputError: texts without a single word.
    """
    # Here, because who only loads one need not wait for TensorFlow.
    import tensorflow as tf
    from tensorflow_text.tools.wordpiece_vocab import bert_vocab_from_dataset

    dataset = tf.data.Dataset.from_generator(
        lambda: iter(texts), output_signature=tf.TensorSpec([], tf.string)
    )
    parameters = {
        "lower_thresh": 2,
        "num_iterations": 2,
        "max_input_tokens": LEARNED_WORDS,
        "max_token_length": 24,
    }
    try:
        return bert_vocab_from_dataset.bert_vocab_from_dataset(
            dataset.batch(512), size, [*SPECIAL_TOKENS], {"lower_case": True}, parameters
        )
    except StopIteration:
        raise InputError("--data_dir: not one word to learn a vocabulary from.") from None


def save_vocabulary(pieces: list[str], path: str) -> None:
    """Writes a `vocab.txt`, whole or not at all."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.writelines(f"{piece}\n" for piece in pieces)
    os.replace(f"{path}.new", path)


def vocabulary_hash(pieces: list[str]) -> str:
    """A short fingerprint: two vocabularies with the same one give the same ids."""
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest()[:16]
