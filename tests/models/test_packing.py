"""Packed rows and length buckets give the losses and gradients of the sequences alone."""

import numpy as np
import pytest
import tensorflow as tf

from inputs.text import packing
from models import bert
from models import packing as packed_bert

LENGTH, PREDICTIONS, WORDS = 24, 3, 40
LENGTHS = (5, 24, 9, 7, 12, 6, 17, 8)
PACKED = packing.PackedRows(LENGTH, 3)
BUCKETS = packing.LengthBuckets((8, 8, 12, LENGTH))


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
    packed = packing.join_batch(batch, PACKED)
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
    packed = {key: value.copy() for key, value in packing.join_batch(batch, PACKED).items()}
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


def bucket_sums(model, batch, training):
    parts = [bert.pretraining_sums(model, x, training) for x in packing.bucket_batches(batch)]
    return {key: tf.add_n([part[key] for part in parts]) for key in parts[0]}


def test_buckets_give_the_same_losses_and_gradients(model, batch):
    joined = packing.join_batch(batch, BUCKETS)
    parts = packing.bucket_batches(joined)
    assert [part["input_word_ids"].shape for part in parts] == [(4, 8), (2, 12), (2, LENGTH)]
    alone, gradients = losses_and_gradients(bert.pretraining_sums, model, batch)
    together, joined_gradients = losses_and_gradients(bucket_sums, model, joined)
    for name, value in alone.items():
        assert float(together[name]) == pytest.approx(float(value), rel=2e-6), name
    largest = max(np.abs(gradient).max() for gradient in gradients)
    for ours, theirs in zip(joined_gradients, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * largest)


def test_a_place_without_a_sequence_counts_nothing(model, batch):
    """Also if the row that fills it is longer than the place, as in a damaged block."""
    few = {key: value[:5] for key, value in batch.items()}
    plan = BUCKETS.assign(few["input_mask"].sum(axis=1))
    assert (plan < 0).sum() == 3
    filled = {key: tf.constant(value[plan.ravel()]) for key, value in few.items()}  # -1: the last
    weights = {"masked_lm_weights", "next_sentence_weights", "example_weights"}
    present = (plan >= 0).ravel()
    for key in weights:
        kept = present if filled[key].shape.rank == 1 else present[:, None]
        filled[key] *= kept.astype(np.float32)
    joined = {key: value.numpy() for key, value in BUCKETS.join(filled).items()}
    alone = bert.pretraining_sums(model, tensors(few), False)
    together = bucket_sums(model, tensors(joined), False)
    for name, value in alone.items():
        assert float(together[name]) == pytest.approx(float(value), rel=2e-6), name


def test_a_sequence_longer_than_its_bucket_is_an_error(batch):
    with pytest.raises(tf.errors.InvalidArgumentError, match="longer than its bucket"):
        BUCKETS.join(tensors(batch))  # not in the order of a plan


def test_buckets_have_each_sequence_once_in_a_place_that_is_long_enough():
    rng = np.random.default_rng(4)
    layout = packing.LengthBuckets((16, 16, 32, 64))
    for lengths in (rng.integers(1, 65, 300), np.full(10, 64), np.full(10, 3), np.array([64, 1])):
        plan = layout.assign(lengths)
        assert sorted(plan[plan >= 0]) == list(range(len(lengths)))
        places = np.broadcast_to(layout.lengths, plan.shape)
        assert (lengths[plan[plan >= 0]] <= places[plan >= 0]).all()
        # No group could be left out: its places are needed by some length.
        assert any(
            (lengths > bound).sum() > (len(plan) - 1) * sum(n > bound for n in layout.lengths)
            for bound in (0, 16, 32)
        )
    with pytest.raises(ValueError, match="sequence 1 has 65 tokens, and not 1 to 64"):
        layout.assign([3, 65])


def test_every_sequence_is_in_one_row_and_rows_are_not_too_full():
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 513, 300)
    rows = packing.PackedRows(512, 3).assign(lengths)
    assert sorted(rows[rows >= 0]) == list(range(300))
    assert rows.shape[1] == 3
    assert np.where(rows >= 0, lengths[rows], 0).sum(axis=1).max() <= 512
    assert len(rows) < 1.15 * lengths.sum() / 512
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, and not 1 to 8"):
        packing.PackedRows(8, 2).assign([3, 9])
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        packing.PackedRows(16, 2).assign([0, 9])


