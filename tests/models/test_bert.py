"""The BERT pre-training model: parameter counts, losses, and its SavedModel."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from export.bert import TOP_K, pretrained_export
from export.saved_model import write_export
from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS
from models import bert

WORDS = ["the", "cat", "sat", "on", "mat", ".", "##s", "dog", "caf", "##e", "cafe"]
VOCABULARY = [*SPECIAL_TOKENS, *WORDS]
LENGTH = 16

# Runs in a process that imports only TensorFlow and TensorFlow Text.
CLIENT = """
import json, sys
import tensorflow as tf, tensorflow_text
fill = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
answers = []
for texts in json.load(sys.stdin):
    texts = tf.constant([bytes.fromhex(text) for text in texts], tf.string, shape=[len(texts)])
    answer = {key: value.numpy() for key, value in fill(text=texts).items()}
    answer["tokens"] = answer["tokens"].astype(str)
    answers.append({key: value.tolist() for key, value in answer.items()})
forbidden = {"official", "orbit", "tf_lamb", "tensorflow_models", "tf_keras"} & set(sys.modules)
assert not forbidden, forbidden
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def model():
    tf.keras.utils.set_random_seed(1)
    return bert.build_pretrainer(
        bert.SIZES["tiny"], len(VOCABULARY), LENGTH, dropout=0.1, initializer_stddev=0.02
    )


@pytest.fixture(scope="module")
def answer(model, tmp_path_factory):
    """A function that runs the SavedModel on batches of byte strings in a separate process."""
    folder = str(tmp_path_factory.mktemp("export") / "model")
    for _ in range(2):  # the second export replaces the first
        write_export(
            pretrained_export(model, VOCABULARY, LENGTH, lower_case=True), "a card", folder
        )

    def ask(*batches):
        payload = json.dumps([[text.hex() for text in batch] for batch in batches])
        client = subprocess.run(
            [sys.executable, "-c", CLIENT, folder], input=payload, capture_output=True, text=True
        )
        assert client.returncode == 0, client.stderr[-2000:]
        return json.loads(client.stdout)

    return ask


def test_cross_entropy_matches_tensorflow():
    rng = np.random.default_rng(1)
    logits = tf.constant(rng.normal(0, 3, [2, 5, 50]), tf.bfloat16)
    labels = tf.constant(rng.integers(0, 50, [2, 5]), tf.int32)
    logits += tf.cast(tf.one_hot(labels, 50) * 6, tf.bfloat16)  # most predictions are right
    weights = tf.constant([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], tf.float32)
    tied = tf.constant([[2.0, 7.0, 7.0], [7.0, 2.0, 7.0]], tf.bfloat16)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        loss, hits = bert.cross_entropy(logits, labels, weights)
        usual = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, tf.cast(logits, tf.float32))
        usual_loss = tf.reduce_sum(usual * weights)
    right = tf.cast(tf.argmax(logits, -1, output_type=tf.int32) == labels, tf.float32)
    assert 0 < float(hits) < 7 and float(hits) == float(tf.reduce_sum(right * weights))
    np.testing.assert_allclose(loss, usual_loss, rtol=1e-6)
    slopes = (tf.cast(tape.gradient(x, logits), tf.float32) for x in (loss, usual_loss))
    np.testing.assert_allclose(*slopes, atol=1e-3)  # bfloat16
    assert float(bert.cross_entropy(tied, tf.constant([1, 1]), tf.ones([2]))[1]) == 0.5


@pytest.mark.slow
def test_bert_base_has_the_published_parameter_count():
    """BERT-base's encoder with the published vocabulary: 109,482,240 (arXiv:1810.04805: 110M)."""
    model = bert.build_pretrainer(
        bert.SIZES["base"], 30_522, 512, dropout=0.1, initializer_stddev=0.02
    )
    heads = ("masked_lm", "next_sentence")
    inside = [v for v in model.variables if not any(head in v.name for head in heads)]
    assert sum(int(np.prod(v.shape)) for v in inside) == 109_482_240


