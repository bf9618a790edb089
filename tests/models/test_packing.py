"""Packed rows and length buckets give the losses and gradients of the sequences alone."""

import numpy as np
import pytest
import tensorflow as tf

from inputs.text import packing
from models import bert
from models import packing as packed_bert

LENGTH, PREDICTIONS, WORDS = 24, 3, 40
LENGTHS = (5, 24, 9, 7, 12, 6, 17, 8)


@pytest.fixture(scope="module")
def model():
    made = bert.build_pretrainer(
        bert.SIZES["tiny"], WORDS, LENGTH, dropout=0.1, initializer_stddev=0.05
    )
    rng = np.random.default_rng(0)
    for variable in made.trainable_variables:  # biases, too, so that each matters
        variable.assign_add(0.05 * rng.normal(size=variable.shape))
    return made


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    count = len(LENGTHS)
    arrays = {
        "input_word_ids": rng.integers(1, WORDS, [count, LENGTH]),
        "input_mask": np.arange(LENGTH) < np.array(LENGTHS)[:, None],
        "input_type_ids": rng.integers(0, 2, [count, LENGTH]),
        "masked_lm_positions": np.stack([rng.choice(n, PREDICTIONS) for n in LENGTHS]),
        "masked_lm_ids": rng.integers(1, WORDS, [count, PREDICTIONS]),
        "next_sentence_labels": rng.integers(0, 2, [count]),
    }
    arrays = {key: value.astype(np.int32) for key, value in arrays.items()}
    for key in ("input_word_ids", "input_type_ids"):
        arrays[key] *= arrays["input_mask"]
    weights = (rng.random([count, PREDICTIONS]) < 0.8).astype(np.float32)
    ones = np.ones([count], np.float32)
    return arrays | {
        "masked_lm_weights": weights,
        "next_sentence_weights": ones,
        "example_weights": ones,
    }


def tensors(batch):
    return {key: tf.constant(value) for key, value in batch.items()}


def losses_and_gradients(sums, model, batch):
    batch = tensors(batch)
    counts = bert.pretraining_counts(batch)
    with tf.GradientTape() as tape:
        values = sums(model, batch, False)
        loss = (
            values["masked_loss"] / counts["masked"] + values["sentence_loss"] / counts["sentence"]
        )
    gradients = tape.gradient(loss, model.trainable_variables)
    return values, [tf.convert_to_tensor(g).numpy() for g in gradients]


def test_packed_rows_give_the_same_losses_and_gradients(model, batch):
    packed = packing.pack(batch, per_row=3)
    assert packed["input_word_ids"].shape[0] < len(LENGTHS) / 1.5
    alone, gradients = losses_and_gradients(bert.pretraining_sums, model, batch)
    together, packed_gradients = losses_and_gradients(packed_bert.pretraining_sums, model, packed)
    for name, value in alone.items():
        assert float(together[name]) == pytest.approx(float(value), rel=2e-6), name
    largest = max(np.abs(gradient).max() for gradient in gradients)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        # The gradient of a key's bias is zero but for rounding.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * largest)
    for key in ("masked", "sentence"):
        assert float(bert.pretraining_counts(packed)[key]) == pytest.approx(
            float(bert.pretraining_counts(batch)[key])
        )


def test_a_neighbour_in_the_row_changes_nothing(model, batch):
    packed = {key: value.copy() for key, value in packing.pack(batch, per_row=3).items()}
    encoder = bert.encoder_of(model)
    before, pooled = (x.numpy() for x in packed_bert.encode_packed(encoder, tensors(packed), False))
    row = int(np.argmax(packed["sequence_ids"].max(axis=1) > 1))
    second = packed["sequence_ids"][row] == 2
    packed["input_word_ids"][row, second] = 1 + packed["input_word_ids"][row, second] % (WORDS - 1)
    after, pooled_after = (
        x.numpy() for x in packed_bert.encode_packed(encoder, tensors(packed), False)
    )
    same = packed["sequence_ids"][row] == 1
    np.testing.assert_array_equal(before[row][same], after[row][same])
    assert np.abs(before[row][second] - after[row][second]).max() > 0.1
    np.testing.assert_array_equal(pooled[row, 0], pooled_after[row, 0])
    assert np.abs(pooled[row, 1] - pooled_after[row, 1]).max() > 0.01


def test_buckets_give_the_same_losses(model, batch):
    buckets = packing.bucket(batch, [8, 12, LENGTH])
    assert {bound: len(part["input_mask"]) for bound, part in buckets.items()} == {
        **{8: 4, 12: 2, LENGTH: 2}
    }
    assert all(part["input_word_ids"].shape[1] == bound for bound, part in buckets.items())
    alone = bert.pretraining_sums(model, tensors(batch), False)
    parts = [bert.pretraining_sums(model, tensors(part), False) for part in buckets.values()]
    for name, value in alone.items():
        total = sum(float(part[name]) for part in parts)
        assert total == pytest.approx(float(value), rel=2e-6)
    with pytest.raises(ValueError, match="must ascend to the length of the batch, 24"):
        packing.bucket(batch, [12, 8, LENGTH])


def test_every_sequence_is_in_one_row_and_rows_are_not_too_full():
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 513, 300)
    rows = packing.assign_rows(lengths, 512, 3)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert max(len(row) for row in rows) <= 3
    assert max(lengths[row].sum() for row in rows) <= 512
    assert len(rows) < 1.15 * lengths.sum() / 512
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens. Rows take 1 to 8"):
        packing.assign_rows([3, 9], 8, 2)
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        packing.assign_rows([0, 9], 16, 2)


def test_packed_batches_have_the_packed_spec(batch):
    spec = packing.packed_spec(4, LENGTH, PREDICTIONS, 3)
    packed = packing.pack(batch, per_row=3)
    assert packed.keys() == spec.keys()
    for key, value in packed.items():
        assert (value.shape, value.dtype) == (tuple(spec[key].shape), spec[key].dtype), key
    assert packed["masked_lm_weights"].sum() == batch["masked_lm_weights"].sum()
    assert packed["next_sentence_weights"].sum() == len(LENGTHS)


def test_a_plan_has_each_sequence_once_whatever_parts_it_was_given():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 65, 200)
    plan = np.concatenate(list(packing.plan_rows([lengths], 64, 3)))
    parts = np.concatenate(list(packing.plan_rows(np.split(lengths, [1, 70, 133]), 64, 3)))
    np.testing.assert_array_equal(plan, parts)
    assert sorted(plan[plan >= 0]) == list(range(200))
    assert np.where(plan >= 0, lengths[plan], 0).sum(axis=1).max() <= 64
    assert len(plan) < 1.2 * lengths.sum() / 64
    # Members of a row are near each other, so that a block of rows is read at once.
    assert (plan.max(axis=1) - np.where(plan >= 0, plan, 200).min(axis=1)).max() < packing.GROUP
