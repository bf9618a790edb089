"""SQuAD: offsets of word pieces, windows, batches."""

import gzip
import json
import pathlib
import random

import numpy as np
import pytest
import tensorflow as tf

from inputs.batching import synthetic_batches
from inputs.squad import examples, windows
from inputs.squad import files as squad
from inputs.squad.offsets import OffsetTokenizer, sanitized
from inputs.text.tokenization import vocabulary
from inputs.text.tokenization.word_pieces import WordPieces
from tasks import squad_answers

SHARED = pathlib.Path(__file__).parents[4] / "shared/data"
LENGTH, QUERY, STRIDE = 64, 16, 24


@pytest.fixture(scope="module")
def pieces():
    if not SHARED.exists():
        pytest.skip("../shared/data is not there")
    return vocabulary.load_vocabulary(str(SHARED / "bert/vocab.txt"))


@pytest.fixture(scope="module")
def real(pieces, tmp_path_factory):
    """Three training articles and their features."""
    with gzip.open(SHARED / "squad/train-v1.1.json.gz") as file:
        content = json.load(file)
    content["data"] = [content["data"][i] for i in (0, 1, 16)]  # the last one has many accents
    path = tmp_path_factory.mktemp("squad") / "train.json"
    path.write_text(json.dumps(content))
    return examples.Features(
        squad.read_squad(str(path)),
        pieces,
        lower_case=True,
        sequence_length=LENGTH,
        max_query_length=QUERY,
        doc_stride=STRIDE,
        seed=3,
    )


def test_pieces_have_the_offsets_of_their_characters(pieces):
    """Also with accents, compatibility forms, Hangul, invisible and multi-byte characters."""
    expected = {
        "Beyoncé's café—NAÏVE": ["Beyoncé", "'", "s", "café", "—", "NAÏVE"],
        "e\u0301t e\u0301": ["e\u0301t", "e\u0301"],
        "x각y": ["x", "각", "각", "각", "y"],
        "½ Å ﬁ": ["½", "½", "½", "Å", "ﬁ"],
        "東京tokyo": ["東", "京", "tokyo"],
        "a\tb\x00c": ["a", "b\x00c"],
        " \u3000": [],
        "": [],
        "x" * 102 + " y": [*["xx"] * 51, "y"],
        "x" * 801 + " y": ["x" * 801, "y"],  # [UNK]
        "ca\x92t ca\ufffdt": ["ca\x92t", "ca\ufffdt"],
    }
    texts = list(expected)
    ids, starts, ends = OffsetTokenizer(pieces, lower_case=True).tokenize(tf.constant(texts))
    assert ids.to_list() == WordPieces(pieces, lower_case=True).tokenize(texts).to_list()
    found = [
        [text.encode()[a:b].decode() for a, b in zip(first, last, strict=True)]
        for text, first, last in zip(texts, starts.to_list(), ends.to_list(), strict=True)
    ]
    assert found == list(expected.values())


def test_malformed_text_becomes_the_replacement_character():
    broken = [b"\xff\xfe a", b"a\xe6\x9db", b"\xed\xa0\x80", b"\xf0\x9f\x98 ok", b"\x00 ok"]
    found = [text.decode() for text in sanitized(broken).numpy()]
    assert found == [text.decode("utf-8", "replace") for text in broken]


def test_every_answer_is_found_or_is_part_of_a_piece(real):
    """Pieces decode to the annotated answer, unless it begins or ends inside a piece."""
    differing = []
    for number, question in enumerate(real.squad.questions):
        first, last = real.first_pieces[number], real.last_pieces[number]
        found, wanted = real.text_of(number, first, last), question.answers[0][1]
        if found != wanted:
            assert wanted in found, (found, wanted)
            assert len(real.text_of(number, first, first)) > 1 or last > first
            inner = [real.text_of(number, i, i) for i in (first, last)]
            assert not (wanted.startswith(inner[0]) and wanted.endswith(inner[1]))
            differing.append((wanted, found))
    assert len(real.squad.questions) > 1_000
    assert len(differing) <= 0.005 * len(real.squad.questions), differing


def test_windows_equal_those_of_run_squad():
    """Compared with the loops of google-research/bert: spans, and the one with most context."""
    rng = random.Random(0)
    sizes = [(rng.randrange(0, 25), rng.choice([0, 1, 5, 44, 45, 46, 99, 300])) for _ in range(60)]
    for stride in (1, 7, STRIDE, 200):
        cut = windows.cut_windows(
            *(tf.constant(column) for column in zip(*sizes, strict=True)),
            sequence_length=LENGTH,
            max_query_length=QUERY,
            doc_stride=stride,
        )
        may_begin, may_end = (x.numpy() for x in windows.may_answer(cut, LENGTH))
        example, starts, lengths = (x.numpy() for x in (cut.example, cut.start, cut.length))
        row = 0
        for number, (question, total) in enumerate(sizes):
            question = min(question, QUERY)
            room, spans, start = LENGTH - question - 3, [], 0
            while True:
                length = min(room, total - start)
                spans.append((start, length))
                if start + length == total:
                    break
                start += min(length, stride)
            best = [best_span(spans, position) for position in range(total)]
            for index, (start, length) in enumerate(spans):
                assert (example[row], starts[row], lengths[row]) == (number, start, length)
                begins = [i for i in range(length) if best[start + i] == index]
                assert (np.nonzero(may_begin[row])[0] - question - 2).tolist() == begins
                assert (np.nonzero(may_end[row])[0] - question - 2).tolist() == list(range(length))
                row += 1
        assert row == len(example)