def test_the_parameter_count_matches_the_size(model):
    width, layers = 128, 2
    encoder = (len(VOCABULARY) + LENGTH + 2) * width + 2 * width
    encoder += layers * (12 * width**2 + 13 * width) + width**2 + width
    heads = width**2 + 3 * width + len(VOCABULARY) + 2 * width + 2
    assert model.count_params() == encoder + heads
    assert all(variable.trainable for variable in model.variables)


def test_sums_match_values_computed_from_the_logits(model):
    rng = np.random.default_rng(0)
    batch = {
        "input_word_ids": rng.integers(5, len(VOCABULARY), (3, LENGTH)),
        "input_mask": np.ones((3, LENGTH)),
        "input_type_ids": np.zeros((3, LENGTH)),
        "masked_lm_positions": rng.integers(0, LENGTH, (3, 4)),
        "masked_lm_ids": rng.integers(5, len(VOCABULARY), (3, 4)),
        "next_sentence_labels": np.array([0, 1, 1]),
    }
    batch = {key: tf.constant(value, tf.int32) for key, value in batch.items()}
    batch["masked_lm_weights"] = tf.constant([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], tf.float32)
    batch["next_sentence_weights"] = tf.constant([1, 1, 0], tf.float32)
    sums, counts = bert.pretraining_sums(model, batch, False), bert.pretraining_counts(batch)
    logits = model({key: batch[key] for key in model.input}, training=False)
    for name, output, labels, weights in (
        ("masked", "mlm_logits", "masked_lm_ids", "masked_lm_weights"),
        ("sentence", "next_sentence", "next_sentence_labels", "next_sentence_weights"),
    ):
        scores, labels = logits[output].numpy().astype(np.float64), batch[labels].numpy()
        weights = batch[weights].numpy()
        shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        likelihood = np.take_along_axis(shares, labels[..., None], -1)[..., 0]
        np.testing.assert_allclose(
            sums[f"{name}_loss"], -(np.log(likelihood) * weights).sum(), rtol=1e-5
        )
        assert sums[f"{name}_accuracy"] == ((scores.argmax(-1) == labels) * weights).sum()
        assert counts[name] == weights.sum()


@pytest.mark.slow
def test_the_export_predicts_the_same_as_the_model(model, answer):
    text, ids = "the [MASK] sat on the [MASK] .", [5, 4, 7, 8, 5, 4, 10]
    (got,) = answer([text.encode()])
    row = [2, *ids, 3]
    inputs = {
        "input_word_ids": tf.constant([row]),
        "input_mask": tf.ones([1, len(row)], tf.int32),
        "input_type_ids": tf.zeros([1, len(row)], tf.int32),
        "masked_lm_positions": tf.constant([[2, 6]]),
    }
    best = tf.math.top_k(tf.nn.softmax(model(inputs, training=False)["mlm_logits"]), TOP_K)
    np.testing.assert_allclose(got["probabilities"], best.values, rtol=1e-4)
    assert got["tokens"] == np.take(VOCABULARY, best.indices).tolist()
    assert got["masks"] == [2]


@pytest.mark.slow
def test_the_export_accepts_any_strings(answer):
    together, alone, odd, none = answer(
        [b"the [MASK]", b"[MASK][MASK]", b"no mask", b""],
        [b"the [MASK]"],
        [b"\xff\xfe [MASK]", "café 東京 [MASK]".encode(), b"cat " * 99 + b"[MASK]"],
        [],
    )
    assert together["masks"] == [1, 2, 0, 0]
    assert np.shape(together["tokens"]) == (4, 2, TOP_K)
    assert together["tokens"][0][1] == [""] * TOP_K  # this text has only one mask
    np.testing.assert_allclose(  # independent of the batch and its padding
        together["probabilities"][0][0], alone["probabilities"][0][0], rtol=1e-4
    )
    assert odd["masks"] == [1, 1, 0]  # the last text's mask is beyond the position table
    assert none["masks"] == []
