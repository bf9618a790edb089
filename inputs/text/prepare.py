"""Tokenizes text once, for many runs: python -m inputs.text.prepare --input=... --output=DIR

Writes shards that train.py takes as --data_dir. If it is stopped, the same command continues after
the last finished shard.
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence

from inputs import process  # isort: split

import numpy as np

from inputs.bad_records import BadRecords
from inputs.errors import InputError, refuse_below, refuse_empty
from inputs.progress import Progress, log
from inputs.shards import MANIFEST, is_prepared
from inputs.storage.files import (
    NEW,
    cache_folder,
    check_writable,
    file_size,
    first_writable,
    is_left_over,
    list_names,
    locked,
    open_bytes,
)
from inputs.text import corpus, documents
from inputs.text.chunks import PACKINGS, PAIRS, TABLE
from inputs.text.corpus import Fingerprint, KnownDocuments, document_key, held_out_below
from inputs.text.files import READ, find_files
from inputs.text.shards import ShardWriter, load_manifest, read_shard, save_manifest, token_dtype
from inputs.text.tokenization import casing, unknown
from inputs.text.tokenization.installed_text import read_installed_text
from inputs.text.tokenization.vocabulary import (
    SEP,
    UNK,
    learn_vocabulary,
    load_vocabulary,
    save_vocabulary,
    vocabulary_hash,
)
from inputs.text.tokenization.word_pieces import tokenize_in_order

NAME = "inputs.text.prepare"
SHARD_TOKENS = 2**24
LISTED_CHARACTERS = 100  # of a shard's unknown characters, in the manifest
COMPARED_BYTES = 2**20  # at each end of a file, to recognize the same file again
CASES = {"auto": None, "true": True, "false": False}
SLOWLY_READ = 2**30  # bytes of raw text that take seconds to read
LARGE = 2**27  # bytes of raw text from which processes pay
MIN_LENGTH = 8  # [CLS] A [SEP] B [SEP] with some text
MAX_LENGTH = 2**31 - 1  # as of a recipe
MAX_WORKERS = 4096
AGAIN = "Free some space, and run the same command again: it continues where it stopped."
DAMAGED_SHARD = "Check the disk. The same command writes such a shard again."


def prepare(
    text: str,
    vocab: str,
    output: str,
    *,
    workers: int,
    lower_case: bool | None = None,
    shard_tokens: int = SHARD_TOKENS,
    packing: str = PAIRS,
    sequence_lengths: Sequence[int] = (),
    max_bad_record_share: float = 0.001,
    log=lambda line: None,
    show_progress: bool = False,
) -> dict:
    """Tokenizes text into shards, and lays its tokens out for training.

    Args:
        text: files, globs or folders, comma-separated.
        vocab: path of a vocab.txt.
        output: folder for the shards. It may be missing, empty, or from an earlier call with the
            same arguments, stopped or finished.
        workers: number of processes that tokenize; 0 to tokenize in threads of this process.
        lower_case: whether to lower-case the text; None to lower-case unless the vocabulary has
            capitals or accents.
        shard_tokens: number of tokens after which a shard ends.
        packing: how sequences are cut, one of `chunks.PACKINGS`.
        sequence_lengths: lengths, in tokens, for which sequences are cut already. For others, the
            training does it at its start.
        max_bad_record_share: the share of lines that may be damaged, in [0, 1].
        log: receives lines about files that are read or passed over, damaged records, existing
            shards, capitals, and words that the vocabulary cannot spell.
        show_progress: if True, shows progress on standard error.

    Returns:
        The manifest.

    Raises:
        InputError: the text, the vocabulary or the folder cannot be used.
    """
    files = find_files(text, "--input", log)
    records = BadRecords(
        max_bad_record_share, skip=True, log=log, limit_flag="--max_bad_record_share"
    )
    return prepare_documents(
        lambda advance: documents.read_documents(files, records, advance),
        identify(files, log),
        sum(map(file_size, files)),
        load_vocabulary(vocab),
        output,
        records=records,
        flag="--output",
        workers=workers,
        lower_case=lower_case,
        shard_tokens=shard_tokens,
        packing=packing,
        sequence_lengths=sequence_lengths,
        log=log,
        show_progress=show_progress,
    )


def prepare_documents(
    read: Callable,
    inputs: list,
    size: int,
    vocabulary: list[str],
    output: str,
    *,
    records: BadRecords,
    flag: str,
    workers: int,
    lower_case: bool | None = None,
    shard_tokens: int = SHARD_TOKENS,
    packing: str = PAIRS,
    sequence_lengths: Sequence[int] = (),
    log=lambda line: None,
    show_progress: bool = False,
    wait: bool = False,
) -> dict:
    """Tokenizes documents into shards, and lays their tokens out for training.

    Args:
        read: takes a function to call with amounts of work; returns an iterator of documents, lists
            of paragraphs. The same in each call.
        inputs: JSON values that identify what `read` returns.
        size: the work in all.
        vocabulary: word pieces.
        output: as for `prepare`.
        records: counts the documents.
        flag: what named the folder, for error messages.
        wait: whether to wait until another process that prepares the folder has ended.

    The other arguments, the return value and the errors are those of `prepare`.
    """
    check_writable(output, flag)
    with locked(output, flag, wait=wait):
        manifest = _begin(output, flag, inputs, vocabulary, lower_case, shard_tokens)
        preparation = _Preparation(output, manifest, vocabulary.index(UNK), log)
        save_vocabulary(vocabulary, os.path.join(output, "vocab.txt"))
        if manifest["finished"]:
            log(f"{output} is finished already")
        else:
            lower_case = manifest["lower_case"]
            log(casing.report(lower_case, vocabulary))
            with Progress(size, "B", enabled=show_progress) as progress:
                done = manifest["shards"][-1]["batches"] if manifest["shards"] else 0
                batches = tokenize_in_order(
                    read(progress.advance),
                    vocabulary,
                    lower_case=lower_case,
                    workers=workers,
                    skip=done,
                )
                preparation.write(batches, progress)
            preparation.finish(records)
            log(preparation.describe_unknown())
        manifest = preparation.manifest
        places = {"flag": flag, "fix": AGAIN}
        corpora = corpus.open_layout(output, manifest["fingerprint"], **places)
        if corpora is None:
            with Progress(manifest["tokens"], " tokens", enabled=show_progress) as progress:
                corpus.lay_out(
                    output,
                    output,
                    manifest,
                    vocabulary.index(SEP),
                    BadRecords(0.0, skip=False, log=log, repair=DAMAGED_SHARD),
                    progress.advance,
                    fix=AGAIN,
                )
            corpora = corpus.open_layout(output, manifest["fingerprint"], **places)
    for length in sequence_lengths:
        for side in corpora:
            count = len(side.chunks(length, packing)[TABLE])
            log(f"Sequences of {length} tokens: {count:,} in {side.describe()}")
    return manifest


def prepare_in_cache(
    text: str,
    vocab: str,
    recipe,
    *,
    known_case: tuple[bool, str] | None,
    records: BadRecords,
    cache_dir: str,
    log: Callable[[str], object],
) -> str:
    """Prepares raw text in a cache, unless an earlier call prepared the same text.

    Args:
        text: files, globs or folders, comma-separated; "" for the text of the installed packages.
        vocab: path of a vocab.txt; "" to learn one from the text.
        recipe: a `recipes.bert.BertRecipe`.
        known_case: see `casing.choose`.
        records: counts damaged lines.
        cache_dir: the cache; "" for that of `inputs.storage.files.cache_folder`.
        log: receives lines.

    Returns:
        The folder with the shards and their vocabulary.

    Raises:
        InputError: the text, the vocabulary or the cache cannot be used.
    """
    if text:
        files = find_files(text, log=log)
        inputs = identify(files, log)
        size = sum(map(file_size, files))

        def read(advance, counted=records):
            return documents.read_documents(files, counted, advance)
    else:
        found = list(read_installed_text())
        content = hashlib.sha256(repr(found).encode()).hexdigest()
        inputs = [{"file": "installed text", "sha256": content}]
        size = len(found)

        def read(advance, counted=records):
            del counted
            for document in found:
                advance(1)
                yield document

    if vocab:
        vocabulary = load_vocabulary(vocab)
        lower_case = casing.choose(recipe.lower_case, vocabulary, known_case)
        origin = vocabulary_hash(vocabulary)
    else:
        vocabulary = None
        lower_case = recipe.lower_case is not False
        origin = f"learned, {recipe.vocabulary_size}"
    limit = recipe.max_bad_record_share, recipe.on_bad_record
    key = hashlib.sha256(json.dumps([inputs, origin, lower_case, limit]).encode()).hexdigest()[:16]
    cache = os.path.expanduser(cache_dir) if cache_dir else cache_folder()
    home = first_writable(
        [cache], "--cache_dir", "The text is prepared there once. Give a folder with --cache_dir."
    )
    folder = os.path.join(home, f"text-{key}")
    if is_prepared(folder) and load_manifest(folder)["finished"]:
        log(f"It was prepared before, in {folder}")
        lost = load_manifest(folder)["damaged_records"]
        if lost:
            log(f"{lost:,} damaged records were skipped then")
        return folder
    log(f"Preparing it once, in {folder}")
    if vocabulary is None:
        # The preparation reads the text again, and then names and counts what is damaged.
        unnamed = BadRecords(limit[0], skip=limit[1] == "skip", log=lambda line: None)
        paragraphs = itertools.chain.from_iterable(read(lambda amount: None, unnamed))
        vocabulary = learn_vocabulary(paragraphs, recipe.vocabulary_size, lower_case=lower_case)
        log(f"Learned a vocabulary of {len(vocabulary):,} word pieces")
    prepare_documents(
        read,
        inputs,
        size,
        vocabulary,
        folder,
        records=records,
        flag="--cache_dir",
        workers=0 if size < LARGE else os.cpu_count() or 1,
        lower_case=lower_case,
        log=log,
        show_progress=sys.stderr.isatty(),
        wait=True,
    )
    return folder


def _begin(output, flag, inputs, vocabulary, lower_case, shard_tokens):
    """The manifest of the preparation that was stopped in this folder, or a new one."""
    known = None
    if is_prepared(output, flag):
        known = load_manifest(output)["lower_case"], f"the text that {output} was begun with"
    facts = {
        "vocabulary_hash": vocabulary_hash(vocabulary),
        "vocabulary_size": len(vocabulary),
        "lower_case": casing.choose(lower_case, vocabulary, known),
        "token_dtype": token_dtype(len(vocabulary)),
        "shard_tokens": shard_tokens,
        "inputs": inputs,
    }
    if known is None:
        others = [
            name for name in list_names(output) if not is_left_over(name) and name != MANIFEST + NEW
        ]
        if others:
            raise InputError(
                f"{flag}: {output} has other content ({others[0]}). Choose an empty folder."
            )
        return _new_manifest(output, facts)
    manifest = load_manifest(output)
    for field, value in facts.items():
        if not _agree(manifest[field], value):
            if not manifest["shards"]:  # nothing would be lost
                return _new_manifest(output, facts)
            raise InputError(
                f"{flag}: {output} was begun with another `{field}`, according to its "
                f"{MANIFEST}. Give the same command as then, or choose an empty folder."
            )
    return manifest


def _agree(known, value) -> bool:
    """Whether a fact of a manifest is still so; of a file, earlier versions kept less."""
    if not isinstance(value, list):
        return known == value
    return len(known) == len(value) and all(
        old.items() <= new.items() for old, new in zip(known, value, strict=True)
    )


def _new_manifest(output, facts):
    """Writes and returns the manifest of a folder without shards."""
    manifest = {"finished": False} | facts | {"shards": []}
    save_manifest(output, manifest)
    return manifest


def identity(path: str) -> dict:
    """Identifies a file by its name, its size, and the hash of both ends."""
    size = file_size(path)
    ends = hashlib.blake2b(digest_size=8)
    with open_bytes(path) as file:
        ends.update(file.read(COMPARED_BYTES))
        file.seek(max(0, size - COMPARED_BYTES))
        ends.update(file.read())
    return {"file": os.path.basename(path), "bytes": size, "ends": ends.hexdigest()}


def identify(files: list[str], log: Callable[[str], object]) -> list[dict]:
    """`identity` of the files of a text, with the hash of all of their content.

    A repaired line in the middle of a file changes neither its size nor its ends.
    """
    if sum(map(file_size, files)) >= SLOWLY_READ:
        log("Reading the text once to see whether it is the one that was prepared before")
    return [identity(file) | {"content": _content_hash(file)} for file in files]


def _content_hash(path):
    content = hashlib.blake2b(digest_size=16)
    with open_bytes(path) as file:
        while block := file.read(2**20):
            content.update(block)
    return content.hexdigest()


class _Preparation:
    """Writes the missing shards, in the order of the text.

    Existing shards are read and verified first. The first one that differs from the manifest is
    written again, and so are all after it, because their content depends on earlier documents.
    """

    def __init__(self, folder, manifest, unknown_id, log):
        self._folder = folder
        self._unknown_id = unknown_id
        self.manifest = manifest
        self._known = KnownDocuments()
        self._fingerprint = Fingerprint()
        found = manifest["shards"]
        for index, shard in enumerate(found):
            if not self._verify(shard, log):
                log(f"{shard['file']} and the shards after it are written again")
                manifest.update(shards=found[:index], finished=False)
                break
        else:
            if found:
                log(f"{len(found)} finished shards were verified and kept")

    def _verify(self, shard, log):
        records = BadRecords(1.0, skip=True, log=log)
        dtype = self.manifest["token_dtype"]
        found = []
        unknown_tokens = 0
        for tokens, lengths in read_shard(self._folder, shard, dtype, records):
            found.append((document_key(tokens), lengths))
            unknown_tokens += self._count_unknown(tokens)
        fingerprint = Fingerprint()
        for key, lengths in found:
            fingerprint.add(key, lengths)
        if fingerprint.hexdigest() != shard["fingerprint"]:
            return False
        # Shards of earlier versions lack these fields; their unknown characters are not recorded.
        shard.setdefault("unknown_tokens", unknown_tokens)
        shard.setdefault("unknown_characters", {})
        for key, lengths in found:
            self._known.add(key)
            self._fingerprint.add(key, lengths)
        return True

    def write(self, batches, progress):
        """Writes batches of tokenized documents into shards."""
        shards = self.manifest["shards"]
        done = shards[-1]["batches"] if shards else 0
        counted = enumerate(batches, start=done + 1)
        while (first := next(counted, None)) is not None:
            fingerprint = Fingerprint()
            characters = collections.Counter()
            with ShardWriter(self._folder, len(shards), self.manifest["token_dtype"]) as writer:
                writer.facts |= {"repeated_documents": 0, "unknown_tokens": 0}
                for count, tokenized in itertools.chain([first], counted):
                    self._add(writer, fingerprint, tokenized)
                    characters.update(tokenized.unknown_characters)
                    writer.facts["batches"] = count  # of the text so far
                    progress.note(f"{self._tokens(writer):,} tokens")
                    if writer.facts["tokens"] >= self.manifest["shard_tokens"]:
                        break
            writer.facts["unknown_characters"] = dict(characters.most_common(LISTED_CHARACTERS))
            shards.append(writer.facts | {"fingerprint": fingerprint.hexdigest()})
            save_manifest(self._folder, self.manifest)
            progress.milestone(f"{writer.facts['file']}: {writer.facts['tokens']:,} tokens")

    def _add(self, writer, fingerprint, tokenized):
        for tokens, lengths in tokenized.documents():
            key = document_key(tokens)
            if self._known.add(key):
                writer.add(tokens, lengths)
                writer.facts["unknown_tokens"] += self._count_unknown(tokens)
                fingerprint.add(key, lengths)
                self._fingerprint.add(key, lengths)
            else:
                writer.facts["repeated_documents"] += 1

    def _count_unknown(self, tokens):
        return int(np.count_nonzero(tokens == self._unknown_id))

    def describe_unknown(self) -> str:
        """Formats a line about the share of [UNK]; call it after `finish`."""
        characters = collections.Counter()
        for shard in self.manifest["shards"]:
            characters.update(shard["unknown_characters"])
        return unknown.report(self.manifest["unknown_tokens"], self.manifest["tokens"], characters)

    def _tokens(self, writer):
        return writer.facts["tokens"] + sum(s["tokens"] for s in self.manifest["shards"])

    def finish(self, records):
        """Completes the manifest with the totals and the documents that are held out."""
        totals = {
            name: sum(shard[name] for shard in self.manifest["shards"])
            for name in (
                "documents",
                "sentences",
                "tokens",
                "unknown_tokens",
                "repeated_documents",
            )
        }
        keys = self._known.sorted()
        below = held_out_below(keys)
        self.manifest |= totals | {
            "damaged_records": records.bad,
            "held_out_documents": int((keys < below).sum()),
            "held_out_below": f"{below:016x}",
            "fingerprint": self._fingerprint.hexdigest(),
            "finished": True,
        }
        save_manifest(self._folder, self.manifest)


def _lengths(flag: str) -> list[int]:
    lengths = [length.strip() for length in flag.split(",") if length.strip()]
    for length in lengths:
        # Python refuses to read a number of many digits.
        is_number = length.isdecimal() and len(length) <= len(str(MAX_LENGTH))
        if not is_number or not MIN_LENGTH <= int(length) <= MAX_LENGTH:
            raise InputError(
                f"--sequence_lengths: lengths are whole numbers from {MIN_LENGTH} to "
                f"{MAX_LENGTH}. Received: {length}."
            )
    return [int(length) for length in lengths]


def main(arguments=None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        required=True,
        help=f"text: files, globs or folders, comma-separated; formats: {READ}",
    )
    parser.add_argument("--vocab", required=True, help="a BERT vocab.txt")
    parser.add_argument("--output", required=True, help="folder for the shards")
    parser.add_argument(
        "--lower_case",
        choices=CASES,
        default="auto",
        help="whether to lower-case the text and drop its accents; auto: unless the vocabulary has "
        "capitals or accents (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="processes that tokenize (default: the number of cores)",
    )
    parser.add_argument(
        "--shard_tokens",
        type=int,
        default=SHARD_TOKENS,
        help="tokens after which a shard ends (default: %(default)s)",
    )
    parser.add_argument(
        "--sequence_lengths",
        default="",
        metavar="LENGTHS",
        help="lengths in tokens, comma-separated, for which sequences are cut in advance, such as "
        "128,512; for other lengths they are cut when training starts",
    )
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        default=PAIRS,
        help="how these sequences are cut (default: %(default)s)",
    )
    parser.add_argument(
        "--max_bad_record_share",
        type=float,
        default=0.001,
        help="the share of lines that may be damaged (default: %(default)s)",
    )
    flags = vars(parser.parse_args(arguments))
    flags["lower_case"] = CASES[flags["lower_case"]]
    try:
        refuse_empty(**{name: flags[name] for name in ("input", "vocab", "output")})
        flags["sequence_lengths"] = _lengths(flags["sequence_lengths"])
        refuse_below(1, workers=flags["workers"], shard_tokens=flags["shard_tokens"])
        if flags["workers"] and flags["workers"] > MAX_WORKERS:
            raise InputError(
                f"--workers must be at most {MAX_WORKERS}. Received: --workers={flags['workers']}."
            )
        manifest = prepare(flags.pop("input"), log=log, show_progress=True, **flags)
    except InputError as error:
        log(f"{NAME}: {error}")
        return 1
    except OSError as error:
        log(f"{NAME}: {error.filename or flags['output']}: {error.strerror or error}.")
        return 1
    except KeyboardInterrupt:
        log(f"{NAME}: stopped. The same command continues after the last finished shard.")
        return process.INTERRUPTED
    print(
        f"{flags['output']}: {manifest['tokens']:,} tokens in {manifest['documents']:,} documents, "
        f"{manifest['held_out_documents']:,} of them held out; shards: {len(manifest['shards'])}; "
        f"dropped repeated documents: {manifest['repeated_documents']:,}, damaged lines: "
        f"{manifest['damaged_records']:,}"
    )
    return 0


if __name__ == "__main__":
    process.run(main)
