"""What is written otherwise for a CPU (waves, sums by rows, u made twice) computes the same."""

import math

import numpy as np
import pytest
import tensorflow as tf

import tf_lamb
from tf_lamb import norms, updates, waves
from tf_lamb.layers import Layer

SHAPES = [(700, 40), (40,), (3, 3, 64, 80), (), (1, 1, 90, 64), (0, 4), (9000,), (30, 12, 64)]


def layer(shape, group=None):
    return Layer("layer", shape, decayed=True, adapted=True, group=group)


def test_every_layer_is_in_one_wave_and_a_group_in_the_same():
    layers = [layer((5,)), layer((6,), "g"), layer((50,)), layer((1,)), layer((7,), "g")]
    assert waves.waves(layers, largest=11) == [[0, 1, 4], [2], [3]]
    assert waves.waves(layers, largest=10**9) == [[0, 1, 4, 2, 3]]
    assert waves.waves([], largest=4) == [[]]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_by_rows_is_the_sum(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    exact = np.sum(x.astype(np.float64))
    allowed = 1e-6 * np.abs(x.astype(np.float64)).sum()
    assert abs(float(norms.total(tf.constant(x), (), True)) - exact) <= allowed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("by_rows", [False, True])
def test_one_flaw_among_many_numbers_is_seen(bad, by_rows):
    tensors = [np.ones(shape, np.float32) for shape in SHAPES]
    assert norms.all_finite(norms.flaws([tf.constant(x) for x in tensors], by_rows))
    tensors[2].flat[12345] = bad
    flaws = norms.flaws([tf.constant(x) for x in tensors], by_rows)
    assert [bool(np.isnan(flaw)) for flaw in flaws] == [i == 2 for i in range(len(SHAPES))]
    assert not norms.all_finite(flaws)


def updated(make, grads, params, on_cpu=None):
    """Parameters and slots after one update: compiled as on this CPU, or eager in a given order."""
    optimizer = make()
    variables = [tf.Variable(x, name=f"w{i}") for i, x in enumerate(params)]
    optimizer.build(variables)
    grads = [tf.constant(x) for x in grads]
    if on_cpu is None:
        optimizer.apply(grads)
        slots = [[v.numpy() for v in kind] for kind in optimizer._plan.slots]
        return [[v.numpy() for v in variables], *slots]
    slots = [[tf.zeros(x.shape) for x in params] for _ in optimizer.slot_names]
    params, index = [tf.constant(x) for x in params], tuple(range(len(params)))
    rate, step = tf.constant(0.1), tf.constant(1.0)
    return optimizer._updated(index, grads, params, slots, rate, step, on_cpu=on_cpu)[0]


@pytest.mark.parametrize("rule", [tf_lamb.LAMB, tf_lamb.LARS])
@pytest.mark.parametrize("groups", [(), ("w[04]$",)])
def test_the_order_for_a_cpu_gives_the_same_update(monkeypatch, rule, groups):
    monkeypatch.setattr(updates, "KEPT", 1000)  # so that some u are made twice
    monkeypatch.setattr(waves.waves, "__defaults__", (20_000,))
    rng = np.random.default_rng(1)
    shapes = [shape for shape in SHAPES if 0 not in shape]
    params, grads = (
        [np.asarray(rng.normal(size=shape) * 10.0**i, np.float32) for i, shape in enumerate(shapes)]
        for _ in range(2)
    )

    def make():
        return rule(0.1, layer_groups=groups, global_clipnorm=1.0, telemetry=True)

    plain = updated(make, grads, params, on_cpu=False)
    for ordered in (updated(make, grads, params, on_cpu=True), updated(make, grads, params)):
        flat = zip(tf.nest.flatten(plain), tf.nest.flatten(ordered), strict=True)
        for one, other in flat:
            one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
            np.testing.assert_allclose(other, one, rtol=2e-6, atol=2e-7 * np.abs(one).max())
    moved = np.abs(np.asarray(plain[0][0]) - params[0]).max()
    assert moved > 1e-4 * np.abs(params[0]).max()


def test_what_comes_after_a_ratio_keeps_every_bit():
    x = np.float32([0.0, -0.0, 1e-30, -3.5, math.inf, math.nan])
    assert tf.constant(1.0) + 0.0 == 1.0  # which puts 0.0 into TensorFlow's cache of constants
    for ratio in (1e-30, 1.0, [[2.0], [1e29]]):
        assert updates.after(tf.constant(ratio), tf.constant(x)).numpy().tobytes() == x.tobytes()
