"""Runs of tokens that fit a sequence: what examples are made of."""

from collections.abc import Iterator

import numpy as np

from inputs.errors import InputError

PAIRS, FULL = PACKINGS = ("pairs", "full-sentences")
SENTENCES_PER_BLOCK = 2**20  # looked at together; decides memory and time, not the result
# In a sequence packed full at most this share stays empty; beyond it the next sentence is cut.
EMPTY_SHARE = 0.05
# Full sequences do not cross the ends of runs of documents this long, so that many can be cut
# at once; half a sentence in so many tokens is left empty by it.
RUN_TOKENS = 2**16

COLUMNS = {
    PAIRS: (
        "start",
        "end",
        "first",
        "sentences",
        "document_end",
        "document_chunks",
        "next_document",
        "sentence_starts",
    ),
    FULL: ("start", "end"),
}


def chunk_blocks(corpus, sequence_length: int, packing: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields the chunks of a corpus in order, in blocks.

    A chunk is one example. With `pairs` it is a run of whole sentences of one document that
    leaves room for [CLS] A [SEP] B [SEP]; a sentence longer than that is cut. With
    `full-sentences` it goes on over the ends of documents, with their [SEP], to fill
    [CLS] ... [SEP] (RoBERTa's FULL-SENTENCES, arXiv:1907.11692, section 4.2, but that a sentence
    is cut where otherwise more than `EMPTY_SHARE` of the sequence stayed empty).

    Yields:
        Dictionaries of int64 arrays. `start`, `end` in tokens, [C]. For pairs also, [C]: `first`
        sentence (in `sentence_starts`) and number of `sentences`; `document_end` in tokens;
        `document_chunks`, how many the document has; `next_document`, the first chunk after them.
        And `sentence_starts`, [S], in tokens.

    Raises:
        InputError: fewer than 2 documents, or chunks, have text enough.
    """
    make = _Pairs(sequence_length - 3) if packing == PAIRS else _Full(sequence_length)
    for low, high in _document_blocks(corpus.documents):
        counts = np.diff(corpus.documents[low : high + 1])
        bounds = np.array(corpus.sentences[corpus.documents[low] : corpus.documents[high] + 1])
        yield make.block(bounds, counts)
    if make.documents < 2:
        raise InputError(
            "--data_dir: too little text: fewer than 2 training or held-out documents have two "
            "words. Give more documents."
        )


def _document_blocks(documents):
    """(first, last + 1) documents of about `SENTENCES_PER_BLOCK` sentences, one at the least."""
    low = 0
    while low < len(documents) - 1:
        limit = documents[low] + SENTENCES_PER_BLOCK
        high = max(low + 1, int(np.searchsorted(documents, limit, "right")) - 1)
        yield low, high
        low = high


class _Pairs:
    """Chunks of sentences of one document."""

    def __init__(self, room):
        self._room = room
        self._sentences = self._chunks = self.documents = 0

    def block(self, bounds, counts):
        """The chunks of documents of so many sentences, which stand at these bounds."""
        room = self._room
        starts, ends = bounds[:-1], bounds[1:].copy()
        last = np.cumsum(counts)
        ends[last - 1] -= 1  # the [SEP] behind each document
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
        firsts, after, start, end = firsts[enough], after[enough], start[enough], end[enough]
        document = of_piece[firsts]
        chunks = np.bincount(document, minlength=len(counts))
        block = {
            "start": start,
            "end": end,
            "first": firsts + self._sentences,
            "sentences": after - firsts,
            "document_end": ends[last - 1][document],
            "document_chunks": chunks[document],
            "next_document": self._chunks + np.cumsum(chunks)[document],
            "sentence_starts": piece_starts,
        }
        self._sentences += len(piece_starts)
        self._chunks += len(start)
        self.documents += np.count_nonzero(chunks)
        return block


class _Full:
    """Chunks that fill a sequence."""

    def __init__(self, sequence_length):
        self._room, self._slack = sequence_length - 2, int(EMPTY_SHARE * sequence_length)
        self.documents = 0

    def block(self, bounds, counts):
        """The chunks of documents of so many sentences, which stand at these bounds."""
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
        # The sequence's own [SEP] takes the place of a document's that would stand at its edge.
        start = start + np.isin(start, separators)
        end = end - np.isin(end - 1, separators)
        enough = end - start >= 1
        self.documents += len(counts)
        return {"start": start[enough], "end": end[enough]}


def _orbits(starts, stops, following):
    """All x, f(x), f(f(x)), ... below `stop`, in ascending order, from each of the starts."""
    found, current = [], starts
    while len(current):
        found.append(current)
        current = following(current)
        left = current < stops
        current, stops = current[left], stops[left]
    return np.sort(np.concatenate(found))


def joined(blocks) -> dict[str, np.ndarray]:
    """The blocks as one."""
    blocks = list(blocks)
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
