"""A replica's step: seeds of dropout masks, and moving averages of batch normalization."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_runs import SmallTask, begin, small_recipe, small_run

from training.dropout import StepSeed, replica_seed

REPLICA_BATCH, STEPS = 8, 3


@pytest.fixture(scope="module")
def masks(mirrored):
    """A function `(step, micro-batch) -> masks`, an array [replicas, layers, ...]."""
    with mirrored.scope():
        inputs = tf_keras.Input([64])
        layers = [tf_keras.layers.Dropout(0.5), tf_keras.layers.Dropout(0.5)]
        model = tf_keras.Model(inputs, [layer(inputs) for layer in layers])
    step_seed = StepSeed(model)

    @tf.function(jit_compile=True)
    def outputs(seed):
        with step_seed.set_to(seed):
            return model(tf.ones([1, 64]), training=True)

    def replica(step, part):
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        seed = tf.random.experimental.stateless_fold_in(replica_seed(7, step, number), part)
        return outputs(seed)

    def drawn(step, part):
        results = mirrored.run(replica, (tf.constant(step), tf.constant(part)))
        return np.stack([np.stack(mirrored.experimental_local_results(r)) for r in results], 1)

    return drawn


def test_each_replica_layer_step_and_micro_batch_draws_its_own_mask(masks):
    drawn = np.stack([masks(step, part) for step in (0, 1) for part in (0, 1)])
    rows = drawn.reshape(16, 64)
    assert len({row.tobytes() for row in rows}) == 16
    assert set(rows.ravel()) == {0.0, 2.0} and 0.4 < np.mean(rows > 0) < 0.6
    np.testing.assert_array_equal(drawn[3], masks(1, 1))


def test_a_layer_outside_of_a_step_has_no_seed():
    model = tf_keras.Sequential([tf_keras.layers.Input([3]), tf_keras.layers.Dropout(0.5)])
    StepSeed(model)
    assert model(tf.ones([1, 3]), training=False).numpy().all()
    with pytest.raises(RuntimeError, match="outside of a step"):
        model(tf.ones([1, 3]), training=True)


@pytest.mark.parametrize("shape", [(9, 40, 128), (4, 5, 32, 48), (50_001,)])
def test_dropout_drops_its_share_in_both_halves_of_a_word(shape):
    inputs = tf_keras.Input(shape[1:], batch_size=shape[0])
    model = tf_keras.Model(inputs, tf_keras.layers.Dropout(0.1)(inputs))
    step_seed = StepSeed(model)

    @tf.function
    def outputs(seed):
        with step_seed.set_to(seed), tf.GradientTape() as tape:
            ones = tf.ones(shape)
            tape.watch(ones)
            dropped = model(ones, training=True)
        return dropped, tape.gradient(dropped, ones)

    values, gradients = outputs(tf.constant([3, 5]))
    np.testing.assert_array_equal(values, gradients)
    kept = values.numpy() > 0
    np.testing.assert_allclose(values.numpy()[kept], 1 / 0.9, rtol=2e-5)
    half = (shape[0] + 1) // 2
    low, high = kept[: shape[0] - half], kept[half:]
    for part in (kept, low, high):
        assert abs(np.mean(~part) - 0.1) < 5 * (0.09 / part.size) ** 0.5
    both = np.mean(~low & ~high)  # 0.01 if the two halves are independent
    assert abs(both - 0.01) < 5 * (0.0099 / low.size) ** 0.5


def image_model():
    return tf_keras.Sequential(
        [
            tf_keras.layers.Input([4, 4, 3]),
            tf_keras.layers.BatchNormalization(momentum=0.9),
            tf_keras.layers.Conv2D(5, 3),
            tf_keras.layers.BatchNormalization(momentum=0.9),
            tf_keras.layers.GlobalAveragePooling2D(),
            tf_keras.layers.Dense(2),
        ]
    )


def summed_loss(model, batch, training):
    logits = model(batch["image"], training=training)
    return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], logits))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_batch_norm_moving_averages_are_averaged_over_replicas(mirrored, accumulation, tmp_path):
    """The first layer's inputs are the images, so NumPy can compute its moving averages."""
    rng = np.random.default_rng(0)
    images = rng.normal(1, 2, [2 * STEPS, REPLICA_BATCH, 4, 4, 3]).astype(np.float32)
    images[1::2] += 3  # those of the second replica
    labels = rng.integers(0, 2, [2 * STEPS, REPLICA_BATCH]).astype(np.int32)
    data = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})
    recipe = small_recipe(optimizer="lars", accumulation=accumulation, jit_compile=True)
    task = SmallTask(recipe, image_model, summed_loss, data)
    run = begin(small_run(task, mirrored, tmp_path))
    model = run.model
    assert np.isfinite(run.train(tf.constant(STEPS))["small_loss"].numpy())
    expected = np.zeros([2, 3])
    for number, image in enumerate(images):
        for part in np.split(image, accumulation):
            mean = part.mean(axis=(0, 1, 2))
            expected[number % 2] += 0.1 * (mean - expected[number % 2])
    first, second = (layer for layer in model.layers if "batch_norm" in layer.name)
    np.testing.assert_allclose(first.moving_mean.numpy(), expected.mean(axis=0), rtol=1e-5)
    assert np.ptp(expected, axis=0).min() > 0.1
    for variable in (*first.variables, *second.variables):
        one, other = (copy.numpy() for copy in mirrored.experimental_local_results(variable))
        np.testing.assert_array_equal(one, other)
    assert np.abs(second.moving_mean.numpy()).min() > 0
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "saved"))
    key = "model/layer_with_weights-0/moving_mean/.ATTRIBUTES/VARIABLE_VALUE"
    np.testing.assert_array_equal(tf.train.load_variable(path, key), first.moving_mean.numpy())


@pytest.mark.parametrize("measured", [False, True])
def test_the_l2_term_is_added_once_for_all_replicas(mirrored, measured, tmp_path):
    """Its gradient is l2·x for decayed weights, not twice that on two replicas."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(0, 1, [REPLICA_BATCH, 4, 4, 3]).astype(np.float32),
        "label": rng.integers(0, 2, [REPLICA_BATCH]).astype(np.int32),
    }
    data = tf.data.Dataset.from_tensors(batch).repeat(2)
    starts, moved = [], []
    for l2 in (0.0, 0.5):
        recipe = small_recipe(
            optimizer="momentum",
            weight_decay=0.0,
            jit_compile=False,
            exclude_from_weight_decay=("gamma$", "beta$", "bias$"),
            l2_regularization=l2,
            measure_noise_scale=measured,
        )
        task = SmallTask(recipe, image_model, summed_loss, data)
        run = begin(small_run(task, mirrored, tmp_path / str(l2)))
        if starts:
            for variable, value in zip(run.model.trainable_variables, starts, strict=True):
                variable.assign(value)
        starts = [variable.numpy() for variable in run.model.trainable_variables]
        run.train(tf.constant(1))
        moved.append([variable.numpy() for variable in run.model.trainable_variables])
    rate = recipe.phases[0].peak_learning_rate
    names = [variable.name for variable in run.model.trainable_variables]
    for name, start, without, with_l2 in zip(names, starts, *moved, strict=True):
        expected = -rate * 0.5 * start if "kernel" in name else np.zeros_like(start)
        np.testing.assert_allclose(with_l2 - without, expected, atol=1e-6, err_msg=name)
    assert sum("kernel" in name for name in names) == 2
