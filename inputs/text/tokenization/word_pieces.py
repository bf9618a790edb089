"""Splits documents into sentences with tensorflow-text, and sentences into BERT's word pieces."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from inputs.errors import InputError
from inputs.text.tokenization.characters import dropped_ranges
from inputs.text.tokenization.unknown import MAX_WORD_BYTES, UnknownCharacters
from inputs.text.tokenization.vocabulary import UNK

BATCH_CHARACTERS = 2**21  # about half a million word pieces
DOCUMENT_CHARACTERS = 100  # added per document, as even a short one takes memory
THREADS = 2  # if a process tokenizes by itself
QUEUED_BATCHES = 3  # per worker

# The rules of StateBasedSentenceBreaker (tensorflow-text 2.20) depend only on punctuation,
# emoticons and the bytes next to them. The bytes of this set are neither, unless they are next to a
# byte outside the set. X is not in the set because of the emoticons "XD" and "DX".
_WORD = np.zeros(256, bool)
_WORD[list(b"ABCDEFGHIJKLMNOPQRSTUVWYZabcdefghijklmnopqrstuvwxyz0123456789,")] = True


class Tokenized(NamedTuple):
    """The word pieces of some documents, end to end.

    Attributes:
        tokens: [T] int32 ids.
        sentence_lengths: [S] int32, in tokens, all above 0.
        sentence_counts: [D] int64, sentences of each document; 0 for one without a word.
        unknown_characters: character -> how often it occurs in sentences with an [UNK], for the
            characters that are no word piece.
    """

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    sentence_counts: np.ndarray
    unknown_characters: dict[str, int]

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (tokens, sentence lengths) of each document that has any."""
        sentences = np.concatenate([[0], np.cumsum(self.sentence_counts)])
        tokens = np.concatenate([[0], np.cumsum(self.sentence_lengths)])[sentences]
        for i in np.flatnonzero(self.sentence_counts):
            yield (
                self.tokens[tokens[i] : tokens[i + 1]],
                self.sentence_lengths[sentences[i] : sentences[i + 1]],
            )


class WordPieces(tf.Module):
    """BERT's tokenizer: white space, punctuation, Chinese characters, WordPiece.

    Characters of `inputs.text.tokenization.characters` are dropped.

    *Differs from* google-research/bert: a word of more than `MAX_WORD_BYTES` bytes is [UNK]; there,
    one of more than 200 characters is, such as one of 201 to 800 letters of one byte. When text is
    lower-cased it is also case-folded (ß becomes ss), and compatibility forms become plain
    characters.

    Args:
        vocabulary: word pieces, ids by position.
        lower_case: if True, text is lower-cased first, and accents are separated (NFD) and dropped.
    """

    def __init__(self, vocabulary: list[str], *, lower_case: bool):
        super().__init__()
        # `FastBertTokenizer` would split words at these characters. When it lower-cases, it drops
        # most format characters by itself.
        ranges = "".join(rf"\x{{{a:x}}}-\x{{{b:x}}}" for a, b in dropped_ranges())
        self._dropped = f"[{ranges}]"
        self._tokenizer = tf_text.FastBertTokenizer(
            vocabulary,
            token_out_type=tf.int32,
            lower_case_nfd_strip_accents=lower_case,
            max_bytes_per_word=MAX_WORD_BYTES,
        )

    def tokenize(self, text) -> tf.RaggedTensor:
        """Splits each of [N] strings: [N, (pieces)] int32 ids."""
        return self._tokenizer.tokenize(tf.strings.regex_replace(text, self._dropped, ""))


