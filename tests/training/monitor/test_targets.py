"""Evaluation every so many examples, the stop at a target, and the sum over replicas."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_runs import SmallTask, begin, small_recipe, small_run

from recipes.types import Phase
from training.monitor.progress import EVALUATIONS, read_rows

PHASES = (
    Phase(steps=10, global_batch_size=8, peak_learning_rate=0.1, warmup_steps=0),
    Phase(steps=6, global_batch_size=4, peak_learning_rate=0.1, warmup_steps=0),
)


def test_steps_of_evaluations_by_examples():
    """80 examples at 8 a step, then 24 at 4: multiples of 30 are 30, 60 and 90."""
    recipe = small_recipe(*PHASES, evaluate_every_examples=30)
    assert [recipe.examples_at(step) for step in (0, 4, 10, 13, 16, 20)] == [
        *(0, 32, 80, 92, 104, 104)
    ]
    assert recipe.evaluation_steps(0, 100) == [4, 8, 10, 13, 16]
    assert recipe.evaluation_steps(4, 10) == [8, 10]
    assert small_recipe(*PHASES, evaluate_every_examples=3).evaluation_steps(0, 16) == [
        *range(1, 17)
    ]
    assert small_recipe(*PHASES, evaluate_every_steps=4).evaluation_steps(0, 16) == [
        *(4, 8, 10, 12, 16)
    ]
    assert small_recipe(*PHASES).evaluation_steps(0, 16) == [10, 16]
    assert small_recipe(*PHASES, evaluate_every_steps=4).evaluation_steps(-1, 0) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"evaluate_every_steps": 2, "evaluate_every_examples": 9},
            "exclude each other. Received: evaluate_every_steps=2, evaluate_every_examples=9",
        ),
        ({"evaluate_every_examples": 0}, "evaluate_every_examples must be at least 1"),
        ({"clip_each_replica": True}, "Set global_clipnorm=1 too"),
        (
            {"clip_each_replica": True, "global_clipnorm": 1.0, "measure_noise_scale": True},
            "needs gradients that are not clipped",
        ),
        ({"sum_dtype": "float16"}, "sum_dtype must be one of float32, bfloat16"),
    ],
)
def test_settings_that_do_not_fit_together(fields, message):
    with pytest.raises(ValueError, match=message):
        small_recipe(**fields).check()


HALVED = Phase(
    steps=40,
    global_batch_size=2,
    peak_learning_rate=0.25,
    warmup_steps=0,
    end_learning_rate=0.25,
)


class Halving(SmallTask):
    """One weight, which each step of gradient descent halves; the metric is its square."""

    def __init__(self, recipe):
        data = tf.data.Dataset.from_tensors({"x": tf.ones([2, 1])})
        super().__init__(recipe, self.model, self.squares, data)

    @staticmethod
    def model():
        inputs = tf_keras.Input([1])
        outputs = tf_keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")(inputs)
        return tf_keras.Model(inputs, outputs)

    @staticmethod
    def squares(model, batch, training):
        return tf.reduce_sum(model(batch["x"]) ** 2)


def halving(folder, log=None, **fields):
    recipe = small_recipe(HALVED, optimizer="momentum", momentum=0.0, weight_decay=0.0, **fields)
    lines = [] if log is None else log
    one = tf.distribute.OneDeviceStrategy("/cpu:0")
    return small_run(Halving(recipe), one, folder, log=lines.append)


def test_a_run_stops_at_its_target_and_stays_there(tmp_path):
    """The square is 4^-t after t steps: at 6 steps it is 2.4e-4, at 8 steps 1.5e-5."""
    lines = []
    fields = {"evaluate_every_examples": 4, "target": 1e-4}
    run = halving(tmp_path, lines, **fields)
    results = run.fit()
    assert run.steps_done == 8
    assert results["small_loss"] == pytest.approx(4.0**-8)
    assert "Reached small_loss 0.0000, the target being 0.0001, after 8 steps (16 examples)" in (
        "\n".join(lines)
    )
    assert [row["step"] for row in read_rows(tmp_path / EVALUATIONS)] == [2, 4, 6, 8]
    again = halving(tmp_path, **fields)
    assert again.fit() == results and again.steps_done == 8
    further = halving(tmp_path, **fields | {"target": 1e-6})
    assert further.fit()["small_loss"] == pytest.approx(4.0**-10) and further.steps_done == 10


def test_a_run_that_reached_its_target_at_the_end_of_a_phase_stays_there(tmp_path):
    """Also at the third start: the second one evaluated with the data of the next phase."""
    phase = dataclasses.replace(HALVED, steps=8)
    fields = {"optimizer": "momentum", "momentum": 0.0, "weight_decay": 0.0, "target": 1e-4}
    one = tf.distribute.OneDeviceStrategy("/cpu:0")
    for _ in range(3):
        run = small_run(Halving(small_recipe(phase, phase, phase, **fields)), one, tmp_path)
        assert run.fit()["small_loss"] == pytest.approx(4.0**-8) and run.steps_done == 8
        (row,) = read_rows(tmp_path / EVALUATIONS)
        assert (row["step"], row["phase"]) == (8, 1)


def test_without_its_target_a_run_goes_to_its_end(tmp_path):
    run = halving(tmp_path, target=-1.0)
    run.fit()
    assert run.steps_done == 40


class OneGradient(SmallTask):
    """A weight of 3 elements. The loss is linear, so that a replica's gradient is its x."""

    def __init__(self, recipe, rows):
        data = tf.data.Dataset.from_tensor_slices({"x": np.float32(rows)[:, None]})
        super().__init__(recipe, self.model, self.product, data)

    @staticmethod
    def model():
        inputs = tf_keras.Input([3])
        outputs = tf_keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(inputs)
        return tf_keras.Model(inputs, outputs)

    @staticmethod
    def product(model, batch, training):
        return tf.reduce_sum(model(batch["x"]))


