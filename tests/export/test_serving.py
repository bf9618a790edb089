"""Exports agree with their models on 100 strings, in a process that imports only the client."""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from export import bert as pretrained_export
from export import resnet as image_classifier
from export import saved_model
from export import squad as question_answerer
from inputs.squad.examples import Features
from inputs.squad.files import Question, Squad
from inputs.text.tokenization.vocabulary import CLS, MASK, SPECIAL_TOKENS
from inputs.text.tokenization.word_pieces import WordPieces
from models import bert, resnet
from models import squad as span_model
from recipes.squad import SQUAD_MINI
from tasks import squad_answers

ROOT = pathlib.Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789éßжя東京"
VOCABULARY = [*SPECIAL_TOKENS, *LETTERS, *(f"##{x}" for x in LETTERS), *".,?!'-", "the", "ада"]
LENGTH = 40  # of the question answerer's rows
POSITIONS = 48  # of the models
RANDOM = {"dropout": 0.1, "initializer_stddev": 0.2}
RECIPE = dataclasses.replace(SQUAD_MINI, sequence_length=LENGTH, max_query_length=9, doc_stride=13)

# Runs in a process that imports only export.client, TensorFlow and the tokenizers' ops.
CLIENT = """
import json, sys
from export import client
import tensorflow as tf
def text(value):
    return [text(x) for x in value] if isinstance(value, list) else value.decode()
requests = json.load(sys.stdin)
assert client.main([requests[0][0], "the [MASK] the"]) == 0
answers = []
loaded = {folder: tf.saved_model.load(folder) for folder in {request[0] for request in requests}}
for folder, name, batches in requests:
    signature = loaded[folder].signatures[name]
    for batch in batches:
        texts = {
            key: tf.constant([bytes.fromhex(text) for text in texts], tf.string, [len(texts)])
            for key, texts in batch.items()
        }
        answer = {key: value.numpy() for key, value in signature(**texts).items()}
        answer = {key: value.tolist() for key, value in answer.items()}
        for key in {"answer", "tokens"} & set(answer):
            answer[key] = text(answer[key])
        answers.append(answer)
forbidden = {"official", "orbit", "tensorflow_models", "tf_keras"}
forbidden |= {"tf_lamb", "inputs", "models", "training"}
assert not forbidden & set(sys.modules)
print(json.dumps(answers))
"""


def sentences():
    """100 byte strings: words, an empty one, long ones, other scripts, malformed UTF-8."""
    rng = random.Random(4)

    def words(count, letters):
        return " ".join("".join(rng.choices(letters, k=rng.randrange(1, 7))) for _ in range(count))

    plain = [words(rng.randrange(1, 60), LETTERS[:36]).encode() for _ in range(60)]
    other = [words(rng.randrange(1, 30), LETTERS + "한국ÉЖ́½ℵ🙂").encode() for _ in range(25)]
    broken = [
        text[:5] + rng.choice([b"\xff", b"\xe6\x9d", b"\xed\xa0\x80", b"\x00", b"\xc0\x80"]) + text
        for text in plain[:11]
    ]
    odd = [b"", b" \n\t", words(3000, LETTERS).encode(), b"x" * 5000]
    texts = plain + other + broken + odd
    rng.shuffle(texts)
    assert len(texts) == 100
    return texts


@pytest.fixture(scope="module")
def texts():
    return sentences()


@pytest.fixture(scope="module")
def models():
    """A pre-trainer and a span labeler; weights are large enough that all outputs differ."""
    tf_keras.utils.set_random_seed(5)
    size = bert.SIZES["tiny"]
    return bert.build_pretrainer(size, len(VOCABULARY), POSITIONS, **RANDOM), labeler()


def labeler():
    return span_model.build_span_labeler(
        bert.SIZES["tiny"], len(VOCABULARY), POSITIONS, types=2, **RANDOM
    )


def batches(size, **columns):
    """Splits columns of the same length into a list of dicts of at most `size` rows."""
    starts = range(0, len(next(iter(columns.values()))), size)
    return [{key: column[i : i + size] for key, column in columns.items()} for i in starts]


