"""A corpus: tokenized documents end to end, split into training and held-out documents.

`inputs.text.prepare` writes shards of documents. `load_prepared` opens them as a corpus. Examples
are made of runs of tokens, not of documents, so the tokens are laid out once more, in arrays that
graphs read in parts.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable

import numpy as np

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.pages import Pages, PagesWriter, open_pages
from inputs.shards import MANIFEST
from inputs.storage.files import cache_folder, first_writable, locked
from inputs.text import chunks
from inputs.text.files import DATA_DIR
from inputs.text.packing import ROWS, write_plan
from inputs.text.shards import load_manifest, read_shard
from inputs.text.tokenization.vocabulary import SEP, load_vocabulary, vocabulary_hash

HELD_OUT_SHARE = 0.02
RECENT_KEYS = 2**18  # collected in a set before they are merged into the sorted array
LAYOUT = "pages"  # folder of the arrays, inside the prepared folder or a cache
CACHE_FIX = "The token ids are laid out there once. Give a folder for them with --cache_dir."
SIDES = ("training", "held_out")
DOCUMENTS_PER_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized documents, end to end.

    Attributes:
        tokens: [T] int32 or uint16 ids; after each document there is one [SEP].
        sentences: [S + 1] int64, where each sentence starts in `tokens`; the last entry is T.
        documents: [D + 1] int64, where each document starts in `sentences`; the last entry is S.
        folder: folder of the arrays' files.
        spare: folder for the tables of chunks if `folder` cannot be written.
        flag: the flag that named the folders, for error messages.
        fix: what to do if they cannot be written, for error messages.
    """

    tokens: Pages
    sentences: Pages
    documents: Pages
    folder: str
    spare: str
    flag: str = DATA_DIR
    fix: str = CACHE_FIX

    def describe(self) -> str:
        """Formats the number of tokens and documents, for a message."""
        count = len(self.documents) - 1
        return f"{len(self.tokens) - count:,} tokens in {count:,} documents"

    def chunks(self, sequence_length: int, packing: str) -> dict[str, Pages]:
        """The arrays of `chunks.chunk_blocks`; they are computed and written once.

        Args:
            sequence_length: tokens per example, special ones included.
            packing: one of `chunks.PACKINGS`.

        Raises:
            InputError: the corpus has too little text, or the files cannot be written.
        """

        def write(folder):
            columns = {chunks.TABLE: len(chunks.COLUMNS[packing])}
            names = [chunks.TABLE]
            names += [chunks.SENTENCE_STARTS] if packing == chunks.PAIRS else []
            with PagesWriter(folder, dict.fromkeys(names, np.int64), columns, self.fix) as writer:
                for block in chunks.chunk_blocks(self, sequence_length, packing):
                    writer.append(**block)

        return self._opened(f"{packing}-{sequence_length}", write)[0]

    def plan(self, sequence_length: int, packing: str, layout) -> tuple[Pages, dict]:
        """The plan of `packing.write_plan` for the chunks; it is made and written once.

        Args:
            sequence_length: tokens of the longest chunks.
            packing: how chunks are cut, one of `chunks.PACKINGS`.
            layout: how they are joined, see `inputs.text.packing`.

        Returns:
            [R, K] int64, and `layout.facts`.

        Raises:
            InputError: see `chunks`.
        """
        table = self.chunks(sequence_length, packing)[chunks.TABLE]
        special = chunks.SPECIAL[packing]

        def write(folder):
            lengths = (block[:, 1] - block[:, 0] + special for block in table.blocks())
            write_plan(folder, lengths, layout, self.fix)

        arrays, facts = self._opened(f"{packing}-{sequence_length}-{layout.name}", write)
        return arrays[ROWS], facts

    def _opened(self, name, write):
        """Opens a folder beside the corpus, which `write` writes if it is not there.

        Returns what `open_pages` returns.
        """
        places = dict.fromkeys([self.folder, self.spare])
        # Opened before the lock is taken: the disk may be read-only.
        for place in places:
            if found := open_pages(os.path.join(place, name)):
                return found
        place = first_writable(list(places), self.flag, self.fix)
        folder = os.path.join(place, name)
        with locked(place, self.flag, wait=True):
            found = open_pages(folder)
            if found is None:
                write(folder)
                found = _written(open_pages(folder), folder, self.flag)
        return found


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

    The arrays are in FOLDER/pages, which the preparation writes. If an earlier version prepared the
    folder, or if it was copied without them, they are written by the first call, or, if FOLDER
    cannot be written, into ~/.cache/tf_lamb/FINGERPRINT/pages.

    Args:
        folder: path.
        vocab: path of a vocab.txt, or "" for the folder's own.
        records: counts the documents.
        cache_dir: if given, arrays that are missing are written to CACHE_DIR/FINGERPRINT/pages.
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
    homes = [folder, cache]
    found = next(filter(None, (open_layout(home, fingerprint, cache) for home in homes)), None)
    if found is None:
        home = first_writable([cache] if cache_dir else homes, "--data_dir", CACHE_FIX)
        log(f"Laying out the token ids of {folder} in {home}")
        with locked(home, "--data_dir", wait=True):
            # Another process may have written it in the meantime.
            found = open_layout(home, fingerprint, cache)
            if found is None:
                # If documents were lost the fingerprint differs, and the next start tries again.
                separator = vocabulary.index(SEP)
                fingerprint = lay_out(home, folder, manifest, separator, records)
                found = _written(open_layout(home, fingerprint, cache), home, DATA_DIR)
    return *found, vocabulary, fingerprint


