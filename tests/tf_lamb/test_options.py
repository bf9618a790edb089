"""Options of Keras around the update: EMA, accumulation, loss scales, mixed precision."""

import contextlib

import numpy as np
import oracle
import pytest
import tensorflow as tf
from drive import FEW_LAYERS, Run, assert_agrees, copies
from drive import random_gradients as all_gradients
from drive import random_weights as all_weights

RATE, MOMENTUM = 0.05, 0.75


def random_weights():
    return all_weights(names=FEW_LAYERS)


def random_gradients(replicas):
    return all_gradients(replicas, names=FEW_LAYERS)


def run_of(flavour, make, strategy=None):
    return Run(flavour, make, random_weights(), strategy, names=FEW_LAYERS)


def lamb(flavour, **arguments):
    return lambda: flavour.lamb.LAMB(RATE, **arguments)


def oracle_layers():
    return [oracle.Lamb(x) for x in random_weights()]


def averaged(flavour, gradients, overwrite):
    """The oracle's weights `[step][layer]`, and their moving averages at the end."""
    layers = oracle_layers()
    weights, averages = [[layer.x for layer in layers]], [layer.x for layer in layers]
    for step, replicas in enumerate(gradients, start=1):
        after = oracle.history(layers, [replicas], [RATE])[-1]
        # The average starts at the weights after the first step in Keras 3, before it in tf_keras.
        kept = 0.0 if flavour.name == "keras3" and step == 1 else MOMENTUM
        averages = [kept * a + (1 - kept) * x for a, x in zip(averages, after, strict=True)]
        if overwrite and step % overwrite == 0:
            for layer, average in zip(layers, averages, strict=True):
                layer.x = average
        weights.append([layer.x for layer in layers])
    return weights, averages


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [None, 2])
@pytest.mark.parametrize("replicas", [1, 2])
def test_ema(flavour, mirrored, replicas, overwrite):
    gradients = random_gradients(replicas)
    make = lamb(flavour, use_ema=True, ema_momentum=MOMENTUM, ema_overwrite_frequency=overwrite)
    run = run_of(flavour, make, mirrored if replicas == 2 else None)
    weights, averages = averaged(flavour, gradients, overwrite)
    assert_agrees(run.history(gradients), weights)
    run.optimizer.finalize_variable_values(run.variables)
    for x, average in zip(run.weights(), averages, strict=True):
        np.testing.assert_allclose(x, average, rtol=0, atol=5e-7 * np.abs(average).max())


@pytest.mark.parametrize("overwrite", [None, 2])
def test_a_skipped_update_leaves_the_averages(flavour, overwrite):
    """It does not count as an update for `ema_overwrite_frequency`, either."""
    gradients = random_gradients(1)
    make = lamb(flavour, use_ema=True, ema_momentum=MOMENTUM, ema_overwrite_frequency=overwrite)
    run = run_of(flavour, make)
    for step, replicas in enumerate(gradients):
        if step in (0, 3):
            run.step([[np.full_like(g, np.nan) for g in replicas[0]]])
        run.step(replicas)
    assert run.optimizer.skipped_steps == 2
    weights, averages = averaged(flavour, gradients, overwrite)
    assert_agrees([run.weights()], [weights[-1]])
    run.optimizer.finalize_variable_values(run.variables)
    for x, average in zip(run.weights(), averages, strict=True):
        np.testing.assert_allclose(x, average, rtol=0, atol=5e-7 * np.abs(average).max())


def means_of(gradients):
    """The mean over each pair of steps of the sum over the replicas: `[step][0][layer]`."""
    summed = [[sum(shares) for shares in zip(*replicas, strict=True)] for replicas in gradients]
    pairs = zip(summed[::2], summed[1::2], strict=True)
    return [[[(a + b) / 2 for a, b in zip(first, second, strict=True)]] for first, second in pairs]


@pytest.mark.parametrize("overwrite", [None, 2])
@pytest.mark.parametrize("replicas", [1, 2])
def test_averages_count_updates_of_accumulated_gradients(keras3, mirrored, replicas, overwrite):
    """Keras's own averages count calls."""
    gradients = random_gradients(replicas)[:4] * 2
    ema = {"use_ema": True, "ema_momentum": MOMENTUM, "ema_overwrite_frequency": overwrite}
    make = lamb(keras3, gradient_accumulation_steps=2, **ema)
    run = run_of(keras3, make, mirrored if replicas == 2 else None)
    found = run.history(gradients)
    weights, averages = averaged(keras3, means_of(gradients), overwrite)
    assert_agrees(found[::2], weights)
    run.optimizer.finalize_variable_values(run.variables)
    for x, average in zip(run.weights(), averages, strict=True):
        np.testing.assert_allclose(x, average, rtol=0, atol=5e-7 * np.abs(average).max())


@pytest.mark.parametrize("replicas", [1, 2])
def test_gradients_accumulate(keras3, mirrored, replicas):
    strategy = mirrored if replicas == 2 else None
    run = run_of(keras3, lamb(keras3, gradient_accumulation_steps=2), strategy)
    gradients = random_gradients(replicas)[:4]
    weights = run.history(gradients)
    for between, before in ((1, 0), (3, 2)):
        assert all(
            np.array_equal(x, y) for x, y in zip(weights[between], weights[before], strict=True)
        )
    exact = oracle.history(oracle_layers(), means_of(gradients), [RATE] * 2)
    assert_agrees(weights[::2], exact)