def proposal(lengths, layout):
    """What is said about a plan of these sequences, and what is proposed."""
    plan = np.concatenate(list(packing.plan_rows([lengths], layout)))
    facts = layout.facts(lengths)
    return (
        layout.describe(len(lengths), len(plan)),
        layout.propose(len(lengths), len(plan), facts),
        len(plan) * layout.tokens,
        facts["tokens"],
    )


def test_better_lengths_of_buckets_are_proposed():
    even = np.random.default_rng(5).integers(1, 65, 4_096)
    layout = packing.LengthBuckets((16, 64, 64, 64))
    said, proposed, _, ideal = proposal(even, layout)
    assert said.startswith("In buckets: 4,096 sequences in 1,") and "4 (16, 3 x 64 tokens)" in said
    assert proposed.startswith("Lengths that fit better: length_buckets=16,32,48,64, with 0.6")
    # The proposal is as good as it says, and nothing better is proposed in its place.
    _, proposed, tokens, _ = proposal(even, packing.LengthBuckets((16, 32, 48, 64)))
    assert (tokens, proposed) == (ideal, "")
    said, proposed, *_ = proposal(np.full(4_000, 60), packing.LengthBuckets((16, 32, 48, 64)))
    assert "25.0% of the places are filled, and a sequence takes 2.50 times the 64 tokens" in said
    assert proposed == "Buckets take more tokens than padding: leave out length_buckets"


@pytest.mark.parametrize("columns", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("kind", ["sorted", "short", "few", "random"])
def test_what_is_proposed_takes_the_tokens_that_it_says(columns, kind):
    rng = np.random.default_rng(6)
    lengths = {
        "sorted": np.sort(rng.integers(1, 513, 3_000)),
        "short": rng.integers(1, 129, 3_000),
        "few": rng.integers(1, 513, 5),
        "random": rng.integers(1, 513, 3_000),
    }[kind]
    facts = packing.LengthBuckets((512,) * columns).facts(lengths)
    layout = packing.LengthBuckets(tuple(facts["fitting"]))
    assert layout.columns == columns and layout.lengths[-1] == 512
    _, proposed, tokens, again = proposal(lengths, layout)
    assert tokens == again == facts["tokens"]
    assert "better" not in proposed


@pytest.mark.parametrize(("layout", "examples"), [(PACKED, 4), (BUCKETS, 2)])
def test_joined_batches_have_the_spec_of_the_layout(batch, layout, examples):
    spec = layout.spec(examples, PREDICTIONS)
    joined = packing.join_batch(batch, layout)
    assert joined.keys() == spec.keys()
    for key, value in joined.items():
        assert (value.shape, value.dtype) == (tuple(spec[key].shape), spec[key].dtype), key
    assert joined["masked_lm_weights"].sum() == batch["masked_lm_weights"].sum()
    assert joined["next_sentence_weights"].sum() == len(LENGTHS)


@pytest.mark.parametrize(
    "layout", [packing.PackedRows(64, 3), packing.LengthBuckets((16, 32, 48, 64))]
)
def test_a_plan_has_each_sequence_once_whatever_parts_it_was_given(layout):
    rng = np.random.default_rng(3)
    count = 2 * layout.neighbors + 72
    lengths = rng.integers(1, 65, count)
    plan = np.concatenate(list(packing.plan_rows([lengths], layout)))
    parts = np.split(lengths, [1, 33, layout.neighbors + 15])
    np.testing.assert_array_equal(plan, np.concatenate(list(packing.plan_rows(parts, layout))))
    assert sorted(plan[plan >= 0]) == list(range(count))
    if isinstance(layout, packing.PackedRows):
        assert np.where(plan >= 0, lengths[plan], 0).sum(axis=1).max() <= 64
        assert len(plan) < 1.2 * lengths.sum() / 64
    else:
        assert len(plan) < 1.2 * count / 4
    # The sequences of an example are near each other, so that a block of examples is read at once.
    spread = plan.max(axis=1) - np.where(plan >= 0, plan, count).min(axis=1)
    assert spread.max() < layout.neighbors
