"""Reads documents from text files, and reports what is wrong with them."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from xml.sax.saxutils import unescape

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.storage.files import COMPRESSIONS, file_size, open_bytes
from inputs.text.files import (
    DAMAGE,
    JSON,
    WIKI,
    WIKI_JSON,
    check_beginning,
    compression_of,
    format_of,
    opened,
)

# Limits on memory. (War and Peace has 3.2 million characters.)
MAX_LINE_BYTES = 2**24
MAX_DOCUMENT_CHARACTERS = 2**22
# Titles may hold quotes. Further attributes come after the title.
WIKI_DOCUMENT = re.compile(r'<doc id=".*? title="(.*?)"(?: [\w-]+="[^"]*")*\s*>')


def read_documents(
    files: list[str], records: BadRecords, advance: Callable[[int], object] = lambda count: None
) -> Iterator[list[str]]:
    """Yields each document as a list of paragraphs, none empty.

    Plain text: blank lines separate documents; each line is a paragraph. JSON lines: each line is
    a document, with its text in `paragraphs` (a list of strings) or in `text` (a string).
    WikiExtractor: a document is between <doc ...> and </doc>, or a line of JSON. Its &lt;, &gt; and
    &amp; are replaced. The line that repeats the title is left out, as the JSON format does.

    Damaged records are skipped and counted: a line that is not UTF-8, has a NUL, is not such a JSON
    object or is longer than `MAX_LINE_BYTES`; a line <doc ...> of another form than
    WikiExtractor's; the rest of a truncated compressed file; a file without text. After a damaged
    line, the document continues with the next line. A file in which most records are damaged, such
    as one named .gz that is not gzip, is an error. A document longer than
    `MAX_DOCUMENT_CHARACTERS` is split.

    Args:
        files: paths, from `inputs.text.files.find_files`.
        records: counts the lines.
        advance: receives the number of bytes read since its last call, for progress.

    Raises:
        InputError: a file cannot be read, or is in UTF-16 or UTF-32; or from `records`.
    """
    readers = {
        JSON: _json_documents,
        WIKI: _wiki_documents,
        WIKI_JSON: functools.partial(_json_documents, decode=unescape),
    }
    for path in files:
        count = 0
        bad = records.bad
        read = readers.get(format_of(path, by_name=False), _text_documents)
        with records.of_file():
            for document in read(path, records, advance):
                for part in _split_long(document):
                    count += 1
                    yield part
        if count == 0 and records.bad == bad:
            records.add_bad(f"{path} holds no text.")
    records.end()


def _split_long(document: list[str]) -> Iterator[list[str]]:
    """Yields the document, split into parts if it is too long; no part is empty."""
    part = []
    size = 0
    for paragraph in document:
        part.append(paragraph)
        size += len(paragraph)
        if size >= MAX_DOCUMENT_CHARACTERS:
            yield part
            part = []
            size = 0
    if part:
        yield part


def _lines(path: str, records: BadRecords, advance) -> Iterator[tuple[str, str]]:
    """Yields ("FILE, line N", line without its line end) of each line that is UTF-8."""
    offset = 0
    read = 0
    try:
        with open_bytes(path) as raw, opened(raw, path) as file:
            for number, line in enumerate(_raw_lines(file, raw, path, records), start=1):
                place = f"{path}, line {number}"
                if number == 1:
                    check_beginning(path, line, compressed=file is not raw)
                if number % 256 == 0:
                    advance(raw.tell() - read)
                    read = raw.tell()
                start, offset = offset, offset + len(line)
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    where = f"{place}, byte {start + error.start}"
                    records.add_bad(f"{where}: not UTF-8 (0x{line[error.start]:02x}).")
                    continue
                if "\0" in text:  # as in UTF-16 of any language
                    where = f"{place}, byte {start + line.index(0)}"
                    records.add_bad(f"{where}: a NUL, which text does not have.")
                    continue
                yield place, text.rstrip("\r\n")
            advance(raw.tell() - read)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None


def _raw_lines(file, raw, path: str, records: BadRecords) -> Iterator[bytes]:
    """Yields the lines of a file, up to the damage if it is a damaged compressed file."""
    number = 0
    try:
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                records.add_bad(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes.")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                line = b""
            yield line
    except (OSError, *DAMAGE) as error:
        kind = compression_of(path)
        if not kind or getattr(error, "errno", None) is not None:
            raise  # an error of the disk, not of the content
        if number == 0:
            records.add_bad(
                f"{path} is named {kind} but is not a complete {COMPRESSIONS[kind]} file ({error})."
            )
            return
        # Estimates the lines after the damage. What was cut off at the end is not known.
        used, size = raw.tell(), file_size(path)
        lost = max(1, round(number * (size - used) / used))
        records.add_bad(
            f"{path}, up to line {number}: the {COMPRESSIONS[kind]} file is damaged ({error}).",
            lost,
        )


def _text_documents(path: str, records: BadRecords, advance) -> Iterator[list[str]]:
    document: list[str] = []
    size = 0
    for _, line in _lines(path, records, advance):
        records.add_good()
        if line.strip():
            document.append(line.strip())
            size += len(line)
        if document and (size >= MAX_DOCUMENT_CHARACTERS or not line.strip()):
            size = 0
            yield document
            document = []
    yield document


def _wiki_documents(path: str, records: BadRecords, advance) -> Iterator[list[str]]:
    """Reads the text format of https://github.com/attardi/wikiextractor."""
    document: list[str] = []
    title = ""
    size = 0
    for place, line in _lines(path, records, advance):
        line = line.strip()
        start = line.startswith("<doc ")  # in the text, < is &lt;
        header = WIKI_DOCUMENT.fullmatch(line) if start else None
        if start and not header:
            records.add_bad(f'{place}: not WikiExtractor\'s <doc id="..." url="..." title="...">.')
        else:
            records.add_good()
        if start:
            title = header[1] if header else ""
        elif line and line != "</doc>":
            if line != title:
                document.append(unescape(line))
                size += len(line)
            title = ""
        if document and (size >= MAX_DOCUMENT_CHARACTERS or start or line == "</doc>"):
            size = 0
            yield document
            document = []
    yield document


def _json_documents(
    path: str, records: BadRecords, advance, decode: Callable[[str], str] = str
) -> Iterator[list[str]]:
    for place, line in _lines(path, records, advance):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also too many digits
            records.add_bad(f"{place}: not JSON ({error}).")
            continue
        if not isinstance(record, dict):
            record = {}
        if "paragraphs" in record and "text" in record:
            records.add_bad(f"{place}: both `paragraphs` and `text`. Leave one of them out.")
            continue
        text = record.get("paragraphs", record.get("text"))
        paragraphs = text.splitlines() if isinstance(text, str) else text
        if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
            records.add_bad(
                f"{place}: not a document. Each line must be a JSON object with `paragraphs` "
                "(a list of strings) or `text` (a string)."
            )
            continue
        if wrong := _not_text(paragraphs):
            records.add_bad(f"{place}: {wrong}, which text does not have.")
            continue
        records.add_good()
        paragraphs = [decode(paragraph).strip() for paragraph in paragraphs]
        yield [paragraph for paragraph in paragraphs if paragraph]


def _not_text(paragraphs) -> str:
    """What a JSON string may contain and text may not; "" if there is no such thing."""
    together = "\n".join(paragraphs)
    if "\0" in together:
        return "a NUL"
    try:
        together.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return ""
