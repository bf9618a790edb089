"""Synthetic batches of each task: what train.py --synthetic trains on."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from inputs.batching import integers_below, random_bits, synthetic_batches, uniform
from recipes import find_recipe, resized
from tasks import TASKS
from training.monitor.progress import read_rows

TRAIN = str(pathlib.Path(__file__).parents[2] / "train.py")


def test_every_one_of_many_can_be_chosen():
    """Of 2^26, 24 bits would choose only every fourth; of 40 million, 42 %."""
    bits = random_bits(3, 7, tf.range(200_000, dtype=tf.int64), 1)[:, 0]
    whole = [int(x) for x in bits.numpy()]
    for limit in (2**26, 40_000_000):
        found = integers_below(bits, limit).numpy()
        assert found.tolist() == [(x >> 11) * limit >> 53 for x in whole]
        if limit == 2**26:
            assert np.bincount(found % 4) / len(found) == pytest.approx(0.25, abs=0.01)
    limits = tf.constant([2**40, 5, 0, -1], tf.int64)
    found = integers_below(bits[:4], limits).numpy()
    assert found.tolist() == [whole[0] >> 24, (whole[1] >> 40) * 5 >> 24, 0, 0]


@pytest.mark.parametrize("limit", [1, 9, 30_522, 2**18])
def test_a_choice_among_few_is_that_of_earlier_versions(limit):
    ids = tf.range(50_000, dtype=tf.int64)
    draws = uniform(5, 2, ids, 3)
    expected = tf.cast(tf.cast(draws, tf.float64) * limit, tf.int64)
    found = integers_below(random_bits(5, 2, ids, 3), limit)
    np.testing.assert_array_equal(found, expected)
    assert set(np.unique(found)) <= set(range(limit))


def test_synthetic_values_are_uniform_below_their_limits():
    spec = {
        "image": tf.TensorSpec([4, 16, 16, 3], tf.uint8),
        "label": tf.TensorSpec([1_000], tf.int64),
        "weight": tf.TensorSpec([4], tf.float32),
        "row": tf.TensorSpec([4], tf.int32),
    }
    batches = synthetic_batches(spec, {"image": 256, "label": 7}, seed=1)
    assert batches.element_spec == spec
    first, second = (tf.nest.map_structure(lambda t: t.numpy(), b) for b in batches.take(2))
    assert set(first["label"]) == set(range(7))
    assert first["image"].min() < 5 and first["image"].max() > 250
    assert set(first["weight"]) == {1.0} and set(first["row"]) == {1}
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])


@pytest.mark.parametrize("name", ["bert-mini-demo", "squad-mini", "cifar10-lamb-128"])
def test_every_task_has_synthetic_batches(name):
    recipe = resized(find_recipe(name), global_batch_size=8)
    task = TASKS[recipe.task](
        recipe,
        data_dir="",
        vocab="",
        resume_dir=None,
        seed=1,
        synthetic=True,
        log=lambda line: None,
    )
    training = task.train_batches(0, 0)(None)
    held_out = task.evaluation_batches(0)(None)
    for batches in (training, held_out):
        batch = next(iter(batches))
        assert {len(values) for values in batch.values()} == {8}
        assert all(float(count) > 0 for count in task.counts(batch).values())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no process is kept to a core")
def test_input_wait_is_measured_right_on_one_core(tmp_path):
    """Synthetic batches are ready at once, so nearly all time must count as training."""
    command = [
        *(sys.executable, TRAIN, "--recipe=cifar10-momentum-128", "--synthetic", "--steps=4"),
        *("--steps_per_loop=2", "--global_batch_size=32", "--set=evaluation_examples=32"),
        f"--model_dir={tmp_path}",
    ]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # inherited by the child process
    try:
        subprocess.run(command, check=True, capture_output=True)
    finally:
        os.sched_setaffinity(0, cores)
    *_, last = read_rows(tmp_path / "history.jsonl")
    assert last["input_wait_share"] < 0.5
