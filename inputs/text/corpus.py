"""A corpus: tokenised documents end to end, split into training and held-out documents.

`tokenize` makes a corpus in memory from raw text. `load_prepared` opens the shards that
`inputs.text.prepare` wrote, and memory-maps their tokens.
"""

import collections
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable

import numpy as np

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.files import cache_folder, first_writable, locked
from inputs.shards import MANIFEST
from inputs.text import chunks, mapped_arrays, unknown
from inputs.text.shards import load_manifest, read_shard
from inputs.text.tokenizing import tokenize_in_threads
from inputs.text.vocabulary import SEP, UNK, load_vocabulary, vocabulary_hash

HELD_OUT_SHARE = 0.02
RECENT_KEYS = 2**18  # collected in a set before they are merged into the sorted array
LAYOUT = "memory_map"  # folder of the mapped files, inside the prepared folder or a cache
CACHE_FIX = (
    "The token ids are written there once, to be memory-mapped. Give a folder for them with "
    "--cache_dir."
)
SIDES = ("training", "held_out")
DOCUMENTS_PER_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents, end to end.

    Attributes:
        tokens: [T] int32 or uint16 ids; after each document there is one [SEP].
        sentences: [S + 1] int64, where each sentence starts in `tokens`; the last entry is T.
        documents: [D + 1] int64, where each document starts in `sentences`; the last entry is S.
        folder: folder of the arrays' files if they are memory-mapped, else None.
        spare: folder for the files of chunks if `folder` cannot be written.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    folder: str | None = None
    spare: str | None = None

    def describe(self) -> str:
        """Formats the number of tokens and documents, for a message."""
        count = len(self.documents) - 1
        return f"{len(self.tokens) - count:,} tokens in {count:,} documents"

    def chunks(self, sequence_length: int, packing: str) -> dict[str, np.ndarray]:
        """The arrays of `chunks.chunk_blocks`, concatenated.

        If the corpus is memory-mapped, the chunks are written to files once and memory-mapped, too.

        Args:
            sequence_length: tokens per example, special ones included.
            packing: one of `chunks.PACKINGS`.

        Raises:
            InputError: the corpus has too little text, or the files cannot be written.
        """
        blocks = chunks.chunk_blocks(self, sequence_length, packing)
        if self.folder is None:
            return chunks.joined(blocks)
        name = f"{packing}-{sequence_length}"
        places = [place for place in (self.folder, self.spare) if place]
        # Opened before the lock is taken: the disk may be read-only.
        for place in places:
            if found := mapped_arrays.open_arrays(os.path.join(place, name)):
                return found[0]
        place = first_writable(places, "--data_dir", CACHE_FIX)
        folder = os.path.join(place, name)
        with locked(place, "--data_dir", wait=True):
            found = mapped_arrays.open_arrays(folder)
            if found is None:
                dtypes = dict.fromkeys(chunks.COLUMNS[packing], np.int64)
                with mapped_arrays.ArraysWriter(folder, dtypes) as writer:
                    for block in blocks:
                        writer.append(**block)
                found = _written(mapped_arrays.open_arrays(folder), folder)
        return found[0]


def tokenize(
    documents: Iterable[list[str]],
    vocabulary: list[str],
    *,
    lower_case: bool,
    log: Callable[[str], object] = lambda line: None,
) -> Corpus:
    """Makes a corpus from raw text. Documents with the same tokens as an earlier one are dropped.

    Args:
        documents: lists of paragraphs.
        vocabulary: word pieces, ids by position.
        lower_case: see `inputs.text.tokenizing.WordPieces`.
        log: receives a line about the share of [UNK].

    Raises:
        InputError: `documents` raised it.
    """
    known = KnownDocuments()
    kept = []
    characters: collections.Counter[str] = collections.Counter()
    for part in tokenize_in_threads(documents, vocabulary, lower_case=lower_case):
        kept += [found for found in part.documents() if known.add(document_key(found[0]))]
        characters.update(part.unknown_characters)
    unk = vocabulary.index(UNK)
    count = sum(np.count_nonzero(tokens == unk) for tokens, _ in kept)
    log(unknown.report(count, sum(len(tokens) for tokens, _ in kept), characters))
    return joined(kept, vocabulary.index(SEP))


def joined(documents: list[tuple[np.ndarray, np.ndarray]], separator: int) -> Corpus:
    """Makes a corpus of documents, each given as (tokens, sentence lengths)."""
    end = np.array([separator], np.int32)
    tokens = [part for ids, _ in documents for part in (ids, end)]
    lengths = [lengths.copy() for _, lengths in documents]
    for document in lengths:
        document[-1] += 1  # the last sentence includes the [SEP]
    return Corpus(
        np.concatenate([np.zeros(0, np.int32), *tokens]),
        np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64),
        np.cumsum([0, *map(len, lengths)], dtype=np.int64),
    )


