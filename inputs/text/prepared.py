"""Prepared shards as corpora: laid out once on this host, and mapped into memory from there."""

import os
import shutil

import numpy as np

from inputs import shards
from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.folder_lock import locked
from inputs.text import mapped_arrays
from inputs.text.corpus import Corpus, joined
from inputs.text.document_keys import Fingerprint, document_key
from inputs.text.vocabulary import SEP, load_vocabulary, vocabulary_hash

LAYOUT = "memory_map"
SIDES = ("training", "held_out")
DOCUMENTS_PER_BLOCK = 1024


def load_prepared(
    folder: str, vocab: str, records: BadRecords
) -> tuple[Corpus, Corpus, list[str], str]:
    """Opens a folder that `inputs.text.prepare` made.

    Shards are for keeping and sending: examples want any run of tokens, not documents. So the ids
    are laid out in plain files in `DIR/memory_map`, on each host once, and mapped: however much
    text there is, memory holds only what the operating system keeps of the files, and gives back.

    Args:
        folder: path, which can be written the first time.
        vocab: path of a vocab.txt, or "" for the folder's own.
        records: counts the documents, and says when too many are damaged.

    Returns:
        (training corpus, held-out corpus, vocabulary, fingerprint).

    Raises:
        InputError: the folder is not whole, or not of this vocabulary; or from `records`.
    """
    manifest = shards.load_manifest(folder)
    if not manifest["finished"]:
        raise InputError(
            f"--data_dir: {folder} is not finished, as its {shards.MANIFEST} says. Give the "
            "command that prepared it again: it goes on."
        )
    path = vocab or os.path.join(folder, "vocab.txt")
    vocabulary = load_vocabulary(path)
    if vocabulary_hash(vocabulary) != manifest["vocabulary_hash"]:
        cure = f"Leave --vocab out to take {folder}/vocab.txt."
        if not vocab:
            cure = "Give the command that prepared the text again: it mends the file."
        raise InputError(
            f"--vocab: {path} is not the vocabulary of the text in {folder}: its hash is "
            f"{vocabulary_hash(vocabulary)}, and `vocabulary_hash` in {shards.MANIFEST} is "
            f"{manifest['vocabulary_hash']}. {cure}"
        )
    fingerprint = manifest["fingerprint"]
    found = _open(folder, fingerprint)
    if found is None:
        with locked(folder, wait=True):
            found = _open(folder, fingerprint)  # perhaps another process laid it out meanwhile
            if found is None:
                # Another fingerprint if documents were lost; then the next start tries again.
                fingerprint = _lay_out(folder, manifest, vocabulary.index(SEP), records)
                found = _open(folder, fingerprint)
    return *found, vocabulary, fingerprint


def _open(folder, fingerprint):
    """(training, held-out) corpora from the layout; None if it is not of this fingerprint."""
    corpora = []
    for side in SIDES:
        path = os.path.join(folder, LAYOUT, side)
        found = mapped_arrays.open_arrays(path)
        if found is None or found[1] != {"fingerprint": fingerprint}:
            return None
        corpora.append(Corpus(**found[0], folder=path))
    return corpora


def _lay_out(folder, manifest, separator, records):
    """Writes the arrays of both corpora; returns their fingerprint."""
    dtype, below = manifest["token_dtype"], int(manifest["held_out_below"], 16)
    shutil.rmtree(os.path.join(folder, LAYOUT), ignore_errors=True)
    dtypes = {"tokens": dtype, "sentences": np.int64, "documents": np.int64}
    whole = Fingerprint()
    paths = [os.path.join(folder, LAYOUT, side) for side in SIDES]
    with (
        mapped_arrays.ArraysWriter(paths[0], dtypes) as training,
        mapped_arrays.ArraysWriter(paths[1], dtypes) as held_out,
    ):
        sides = [_Side(training, separator), _Side(held_out, separator)]
        for shard in manifest["shards"]:
            for tokens, lengths in shards.read_shard(folder, shard, dtype, records):
                key = document_key(tokens)
                whole.add(key, lengths)
                sides[key < below].add(tokens, lengths)
        records.end()
        for side in sides:
            side.end(whole.hexdigest())
    return whole.hexdigest()


class _Side:
    """Lays out one corpus, some documents at a time."""

    def __init__(self, writer, separator):
        self._writer, self._separator = writer, separator
        self._waiting = []
        self._tokens = self._sentences = 0

    def add(self, tokens, lengths):
        """Takes the next document."""
        self._waiting.append((tokens, lengths))
        if len(self._waiting) == DOCUMENTS_PER_BLOCK:
            self._write()

    def _write(self):
        part = joined(self._waiting, self._separator)
        self._waiting = []
        self._writer.append(
            tokens=part.tokens,
            sentences=self._tokens + part.sentences[:-1],
            documents=self._sentences + part.documents[:-1],
        )
        self._tokens += len(part.tokens)
        self._sentences += len(part.sentences) - 1

    def end(self, fingerprint):
        """Writes the rest."""
        self._write()
        self._writer.append(tokens=[], sentences=[self._tokens], documents=[self._sentences])
        self._writer.facts = {"fingerprint": fingerprint}
