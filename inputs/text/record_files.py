"""Finds TFRecord files of masked pre-training examples, and the ones that are held out."""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable

from inputs.errors import InputError
from inputs.shards import HEADER_BYTES, is_prepared, record_length
from inputs.storage.files import (
    COMPRESSIONS,
    PassedOver,
    absolute,
    file_size,
    is_file,
    is_folder,
    open_bytes,
)
from inputs.text.files import SUFFIXES, VOCABULARY, WIKI_NAME, files_below, matches
from inputs.text.prepare import identity

# Of a file's name, or of that of a folder that distinguishes it from other files of the list: its
# examples are held out.
HELD_OUT_NAME = re.compile(
    r"(?i)(^|[^a-z])(eval(uation)?|valid(ation)?|dev|test|held[-_]?out)([^a-z]|$)"
)
# Of a file that should be a TFRecord file.
RECORD_NAME = re.compile(r"(?i).+(\.tfrecords?|-\d+-of-\d+)+")
MLPERF_HELD_OUT = "eval_10k"  # 10,000 examples, picked from `eval_intermediate` beside it
FLAG = "--data_dir"
GZIP = b"\x1f\x8b"
TEXT_SUFFIXES = {*SUFFIXES, ".json", ".md5", ".md"}


def find_record_files(
    data: str, log: Callable[[str], object] = lambda line: None
) -> tuple[list[str], list[str]] | None:
    """Expands a comma-separated list of files, globs and folders into TFRecord files, in order.

    The content tells what a TFRecord file is, as MLPerf's have no suffix. Files besides
    `eval_10k` that are called after an evaluation are passed over where there is one.

    Args:
        data: the list, without spaces. Folders are read recursively.
        log: receives a line for each entry: how many files are read and passed over.

    Returns:
        The files to train on, and those that are held out: see `HELD_OUT_NAME`. None if there is no
        TFRecord file at all.

    Raises:
        InputError: an entry has none while another has, all of them are held out, they are
            compressed or damaged, or a folder cannot be read.
    """
    found: dict[str, list[str]] = {}
    others: list[str] = []
    for entry in data.split(","):
        passed_over = PassedOver()
        found[entry] = []
        for path in _files(entry, passed_over):
            if is_record_file(path):
                found[entry].append(path)
            else:
                others.append(path)
                passed_over.add(path)
        if found[entry]:
            rest = passed_over.describe()
            plural = "s" * (len(found[entry]) != 1)
            line = f"{entry}: {len(found[entry]):,} TFRecord file{plural}"
            log(line + (rest and f"; {rest}"))
    if not any(found.values()):
        return None
    for entry, files in found.items():
        if not files:
            raise InputError(
                f"--data_dir: {entry!r} has no TFRecord file, but other entries have. Give either "
                "text, or TFRecord files of masked examples."
            )
    _check_others(others, [path for paths in found.values() for path in paths])
    # So that a file that is named twice is read once.
    files = {absolute(path): (path, entry) for entry in found for path in found[entry]}
    roots = {absolute(_root(path, entry) or os.curdir) for path, entry in files.values()}
    held_out = [path for path, entry in files.values() if _is_held_out(path, entry, len(roots) > 1)]
    training = [path for path, _ in files.values() if path not in set(held_out)]
    chosen = [path for path in held_out if os.path.basename(path) == MLPERF_HELD_OUT]
    if chosen and len(chosen) < len(held_out):
        others = sorted(set(held_out).difference(chosen))
        log(f"Passed over, as {MLPERF_HELD_OUT} is the held-out set: {', '.join(others)}")
        held_out = chosen
    if not training:
        raise InputError(
            f"--data_dir: {data}: by its name, {held_out[0]} is held out, and there is no file to "
            "train on. Give the files of the training examples, too."
        )
    return training, held_out


def is_record_file(path: str) -> bool:
    """Whether a TFRecord begins at the start of a file.

    Raises:
        InputError: the file is a compressed TFRecord file.
    """
    name = os.path.basename(path).lower()
    stem, ending = os.path.splitext(name)
    plain = stem if ending in COMPRESSIONS else name
    if os.path.splitext(plain)[1] in TEXT_SUFFIXES or WIKI_NAME.fullmatch(plain):
        return False
    if name == VOCABULARY:
        return False
    try:
        with open_bytes(path) as file:
            if record_length(file, 0) is not None:
                return True
            file.seek(0)
            if file.read(len(GZIP)) != GZIP:
                return False
            file.seek(0)
            with gzip.GzipFile(fileobj=file) as content:
                compressed = record_length(_Start(content.read(HEADER_BYTES)), 0) is not None
    except (OSError, EOFError, UnicodeError, zlib.error):
        return False  # reading it as text reports the error
    if compressed:
        raise InputError(
            f"--data_dir: {path} is a compressed TFRecord file, of which single records cannot be "
            f"read. Decompress it: gunzip -c {path} > NEW_FILE"
        )
    return False


class _Start:
    """The first bytes of a file, for `record_length`."""

    def __init__(self, data: bytes):
        self._data = data

    def seek(self, offset):
        del offset

    def read(self, size):
        return self._data[:size]


def fingerprint(files: list[str]) -> str:
    """A short hash that identifies files, by name, size and the content of both ends."""
    facts = json.dumps([identity(file) for file in files])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _files(entry: str, passed_over: PassedOver) -> list[str]:
    """The files that an entry names."""
    found = []
    for path in matches(entry, FLAG, passed_over):
        if not is_folder(path):
            found.append(path)
        elif not is_prepared(path, FLAG):
            found += sorted(files_below(path, FLAG, passed_over))
    return [path for path in found if is_file(path)]


def _check_others(others, found) -> None:
    """Refuses files that are no TFRecord files but have the name of one, or of one that was found.

    Raises:
        InputError: there is such a file.
    """
    kinds = {_kind(path) for path in found}
    for path in others:
        if RECORD_NAME.fullmatch(os.path.basename(path)) or _kind(path) in kinds:
            is_empty = not file_size(path)
            raise InputError(
                f"--data_dir: {path} is {'empty' if is_empty else 'no TFRecord file'}, by its name "
                f"one of the data{'' if is_empty else ', or its first record is damaged'}. Copy it "
                "again, or remove it."
            )


def _kind(path) -> str:
    """The name of a file without its numbers, and its folder."""
    folder, name = os.path.split(path)
    return os.path.join(folder, re.sub(r"\d+", "#", name))


def _root(path: str, entry: str) -> str:
    """The folder of an entry: the part before its first wildcard, or that of a single file."""
    entry = entry.rstrip("/")
    if path.startswith(f"{entry}/"):
        return entry
    return os.path.dirname(path if path == entry else re.split(r"[*?[]", entry)[0])


def _is_held_out(path: str, entry: str, several: bool) -> bool:
    """Whether a file is held out by a name below the folder of its entry.

    With several such folders, the name of this one counts, too.
    """
    root = _root(path, entry)
    names = os.path.relpath(path, root or os.curdir).split("/")
    names += [os.path.basename(root)] if several else []
    return any(map(HELD_OUT_NAME.search, names))