class Tokenizer:
    """Splits paragraphs into sentences, and sentences into word pieces.

    Args:
        vocabulary: word pieces, ids by position.
        lower_case: see `WordPieces`.

    Attributes:
        pieces: function from a tensor of sentences to a ragged tensor of their ids.
    """

    def __init__(self, vocabulary: list[str], *, lower_case: bool):
        self._breaker = tf_text.StateBasedSentenceBreaker()
        self._splitter = tf_text.ByteSplitter()
        self._unknown = vocabulary.index(UNK)
        self._unknown_characters = UnknownCharacters(vocabulary, lower_case=lower_case)
        self.pieces = WordPieces(vocabulary, lower_case=lower_case).tokenize

    def __call__(self, documents: list[list[str]]) -> Tokenized:
        """Tokenizes documents, each a list of paragraphs."""
        with tf.device("/cpu:0"):
            paragraphs = list(itertools.chain.from_iterable(documents))
            sentences = self.break_sentences(paragraphs)
            pieces = self.pieces(sentences.flat_values)
        ids, lengths = pieces.flat_values.numpy(), pieces.row_lengths().numpy()
        # The number of sentences with a word before each sentence.
        before = np.concatenate([[0], np.cumsum(lengths > 0)])
        ends = np.cumsum([0, *map(len, documents)])
        counts = np.diff(before[sentences.row_splits.numpy()[ends]])
        unknown = {}
        if (places := np.flatnonzero(ids == self._unknown)).size:
            rows = np.unique(np.searchsorted(np.cumsum(lengths), places, "right"))
            unknown = self._unknown_characters(tf.gather(sentences.flat_values, rows).numpy())
        return Tokenized(ids, lengths[lengths > 0].astype(np.int32), counts, unknown)

    def break_sentences(self, paragraphs: list[str]) -> tf.RaggedTensor:
        """Splits as `StateBasedSentenceBreaker.break_sentences`, three to six times as fast.

        The library tries 150 emoticons at each byte. Here it gets the text without the inner
        bytes of plain words, and the offsets that it returns are mapped back to the whole text.

        *Differs from* the library: there, each space between two sentences counts as one byte, so
        that a sentence after U+00A0 or U+3000 begins inside that character. Here every cut is
        moved to the next character boundary.

        Args:
            paragraphs: P strings.

        Returns:
            [P, (sentences)] ragged tensor of strings.
        """
        raw = [paragraph.encode() for paragraph in paragraphs]
        text = np.frombuffer(b"\n".join([b"", *raw, b"\n"]), np.uint8)
        lengths = np.array([len(r) for r in raw], np.int64)
        starts = np.cumsum(lengths + 1) - lengths
        kept = np.flatnonzero(_near_punctuation(text))
        short = text[kept].tobytes()
        low = np.searchsorted(kept, starts)
        high = np.searchsorted(kept, starts + lengths)
        spans = zip(low.tolist(), high.tolist(), strict=True)
        _, begins, ends = self._breaker.break_sentences_with_offsets(
            tf.constant([short[i:j] for i, j in spans], tf.string)
        )
        rows = begins.row_lengths().numpy()
        offset, start = np.repeat(low, rows), np.repeat(starts, rows)
        first = _next_character(text, kept[begins.flat_values.numpy() + offset]) - start
        end = _next_character(text, kept[ends.flat_values.numpy() + offset - 1] + 1) - start

        def ragged(values):
            values = tf.constant(values.astype(np.int32))
            return tf.RaggedTensor.from_row_lengths(values, rows, validate=False)

        return self._splitter.split_by_offsets(
            tf.constant(raw, tf.string), ragged(first), ragged(end)
        )


def _next_character(text: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Moves places inside a UTF-8 character to the end of that character.

    Args:
        text: [N] uint8.
        places: [K] ints below N.
    """
    for _ in range(3):  # at most three bytes of a character are not its first
        places = places + (text[places] & 0xC0 == 0x80)
    return places


def _near_punctuation(text: np.ndarray) -> np.ndarray:
    """[N] bool: bytes that are punctuation, one byte before it or up to three bytes after it.

    Three, because a sentence may end with the letter of an emoticon and a space (":c Then").
    """
    word = _WORD[text]
    plain = word.copy()
    plain[1:-1] |= (text[1:-1] == ord(" ")) & word[:-2] & word[2:]
    other = ~plain
    kept = other.copy()
    kept[:-1] |= other[1:]
    for distance in (1, 2, 3):
        kept[distance:] |= other[:-distance]
    return kept


def batch_documents(documents: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    """Groups documents into batches of about `BATCH_CHARACTERS`; the result is deterministic."""
    batch = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document)) + DOCUMENT_CHARACTERS
        if size >= BATCH_CHARACTERS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def tokenize_in_order(
    documents: Iterable[list[str]],
    vocabulary: list[str],
    *,
    lower_case: bool,
    workers: int,
    skip: int = 0,
) -> Iterator[Tokenized]:
    """Tokenizes batches of documents, in order, in worker processes or threads.

    Args:
        documents: lists of paragraphs.
        vocabulary: word pieces, ids by position.
        lower_case: see `WordPieces`.
        workers: number of processes; 0 to tokenize in threads of this process.
        skip: number of batches to read without tokenizing them.

    Raises:
        InputError: a worker process was killed, or `documents` raised it.
    """
    batches = itertools.islice(batch_documents(documents), skip, None)
    if workers == 0:
        tokenizer = Tokenizer(vocabulary, lower_case=lower_case)
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            yield from _in_order(pool, tokenizer, batches, THREADS)
        return
    # Workers are forked from a server process that has imported TensorFlow but never run it. This
    # is safe, unlike forking this process, and the workers share the memory of the import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "tensorflow_text"])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages of the workers
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, _start_worker, (vocabulary, lower_case)
    )
    try:
        yield from _in_order(pool, _tokenize_in_worker, batches, QUEUED_BATCHES * workers)
    except BrokenProcessPool:
        raise InputError(
            "A worker process was killed, probably because memory ran out. The same command "
            "continues after the last finished shard; with --workers, python -m "
            "inputs.text.prepare takes fewer processes."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool, function, batches, queued):
    """Yields `function(batch)` in the order of the batches, at most `queued` + 1 at a time."""
    futures: collections.deque = collections.deque()
    for batch in batches:
        futures.append(pool.submit(function, batch))
        if len(futures) > queued:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _start_worker(vocabulary, lower_case):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer(vocabulary, lower_case=lower_case)


def _exit_with_parent():
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _tokenize_in_worker(batch):
    return _worker_tokenizer(batch)