def _written(found, folder, flag):
    """Returns `found`, which was read back after it was written in `folder`.

    Raises:
        InputError: it is None, because the disk did not keep what was written.
    """
    if found is None:
        raise InputError(
            f"{flag}: what was just written in {folder} is damaged when it is read back. Check the "
            "disk, or use another folder."
        )
    return found


def open_layout(
    home: str, fingerprint: str, cache: str = "", **messages: str
) -> list[Corpus] | None:
    """[training, held-out] corpora, or None if there is no layout of this fingerprint.

    Args:
        home: the folder of the layout.
        fingerprint: of its documents.
        cache: a folder for more files if that one cannot be written.
        **messages: `flag` and `fix` of `Corpus`.
    """
    corpora = []
    for side in SIDES:
        path, spare = (os.path.join(folder, LAYOUT, side) for folder in (home, cache or home))
        found = open_pages(path)
        if found is None or found[1] != {"fingerprint": fingerprint}:
            return None
        corpora.append(Corpus(**found[0], folder=path, spare=spare, **messages))
    return corpora


class _Unchanged(Exception):
    """Ends the writing: the same layout exists already, and other processes may be reading it."""


def lay_out(
    home: str,
    folder: str,
    manifest: dict,
    separator: int,
    records: BadRecords,
    advance: Callable[[int], object] = lambda tokens: None,
    fix: str = CACHE_FIX,
) -> str:
    """Writes the arrays of both corpora of a prepared folder, unless the same are there.

    Args:
        home: the folder to write to.
        folder: the folder with the shards.
        manifest: its manifest.
        separator: id of [SEP].
        records: counts the documents.
        advance: called with the number of tokens of each document.
        fix: what to do if `home` cannot be written, for the error message.

    Returns:
        The fingerprint of the documents that could be read.

    Raises:
        InputError: `home` cannot be written; or from `records`.
    """
    below = int(manifest["held_out_below"], 16)
    dtypes = {"tokens": manifest["token_dtype"], "sentences": np.int64, "documents": np.int64}
    total = Fingerprint()
    paths = [os.path.join(home, LAYOUT, side) for side in SIDES]
    with (
        contextlib.suppress(_Unchanged),
        PagesWriter(paths[0], dtypes, fix=fix) as training,
        PagesWriter(paths[1], dtypes, fix=fix) as held_out,
    ):
        sides = [_LayoutWriter(training, separator), _LayoutWriter(held_out, separator)]
        for shard in manifest["shards"]:
            for tokens, lengths in read_shard(folder, shard, manifest["token_dtype"], records):
                key = document_key(tokens)
                total.add(key, lengths)
                sides[key < below].add(tokens, lengths)
                advance(len(tokens))
        records.end()
        if open_layout(home, total.hexdigest()):
            raise _Unchanged
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
        end = np.array([self._separator])
        tokens = [part for ids, _ in self._pending for part in (ids, end)]
        lengths = [lengths.copy() for _, lengths in self._pending]
        self._pending = []
        for document in lengths:
            document[-1] += 1  # the last sentence includes the [SEP]
        counts = [len(document) for document in lengths]
        lengths = np.concatenate([[0], *lengths]).astype(np.int64)
        sentences = self._tokens + np.cumsum(lengths)
        documents = self._sentences + np.cumsum([0, *counts], dtype=np.int64)
        self._writer.append(
            tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
            sentences=sentences[:-1],
            documents=documents[:-1],
        )
        self._tokens, self._sentences = int(sentences[-1]), int(documents[-1])

    def finish(self, fingerprint):
        self._write()
        self._writer.append(sentences=[self._tokens], documents=[self._sentences])
        self._writer.facts = {"fingerprint": fingerprint}