def test_gradients_are_divided_by_the_loss_scale_factor(keras3):
    run = run_of(keras3, lamb(keras3, loss_scale_factor=512.0))
    gradients = random_gradients(1)
    scaled = [[[g * 512 for g in grads] for grads in replicas] for replicas in gradients]
    assert float(run.optimizer.scale_loss(tf.constant(2.0))) == 1024.0
    assert_agrees(run.history(scaled), oracle.history(oracle_layers(), gradients, [RATE] * 5))


def loss_scaled(flavour, inner):
    if flavour.name == "keras3":
        return flavour.keras.optimizers.LossScaleOptimizer(inner, initial_scale=512.0)
    return flavour.keras.mixed_precision.LossScaleOptimizer(inner, initial_scale=512.0)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_dynamic_loss_scale_skips_gradients_that_are_not_finite(flavour, mirrored, replicas):
    strategy = mirrored if replicas == 2 else None
    run = run_of(flavour, lambda: loss_scaled(flavour, lamb(flavour)()), strategy)
    # In tf_keras the training loop unscales the gradients, and a skipped step is counted.
    scale = 512.0 if flavour.name == "keras3" else 1.0
    gradients = random_gradients(replicas)
    scaled = [[[g * scale for g in grads] for grads in shares] for shares in gradients]
    weights = run.history(scaled[:2])
    assert_agrees(weights, oracle.history(oracle_layers(), gradients[:2], [RATE] * 2))
    run.step([[np.full_like(g, np.inf) for g in grads] for grads in scaled[2]])
    assert all(np.array_equal(x, y) for x, y in zip(run.weights(), weights[-1], strict=True))
    run.step(scaled[3])
    assert all(np.isfinite(x).all() for x in run.weights())
    assert not np.array_equal(run.weights()[0], weights[-1][0])


def test_a_loss_scale_optimizer_is_saved_with_ours_inside(flavour):
    inner = lamb(flavour, exclude_from_weight_decay=["bias"])()
    optimizer = loss_scaled(flavour, inner)
    config = flavour.keras.optimizers.serialize(optimizer)
    loaded = flavour.keras.optimizers.deserialize(config)
    assert type(loaded) is type(optimizer)
    assert loaded.inner_optimizer.get_config() == inner.get_config()


@pytest.fixture
def policy(request, flavour):
    keras = flavour.keras
    set_policy = keras.mixed_precision.set_global_policy
    set_policy(request.param)
    yield
    set_policy("float32")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["LAMB", "LARS"])
@pytest.mark.parametrize(
    ("policy", "replicas"), [("mixed_float16", 2), ("mixed_bfloat16", 1)], indirect=["policy"]
)
def test_mixed_precision_learns(flavour, policy, mirrored, rule, replicas):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    y = (x[:, :1] > 0).astype("float32")
    layers = flavour.keras.layers
    arguments = {"LAMB": {}, "LARS": {"trust_coefficient": 0.1}}[rule]
    flavour.keras.utils.set_random_seed(0)
    with mirrored.scope() if replicas == 2 else contextlib.nullcontext():
        model = flavour.keras.Sequential(
            [layers.Input((4,)), layers.Dense(8, activation="relu"), layers.Dense(1)]
        )
        optimizer = getattr(flavour.lamb, rule)(
            0.05, exclude_from_weight_decay=["bias"], **arguments
        )
        model.compile(optimizer, loss="mse")
    losses = model.fit(x, y, batch_size=16, epochs=5, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.iterations.numpy() == 20
    strategy = mirrored if replicas == 2 else None
    state = [*model.weights, *(slot for kind in optimizer._plan.slots for slot in kind)]
    for variable in state:
        values = copies(strategy, variable)
        assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in values)
        assert all(value.tobytes() == values[0].tobytes() for value in values)


@pytest.mark.parametrize("rule", ["LAMB", "LARS"])
def test_the_error_of_a_bfloat16_first_moment(keras3, rule):
    """After five steps the total change of the weights has an error below 1/128, but above 0."""
    rate = {"LAMB": 0.05, "LARS": 10.0}[rule]
    changes = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = getattr(keras3.lamb, rule)
        run = run_of(keras3, lambda o=optimizer, d=dtype: o(rate, moment_dtype=d))
        for gradients in random_gradients(1)[:5]:
            run.step(gradients)
        ends = [copies(run.strategy, variable)[0] for variable in run.variables]
        changes[dtype] = [
            np.asarray(end, np.float64) - start
            for end, start in zip(ends, random_weights(), strict=True)
        ]
    for exact, near in zip(changes["float32"], changes["bfloat16"], strict=True):
        assert np.linalg.norm(near - exact) < 2**-7 * np.linalg.norm(exact)
    assert any((near != exact).any() for exact, near in zip(*changes.values(), strict=True))
