"""Tokenises text once, for many runs: python -m inputs.text.prepare --input=... --output=DIR

Raw text becomes shards that train.py takes as --data_dir. The same command again goes on where it
was stopped.
"""

import argparse
import hashlib
import itertools
import os
import sys

from tqdm import tqdm

from inputs import shards
from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.folder_lock import LOCK, locked
from inputs.text import documents
from inputs.text.document_keys import Fingerprint, KnownDocuments, document_key, held_out_below
from inputs.text.vocabulary import load_vocabulary, save_vocabulary, vocabulary_hash
from inputs.text.workers import tokenized_batches

SHARD_TOKENS = 2**24
COMPARED_BYTES = 2**20  # at either end of an input file, to see whether it is the same one
STOPPED = 130  # the shell's exit status for Ctrl-C


def prepare(
    text: str,
    vocab: str,
    output: str,
    *,
    workers: int,
    shard_tokens: int = SHARD_TOKENS,
    max_bad_record_share: float = 0.001,
    say=lambda line: None,
    progress: bool = False,
) -> dict:
    """Tokenises text into shards; returns the manifest.

    Args:
        text: files, globs or folders, comma-separated.
        vocab: path of a vocab.txt.
        output: folder; missing, empty, or of a run like this that was stopped.
        workers: processes that tokenise; 0 for this one.
        shard_tokens: tokens after which a shard ends.
        max_bad_record_share: share of the lines that may be damaged.
        say: takes lines about damaged ones, and about what was found in the folder.
        progress: whether a bar is drawn on standard error.

    Raises:
        InputError: text, vocabulary or folder cannot be used.
    """
    files = documents.find_files(text, "--input")
    vocabulary = load_vocabulary(vocab)
    with locked(_made(output), wait=False):
        manifest = _begin(output, files, vocabulary, shard_tokens)
        run = _Run(output, manifest, say)
        save_vocabulary(vocabulary, os.path.join(output, "vocab.txt"))
        if manifest["finished"]:
            say(f"{output} is finished: nothing was left to do")
            return manifest
        records = BadRecords(
            max_bad_record_share, skip=True, say=say, limit_flag="--max_bad_record_share"
        )
        size = sum(os.path.getsize(file) for file in files)
        with tqdm(total=size, unit="B", unit_scale=True, disable=not progress) as bar:
            read = documents.read_documents(files, records, bar.update)
            done = manifest["shards"][-1]["batches"] if manifest["shards"] else 0
            run.write(tokenized_batches(read, vocabulary, workers, skip=done), bar)
        run.finish(records)
    return run.manifest


def _made(output):
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {output} cannot be made: {error.strerror}.") from None
    return output


def _begin(output, files, vocabulary, shard_tokens):
    """The manifest of the run that was stopped here, or a new one."""
    facts = {
        "vocabulary_hash": vocabulary_hash(vocabulary),
        "vocabulary_size": len(vocabulary),
        "token_dtype": shards.token_dtype(len(vocabulary)),
        "shard_tokens": shard_tokens,
        "inputs": [_identity(file) for file in files],
    }
    if not shards.is_prepared(output):
        others = sorted(set(os.listdir(output)) - {LOCK, f"{shards.MANIFEST}.new"})
        if others:
            raise InputError(
                f"--output: {output} holds something else ({others[0]}). Choose an empty folder."
            )
        manifest = {"finished": False} | facts | {"shards": []}
        shards.save_manifest(output, manifest)
        return manifest
    manifest = shards.load_manifest(output)
    for field, value in facts.items():
        if manifest[field] != value:
            raise InputError(
                f"--output: {output} was begun with another `{field}`, as its {shards.MANIFEST} "
                "says. Give the same command again, or choose an empty folder."
            )
    return manifest


def _identity(path):
    """What tells whether an input is still the same: its name, size, and both ends."""
    size = os.path.getsize(path)
    ends = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        ends.update(file.read(COMPARED_BYTES))
        file.seek(max(0, size - COMPARED_BYTES))
        ends.update(file.read())
    return {"file": os.path.basename(path), "bytes": size, "ends": ends.hexdigest()}