def split_held_out(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Returns (training, held-out) documents: about 2 % are held out, by a hash of their text.

    Raises:
        InputError: fewer than 4 documents.
    """
    documents = list(_documents(corpus))
    keys = np.array([document_key(tokens) for tokens, _ in documents], np.uint64)
    below = held_out_below(np.sort(keys))
    separator = int(corpus.tokens[-1])
    held_out, training = [], []
    for document, is_held_out in zip(documents, keys < below, strict=True):
        (held_out if is_held_out else training).append(document)
    return joined(training, separator), joined(held_out, separator)


def fingerprint(corpus: Corpus) -> str:
    """A short hash of a corpus; corpora with the same hash make the same examples."""
    total = Fingerprint()
    for tokens, lengths in _documents(corpus):
        total.add(document_key(tokens), lengths)
    return total.hexdigest()


def _documents(corpus: Corpus):
    """Yields (tokens, sentence lengths) of each document, without the [SEP]."""
    bounds = corpus.documents.tolist()
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        starts = corpus.sentences[low : high + 1]
        lengths = np.diff(starts).astype(np.int32)
        lengths[-1] -= 1
        yield corpus.tokens[starts[0] : starts[-1] - 1], lengths


def document_key(tokens: np.ndarray) -> int:
    """A 64-bit hash of a document's ids.

    Among 10 million documents, the probability that two different ones share a key is 3e-6.
    """
    data = np.ascontiguousarray(tokens, np.int32).data
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class KnownDocuments:
    """The set of all document keys so far.

    It takes 8 bytes per key (16 while it grows) and about 25 MB: 0.5 GB for 30 million documents.
    """

    def __init__(self):
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, key: int) -> bool:
        """Adds a key; returns whether it is new."""
        if key in self._recent:
            return False
        place = np.searchsorted(self._sorted, np.uint64(key))
        if place < len(self._sorted) and self._sorted[place] == key:
            return False
        self._recent.add(key)
        if len(self._recent) == RECENT_KEYS:
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
        keys: of all documents in ascending order, [D] uint64.

    Raises:
        InputError: fewer than 4 documents; each side needs two, to pair unrelated sentences.
    """
    if len(keys) < 4:
        raise InputError(
            f"The text has only {len(keys)} different documents, but at least 4 are needed (2 for "
            "training, 2 held out). In .txt files a blank line ends a document."
        )
    return int(keys[max(2, round(HELD_OUT_SHARE * len(keys)))])


class Fingerprint:
    """A short hash of a sequence of documents and their sentences."""

    def __init__(self):
        self._keys = hashlib.blake2b(digest_size=16)
        self._lengths = hashlib.blake2b(digest_size=16)

    def add(self, key: int, sentence_lengths: np.ndarray) -> None:
        """Adds the next document.

        Args:
            key: its `document_key`.
            sentence_lengths: [S] ints, in tokens.
        """
        self._keys.update(key.to_bytes(8, "big"))
        self._lengths.update(np.ascontiguousarray(sentence_lengths, np.int32).data)

    def hexdigest(self) -> str:
        """The hash of the documents so far."""
        both = self._keys.digest() + self._lengths.digest()
        return hashlib.blake2b(both, digest_size=8).hexdigest()


def load_prepared(
    folder: str,
    vocab: str,
    records: BadRecords,
    *,
    cache_dir: str = "",
    log: Callable[[str], object] = lambda line: None,
) -> tuple[Corpus, Corpus, list[str], str]:
    """Opens a folder that `inputs.text.prepare` made.

    Examples need random access to tokens, but shards hold documents. So the first call on a host
    writes the tokens to plain files in FOLDER/memory_map, and memory-maps them. Memory then holds
    only the parts of the files that the operating system caches. If FOLDER cannot be written, the
    files are in ~/.cache/tf_lamb/FINGERPRINT/memory_map.

    Args:
        folder: path.
        vocab: path of a vocab.txt, or "" for the folder's own.
        records: counts the documents.
        cache_dir: if given, the files are in CACHE_DIR/FINGERPRINT/memory_map.
        log: receives a line if the files are not in FOLDER.

    Returns:
        (training corpus, held-out corpus, vocabulary, fingerprint).

    Raises:
        InputError: the folder is not complete, or has another vocabulary; no folder for the files
            can be written; or from `records`.
    """
    manifest = load_manifest(folder)
    if not manifest["finished"]:
        raise InputError(
            f"--data_dir: {folder} is not finished, according to its {MANIFEST}. Run the command "
            "that prepared it again: it continues where it stopped."
        )
    path = vocab or os.path.join(folder, "vocab.txt")
    vocabulary = load_vocabulary(path)
    if vocabulary_hash(vocabulary) != manifest["vocabulary_hash"]:
        fix = f"Leave --vocab out to use {folder}/vocab.txt."
        if not vocab:
            fix = "Run the command that prepared the text again: it restores the file."
        raise InputError(
            f"--vocab: {path} is not the vocabulary of the text in {folder}: its hash is "
            f"{vocabulary_hash(vocabulary)}, but `vocabulary_hash` in {MANIFEST} is "
            f"{manifest['vocabulary_hash']}. {fix}"
        )
    fingerprint = manifest["fingerprint"]
    cache = os.path.expanduser(cache_dir) if cache_dir else cache_folder()
    cache = os.path.join(cache, fingerprint)
    homes = [cache] if cache_dir else [folder, cache]
    found = next(filter(None, (_open_layout(home, fingerprint, cache) for home in homes)), None)
    if found is None:
        home = first_writable(homes, "--data_dir", CACHE_FIX)
        if home != folder:
            log(f"{folder}: the token ids are mapped from {home} (--cache_dir)")
        with locked(home, "--data_dir", wait=True):
            # Another process may have written it in the meantime.
            found = _open_layout(home, fingerprint, cache)
            if found is None:
                # If documents were lost the fingerprint differs, and the next start tries again.
                separator = vocabulary.index(SEP)
                fingerprint = _write_layout(home, folder, manifest, separator, records)
                found = _written(_open_layout(home, fingerprint, cache), home)
    return *found, vocabulary, fingerprint


def _written(found, folder):
    """Returns `found`, which was read back after it was written in `folder`.

    Raises:
        InputError: it is None, because the disk did not keep what was written.
    """
    if found is None:
        raise InputError(
            f"--data_dir: what was just written in {folder} is damaged when it is read back. Check "
            f"the disk. {CACHE_FIX}"
        )
    return found


def _open_layout(home, fingerprint, cache):
    """[training, held-out] corpora, or None if there is no layout of this fingerprint."""
    corpora = []
    for side in SIDES:
        path, spare = (os.path.join(folder, LAYOUT, side) for folder in (home, cache))
        found = mapped_arrays.open_arrays(path)
        if found is None or found[1] != {"fingerprint": fingerprint}:
            return None
        corpora.append(Corpus(**found[0], folder=path, spare=spare))
    return corpora


def _write_layout(home, folder, manifest, separator, records):
    """Writes the arrays of both corpora of a prepared folder; returns their fingerprint."""
    dtype = manifest["token_dtype"]
    below = int(manifest["held_out_below"], 16)
    shutil.rmtree(os.path.join(home, LAYOUT), ignore_errors=True)
    dtypes = {"tokens": dtype, "sentences": np.int64, "documents": np.int64}
    total = Fingerprint()
    paths = [os.path.join(home, LAYOUT, side) for side in SIDES]
    with (
        mapped_arrays.ArraysWriter(paths[0], dtypes) as training,
        mapped_arrays.ArraysWriter(paths[1], dtypes) as held_out,
    ):
        sides = [_LayoutWriter(training, separator), _LayoutWriter(held_out, separator)]
        for shard in manifest["shards"]:
            for tokens, lengths in read_shard(folder, shard, dtype, records):
                key = document_key(tokens)
                total.add(key, lengths)
                sides[key < below].add(tokens, lengths)
        records.end()
        for side in sides:
            side.finish(total.hexdigest())
    return total.hexdigest()


class _LayoutWriter:
    """Appends documents to the arrays of one corpus, in blocks."""

    def __init__(self, writer, separator):
        self._writer = writer
        self._separator = separator
        self._pending = []
        self._tokens = 0
        self._sentences = 0

    def add(self, tokens, lengths):
        self._pending.append((tokens, lengths))
        if len(self._pending) == DOCUMENTS_PER_BLOCK:
            self._write()

    def _write(self):
        block = joined(self._pending, self._separator)
        self._pending = []
        self._writer.append(
            tokens=block.tokens,
            sentences=self._tokens + block.sentences[:-1],
            documents=self._sentences + block.documents[:-1],
        )
        self._tokens += len(block.tokens)
        self._sentences += len(block.sentences) - 1

    def finish(self, fingerprint):
        self._write()
        self._writer.append(tokens=[], sentences=[self._tokens], documents=[self._sentences])
        self._writer.facts = {"fingerprint": fingerprint}
