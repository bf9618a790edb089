"""SQuAD v1.1 files: read, checked field by field, each mistake with its file and place."""

import dataclasses
import gzip
import hashlib
import json
import os
import zlib

from inputs.errors import InputError

SHOWN = 60  # characters of an answer in a message


@dataclasses.dataclass(frozen=True)
class Question:
    """One question on a context, `answers` as (first character, text) of the context."""

    id: str
    text: str
    context: int
    answers: tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True)
class Squad:
    """Contexts, the questions on them in the order of the file, a hash of its text, its path."""

    contexts: list[str]
    questions: list[Question]
    fingerprint: str
    path: str = ""

    def evaluated_as(self) -> list[dict]:
        """The questions and their answers in the layout that the official metric reads."""
        answered = [
            {"id": question.id, "answers": [{"text": text} for _, text in question.answers]}
            for question in self.questions
        ]
        return [{"paragraphs": [{"qas": answered}]}]


def find_files(data_dir: str) -> tuple[str, str]:
    """The (training, dev) files that `--data_dir` names: two paths, or a folder that holds them.

    In a folder they are the ones called train*.json and dev*.json, gzipped or not.

    Raises:
        InputError: not one of each.
    """
    given = [path.strip() for path in data_dir.split(",") if path.strip()]
    if len(given) == 2:
        return given[0], given[1]
    found = []
    if len(given) == 1 and os.path.isdir(given[0]):
        names = sorted(os.listdir(given[0]))
        for start in ("train", "dev"):
            of_kind = [name for name in names if name.startswith(start)]
            found.append([name for name in of_kind if name.endswith((".json", ".json.gz"))])
    if len(found) != 2 or any(len(names) != 1 for names in found):
        raise InputError(
            f"--data_dir={data_dir}: SQuAD needs a folder with one train*.json and one dev*.json "
            "(.gz or not), or these two files separated by a comma."
        )
    return tuple(os.path.join(given[0], names[0]) for names in found)


def read_squad(path: str) -> Squad:
    """Reads a SQuAD v1.1 file, gzipped or not.

    Raises:
        InputError: the file cannot be read, a field is missing or of another type, or an answer
            is not what its context has at that place.
    """
    raw = _bytes_of(path)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--data_dir: {path} is no JSON in UTF-8 ({error}).") from None
    contexts, questions, places = [], [], {}
    for paragraph, where in _paragraphs(_Reader(path), content):
        contexts.append(_context(paragraph, where))
        for number, entry in enumerate(where.get(paragraph, "qas", list)):
            at = where.at(f"qas[{number}]")
            question = _question(entry, at, contexts[-1], len(contexts) - 1)
            if question.id in places:
                at.fail(f"id {question.id!r} stands at {places[question.id]} too")
            places[question.id] = at.place
            questions.append(question)
    if not questions:
        raise InputError(f"--data_dir: {path} holds no question. Give a SQuAD v1.1 file.")
    return Squad(contexts, questions, hashlib.sha256(raw).hexdigest()[:16], path)


def _bytes_of(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            raw = file.read()
        return gzip.decompress(raw) if path.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--data_dir: {path} cannot be read ({reason}).") from None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Takes fields out of parsed JSON, and says where it stands when one is not as it should be."""

    path: str
    place: str = ""

    def at(self, place: str) -> "_Reader":
        return _Reader(self.path, f"{self.place}.{place}" if self.place else place)

    def fail(self, what: str):
        raise InputError(f"--data_dir: {self.path}, {self.place}: {what}.")

    def get(self, holder, field: str, kind: type):
        names = {str: "a string", int: "a whole number", list: "a list"}
        value = holder.get(field) if isinstance(holder, dict) else None
        if type(value) is not kind:
            found = "is missing" if value is None else f"is {str(value)[:40]!r}"
            where = f"{self.place}.{field}" if self.place else field
            raise InputError(
                f"--data_dir: {self.path}: {where} {found}, and must be {names[kind]}. "
                "SQuAD v1.1 has data[].paragraphs[].{context, qas[].{id, question, "
                "answers[].{answer_start, text}}}."
            )
        try:
            if kind is str:
                value.encode()
        except UnicodeEncodeError:
            self.fail(f"{field} holds half of a surrogate pair, which is no text")
        return value


def _paragraphs(reader: _Reader, content):
    for number, article in enumerate(reader.get(content, "data", list)):
        at = reader.at(f"data[{number}]")
        for index, paragraph in enumerate(at.get(article, "paragraphs", list)):
            yield paragraph, at.at(f"paragraphs[{index}]")


def _context(paragraph, where: _Reader) -> str:
    context = where.get(paragraph, "context", str)
    if not context.strip():
        where.fail("context is empty")
    return context


def _question(entry, where: _Reader, context: str, number: int) -> Question:
    text = where.get(entry, "question", str)
    answers = []
    for index, answer in enumerate(where.get(entry, "answers", list)):
        at = where.at(f"answers[{index}]")
        start, words = at.get(answer, "answer_start", int), at.get(answer, "text", str)
        there = context[start : start + len(words)] if start >= 0 else ""
        if not words or there != words:
            at.fail(
                f"the answer {words[:SHOWN]!r} is not what the context has at "
                f"answer_start={start} ({there[:SHOWN]!r})"
            )
        answers.append((start, words))
    if not answers:
        where.fail("answers is empty, and SQuAD v1.1 has an answer to every question")
    return Question(where.get(entry, "id", str), text, number, tuple(answers))
