"""Finds text files, recognizes their formats and encodings, and opens them."""

import bz2
import codecs
import glob
import gzip
import importlib.util
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import IO

from inputs.errors import InputError
from inputs.shards import is_prepared
from inputs.storage.files import (
    COMPRESSIONS,
    PassedOver,
    exists,
    file_sizes,
    is_folder,
    is_remote,
    open_bytes,
    walk,
)

VOCABULARY = "vocab.txt"
DATA_DIR = "--data_dir"  # the flag of train.py
# Formats, see `documents.read_documents`.
PLAIN, JSON, WIKI, WIKI_JSON = ("plain", "json", "wiki", "wiki_json")
SUFFIXES = {".txt": PLAIN, ".jsonl": JSON, ".ndjson": JSON}
READ = (
    f"{', '.join(SUFFIXES)} (and .json with a document per line), each also with "
    f"{', '.join(COMPRESSIONS)}; and the files that WikiExtractor writes, wiki_00"
)
GUIDE = "docs/guides/your-data.md"
WIKI_NAME = re.compile(r"wiki_\d+")
WIKI_START = b"<doc id="
DAMAGE = (EOFError, zlib.error, lzma.LZMAError)  # of a compressed file
SNIFFED_BYTES = 2**20  # read from a file whose name does not tell the format
BYTE_ORDER_MARKS = (  # UTF-32 first, because its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
NUL_SHARE = 0.25  # with at least this share of NUL bytes, a file is not UTF-8
# Advice for files of other kinds, by suffix.
TO_JSON_LINES = (
    "It is a table. Convert it to JSON lines, if its text is in the column `text`: python -c "
    "\"import pandas; pandas.{reader}('{path}')[['text']].to_json('{path}.jsonl.gz', "
    "orient='records', lines=True)\""
)
ADVICE = {
    (".parquet",): TO_JSON_LINES.replace("{reader}", "read_parquet"),
    (".arrow", ".feather"): "It is a table. Convert it to JSON lines.",
    (".csv",): TO_JSON_LINES.replace("{reader}", "read_csv"),
    (".xml",): (
        "If it is a dump of Wikipedia, extract its text first: python -m "
        "wikiextractor.WikiExtractor {path} -o extracted. Then give the folder `extracted`."
    ),
    (".hdf5", ".h5"): "It is an HDF5 file. Write its content as text or as TFRecord files.",
    (".wet", ".warc", ".wat"): "It is a web archive. Convert its text to JSON lines.",
    (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"): (
        "It is an archive. Unpack it, and give the folder."
    ),
    (".json",): (
        "Its first line is not a JSON object with `text` or `paragraphs`. Write one such object "
        "per line."
    ),
    (".pdf", ".doc", ".docx", ".odt", ".epub", ".rtf", ".html", ".htm", ".md", ".tex"): (
        "It holds more than text. Convert it to plain text, with a blank line between documents."
    ),
}
# Of --data_dir, which also takes the files of `inputs.text.record_files`.
RECORDS = "TFRecord files of masked examples with MLPerf's features (input_ids, masked_lm_ids, ...)"
OTHER_ADVICE = (
    "If it is plain text in UTF-8 with a blank line between documents, give it a name that ends in "
    ".txt."
)


def find_files(
    data: str, flag: str = DATA_DIR, log: Callable[[str], object] = lambda line: None
) -> list[str]:
    """Expands a comma-separated list of files, globs and folders into text files, in order.

    Folders are read recursively, and `**` in a glob matches any folders. Links are followed, and
    each folder is read once. These are passed over: hidden and system files
    (`inputs.storage.files.is_left_over`), folders of prepared shards inside another folder, files
    of other kinds, and files named vocab.txt unless listed by that path.

    Args:
        data: the list, without spaces.
        flag: the flag that the list comes from, for error messages.
        log: receives a line about each folder and glob: how many files are read and passed over.

    Raises:
        InputError: an entry matches nothing, is of another file type or a folder of shards, or
            needs a package that is not installed.
    """
    files: list[str] = []
    for entry in data.split(","):
        passed_over = PassedOver()
        found: list[str] = []
        others: list[str] = []
        for path in matches(entry, flag, passed_over):
            if is_folder(path):
                _check_not_prepared(path, flag)
                candidates = files_below(path, flag, passed_over)
            else:
                candidates = [path]
            for file in candidates:
                if os.path.basename(file) == VOCABULARY and file != entry:
                    passed_over[VOCABULARY] += 1
                elif format_of(file, by_name=file != entry):
                    found.append(file)
                else:
                    others.append(file)
                    passed_over.add(file)
        if not found:
            if others:
                raise InputError(f"{flag}: {_refusal(sorted(others), flag)}")
            more = f"; or {RECORDS}" if flag == DATA_DIR else ""
            raise InputError(
                f"{flag}: {entry!r} does not exist, or holds no text. Give a file, a glob or a "
                f"folder with files that end in {READ}{more}."
            )
        if found != [entry]:
            rest = passed_over.describe()
            plural = "s" * (len(found) != 1)
            log(f"{entry}: {len(found):,} file{plural} to read" + (rest and f"; {rest}"))
        files += sorted(found)
    for file in files:
        _check_package(file)
    return files


def _check_not_prepared(path, flag):
    if is_prepared(path, flag):
        raise InputError(
            f"{flag}: {path} holds prepared shards (manifest.json), not text. Give such a "
            "folder to train.py, as the only entry of --data_dir."
        )


def files_below(
    top: str,
    flag: str,
    passed_over: PassedOver,
    wanted: Callable[[str], bool] = lambda folder: True,
) -> list[str]:
    """The files in a folder and below it, except those of prepared shards.

    Args:
        top: the folder.
        flag: of the folder, for error messages.
        passed_over: counts what is left out.
        wanted: whether a folder below is entered.
    """

    def enter(folder):
        if not wanted(folder):
            return False
        if is_prepared(folder, flag):
            passed_over["folder of prepared shards"] += 1
            return False
        return True

    return [entry.path for entry in walk(top, flag, passed_over, enter=enter)]


def matches(entry: str, flag: str, passed_over: PassedOver) -> list[str]:
    """The files and folders that an entry names; in a glob, `**` matches any folders."""
    try:
        if exists(entry):  # its name may contain brackets
            return [entry]
    except OSError as error:
        raise InputError(f"{flag}: {entry} cannot be read ({error.strerror}).") from None
    parts = entry.rstrip(os.sep).split(os.sep)
    if "**" not in parts and not is_remote(entry):
        return sorted(glob.glob(entry))
    # `glob` itself would follow a link to a parent folder again and again.
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), None)
    if first is None:
        return []
    top = os.sep.join(parts[:first]) or (os.sep if first else os.curdir)
    if not is_folder(top):
        return []

    def enter(folder):
        return _may_hold(os.path.relpath(folder, top).split(os.sep), parts[first:])

    found = [os.path.relpath(file, top) for file in files_below(top, flag, passed_over, enter)]
    base = os.sep.join(parts[:first] + [""]) if first else ""
    # As in other globs, a folder that matches stands for all its files.
    return [
        base + path
        for path, names in ((path, path.split(os.sep)) for path in found)
        if any(_fits(names[: i + 1], parts[first:]) for i in range(len(names)))
    ]


