"""Tokenised text: documents as runs of word pieces, some of them held out."""

import dataclasses
import os
from collections.abc import Iterable

import numpy as np

from inputs.folder_lock import locked
from inputs.text import chunks, mapped_arrays
from inputs.text.document_keys import Fingerprint, KnownDocuments, document_key, held_out_below
from inputs.text.tokenizing import tokenize_all
from inputs.text.vocabulary import SEP


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents, end to end.

    tokens: [T] int32 or uint16 ids; behind each document stands one [SEP].
    sentences: [S + 1] int64, where each sentence starts in `tokens`; the last entry is T.
    documents: [D + 1] int64, where each document starts in `sentences`; the last entry is S.
    folder: where the arrays' files are, if they are mapped; else None.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    folder: str | None = None

    @property
    def size(self) -> str:
        """Tokens and documents, in words."""
        number = len(self.documents) - 1
        return f"{len(self.tokens) - number:,} tokens in {number:,} documents"

    def chunks(self, sequence_length: int, packing: str) -> dict[str, np.ndarray]:
        """What `chunks.chunk_blocks` yields, in one; kept beside the corpus if that is mapped."""
        blocks = chunks.chunk_blocks(self, sequence_length, packing)
        if self.folder is None:
            return chunks.joined(blocks)
        folder = os.path.join(self.folder, f"{packing}-{sequence_length}")
        if found := mapped_arrays.open_arrays(folder):  # perhaps on a disk that cannot be written
            return found[0]
        with locked(self.folder, wait=True):
            found = mapped_arrays.open_arrays(folder)
            if found is None:
                dtypes = dict.fromkeys(chunks.COLUMNS[packing], np.int64)
                with mapped_arrays.ArraysWriter(folder, dtypes) as writer:
                    for block in blocks:
                        writer.append(**block)
                found = mapped_arrays.open_arrays(folder)
        return found[0]


def tokenize(documents: Iterable[list[str]], vocabulary: list[str]) -> Corpus:
    """Splits paragraphs into sentences and these into word pieces.

    Documents whose tokens repeat an earlier document's are dropped.

    Args:
        documents: lists of paragraphs.
        vocabulary: word pieces, ids by position.

    Raises:
        InputError: as `documents` raises it.
    """
    known = KnownDocuments()
    kept = [
        document
        for part in tokenize_all(documents, vocabulary)
        for document in part.documents()
        if known.add(document_key(document[0]))
    ]
    return joined(kept, vocabulary.index(SEP))


def joined(documents: list[tuple[np.ndarray, np.ndarray]], separator: int) -> Corpus:
    """The corpus of some documents, each as (tokens, sentence lengths)."""
    behind = np.array([separator], np.int32)
    tokens = [part for ids, _ in documents for part in (ids, behind)]
    lengths = [lengths.copy() for _, lengths in documents]
    for document in lengths:
        document[-1] += 1
    return Corpus(
        np.concatenate([np.zeros(0, np.int32), *tokens]),
        np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64),
        np.cumsum([0, *map(len, lengths)], dtype=np.int64),
    )


def _parts(corpus: Corpus):
    """Yields (tokens, sentence lengths) of each document, without the [SEP]."""
    bounds = corpus.documents.tolist()
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        starts = corpus.sentences[low : high + 1]
        lengths = np.diff(starts).astype(np.int32)
        lengths[-1] -= 1
        yield corpus.tokens[starts[0] : starts[-1] - 1], lengths


def fingerprint(corpus: Corpus) -> str:
    """A short hash: two corpora with the same one make the same examples."""
    whole = Fingerprint()
    for tokens, lengths in _parts(corpus):
        whole.add(document_key(tokens), lengths)
    return whole.hexdigest()


def split_held_out(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Returns (training, held-out) documents: about 2 % are held out, by a hash of their text.

    Raises:
        InputError: fewer than 4 documents; each side needs two, to pair unrelated sentences.
    """
    parts = list(_parts(corpus))
    keys = np.array([document_key(tokens) for tokens, _ in parts], np.uint64)
    below = held_out_below(np.sort(keys))
    separator = int(corpus.tokens[-1])
    sides = zip(parts, keys < below, strict=True)
    held_out, training = [], []
    for part, is_held_out in sides:
        (held_out if is_held_out else training).append(part)
    return joined(training, separator), joined(held_out, separator)
