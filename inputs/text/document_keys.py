"""Which document it is, by its text alone: to drop the second copy, and to hold some out."""

import hashlib

import numpy as np

from inputs.errors import InputError

HELD_OUT_SHARE = 0.02
RECENT = 2**18


def document_key(tokens: np.ndarray) -> int:
    """A 64-bit hash of a document's ids. Among 10 million documents two different ones share a
    key with a chance of 3 in a million.
    """
    data = np.ascontiguousarray(tokens, np.int32).data
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class KnownDocuments:
    """The keys of all documents so far.

    Takes 8 bytes for each, 16 while it grows, and some 25 MB: 30 million documents in 0.5 GB.
    """

    def __init__(self):
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, key: int) -> bool:
        """Whether the key is new; from now on it is known."""
        if key in self._recent:
            return False
        place = np.searchsorted(self._sorted, np.uint64(key))
        if place < len(self._sorted) and self._sorted[place] == key:
            return False
        self._recent.add(key)
        if len(self._recent) == RECENT:
            self._merge()
        return True

    def _merge(self):
        recent = np.fromiter(self._recent, np.uint64, len(self._recent))
        self._recent.clear()
        self._sorted = np.concatenate([self._sorted, recent])
        self._sorted.sort()

    def sorted(self) -> np.ndarray:
        """All keys in ascending order, [D] uint64."""
        self._merge()
        return self._sorted


def held_out_below(keys: np.ndarray) -> int:
    """The key below which a document is held out: about 2 % of them, at least 2.

    Args:
        keys: all documents' keys in ascending order, [D] uint64.

    Raises:
        InputError: fewer than 4 documents; each side needs two, to pair unrelated sentences.
    """
    if len(keys) < 4:
        raise InputError(
            f"The text has only {len(keys)} different documents, and at least 4 are needed (2 to "
            "train on, 2 held out). In .txt files a blank line ends a document."
        )
    return int(keys[max(2, round(HELD_OUT_SHARE * len(keys)))])


class Fingerprint:
    """A short hash of documents in their order, cut into sentences."""

    def __init__(self):
        self._keys, self._lengths = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)

    def add(self, key: int, sentence_lengths: np.ndarray) -> None:
        """Adds the next document.

        Args:
            key: its `document_key`.
            sentence_lengths: [S] ints, in tokens.
        """
        self._keys.update(key.to_bytes(8, "big"))
        self._lengths.update(np.ascontiguousarray(sentence_lengths, np.int32).data)

    def hexdigest(self) -> str:
        """Of all that was added so far."""
        both = self._keys.digest() + self._lengths.digest()
        return hashlib.blake2b(both, digest_size=8).hexdigest()
