"""The ResNet models: published architecture, equivalent implementations, and losses."""

import functools
import types

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import recipes
from inputs.images import examples
from models import resnet
from tasks.resnet import ImageClassification
from training import optimizers
from training.dropout import replica_seed
from training.step import ReplicaStep

SMALL = resnet.Size(10, width=8)
SETTINGS = {"normalization": "imagenet", "batch_norm_momentum": 0.9}


def build(size=SMALL, image_size=64, classes=7, **settings):
    return resnet.build_classifier(size, image_size, classes, **SETTINGS | settings)


def made_up(size, image_size=64, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    shape = [size, image_size, image_size, 3]
    return {
        "image": tf.constant(rng.integers(0, 256, shape), tf.uint8),
        "label": tf.constant(rng.integers(0, classes, size), tf.int32),
        "mixup": tf.ones([size]),
        "example_weights": tf.ones([size]),
    }


@pytest.fixture(scope="module")
def resnet50():
    return build(resnet.SIZES["resnet-50"], 224, 1000)


def test_resnet_50_has_the_published_parameter_count(resnet50):
    """25.557 million; the 53 batch normalizations also have a mean and a variance per channel."""
    count = sum(int(np.prod(v.shape)) for v in resnet50.trainable_variables)
    assert count == 25_557_032
    assert sum(int(np.prod(v.shape)) for v in resnet50.non_trainable_variables) == 53_120
    assert not resnet50.losses  # no L2 terms: the optimizer applies weight decay


def test_the_stride_is_in_the_3x3_convolution(resnet50):
    """As in ResNet v1.5."""
    (backbone,) = [layer.backbone for layer in resnet50.layers if hasattr(layer, "backbone")]
    blocks = [layer for layer in backbone.layers if hasattr(layer, "_conv3")]
    strides = [[c.strides[0] for c in (b._conv1, b._conv2, b._conv3)] for b in blocks]
    assert len(blocks) == 16
    assert [s for s in strides if s != [1, 1, 1]] == [[1, 2, 1]] * 3


@pytest.mark.parametrize("name", ["resnet-18", "resnet-50-narrow", "cifar-resnet-10"])
def test_the_last_batch_norm_scale_of_each_block_starts_at_zero(name):
    """So that each block starts as the identity. All other scales start at one."""
    size = resnet.SIZES[name]
    model = build(size, 32, 10)
    gammas = [v.numpy() for v in model.trainable_variables if "gamma" in v.name]
    zero = sum(not gamma.any() for gamma in gammas)
    assert zero == {18: 8, 50: 16, 10: 4}[size.layers]
    assert sum((gamma == 1).all() for gamma in gammas) == len(gammas) - zero


@pytest.mark.parametrize("name", ["resnet50-lamb-32k", "resnet50-lars-32k", "resnet50-momentum-8k"])
def test_batch_norm_and_biases_are_neither_decayed_nor_adapted(resnet50, name):
    recipe = recipes.find_recipe(name)
    optimizer = optimizers.make_optimizer(recipe, optimizers.make_schedule(recipe))
    optimizers.build(optimizer, recipe, resnet50.trainable_variables)
    decayed, adapted = (
        {layer.name for layer in optimizer.layers if getattr(layer, what)}
        for what in ("decayed", "adapted")
    )
    kernels = {v.name[:-2] for v in resnet50.trainable_variables if "kernel" in v.name}
    assert len(optimizer.layers) == 161 and len(kernels) == 54
    assert decayed == kernels
    assert adapted == (set() if recipe.optimizer == "momentum" else kernels)


def test_the_space_to_depth_stem_computes_the_same_outputs():
    plain, other = build(image_size=96), build(image_size=96, space_to_depth=True)
    assert [v.shape for v in plain.variables] == [v.shape for v in other.variables]
    for ours, theirs in zip(other.variables, plain.variables, strict=True):
        value = tf.random.stateless_normal(theirs.shape, [1, len(theirs.shape)])
        theirs.assign(abs(value) + 0.5 if "variance" in theirs.name else value)
        ours.assign(theirs)
    batch = tf.cast(made_up(2, 96)["image"], tf.float32)
    expected = plain(batch, training=False)
    np.testing.assert_allclose(
        other(batch, training=False),
        expected,
        rtol=0,
        atol=1e-5 * float(tf.reduce_max(abs(expected))),
    )


def test_pixels_are_normalised_in_the_model():
    for name, (mean, deviation) in resnet.NORMALIZATIONS.items():
        rescaling = build(normalization=name).layers[1]
        found = rescaling(tf.fill([1, 2, 2, 3], 200.0))
        np.testing.assert_allclose(found[0, 0, 0], (200 - np.array(mean)) / deviation, rtol=1e-5)


def test_sums_match_a_numpy_reference():
    """Cross-entropy with label smoothing and mixup in training, and without in evaluation."""
    model, batch = build(), made_up(6)
    head = model.layers[-1].layers[-1]
    head.kernel.assign(tf.random.stateless_normal(head.kernel.shape, [1, 2]))
    weights = np.array([1, 1, 0, 1, 1, 0], np.float32)
    batch["example_weights"] = tf.constant(weights)
    labels, classes = batch["label"].numpy(), 7

    def cross_entropy(logits, targets):
        logits = np.asarray(logits, np.float64)
        shifted = logits - logits.max(1, keepdims=True)
        return -(targets * (shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))).sum(1)

    sums = functools.partial(resnet.classification_sums, label_smoothing=0.1)
    plain = sums(model, batch, training=False)
    logits = model(tf.cast(batch["image"], tf.float32), training=False).numpy()
    exact = cross_entropy(logits, np.eye(classes)[labels])
    np.testing.assert_allclose(plain["image_loss"], (exact * weights).sum(), rtol=1e-5)
    order = np.argsort(-logits, axis=1)
    for name, k in (("image_top1", 1), ("image_top5", 5)):
        hits = (order[:, :k] == labels[:, None]).any(1)
        assert float(plain[name]) == (hits * weights).sum()
    for value, right in ((0.0, (labels == 0) * weights), (np.nan, 0 * weights)):
        head.kernel.assign(tf.fill(head.kernel.shape, value))  # all logits equal, then all NaN
        head.bias.assign(tf.fill([classes], value))
        assert float(sums(model, batch, training=False)["image_top1"]) == right.sum()
    head.kernel.assign(tf.random.stateless_normal(head.kernel.shape, [1, 2]))
    head.bias.assign(tf.zeros([classes]))
    own = np.array([1, 0.3, 0.6, 0.5, 0.9, 0.2], np.float32)
    trained = sums(model, batch | {"mixup": tf.constant(own)}, training=True)
    pixels = batch["image"].numpy().astype(np.float32)
    share = own[:, None, None, None]
    mixed = model(pixels * share + pixels[::-1] * (1 - share), training=True)
    targets = np.eye(classes)[labels]
    targets = targets * own[:, None] + targets[::-1] * (1 - own[:, None])
    exact = cross_entropy(mixed, targets * 0.9 + 0.1 / classes)
    np.testing.assert_allclose(trained["image_loss"], (exact * weights).sum(), rtol=1e-4)
    assert float(resnet.classification_counts(batch)["image"]) == 4


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights():
    policy = tf_keras.mixed_precision.global_policy()
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = build()
    finally:
        tf_keras.mixed_precision.set_global_policy(policy)
    assert model.output.dtype == tf.bfloat16
    assert {v.dtype for v in model.variables} == {tf.float32}
    reference = build()
    reference.set_weights(model.get_weights())
    sums = [
        resnet.classification_sums(m, made_up(8), training=True, label_smoothing=0.1)
        for m in (model, reference)
    ]
    assert sums[0]["image_loss"].dtype == tf.float32
    np.testing.assert_allclose(sums[0]["image_loss"], sums[1]["image_loss"], rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("synchronised", [True, False])
def test_synchronised_batch_norm_uses_statistics_of_all_replicas(mirrored, synchronised):
    """If synchronized, moving averages of two half batches equal those of the whole batch."""
    whole, batch = build(), made_up(8)
    weights = whole.get_weights()
    # The first half is darker, so that the halves have other statistics than the whole.
    image = tf.concat([batch["image"][:4] // 4, batch["image"][4:]], axis=0)
    whole(tf.cast(image, tf.float32), training=True)
    with mirrored.scope():
        model = build(sync_batch_norm=synchronised)
        model.set_weights(weights)

    def run():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return model(tf.cast(image[replica * 4 : replica * 4 + 4], tf.float32), training=True)

    mirrored.run(tf.function(run) if not synchronised else run)
    means = [
        next(v for v in m.non_trainable_variables if "moving_variance" in v.name)
        for m in (whole, model)
    ]
    ours = means[1].values if hasattr(means[1], "values") else [means[1]]
    agree = [np.allclose(v, means[0], rtol=1e-3) for v in ours]
    assert agree == [synchronised] * len(ours)


def test_resnet_50_lowers_for_the_papers_batch_per_core(resnet50):
    """Forward and backward pass for 16 images per core: a batch of 32K on 1,024 TPU v3 chips."""
    batch_size = 32_768 // 2_048
    task = types.SimpleNamespace(
        metrics=ImageClassification.metrics,
        parts=lambda batch: [batch],
        sums=functools.partial(resnet.classification_sums, label_smoothing=0.1),
        counts=resnet.classification_counts,
    )
    step = ReplicaStep(task, resnet50, None, seed=1, jit_compile=True)
    spec = examples.element_spec(batch_size, 224)
    batch = {name: tf.zeros(tensor.shape, tensor.dtype) for name, tensor in spec.items()}
    counts = {"image": tf.constant(32_768.0)}
    seed = replica_seed(1, tf.constant(0, tf.int64), tf.constant(0))
    compiled = tf.function(step.sums_and_gradients, jit_compile=True)
    text = compiled.experimental_get_compiler_ir(batch, counts, seed)(stage="hlo")
    assert "u8[16,224,224,3]" in text and "f32[7,7,3,64]" in text
    assert text.count(" convolution(") == 3 * 53  # forward, input gradient, weight gradient
