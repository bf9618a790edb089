"""SQuAD files, their mistakes, and the metric."""

import json

import pytest

from inputs.errors import InputError
from inputs.squad import examples
from inputs.squad import files as squad
from inputs.text.vocabulary import SPECIAL_TOKENS
from tasks import squad_answers


def article(context, *questions):
    """One paragraph in SQuAD's format. Questions are (id, text, answers), answers are strings."""
    qas = [
        {
            "id": key,
            "question": text,
            "answers": [{"answer_start": context.index(a), "text": a} for a in answers],
        }
        for key, text, answers in questions
    ]
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_the_metric_by_hand(tmp_path):
    context = "The quick, brown fox of André's ran 24-10 over a lazy dog in 1066."
    questions = [
        ("a", "?", ["quick, brown fox"]),
        ("b", "?", ["quick, brown fox", "fox"]),
        ("c", "?", ["a lazy dog"]),
        ("d", "?", ["André's"]),
        ("e", "?", ["24-10"]),
        ("f", "?", ["1066"]),
        ("g", "?", ["The quick"]),
        ("h", "?", ["1066"]),
    ]
    read = squad.read_squad(write(tmp_path / "dev.json", article(context, *questions)))
    answered = {
        "a": "THE Quick brown  fox!",  # equal once normalised: 1, 1
        "b": "the fox ran",  # with "fox": 1 of 2 and 1 of 1 words, F1 2/3; with the other one 2/5
        "c": "lazy lazy dog",  # 2 of 3 and 2 of 2: 4/5
        "d": "andrés",  # 1, 1
        "e": "24 10",  # "2410" is another word: 0, 0
        "f": "",  # 0, 0
        "g": "quick brown",  # 1 of 2 and 1 of 1: 2/3
    }  # and none for h: 0, 0
    found = squad_answers.metrics(read, answered)
    assert found["exact_match"] == pytest.approx(100 * 2 / 8)
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3 + 4 / 5 + 1 + 2 / 3) / 8)


GOOD = article("Ada wrote it in 1843.", ("q1", "Who?", ["Ada"]), ("q2", "When?", ["1843"]))


def changed(*path, to):
    """GOOD with one value changed, or removed if `to` is None."""
    content = json.loads(json.dumps(GOOD))
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = to
    if to is None:
        del holder[path[-1]]
    return content


PARAGRAPH = ("data", 0, "paragraphs", 0)
QUESTION = (*PARAGRAPH, "qas", 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (changed("data", to=None), "data is missing"),
        ([1, 2], "data is missing"),
        (changed("data", to=[]), "has no question"),
        (changed("data", 0, "paragraphs", to=None), "data[0].paragraphs is missing"),
        (changed(*PARAGRAPH, "context", to=None), "data[0].paragraphs[0].context is missing"),
        (changed(*PARAGRAPH, "context", to=" "), "data[0].paragraphs[0]: context is empty"),
        (changed(*PARAGRAPH, "context", to="\ud800"), "context holds half of a surrogate pair"),
        (changed(*PARAGRAPH, "qas", to={}), "paragraphs[0].qas is '{}', but must be a list"),
        (changed(*QUESTION, "question", to=7), "qas[1].question is '7', but must be a string"),
        (changed(*QUESTION, "id", to="q1"), "qas[1]: id 'q1' is also at data[0].paragraphs[0]."),
        (changed(*QUESTION, "answers", to=[]), "qas[1]: answers is empty"),
        (
            changed(*QUESTION, "answers", 0, "answer_start", to=900),
            "answers[0]: the answer '1843' differs from the context at answer_start=900 ('')",
        ),
        (changed(*QUESTION, "answers", 0, "answer_start", to=-5), "answer_start=-5 ('')"),
        (changed(*QUESTION, "answers", 0, "answer_start", to="1"), "must be a whole number"),
        (
            changed(*QUESTION, "answers", 0, "text", to="1844"),
            "the answer '1844' differs from",
        ),
        ("{", "is not JSON in UTF-8"),
    ],
)
def test_errors_name_the_file_and_field(tmp_path, content, said):
    path = tmp_path / "dev.json"
    path.write_text(content if content == "{" else json.dumps(content))
    with pytest.raises(InputError) as error:
        squad.read_squad(str(path))
    message = str(error.value)
    assert said in message and str(path) in message and "\n" not in message


def test_files_are_found_or_named(tmp_path):
    (tmp_path / "train-v1.1.json.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(InputError, match="one train.*json and one dev"):
        squad.find_files(str(tmp_path))
    write(tmp_path / "dev-v1.1.json", GOOD)
    training, dev = squad.find_files(str(tmp_path))
    assert squad.find_files(f"{training},{dev}") == (training, dev)
    with pytest.raises(InputError, match="train-v1.1.json.gz cannot be read"):
        squad.read_squad(training)
    with pytest.raises(InputError, match="nowhere.json cannot be read"):
        squad.read_squad("nowhere.json")
    invisible = article("\u200b\u0301", ("q", "?", ["\u0301"]))
    with pytest.raises(InputError, match="the context of question 'q' has no word"):
        examples.Features(
            squad.read_squad(write(tmp_path / "x.json", invisible)),
            [*SPECIAL_TOKENS, "a"],
            lower_case=True,
            sequence_length=32,
            max_query_length=8,
            doc_stride=9,
            seed=1,
        )