class _Run:
    """Writes the shards that are left, in the order of the text.

    Shards that are there are read whole. From the first one on that is not what the manifest says
    all are made anew: what they hold depends on the documents before them.
    """

    def __init__(self, folder, manifest, say):
        self._folder, self.manifest = folder, manifest
        self._known, self._fingerprint = KnownDocuments(), Fingerprint()
        found = manifest["shards"]
        for number, shard in enumerate(found):
            if not self._verify(shard, say):
                say(f"{shard['file']} is made anew, and those behind it")
                manifest.update(shards=found[:number], finished=False)
                break
        else:
            if found:
                say(f"{len(found)} finished shards were verified and kept")

    def _verify(self, shard, say):
        records = BadRecords(1.0, skip=True, say=say)
        dtype, keys = self.manifest["token_dtype"], []
        for tokens, lengths in shards.read_shard(self._folder, shard, dtype, records):
            keys.append((document_key(tokens), lengths))
        own = Fingerprint()
        for document in keys:
            own.add(*document)
        if own.hexdigest() != shard["fingerprint"]:
            return False
        for document in keys:
            self._known.add(document[0])
            self._fingerprint.add(*document)
        return True

    def write(self, batches, bar):
        """Writes what the workers give, a shard whenever it is full."""
        found = self.manifest["shards"]
        done = found[-1]["batches"] if found else 0
        counted = enumerate(batches, start=done + 1)
        while (first := next(counted, None)) is not None:
            dtype = self.manifest["token_dtype"]
            with shards.ShardWriter(self._folder, len(found), dtype) as writer:
                writer.facts["repeated_documents"] = 0
                for number, tokenized in itertools.chain([first], counted):
                    self._add(writer, tokenized)
                    writer.facts["batches"] = number  # of the text so far
                    bar.set_postfix_str(f"{self._tokens(writer):,} tokens", refresh=False)
                    if writer.facts["tokens"] >= self.manifest["shard_tokens"]:
                        break
            found.append(writer.facts)
            shards.save_manifest(self._folder, self.manifest)

    def _add(self, writer, tokenized):
        for tokens, lengths in tokenized.documents():
            key = document_key(tokens)
            if self._known.add(key):
                writer.add(key, tokens, lengths)
                self._fingerprint.add(key, lengths)
            else:
                writer.facts["repeated_documents"] += 1

    def _tokens(self, writer):
        return writer.facts["tokens"] + sum(s["tokens"] for s in self.manifest["shards"])

    def finish(self, records):
        """Sums up, and says which documents are held out."""
        total = {
            name: sum(shard[name] for shard in self.manifest["shards"])
            for name in ("documents", "sentences", "tokens", "repeated_documents")
        }
        keys = self._known.sorted()
        below = held_out_below(keys)
        self.manifest |= total | {
            "damaged_records": records.bad,
            "held_out_documents": int((keys < below).sum()),
            "held_out_below": f"{below:016x}",
            "fingerprint": self._fingerprint.hexdigest(),
            "finished": True,
        }
        shards.save_manifest(self._folder, self.manifest)


def say(line: str) -> None:
    """A line beside the bar."""
    tqdm.write(line, file=sys.stderr)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="text: files, globs or folders, with commas")
    parser.add_argument("--vocab", required=True, help="a BERT vocab.txt")
    parser.add_argument("--output", required=True, help="folder for the shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: the cores")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS)
    parser.add_argument("--max_bad_record_share", type=float, default=0.001)
    flags = vars(parser.parse_args())
    try:
        for name in ("workers", "shard_tokens"):
            if flags[name] < 1:
                raise InputError(f"--{name} must be at least 1. Received: --{name}={flags[name]}.")
        manifest = prepare(flags.pop("input"), say=say, progress=True, **flags)
    except InputError as error:
        say(f"prepare_text: {error}")
        return 1
    except OSError as error:
        say(f"prepare_text: {error.filename or flags['output']}: {error.strerror or error}.")
        return 1
    except KeyboardInterrupt:
        say("prepare_text: stopped. The same command goes on after the last finished shard.")
        return STOPPED
    print(
        f"{manifest['tokens']:,} tokens in {manifest['documents']:,} documents, of them "
        f"{manifest['held_out_documents']:,} held out, in {len(manifest['shards'])} shards in "
        f"{flags['output']}; {manifest['repeated_documents']:,} repeated documents and "
        f"{manifest['damaged_records']:,} damaged lines were left out"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
