"""Documents in groups that are tokenised together; without TensorFlow, for who only passes them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

BATCH_CHARACTERS = 2**21  # about half a million word pieces
DOCUMENT_CHARACTERS = 100  # what a document takes in memory, however short


def batches(documents: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    """Groups documents to about `BATCH_CHARACTERS`; the same documents, the same groups."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document)) + DOCUMENT_CHARACTERS
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Tokenized(NamedTuple):
    """Some documents' word pieces, end to end.

    tokens: [T] int32 ids.
    sentence_lengths: [S] int32, in tokens, all above 0.
    sentence_counts: [D] int64, each document's sentences; 0 for one without a word.
    """

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    sentence_counts: np.ndarray

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (tokens, sentence lengths) of each document that has any."""
        sentences = np.concatenate([[0], np.cumsum(self.sentence_counts)])
        tokens = np.concatenate([[0], np.cumsum(self.sentence_lengths)])[sentences]
        for i in np.flatnonzero(self.sentence_counts):
            yield (
                self.tokens[tokens[i] : tokens[i + 1]],
                self.sentence_lengths[sentences[i] : sentences[i + 1]],
            )
