"""SQuAD files, their mistakes, and the metric."""

import gzip
import json

import pytest

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.squad import examples
from inputs.squad import files as squad
from inputs.storage import files as storage
from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS
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
        "a": "THE Quick brown  fox!",  # equal once normalized: 1, 1
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
        (changed(*QUESTION, "answers", to=[]), "qas[1]: answers is empty. In SQuAD v1.1 every"),
        (
            changed(*QUESTION, "is_impossible", to=True),
            "is_impossible is true, as in SQuAD v2.0. In",
        ),
        (changed(*QUESTION, "answers", 0, "text", to=""), "answers[0]: text is empty"),
        (changed(*QUESTION, "answers", 0, "answer_start", to="1"), "must be a whole number"),
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


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (
            "answer_start",
            900,
            "the answer '1843' differs from the context at answer_start=900 ('')",
        ),
        ("answer_start", -5, "the answer '1843' differs from the context at answer_start=-5 ('')"),
        ("text", "1844", "the answer '1844' differs from the context at answer_start=16 ('1843')"),
    ],
)
def test_a_misplaced_answer(tmp_path, field, value, said):
    """It is damaged in a training file; in a dev file its text is enough."""
    content = changed(*QUESTION, "answers", 0, field, to=value)
    path = write(tmp_path / "x.json", content)
    told = []
    training = squad.read_squad(path, BadRecords(0.5, skip=True, log=told.append))
    assert [question.id for question in training.questions] == ["q1"]
    assert f"{path}, data[0].paragraphs[0].qas[1].answers[0]: {said}" in told[0]
    assert told[1] == "1 of 2 records were damaged and skipped"
    with pytest.raises(InputError, match="Including it, 1 of 2 records are damaged, more than"):
        squad.read_squad(path, BadRecords(0.1, skip=True, log=print))
    with pytest.raises(InputError, match="Repair it, or skip"):
        squad.read_squad(path, BadRecords(0.5, skip=False, log=print))
    dev = squad.read_squad(path)
    text = value if field == "text" else "1843"
    assert [question.answers for question in dev.questions] == [((0, "Ada"),), ((None, text),)]
    found = squad_answers.metrics(dev, {"q1": "Ada", "q2": text})
    assert found == {"exact_match": 100, "f1": 100}


@pytest.mark.parametrize("answer", [" ", "\u200b", " \x92\ufffd"])
def test_an_answer_without_a_word_has_no_place(tmp_path, answer):
    context = f"Ada wrote it{answer}in 1843."
    content = article(context, ("q1", "Who?", ["Ada"]), ("q2", "When?", [answer]))
    if answer == " ":
        content["data"][0]["paragraphs"][0]["qas"][1]["answers"][0]["answer_start"] = 12
    content["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = False
    path = write(tmp_path / "x.json", content)
    told = []
    training = squad.read_squad(path, BadRecords(0.5, skip=True, log=told.append))
    assert [question.id for question in training.questions] == ["q1"]
    assert told[0].endswith(f"answers[0]: the answer {answer!r} has no word.")
    assert [q.placed for q in squad.read_squad(path).questions] == [(0, "Ada"), None]


def test_a_paragraph_without_text_and_questions_is_skipped(tmp_path):
    content = json.loads(json.dumps(GOOD))
    content["data"][0]["paragraphs"].insert(0, {"context": " ", "qas": []})
    assert squad.read_squad(write(tmp_path / "x.json", content)).contexts == [
        "Ada wrote it in 1843."
    ]


def test_misplaced_answers_beside_right_ones(tmp_path):
    """A training question keeps its other answers; a dev question without one has no loss."""
    content = json.loads(json.dumps(GOOD))
    first, second = content["data"][0]["paragraphs"][0]["qas"]
    first["answers"].insert(0, {"answer_start": 3, "text": "Ada wrote"})
    second["answers"] = [{"answer_start": 0, "text": "1843"}, {"answer_start": 0, "text": "in"}]
    path = write(tmp_path / "x.json", content)
    with pytest.raises(InputError, match="Including it, 3 of 4 records of the file are damaged"):
        squad.read_squad(path, BadRecords(0.1, skip=True, log=print))
    training = squad.read_squad(path, BadRecords(0.75, skip=True, log=print))
    assert [question.placed for question in training.questions] == [(0, "Ada")]
    words = ["who", "when", "?", "ada", "wrote", "it", "in", "1843", "."]
    features = examples.Features(
        squad.read_squad(path),
        [*SPECIAL_TOKENS, *words],
        lower_case=True,
        sequence_length=16,
        max_query_length=4,
        doc_stride=9,
        seed=1,
    )
    (batch,) = features.evaluation_batches(2, 10)
    assert batch["example_weights"].numpy().tolist() == [1, 0]
    assert batch["start_positions"].numpy()[0] == batch["end_positions"].numpy()[0] == 4
    (asked,) = features.prediction_batches(2)
    assert asked["feature"].numpy().tolist() == [0, 1]


def test_utf_16_is_json_too(tmp_path):
    """JSON says which encodings it may have, and `json` recognizes them."""
    for encoding in ("utf-8-sig", "utf-16", "utf-32-le"):
        (tmp_path / "x.json").write_bytes(json.dumps(GOOD).encode(encoding))
        assert squad.read_squad(str(tmp_path / "x.json")).contexts == ["Ada wrote it in 1843."]


def test_files_on_object_storage():
    folder = "ram://squad/data"
    storage.make_folder(folder)
    for name in ("train-v1.1.json.gz", "dev-v1.1.json"):
        content = json.dumps(GOOD).encode()
        with storage.atomic_write(f"{folder}/{name}", "wb") as file:
            file.write(gzip.compress(content) if name.endswith(".gz") else content)
    training, dev = squad.find_files(folder)
    assert squad.read_squad(training).contexts == squad.read_squad(dev).contexts
    with pytest.raises(InputError, match=r"^--data_dir: foo://a cannot be read \(this Tensor"):
        squad.find_files("foo://a")


def test_files_are_found_or_named(tmp_path):
    (tmp_path / "train-v1.1.json.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(InputError, match="one train.*json and one dev"):
        squad.find_files(str(tmp_path))
    write(tmp_path / "dev-v1.1.json", GOOD)
    training, dev = squad.find_files(str(tmp_path))
    for given in (f"{training},{dev}", f"{dev},{training}", f"x/{dev}, {training}"):
        assert squad.find_files(given)[0] == training
    assert squad.find_files("dev.json,a.json") == ("dev.json", "a.json")
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
