"""Rematerialization: the layers run twice, with the same gradients and dropout masks."""

import numpy as np
import pytest
import tensorflow as tf

from models import bert
from tasks.task import Metric, loss_metric
from training.step import ReplicaStep

PARTS = {"vocabulary_size": 50, "max_sequence_length": 8}


class Pretraining:
    """The parts of a task that `ReplicaStep` uses."""

    metrics = (
        loss_metric("masked_loss", "masked"),
        Metric("masked_accuracy", "masked", higher_is_better=True),
        loss_metric("sentence_loss", "sentence"),
        Metric("sentence_accuracy", "sentence", higher_is_better=True),
    )
    parts = staticmethod(lambda batch: [batch])
    sums = staticmethod(bert.pretraining_sums)
    counts = staticmethod(bert.pretraining_counts)


def make_batch():
    """A batch of four sequences of 8 tokens."""
    random = np.random.default_rng(0)

    def integers(*shape, high=50):
        return tf.constant(random.integers(0, high, shape), tf.int32)

    return {
        "input_word_ids": integers(4, 8),
        "input_mask": tf.constant([[1] * 8, [1] * 6 + [0] * 2] * 2, tf.int32),
        "input_type_ids": integers(4, 8, high=2),
        "masked_lm_positions": integers(4, 2, high=6),
        "masked_lm_ids": integers(4, 2),
        "masked_lm_weights": tf.ones([4, 2]),
        "next_sentence_labels": integers(4, high=2),
        "next_sentence_weights": tf.ones([4]),
    }


def make_step(remat, **arguments):
    """A BERT of two layers with dropout, and its training step."""
    model = bert.build_pretrainer(
        bert.Size(2, 16, 2), 50, 8, dropout=0.3, initializer_stddev=0.3, remat=remat
    )
    step = ReplicaStep(Pretraining, model, None, seed=3, **arguments)
    return model, step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("jit_compile", "accumulation"),
    [(False, 1), (True, 2)],
    ids=["graph", "XLA, two micro-batches"],
)
def test_gradients_and_dropout_are_those_without_it(jit_compile, accumulation):
    batch = make_batch()
    counts = bert.pretraining_counts(batch)
    seed = tf.constant([5, 6])
    arguments = {"jit_compile": jit_compile, "accumulation": accumulation}
    (model, step), (remat_model, remat_step) = (make_step(r, **arguments) for r in ("off", "layer"))
    remat_model.set_weights(model.get_weights())
    compute, recompute = (
        tf.function(step._gradients, autograph=False) for step in (step, remat_step)
    )
    sums, gradients = compute(batch, counts, seed)
    remat_sums, remat_gradients = recompute(batch, counts, seed)
    again = recompute(batch, counts, tf.constant([7, 8]))
    for name, value in sums.items():
        np.testing.assert_allclose(remat_sums[name], value, rtol=1e-5)
    for ours, first in zip(remat_gradients, gradients, strict=True):
        np.testing.assert_allclose(ours, first, rtol=1e-3, atol=1e-5 * float(tf.norm(first)) + 1e-7)
    # Another seed gives other masks.
    assert abs(float(again[0]["masked_loss"] - sums["masked_loss"])) > 1e-3


@pytest.mark.slow
def test_the_products_of_each_layer_are_in_the_program_twice():
    batch = make_batch()
    counts = bert.pretraining_counts(batch)
    products = {}
    for remat in ("off", "layer"):
        step = make_step(remat, jit_compile=False)[1]
        run = tf.function(step.sums_and_gradients, jit_compile=True, autograph=False)
        lower = run.experimental_get_compiler_ir(batch, counts, tf.constant([5, 6]))
        products[remat] = lower(stage="hlo").count(" dot(")
    # Query, key, value, scores, context, output, and the two of the feed-forward network.
    assert products["layer"] == products["off"] + 2 * 8