def best_span(spans, position):
    scores = [
        min(position - start, start + length - 1 - position) + 0.01 * length
        if start <= position < start + length
        else -1
        for start, length in spans
    ]
    return scores.index(max(scores))


def in_order(real, batches):
    """The batches of all windows as one; with a batch of 1, in the order of the file."""
    rows = list(batches.unbatch().batch(real.num_examples).as_numpy_iterator())
    return rows[0]


@pytest.mark.slow
def test_rows_show_question_context_and_answer(real, pieces):
    batch = in_order(real, real.evaluation_batches(1, 10**9))
    offsets = in_order(real, real.prediction_batches(1))["offset"]
    tokenizer = WordPieces(pieces, lower_case=True)
    questions = tokenizer.tokenize([q.text for q in real.squad.questions]).to_list()
    contexts = tokenizer.tokenize(real.squad.contexts).to_list()
    cls, sep, pad = (pieces.index(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    seen = {}
    for row in range(0, real.num_examples, 7):
        number = real.question_of[row]
        question = questions[number][:QUERY]
        length = batch["input_mask"][row].sum()
        ids = batch["input_word_ids"][row].tolist()
        shown = ids[len(question) + 2 : length - 1]
        assert ids[: len(question) + 2] == [cls, *question, sep]
        assert ids[length - 1 :] == [sep] + [pad] * (LENGTH - length)
        types = [0] * (len(question) + 2) + [1] * (len(shown) + 1) + [0] * (LENGTH - length)
        assert batch["input_type_ids"][row].tolist() == types
        whole = contexts[real.squad.questions[number].context]
        start, end = batch["start_positions"][row], batch["end_positions"][row]
        answer = whole[real.first_pieces[number] : real.last_pieces[number] + 1]
        from_context = len(question) + 2 - offsets[row]  # where the window begins
        assert shown == whole[from_context : from_context + len(shown)]
        first, last = real.first_pieces[number], real.last_pieces[number]
        if from_context <= first and last < from_context + len(shown):
            assert ids[start : end + 1] == answer and start > len(question) + 1
            seen[number] = True
        else:
            assert (start, end) == (0, 0)
    assert len(seen) > 100
    every = real.question_of[np.nonzero(batch["start_positions"])[0]]
    short = real.last_pieces - real.first_pieces < STRIDE
    assert set(np.nonzero(short)[0]) <= set(every)  # each is in some window


def test_order_is_a_function_of_seed_and_step(real):
    def rows(first_step, steps, context=None, size=8):
        batches = real.training_batches(8, context, first_step).take(steps)
        return np.concatenate([batch["input_word_ids"].numpy() for batch in batches])

    whole = rows(0, 40)
    np.testing.assert_array_equal(whole[80:], rows(10, 30))
    halves = [
        rows(0, 40, tf.distribute.InputContext(2, pipeline, 2)).reshape(40, 4, LENGTH)
        for pipeline in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(halves, 1).reshape(-1, LENGTH), whole)


@pytest.mark.slow
def test_an_epoch_has_every_window_once_and_dev_ends_with_weight_0(real):
    count = real.num_examples
    found = np.concatenate([batch["feature"].numpy() for batch in real.prediction_batches(64)])
    assert len(found) % 64 == 0 and count % 64
    assert sorted(found) == [-1] * (len(found) - count) + list(range(count))
    weights = [batch["example_weights"].numpy() for batch in real.evaluation_batches(64, 100)]
    assert [w.sum() for w in weights] == [64, 36]
    steps = -(-count // 64)
    epoch = [batch["input_word_ids"].numpy() for batch in real.training_batches(64).take(steps)]
    rows = {row.tobytes() for row in np.concatenate(epoch)[:count]}
    everything = in_order(real, real.evaluation_batches(1, 10**9))
    assert rows == {row.tobytes() for row in everything["input_word_ids"]}


def test_batches_have_the_element_spec(real):
    spec = examples.element_spec(8, LENGTH)
    (batch,) = real.training_batches(8).take(1)
    (made_up,) = synthetic_batches(spec, {}, 1).take(1)
    for key, expected in spec.items():
        assert expected.is_compatible_with(batch[key]), key
    assert made_up.keys() == batch.keys()


def test_gold_answers_score_100(real):
    for pick in (0, -1):
        gold = {q.id: q.answers[pick][1] for q in real.squad.questions}
        assert squad_answers.metrics(real.squad, gold) == {"exact_match": 100, "f1": 100}