@pytest.fixture(scope="module")
def served(models, texts, tmp_path_factory):
    """The outputs of each signature for the 100 strings, in batches of 1 and of 32."""
    folders = [str(tmp_path_factory.mktemp("export") / name) for name in ("pretrained", "squad")]
    made = (
        pretrained_export.pretrained_export(models[0], VOCABULARY, POSITIONS, lower_case=True),
        question_answerer.answering_export(models[1], VOCABULARY, RECIPE, lower_case=True),
    )
    for folder, one in zip(folders, made, strict=True):
        saved_model.write_export(one, "# A card\n", folder)
    columns = {
        (folders[0], "serving_default"): {"text": masked(texts)},
        (folders[0], "encode"): {"text": texts},
        (folders[1], "serving_default"): {"question": texts[::-1], "context": texts},
    }
    requests = [
        (folder, name, batches(size, **{k: [t.hex() for t in v] for k, v in column.items()}))
        for (folder, name), column in columns.items()
        for size in (1, 32)
    ]
    requests.append((folders[1], "serving_default", [{"question": [], "context": []}]))
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    client = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert client.returncode == 0, client.stderr[-2000:]
    assert not client.stderr  # no start-up messages
    *shown, answers = client.stdout.splitlines()
    assert shown[0] == "  the [MASK] the" and shown[1].count(" %") == pretrained_export.TOP_K
    answers = iter(json.loads(answers))
    found = {}
    for kind, (_, _, asked) in zip(
        ["fill"] * 2 + ["encode"] * 2 + ["answer"] * 2, requests, strict=False
    ):
        parts = [next(answers) for _ in asked]
        joined = {key: [x for part in parts for x in part[key]] for key in parts[0]}
        found.setdefault(kind, []).append(joined)
    assert next(answers) == {"answer": [], "start": [], "end": [], "score": []}
    return found


def masked(texts):
    return [text[:20] + b" [MASK] " + text[20:] for text in texts]


def rows_of(texts, length):
    """Yields the model's inputs for each text: one row without padding."""
    tokenizer = WordPieces(VOCABULARY, lower_case=True)
    for text in texts:
        parts = [tokenizer.tokenize([part])[0].numpy().tolist() for part in text.split(b"[MASK]")]
        ids = [VOCABULARY.index(CLS), *parts[0]]
        for part in parts[1:]:
            ids += [VOCABULARY.index(MASK), *part]
        ids = [*ids[: length - 1], VOCABULARY.index("[SEP]")]
        yield {
            "input_word_ids": tf.constant([ids]),
            "input_mask": tf.ones([1, len(ids)], tf.int32),
            "input_type_ids": tf.zeros([1, len(ids)], tf.int32),
        }


@pytest.mark.slow
def test_masks_are_filled_like_the_model_fills_them(models, texts, served):
    filled = 0
    model = tf.function(models[0], reduce_retracing=True)
    for i, inputs in enumerate(rows_of(masked(texts), POSITIONS)):
        places = np.nonzero(inputs["input_word_ids"][0] == VOCABULARY.index(MASK))[0]
        for column in served["fill"]:
            assert column["masks"][i] == len(places)
        if not len(places):
            continue
        logits = model(inputs | {"masked_lm_positions": tf.constant([places], tf.int32)})
        best = tf.math.top_k(tf.nn.softmax(logits["mlm_logits"])[0, 0], pretrained_export.TOP_K)
        for column in served["fill"]:
            np.testing.assert_allclose(
                column["probabilities"][i][0], best.values, rtol=1e-4, atol=1e-6
            )
            assert column["tokens"][i][0] == np.take(VOCABULARY, best.indices).tolist()
        filled += 1
    assert filled > 70


@pytest.mark.slow
def test_sentences_are_encoded_like_the_model_encodes_them(models, texts, served):
    encoder = tf.function(bert.encoder_of(models[0]), reduce_retracing=True)
    for i, inputs in enumerate(rows_of(texts, POSITIONS)):
        expected = encoder(inputs)
        length = inputs["input_word_ids"].shape[1]
        for column in served["encode"]:
            assert sum(column["mask"][i]) == length
            np.testing.assert_allclose(
                column["pooled_output"][i], expected["pooled_output"][0], atol=1e-4
            )
            np.testing.assert_allclose(
                column["sequence_output"][i][:length],
                expected["sequence_output"][0],
                atol=1e-4,
            )


@pytest.mark.slow
def test_questions_are_answered_like_in_the_evaluation(models, texts, served, mirrored):
    """Compares with the code that evaluates a fine-tuned model, on two replicas."""
    contexts = [text.decode("utf-8", "replace") for text in texts]
    questions = [text.decode("utf-8", "replace") for text in texts[::-1]]
    whole = [i for i, context in enumerate(contexts) if context.strip(" \n\t\x00")]
    squad = Squad(
        contexts, [Question(str(i), questions[i], i, ((0, contexts[i][:1]),)) for i in whole], ""
    )
    features = Features(
        squad,
        VOCABULARY,
        lower_case=True,
        sequence_length=LENGTH,
        max_query_length=9,
        doc_stride=13,
        seed=1,
    )
    with mirrored.scope():
        model = labeler()
    model.set_weights(models[1].get_weights())
    spans = squad_answers.predict_spans(model, mirrored, features, RECIPE, 64)
    expected = squad_answers.n_best_answers(features, spans, RECIPE.n_best)
    assert len(features.question_of) > 500 and len(whole) == 98
    for column in served["answer"]:
        for i, context in enumerate(contexts):
            text, start, end, score = (
                column[key][i] for key in ("answer", "start", "end", "score")
            )
            assert context[start:end] == text
            if str(i) in expected:
                best = expected[str(i)][0]
                assert (context[start:end], score) == (
                    best["text"],
                    pytest.approx(best["score"], abs=1e-4),
                )
            else:
                assert (start, end, score) == (0, 0, tf.float32.min)