def moved(where, folder, rows, **fields):
    """Minus the weight after a step of gradient descent with rate 1: the gradient."""
    phase = Phase(steps=1, global_batch_size=2, peak_learning_rate=1.0, warmup_steps=0)
    recipe = small_recipe(phase, optimizer="momentum", momentum=0.0, weight_decay=0.0, **fields)
    recipe.check()
    run = begin(small_run(OneGradient(recipe, rows), where, folder))
    run.train(tf.constant(1))
    return -run.model.trainable_variables[0].numpy().ravel()


def test_each_replicas_gradient_is_clipped_before_the_sum(mirrored, tmp_path):
    """Means of (3, 4, 0), clipped to (0.6, 0.8, 0), and (0, 0, 0.5), which is short enough."""
    rows = [[3, 4, 0], [0, 0, 0.5]]
    clip = {"global_clipnorm": 1.0}
    before = moved(mirrored, tmp_path / "a", rows, **clip, clip_each_replica=True)
    np.testing.assert_allclose(before, [0.3, 0.4, 0.25], rtol=1e-6)
    after = moved(mirrored, tmp_path / "b", rows, **clip)
    mean = np.mean(rows, axis=0)
    np.testing.assert_allclose(after, mean / np.linalg.norm(mean), rtol=1e-6)


def test_gradients_are_summed_in_bfloat16_if_asked(mirrored, tmp_path):
    """1 + 2⁻⁷ has 8 bits and 1 + 2⁻⁹ has 10: bfloat16, with 8, rounds the latter to 1."""
    rows = [[2 + 2**-6, 2 + 2**-8, 2], [0, 0, 2]]
    exact = moved(mirrored, tmp_path / "a", rows)
    np.testing.assert_array_equal(exact, np.float32(np.mean(rows, axis=0)))
    rounded = moved(mirrored, tmp_path / "b", rows, sum_dtype="bfloat16")
    np.testing.assert_array_equal(rounded, np.float32([1 + 2**-7, 1, 2]))
    one = tf.distribute.OneDeviceStrategy("/cpu:0")
    alone = moved(one, tmp_path / "c", rows, sum_dtype="bfloat16")  # nothing to sum
    np.testing.assert_array_equal(alone, np.float32(rows[0]) / 1)
