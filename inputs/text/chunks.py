"""Cuts a corpus into chunks: runs of tokens that fit a sequence, one per example."""

from collections.abc import Iterator

import numpy as np

from inputs.errors import InputError

PAIRS, FULL = PACKINGS = ("pairs", "full-sentences")
SENTENCES_PER_BLOCK = 2**20  # processed together; affects memory and time, not the result
# Maximum share of a full sequence that may stay empty. If it would be more, a sentence is cut.
EMPTY_SHARE = 0.05
# Documents are grouped into runs of this length, and full sequences do not cross their boundaries,
# so that many runs can be cut at once. Each run leaves about half a sequence empty.
RUN_TOKENS = 2**16

# The columns of a table of chunks.
COLUMNS = {
    PAIRS: ("start", "end", "first", "sentences", "document_end", "next_document"),
    FULL: ("start", "end"),
}
# Names of the arrays.
TABLE = "table"
SENTENCE_STARTS = "sentence_starts"
SPECIAL = {PAIRS: 3, FULL: 2}  # tokens of a sequence besides those of its chunk: [CLS], [SEP]


def chunk_blocks(corpus, sequence_length: int, packing: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields the chunks of a corpus in order, in blocks.

    With `pairs`, a chunk is a run of whole sentences of one document that fits
    [CLS] A [SEP] B [SEP]; a longer sentence is cut. With `full-sentences`, a chunk fills
    [CLS] ... [SEP] and continues across documents, including their [SEP] (RoBERTa's
    FULL-SENTENCES, arXiv:1907.11692, section 4.2). *Differs from* RoBERTa: a sentence is cut if
    more than `EMPTY_SHARE` of the sequence would stay empty otherwise.

    Args:
        corpus: an `inputs.text.corpus.Corpus`.
        sequence_length: tokens per example, special ones included.
        packing: one of `PACKINGS`.

    Yields:
        Dictionaries of int64 arrays: `table`, [C, columns], with a row for each of C chunks; and,
        with `pairs`, `sentence_starts`, [S], where each sentence or part of one starts, in tokens.
        The columns are, with `full-sentences`, `start` and `end`, in tokens; with `pairs` also
        `first`, the first sentence, as an index in `sentence_starts`; `sentences`, the number of
        sentences; `document_end`, the end of the document, in tokens; and `next_document`, the
        index of the first chunk of the next document.

    Raises:
        InputError: fewer than 2 documents have enough text.
    """
    cutter = _Pairs(sequence_length - 3) if packing == PAIRS else _Full(sequence_length)
    documents = corpus.documents.all()
    blocks = list(_document_blocks(documents))
    sentences = corpus.sentences.slices(
        (documents[low], documents[high] + 1) for low, high in blocks
    )
    for (low, high), bounds in zip(blocks, sentences, strict=True):
        block = cutter.block(bounds, np.diff(documents[low : high + 1]))
        columns = [block[name] for name in COLUMNS[packing]]
        yield {TABLE: np.stack(columns, 1)} | {
            name: block[name] for name in block if name == SENTENCE_STARTS
        }
    if cutter.documents < 2:
        raise InputError(
            "The text is too short: fewer than 2 training or held-out documents have at least two "
            "words. Give more documents."
        )


def _document_blocks(documents):
    """Yields (first, last + 1) of blocks of documents of about `SENTENCES_PER_BLOCK` sentences."""
    low = 0
    while low < len(documents) - 1:
        limit = documents[low] + SENTENCES_PER_BLOCK
        high = max(low + 1, int(np.searchsorted(documents, limit, "right")) - 1)
        yield low, high
        low = high


class _Pairs:
    """Cuts chunks of whole sentences of one document."""

    def __init__(self, room):
        self._room = room
        self._sentences = 0
        self._chunks = 0
        self.documents = 0

    def block(self, bounds, counts):
        """The chunks of some documents.

        Args:
            bounds: [S + 1] int64, where each sentence starts, in tokens.
            counts: [D] int64, sentences of each document.
        """
        room = self._room
        starts = bounds[:-1]
        ends = bounds[1:].copy()
        last = np.cumsum(counts)
        ends[last - 1] -= 1  # without the [SEP] after each document
        cuts = np.maximum(1, -(-(ends - starts) // room))  # long sentences are cut to fit
        within = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        piece_starts = np.repeat(starts, cuts) + room * within
        piece_ends = np.minimum(piece_starts + room, np.repeat(ends, cuts))
        stops = np.cumsum(cuts)[last - 1]  # of each document, in pieces
        of_piece = np.repeat(np.arange(len(counts)), np.diff(stops, prepend=0))
        following = np.minimum(
            np.searchsorted(piece_ends, piece_starts + room, "right"), stops[of_piece]
        )
        firsts = _orbits(np.concatenate([[0], stops[:-1]]), stops, lambda first: following[first])
        after = following[firsts]
        start, end = piece_starts[firsts], piece_ends[after - 1]
        enough = end - start >= 2  # a pair needs a token on each side
        firsts = firsts[enough]
        after = after[enough]
        start = start[enough]
        end = end[enough]
        document = of_piece[firsts]
        chunks = np.bincount(document, minlength=len(counts))
        block = {
            "start": start,
            "end": end,
            "first": firsts + self._sentences,
            "sentences": after - firsts,
            "document_end": ends[last - 1][document],
            "next_document": self._chunks + np.cumsum(chunks)[document],
            "sentence_starts": piece_starts,
        }
        self._sentences += len(piece_starts)
        self._chunks += len(start)
        self.documents += np.count_nonzero(chunks)
        return block


class _Full:
    """Cuts chunks that fill a sequence."""

    def __init__(self, sequence_length):
        self._room = sequence_length - 2
        self._slack = int(EMPTY_SHARE * sequence_length)
        self.documents = 0

    def block(self, bounds, counts):
        """The chunks of some documents. See `_Pairs.block` for the arguments."""
        document_bounds = bounds[np.concatenate([[0], np.cumsum(counts)])]
        run = np.unique(
            (document_bounds[:-1] - document_bounds[0]) // RUN_TOKENS, return_index=True
        )
        starts = document_bounds[run[1]]
        stops = np.append(starts[1:], document_bounds[-1])

        def following(position):
            stop = stops[np.searchsorted(stops, position, "right")]
            limit = np.minimum(position + self._room, stop)
            whole = bounds[np.searchsorted(bounds, limit, "right") - 1]
            return np.where(limit - whole > self._slack, limit, whole)

        start = _orbits(starts, stops, following)
        end = following(start)
        separators = document_bounds[1:] - 1
        # A document's [SEP] at the edge of the sequence is replaced by the sequence's own.
        start = start + np.isin(start, separators)
        end = end - np.isin(end - 1, separators)
        enough = end - start >= 1
        self.documents += len(counts)
        return {"start": start[enough], "end": end[enough]}


def _orbits(starts, stops, following):
    """The sorted x, f(x), f(f(x)), ... that are below `stop`, for each x in `starts`."""
    found = []
    current = starts
    while len(current):
        found.append(current)
        current = following(current)
        left = current < stops
        current, stops = current[left], stops[left]
    return np.sort(np.concatenate(found))
