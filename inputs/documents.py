"""Reads documents from text files: what stands in them, or one sentence on why it cannot be."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator

from inputs.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def find_files(data: str) -> list[str]:
    """Expands a comma-separated list of files, globs and folders into text files, in order.

    Raises:
        InputError: an entry that matches nothing, or a file of another kind.
    """
    files: list[str] = []
    for entry in data.split(","):
        if os.path.isdir(entry):
            found = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(entry)
                for name in names
                if name.endswith(SUFFIXES)
            ]
        else:
            found = [path for path in glob.glob(entry) if os.path.isfile(path)]
            wrong = [path for path in found if not path.endswith(SUFFIXES)]
            if wrong:
                raise InputError(
                    f"--data_dir: {wrong[0]} is no text file by its name. "
                    f"Rename it to end in one of {', '.join(SUFFIXES)}."
                )
        if not found:
            raise InputError(
                f"--data_dir: {entry!r} is not there, or holds no text. Give a file, a glob or a "
                f"folder with files that end in {', '.join(SUFFIXES)}."
            )
        files += sorted(found)
    return files


def read_documents(files: list[str]) -> Iterator[list[str]]:
    """Yields each document as a list of paragraphs, none empty.

    `.txt`: documents are separated by blank lines, a line is a paragraph. `.jsonl`: a line is a
    document, its text in `paragraphs` (a list of strings) or in `text` (a string).

    Raises:
        InputError: a file that is empty, not UTF-8, not gzip although named so, or a line that is
            not such a JSON object; the message names the file and the place.
    """
    for path in files:
        count = 0
        is_json = path.removesuffix(".gz").endswith(".jsonl")
        for document in (_json_documents if is_json else _text_documents)(path):
            if document:
                count += 1
                yield document
        if count == 0:
            raise InputError(f"{path} holds no text. Take it out of --data_dir, or fill it.")


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end)."""
    offset = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path}, line {number}, byte {offset + error.start}: not UTF-8 "
                        f"(0x{line[error.start]:02x}). Convert the file, for example with "
                        "`iconv -f LATIN1 -t UTF-8`."
                    ) from None
                offset += len(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} is named .gz but is no whole gzip file ({error}). "
            "Rename it, or fetch it again if it was cut short."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None


def _text_documents(path: str) -> Iterator[list[str]]:
    document: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            document.append(line.strip())
        elif document:
            yield document
            document = []
    yield document


def _json_documents(path: str) -> Iterator[list[str]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number too long
            raise InputError(f"{path}, line {number}: not JSON ({error}). Mend the line.") from None
        text = record.get("paragraphs", record.get("text")) if isinstance(record, dict) else None
        paragraphs = text.splitlines() if isinstance(text, str) else text
        if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
            raise InputError(
                f"{path}, line {number}: no document. Each line must be a JSON object with "
                "`paragraphs` (a list of strings) or `text` (a string)."
            )
        # JSON can spell half of a surrogate pair, which is no text and has no UTF-8.
        whole = [p.encode("utf-8", "replace").decode("utf-8").strip() for p in paragraphs]
        yield [paragraph for paragraph in whole if paragraph]