def test_an_empty_batch_gives_an_empty_answer(models):
    """From every signature of every export."""
    shapes = {
        "fill": {"tokens": [0, 0, 5], "probabilities": [0, 0, 5], "masks": [0]},
        "encode": {"pooled_output": [0, 128], "sequence_output": [0, 2, 128], "mask": [0, 2]},
        "answer": {"answer": [0], "start": [0], "end": [0], "score": [0]},
        "classify": {name: [0, 2] for name in ("names", "wnids", "probabilities")},
    }
    none = tf.constant([], tf.string)
    pretrained = pretrained_export.pretrained_export(
        models[0], VOCABULARY, POSITIONS, lower_case=True
    )
    answering = question_answerer.answering_export(models[1], VOCABULARY, RECIPE, lower_case=True)
    classifier = resnet.build_classifier(
        resnet.SIZES["cifar-resnet-10"], 32, 2, normalization="cifar10", batch_norm_momentum=0.9
    )
    classes = [("n1", "cat"), ("n2", "dog")]
    images = image_classifier.classifier_export(classifier, classes, 32, 1.0)
    outputs = {
        "fill": pretrained.signatures["serving_default"](none),
        "encode": pretrained.signatures["encode"](none),
        "answer": answering.signatures["serving_default"](none, none),
        "classify": images.signatures["pixels"](tf.zeros([0, 32, 32, 3])),
    }
    found = {
        name: {key: value.shape.as_list() for key, value in output.items()}
        for name, output in outputs.items()
    }
    assert found == shapes
    files = images.signatures["serving_default"](none)
    assert files.pop("error").shape == [0]
    assert {key: value.shape.as_list() for key, value in files.items()} == shapes["classify"]


def test_malformed_text_is_decoded_as_python_decodes_it(models, tmp_path):
    """Malformed bytes become U+FFFD, which is no part of any word."""
    module = pretrained_export.PretrainedBert(models[0], VOCABULARY, POSITIONS, lower_case=True)
    for text in (b"abc\xc3", b"\xff the", b"a\xe6\x9d [MASK]"):
        broken, decoded, without = (
            module._rows(tf.constant([data]))["input_word_ids"].numpy()
            for data in (text, text.decode(errors="replace"), text.decode(errors="ignore"))
        )
        np.testing.assert_array_equal(broken, decoded)
        np.testing.assert_array_equal(broken, without)


def test_questions_that_share_one_context(models):
    made = question_answerer.answering_export(models[1], VOCABULARY, RECIPE, lower_case=True)
    answer = made.signatures["serving_default"]
    questions = [f"the {letter}?" for letter in "abcdefgh"]
    context = "a b c. d e f g the h i j k " * 9  # several windows
    expected = [answer([question], [context]) for question in questions]
    assert len({(*one["start"].numpy(), *one["end"].numpy()) for one in expected}) > 1
    for contexts in ([context], [context] * len(questions)):
        found = answer(questions, contexts)
        for name, values in found.items():
            alone = np.concatenate([one[name].numpy() for one in expected])
            if name == "score":
                np.testing.assert_allclose(values, alone, atol=1e-4)
            else:
                np.testing.assert_array_equal(values, alone)
    for questions, contexts in ((["a"], ["b", "c"]), (["a", "b", "c"], ["d", "e"])):
        with pytest.raises(tf.errors.InvalidArgumentError, match="as many contexts as questions"):
            answer(questions, contexts)


@pytest.mark.slow
def test_a_failed_export_leaves_the_older_one_whole(models, tmp_path, monkeypatch):
    made = pretrained_export.pretrained_export(models[0], VOCABULARY, POSITIONS, lower_case=True)
    folder = tmp_path / "model"
    saved_model.write_export(made, "first", str(folder))

    def full(encoder, weights):
        raise OSError("the disk is full")

    monkeypatch.setattr(saved_model.tf_models_weights, "save_encoder", full)
    with pytest.raises(OSError):
        saved_model.write_export(made, "second", str(folder))
    assert (folder / saved_model.CARD).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    names = {path.name for path in (folder / saved_model.WEIGHTS).iterdir()}
    assert {"vocab.txt", "bert_config.json", "bert_model.ckpt-1.index", "checkpoint"} <= names
