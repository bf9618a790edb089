"""The gradient noise scale, on a problem for which it is known."""

import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_runs import SmallTask, begin, small_recipe, small_run

from inputs.errors import InputError
from preflight import plan
from recipes.types import Phase
from tf_lamb.tf_keras import LARS
from training.monitor import noise_scale
from training.monitor.progress import Rows
from training.step import ReplicaStep

WIDTH, DISTANCE, DEVIATION, BATCH, STEPS = 50, 2.0, 3.0, 16, 400
SCALE = WIDTH * DEVIATION**2 / DISTANCE**2


class Difference(tf_keras.layers.Layer):
    """w - x. If the loss is half of its square, it is also the gradient of an example."""

    def build(self, shape):
        self.w = self.add_weight(name="w", shape=shape[1:], initializer="zeros")

    def call(self, inputs):
        return self.w - inputs


def summed_loss(model, batch, training):
    return tf.reduce_sum(tf.square(model(batch["x"], training=training))) / 2


def build_model():
    return tf_keras.Sequential([tf_keras.layers.Input([WIDTH]), Difference()])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_noise_scale_is_estimated_from_micro_batches(mirrored, accumulation, tmp_path):
    """x ~ N(m, 9 I) in 50 dimensions, w = 0 and |m| = 2: |G|^2 is 4 and tr(S) is 450."""
    x = DISTANCE / WIDTH**0.5 + DEVIATION * np.random.default_rng(0).normal(
        size=[2 * STEPS, BATCH, WIDTH]
    )
    phase = Phase(steps=STEPS, global_batch_size=2, peak_learning_rate=1e-30, warmup_steps=0)
    recipe = small_recipe(
        phase,
        optimizer="momentum",
        weight_decay=0.0,
        accumulation=accumulation,
        jit_compile=False,
        measure_noise_scale=True,
    )
    data = tf.data.Dataset.from_tensor_slices({"x": x.astype(np.float32)})
    run = begin(small_run(SmallTask(recipe, build_model, summed_loss, data), mirrored, tmp_path))
    means = {name: float(value) for name, value in run.train(tf.constant(STEPS)).items()}
    assert means["gradient_signal"] == pytest.approx(DISTANCE**2, rel=0.06)
    assert means["gradient_noise"] == pytest.approx(SCALE * DISTANCE**2, rel=0.02)
    assert means["noise_scale"] == pytest.approx(SCALE, rel=0.06)
    Rows(tmp_path / "history.jsonl").append({"step": 1, "phase": 1} | means)
    assert plan.parse_noise_scale(str(tmp_path)) == pytest.approx(means["noise_scale"])


@pytest.mark.parametrize(
    "make", [lambda: tf_keras.optimizers.SGD(0.1), lambda: LARS(10.0, weight_decay=1.0)]
)
def test_measuring_the_noise_scale_does_not_change_the_update(mirrored, make):
    """If it is measured, `ReplicaStep` sums the gradients over replicas, not the optimizer."""
    batches = tf.random.stateless_normal([2, 4, WIDTH], [1, 2])
    weights = []
    for measure in (False, True):
        with mirrored.scope():
            model = build_model()
            model.layers[0].w.assign(tf.ones([WIDTH]))
            optimizer = make()
            optimizer.build(model.trainable_variables)
            step = ReplicaStep(
                SmallTask(small_recipe(), sums=summed_loss),
                model,
                optimizer,
                seed=1,
                jit_compile=False,
                measure_noise=measure,
            )

        def train(step=step):
            context = tf.distribute.get_replica_context()
            return step.train({"x": batches[context.replica_id_in_sync_group]}, 0)

        tf.function(lambda train=train: mirrored.run(train))()
        weights.append(model.layers[0].w.numpy())
    np.testing.assert_allclose(*weights, rtol=1e-6)
    assert np.ptp(weights[0]) > 1e-3
    if make().__class__ is tf_keras.optimizers.SGD:
        mean = tf.reduce_mean(batches, axis=[0, 1]).numpy()
        np.testing.assert_allclose(weights[1], 1 - 0.1 * (1 - mean), rtol=1e-5)


def test_a_gradient_that_is_not_finite_is_left_out_of_the_means():
    bad = [tf.constant([float("inf"), 1.0])]
    shares, count = noise_scale.noise_sums(tf.constant(float("nan")), bad, 8, 2, 1)
    assert [float(value) for value in (*shares.values(), *count.values())] == [0.0, 0.0, 0.0]


def test_the_planner_takes_a_number_or_a_run_that_measured(tmp_path):
    assert plan.parse_noise_scale("5000") == 5000.0
    with pytest.raises(InputError, match="--noise_scale must be positive"):
        plan.parse_noise_scale("-1")
    with pytest.raises(InputError, match="^--noise_scale: .*history.jsonl has no gradient noise"):
        plan.parse_noise_scale(str(tmp_path))
    rows = [
        {"step": 1, "phase": 1, "gradient_signal": 1.0, "gradient_noise": 7.0},
        {"step": 2, "phase": 2, "gradient_signal": 1.0, "gradient_noise": 9.0},
        {"step": 3, "phase": 2, "gradient_signal": 2.0, "gradient_noise": 40.0},
        {"step": 4, "phase": 2, "gradient_signal": -1.0, "gradient_noise": 20.0},
    ]
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert noise_scale.measured(str(tmp_path)) == 60.0  # (40 + 20) / (2 - 1)
    Rows(path).append({"step": 5, "phase": 2, "gradient_signal": -3.0, "gradient_noise": 1.0})
    with pytest.raises(InputError, match="lost in its noise"):
        noise_scale.measured(str(tmp_path))
