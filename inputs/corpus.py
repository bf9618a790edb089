"""Tokenised text: documents as runs of word pieces, some of them held out, cut into chunks."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from inputs.errors import InputError

HELD_OUT_SHARE = 0.02
DOCUMENTS_PER_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents, end to end.

    tokens: [T] int32 ids.
    sentences: [S + 1] int64, where each sentence starts in `tokens`; the last entry is T.
    documents: [D + 1] int64, where each document starts in `sentences`; the last entry is S.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray


def make_tokenizer(vocabulary: list[str]) -> tf_text.FastBertTokenizer:
    """BERT's uncased tokenizer: NFD, accents stripped, lower case, WordPiece."""
    return tf_text.FastBertTokenizer(
        vocabulary, token_out_type=tf.int32, lower_case_nfd_strip_accents=True
    )


def tokenize(documents: Iterable[list[str]], vocabulary: list[str]) -> Corpus:
    """Splits paragraphs into sentences and these into word pieces.

    Documents whose tokens repeat an earlier document's are dropped.

    Args:
        documents: lists of paragraphs.
        vocabulary: word pieces, ids by position.

    Raises:
        InputError: as `documents` raises it.
    """
    tokenizer, breaker = make_tokenizer(vocabulary), tf_text.StateBasedSentenceBreaker()

    def sentences_of(paragraphs, paragraph_counts):
        sentences = breaker.break_sentences(paragraphs)
        ids = tokenizer.tokenize(sentences.flat_values)
        # A document's sentences: those of all its paragraphs.
        per_document = tf.RaggedTensor.from_row_lengths(sentences.row_lengths(), paragraph_counts)
        return ids.flat_values, ids.row_lengths(), tf.reduce_sum(per_document, axis=1)

    failed = []

    def batches():
        source = iter(documents)
        try:
            while batch := list(itertools.islice(source, DOCUMENTS_PER_BATCH)):
                yield _flat(batch)
        except InputError as error:  # which TensorFlow would wrap in one of its own
            failed.append(error)

    signature = (tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int64))
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    dataset = dataset.map(sentences_of, num_parallel_calls=tf.data.AUTOTUNE)
    seen: set[bytes] = set()
    tokens, lengths, counts = [], [], []
    for ids, id_counts, sentence_counts in dataset.prefetch(2).as_numpy_iterator():
        ends = np.cumsum(sentence_counts)
        token_ends = np.concatenate([[0], np.cumsum(id_counts)])
        for start, end in zip(ends - sentence_counts, ends, strict=True):
            document = ids[token_ends[start] : token_ends[end]]
            key = hashlib.blake2b(document.tobytes(), digest_size=16).digest()
            if len(document) and key not in seen:
                seen.add(key)
                sentence_lengths = id_counts[start:end]
                tokens.append(document)
                lengths.append(sentence_lengths[sentence_lengths > 0])
                counts.append(len(lengths[-1]))
    if failed:
        raise failed[0]
    return _joined(tokens, lengths, counts)


def _flat(documents):
    flat = [paragraph for document in documents for paragraph in document]
    return flat, [len(document) for document in documents]


def _joined(tokens, lengths, counts) -> Corpus:
    def starts(values):
        return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)

    if not tokens:
        return Corpus(np.zeros(0, np.int32), starts([]), starts([]))
    return Corpus(np.concatenate(tokens), starts(np.concatenate(lengths)), starts(counts))


def fingerprint(corpus: Corpus) -> str:
    """A short hash: two corpora with the same one make the same examples."""
    key = hashlib.blake2b(corpus.tokens.tobytes(), digest_size=8)
    key.update(corpus.sentences.tobytes() + corpus.documents.tobytes())
    return key.hexdigest()


def split_held_out(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Returns (training, held-out) documents: about 2 % are held out, by a hash of their text.

    Raises:
        InputError: fewer than 4 documents; each side needs two, to pair unrelated sentences.
    """
    number = len(corpus.documents) - 1
    if number < 4:
        raise InputError(
            f"--data_dir: {number} different documents, and at least 4 are needed (2 to train on, "
            "2 held out). In .txt files a blank line ends a document."
        )
    spans = corpus.sentences[corpus.documents]
    keys = [
        hashlib.blake2b(corpus.tokens[start:end].tobytes(), digest_size=8).digest()
        for start, end in zip(spans[:-1], spans[1:], strict=True)
    ]
    held_out = np.zeros(number, bool)
    share = max(2, round(HELD_OUT_SHARE * number))
    held_out[sorted(range(number), key=keys.__getitem__)[:share]] = True
    return _select(corpus, ~held_out), _select(corpus, held_out)


def _select(corpus: Corpus, chosen: np.ndarray) -> Corpus:
    counts, lengths = np.diff(corpus.documents), np.diff(corpus.sentences)
    of_sentence = np.repeat(chosen, counts)
    of_token = np.repeat(of_sentence, lengths)
    tokens = corpus.tokens[of_token]
    return _joined([tokens], [lengths[of_sentence]], counts[chosen])


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Runs of whole sentences of one document that fit a sequence; one is one example.

    All are [C] int64: `start`, `end` in tokens; `first` sentence and its number of `sentences`
    (in `sentence_starts`, [S]); `document_end` in tokens; `others` and `next_document`, the
    number of chunks in other documents and where, cyclically, the first of them stands.
    """

    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    sentences: np.ndarray
    document_end: np.ndarray
    others: np.ndarray
    next_document: np.ndarray
    sentence_starts: np.ndarray


def make_chunks(corpus: Corpus, sequence_length: int) -> Chunks:
    """Packs consecutive sentences greedily into chunks of at most `sequence_length - 3` tokens."""
    room = sequence_length - 3  # [CLS] A [SEP] B [SEP]
    starts: list[int] = []  # of pieces: sentences, the long ones cut to fit
    rows = []
    for document in range(len(corpus.documents) - 1):
        low, high = corpus.documents[document : document + 2]
        bounds = corpus.sentences[low : high + 1].tolist()
        piece_bounds = [bounds[0]]
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            piece_bounds += [*range(begin + room, end, room), end]
        first = 0
        for i in range(1, len(piece_bounds)):
            last = i == len(piece_bounds) - 1
            if last or piece_bounds[i + 1] - piece_bounds[first] > room:
                span = (piece_bounds[first], piece_bounds[i])
                if span[1] - span[0] >= 2:  # a pair needs a token on each side
                    rows.append((*span, len(starts) + first, i - first, bounds[-1], document))
                first = i
        starts += piece_bounds[:-1]
    columns = np.array(rows, np.int64).reshape(-1, 6).T
    _, chunk_counts = np.unique(columns[5], return_counts=True)
    if len(chunk_counts) < 2:
        raise InputError(
            "--data_dir: too little text: fewer than 2 training or held-out documents have two "
            "words. Give more documents."
        )
    return Chunks(
        *columns[:5],
        others=np.repeat(len(rows) - chunk_counts, chunk_counts),
        next_document=np.repeat(np.cumsum(chunk_counts), chunk_counts),
        sentence_starts=np.array(starts, np.int64),
    )