def _may_hold(folder: list[str], pattern: list[str]) -> bool:
    """Whether a path in or below a folder may match a glob, or the folder itself does."""
    size = len(folder)
    return "**" in pattern or _fits(folder[: len(pattern)], pattern[:size])


def _fits(path: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match those of a glob."""
    if not pattern:
        return not path
    if pattern[0] == "**" and _fits(path, pattern[1:]):
        return True
    if not path:
        return False
    rest = pattern if pattern[0] == "**" else pattern[1:]
    return (pattern[0] == "**" or fnmatchcase(path[0], pattern[0])) and _fits(path[1:], rest)


def compression_of(path: str) -> str:
    """The suffix of a compressed file, such as ".gz", in lower case; else ""."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix if suffix in COMPRESSIONS else ""


def format_of(path: str, by_name: bool = True) -> str:
    """The format of a text file: `PLAIN`, `JSON`, `WIKI` or `WIKI_JSON`; "" if it is not text.

    The name decides, except that a file that begins with WikiExtractor's <doc> line is `WIKI`.

    Args:
        path: path of the file.
        by_name: if False, the first line is checked for <doc> whatever the name is.
    """
    name = os.path.basename(path).lower()
    name = name.removesuffix(compression_of(name))
    suffix = os.path.splitext(name)[1]
    known = SUFFIXES.get(suffix, "")
    if known == JSON:
        return JSON
    is_wiki = WIKI_NAME.fullmatch(name)
    if not (known or is_wiki or suffix == ".json" or not by_name):
        return ""
    start = _start(path)
    if start.startswith(WIKI_START):
        return WIKI
    if (is_wiki or suffix == ".json") and _is_document(start):
        return WIKI_JSON if is_wiki else JSON
    return known


def _start(path: str) -> bytes:
    """The first line that is not blank; b"" if the file cannot be read."""
    try:
        with open_bytes(path) as raw, opened(raw, path) as file:
            lines = iter(lambda: file.readline(SNIFFED_BYTES), b"")
            return next((line for line in map(_stripped, lines) if line), b"")
    except (OSError, InputError, *DAMAGE):
        return b""  # reading reports the error


def _stripped(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _is_document(line: bytes) -> bool:
    """Whether a line is a JSON object with text, as far as `SNIFFED_BYTES` of it tell."""
    if len(line) >= SNIFFED_BYTES - 1:
        return line.startswith(b"{") and (b'"text"' in line or b'"paragraphs"' in line)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and ("text" in record or "paragraphs" in record)


def _refusal(paths: list[str], flag: str) -> str:
    """Why the first one of some files that has content is not read, and what to do."""
    sizes = file_sizes(paths)
    path = next((path for path, size in zip(paths, sizes, strict=True) if size != 0), None)
    if path is None:
        others = f" and {len(paths) - 1:,} more" if paths[1:] else ""
        what = "no records and no text" if flag == DATA_DIR else "no text"
        return f"{paths[0]}{others}: an empty file has {what}. Copy it again."
    name = os.path.basename(path).lower()
    stem = name.removesuffix(compression_of(name))
    suffixes = (os.path.splitext(stem)[1], os.path.splitext(name)[1])
    advice = next((text for ends, text in ADVICE.items() if {*ends} & {*suffixes}), OTHER_ADVICE)
    advice = advice.replace("{path}", path)
    more = f" --data_dir also takes {RECORDS}." if flag == DATA_DIR else ""
    return f"{path} is not of a kind that is read as text: {READ}. {advice}{more} See {GUIDE}."


def check_beginning(path: str, beginning: bytes, *, flag: str = "", compressed: bool = False):
    """Raises an error if a file is in UTF-16 or UTF-32.

    Their bytes can look like UTF-8 with NULs between the letters.

    Args:
        path: path of the file, for the message.
        beginning: its first line, or more.
        flag: the flag that named it, for the message.
        compressed: whether `beginning` was decompressed.

    Raises:
        InputError: the file begins with a byte-order mark, or has NULs between its letters.
    """
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if beginning.startswith(mark)), None)
    reason = "its first bytes are a byte-order mark"
    nuls = beginning.count(0)
    if encoding is None and nuls and nuls >= NUL_SHARE * len(beginning):
        reason = f"{nuls / len(beginning):.0%} of its first line are NUL bytes"
        width = 32 if nuls > 0.6 * len(beginning) else 16
        is_big = beginning[0] == 0
        # The bytes that tell letters apart are not NUL. A block of NULs, as a crash leaves it, has
        # NULs there, too, and is damage.
        letters = beginning[width // 8 - 1 if is_big else 0 :: width // 8]
        if letters.count(0) < NUL_SHARE / 2 * len(letters):
            encoding = f"UTF-{width}{'BE' if is_big else 'LE'}"
    if encoding:
        what = f"{flag}: {path}".removeprefix(": ")
        command = f"iconv -f {encoding} -t UTF-8"
        command = f"{command}` after decompression" if compressed else f"{command} {path} > NEW`"
        raise InputError(f"{what} is {encoding}, not UTF-8: {reason}. Convert it: `{command}.")


def opened(raw: IO[bytes], path: str) -> IO[bytes]:
    """Returns a file object that decompresses an open file, as its suffix says.

    Reading damaged content raises an `OSError` without `errno`, or one of `DAMAGE`.

    Args:
        raw: the open file.
        path: its path.

    Raises:
        InputError: the package that reads .zst is not installed.
    """
    kind = compression_of(path)
    if kind == ".gz":
        return gzip.open(raw)
    if kind == ".bz2":
        return bz2.open(raw)
    if kind == ".xz":
        return lzma.open(raw)
    if kind == ".zst":
        _check_package(path)
        return io.BufferedReader(_ZstdFile(raw))
    return raw


def _check_package(path):
    if compression_of(path) == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise InputError(
            f"{path}: reading .zst needs the package zstandard. Install it: pip install zstandard"
        )


class _ZstdFile(io.RawIOBase):
    """Decompresses a file of Zstandard frames.

    *Differs from* `zstandard`'s own `stream_reader`: a truncated file raises `EOFError`.
    """

    def __init__(self, raw: IO[bytes]):
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        # The window of `zstd --long=31`; by default the library refuses more than 128 MiB.
        self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame = None
        self._compressed = self._content = b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer) -> int:
        """Fills a buffer; returns the number of bytes, 0 at the end."""
        while not self._content:
            self._compressed = self._compressed or self._raw.read(io.DEFAULT_BUFFER_SIZE)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._content = self._frame.decompress(self._compressed)
            except self._error as error:
                raise OSError(str(error)) from None
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size
