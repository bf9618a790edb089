"""Reads SQuAD v1.1 files and checks every field; errors name the file and the field."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import zlib

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.storage.files import is_folder, list_names, read_bytes
from inputs.text.tokenization.characters import is_dropped

DATA_DIR = "--data_dir"
SHOWN_CHARACTERS = 60  # of an answer, in a message
ANSWERABLE = (
    "In SQuAD v1.1 every question has an answer: give a v1.1 file, or leave out the questions of "
    "v2.0 that have none"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique in the file.
        text: the question.
        context: index in `Squad.contexts`.
        answers: (index of the first character in the context, text) of each answer. The index is
            None if the text is not at the place that the file gives.
    """

    id: str
    text: str
    context: int
    answers: tuple[tuple[int | None, str], ...]

    @property
    def placed(self) -> tuple[int, str] | None:
        """The first answer whose place in the context is known."""
        return next(((start, text) for start, text in self.answers if start is not None), None)


@dataclasses.dataclass(frozen=True)
class Squad:
    """The content of a file.

    Attributes:
        contexts: the paragraphs that answers are found in.
        questions: in the order of the file.
        fingerprint: a hash of the file's content.
        path: path of the file.
        flag: the flag or argument that named it, for error messages.
    """

    contexts: list[str]
    questions: list[Question]
    fingerprint: str
    path: str = ""
    flag: str = DATA_DIR

    def evaluated_as(self) -> list[dict]:
        """The questions and their answers, in the layout that the official metric reads."""
        answered = [
            {"id": question.id, "answers": [{"text": text} for _, text in question.answers]}
            for question in self.questions
        ]
        return [{"paragraphs": [{"qas": answered}]}]


def find_files(data_dir: str) -> tuple[str, str]:
    """The (training, dev) files of `--data_dir`: two comma-separated paths, or their folder.

    In a folder, the names are train*.json and dev*.json, with or without .gz. Two paths whose names
    begin so are in any order; with other names, the training file comes first.

    Raises:
        InputError: there is not exactly one of each.
    """
    given = [path.strip() for path in data_dir.split(",") if path.strip()]
    if len(given) == 2:
        names = [os.path.basename(path) for path in given]
        if names[0].startswith("dev") and names[1].startswith("train"):
            given.reverse()
        return given[0], given[1]
    found = []
    try:
        names = list_names(given[0]) if len(given) == 1 and is_folder(given[0]) else None
    except OSError as error:
        raise InputError(f"--data_dir: {given[0]} cannot be read ({error.strerror}).") from None
    if names is not None:
        for split in ("train", "dev"):
            of_split = [name for name in names if name.startswith(split)]
            found.append([name for name in of_split if name.endswith((".json", ".json.gz"))])
    if len(found) != 2 or any(len(names) != 1 for names in found):
        raise InputError(
            f"--data_dir={data_dir}: SQuAD needs a folder with one train*.json and one dev*.json "
            "(.gz or not), or these two files separated by a comma."
        )
    return tuple(os.path.join(given[0], names[0]) for names in found)


def read_squad(path: str, records: BadRecords | None = None, *, flag: str = DATA_DIR) -> Squad:
    """Reads a SQuAD v1.1 file, gzipped or not.

    Args:
        path: path of the file.
        records: for a training file, counts the answers. An answer that differs from the context at
            its position, or has no word, is damaged, and a question with damaged answers only is
            left out. None for a dev file, whose answers are compared as text and need no position.
        flag: the flag or argument that named the file, for error messages.

    Raises:
        InputError: the file cannot be read, a field is missing or of another type, or too many
            answers are damaged.
    """
    raw = _content(path, flag)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag}: {path} is not JSON in UTF-8 ({error}).") from None
    contexts, questions = [], []
    locations: dict[str, str] = {}
    with records.of_file() if records else contextlib.nullcontext():
        for paragraph, where in _paragraphs(_Reader(path, flag), content):
            entries = where.get(paragraph, "qas", list)
            context = where.get(paragraph, "context", str)
            if not context.strip():
                if not entries:  # there is nothing to ask
                    continue
                where.fail("context is empty")
            contexts.append(context)
            for index, entry in enumerate(entries):
                at = where.at(f"qas[{index}]")
                question = _question(entry, at, contexts[-1], len(contexts) - 1, records)
                if question.id in locations:
                    at.fail(f"id {question.id!r} is also at {locations[question.id]}")
                locations[question.id] = at.location
                if records is None or question.placed:
                    questions.append(question)
    if records:
        records.end()
    if not questions:
        raise InputError(f"{flag}: {path} has no question. Give a SQuAD v1.1 file.")
    return Squad(contexts, questions, hashlib.sha256(raw).hexdigest()[:16], path, flag)


def _content(path: str, flag: str) -> bytes:
    raw = read_bytes(path, flag=flag)
    try:
        return gzip.decompress(raw) if path.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{flag}: {path} cannot be read ({error}).") from None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Takes fields out of parsed JSON; its errors name the file and the location in it."""

    path: str
    flag: str
    location: str = ""

    def at(self, name: str) -> "_Reader":
        location = f"{self.location}.{name}" if self.location else name
        return dataclasses.replace(self, location=location)

    def fail(self, problem: str):
        raise InputError(f"{self.flag}: {self.path}, {self.location}: {problem}.")

    def get(self, holder, field: str, kind: type):
        names = {str: "a string", int: "a whole number", list: "a list"}
        value = holder.get(field) if isinstance(holder, dict) else None
        if type(value) is not kind:
            found = "is missing" if value is None else f"is {str(value)[:40]!r}"
            where = f"{self.location}.{field}" if self.location else field
            raise InputError(
                f"{self.flag}: {self.path}: {where} {found}, but must be {names[kind]}. "
                "SQuAD v1.1 has data[].paragraphs[].{context, qas[].{id, question, "
                "answers[].{answer_start, text}}}."
            )
        try:
            if kind is str:
                value.encode()
        except UnicodeEncodeError:
            self.fail(f"{field} holds half of a surrogate pair, which is not text")
        return value


def _paragraphs(reader: _Reader, content):
    for i, article in enumerate(reader.get(content, "data", list)):
        at = reader.at(f"data[{i}]")
        for j, paragraph in enumerate(at.get(article, "paragraphs", list)):
            yield paragraph, at.at(f"paragraphs[{j}]")


def _question(entry, where: _Reader, context: str, context_index: int, records) -> Question:
    text = where.get(entry, "question", str)
    answers = []
    for index, answer in enumerate(where.get(entry, "answers", list)):
        at = where.at(f"answers[{index}]")
        start = at.get(answer, "answer_start", int)
        given = at.get(answer, "text", str)
        if not given:
            at.fail("text is empty")
        found = context[start : start + len(given)] if start >= 0 else ""
        has_word = not all(letter.isspace() or is_dropped(letter) for letter in given)
        answers.append((start if found == given and has_word else None, given))
        if not records:
            continue
        shown = f"{at.path}, {at.location}: the answer {given[:SHOWN_CHARACTERS]!r}"
        if found != given:
            records.add_bad(
                f"{shown} differs from the context at answer_start={start} "
                f"({found[:SHOWN_CHARACTERS]!r})."
            )
        elif not has_word:
            records.add_bad(f"{shown} has no word.")
        else:
            records.add_good()
    if entry.get("is_impossible"):
        where.fail(f"is_impossible is true, as in SQuAD v2.0. {ANSWERABLE}")
    if not answers:
        where.fail(f"answers is empty. {ANSWERABLE}")
    return Question(where.get(entry, "id", str), text, context_index, tuple(answers))
