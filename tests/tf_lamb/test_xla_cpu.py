"""What differs on a CPU (sums by rows, waves, u computed twice) does not change the results."""

import contextlib
import math

import numpy as np
import pytest
import tensorflow as tf

import tf_lamb
from tf_lamb import norms, xla, xla_cpu

SHAPES = [(700, 40), (40,), (3, 3, 64, 80), (), (1, 1, 90, 64), (0, 4), (9000,), (30, 12, 64)]
SUMS = [contextlib.nullcontext, xla_cpu.xla_sums, xla_cpu.tensorflow_sums]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_by_rows_is_the_sum(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    exact = np.sum(x.astype(np.float64))
    allowed = 1e-6 * np.abs(x.astype(np.float64)).sum()
    assert abs(float(xla_cpu._row_sum(tf.constant(x))) - exact) <= allowed


@pytest.mark.parametrize("sums", SUMS, ids=lambda sums: sums.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_sum_of_squares_agrees_with_float64(shape, sums):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with sums():
        found = float(norms.sum_squares(tf.constant(x)))
    assert found == pytest.approx(np.sum(np.square(x.astype(np.float64))), rel=1e-6, abs=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e19, 3e38])
@pytest.mark.parametrize("sums", SUMS, ids=lambda sums: sums.__name__)
def test_one_bad_element_among_many_is_found(bad, sums):
    """Also one that is finite, but whose square is not finite in float32."""
    optimizer = tf_lamb.LAMB()
    arrays = [np.ones(shape, np.float32) for shape in SHAPES]
    with sums():
        gradients = optimizer.summarize_gradients([tf.constant(x) for x in arrays])
        assert gradients.finite and not any(map(float, gradients.nonfinite_marks))
        arrays[2].flat[12345] = bad
        gradients = optimizer.summarize_gradients([tf.constant(x) for x in arrays])
    assert not gradients.finite
    seen = [bool(np.isnan(value)) for value in gradients.nonfinite_marks]
    assert seen == [i == 2 for i in range(len(SHAPES))]


def arrays(seed, shapes):
    """Arrays of normal numbers, each ten times as large as the one before."""
    rng = np.random.default_rng(seed)
    drawn = enumerate(rng.normal(size=shape) for shape in shapes)
    return [np.asarray(x * 10.0**i, np.float32) for i, x in drawn]


def state(optimizer, variables):
    return [np.array(v.numpy()) for kind in (variables, *optimizer._plan.slots) for v in kind]


def updated(make, grads, params, whole=False):
    """Weights and slots after two updates.

    Args:
        whole: whether the user compiles the step. All layers are then in one program, in waves.
    """
    optimizer = make()
    variables = [tf.Variable(x, name=f"w{i}") for i, x in enumerate(params)]
    optimizer.build(variables)

    def step(*grads):
        optimizer.apply(list(grads), variables)

    step = tf.function(step, jit_compile=True) if whole else step
    for _ in range(2):
        step(*(tf.constant(x) for x in grads))
    return state(optimizer, variables), optimizer.telemetry_rows


def updated_eagerly(make, grads, params):
    """Weights and slots after two updates, which run operation by operation."""
    optimizer = make()
    optimizer.build([tf.Variable(x, name=f"w{i}") for i, x in enumerate(params)])
    values = [list(map(tf.constant, params))]
    values += [[tf.zeros(x.shape) for x in params] for _ in optimizer.slot_names]
    index, grads = tuple(range(len(params))), list(map(tf.constant, grads))
    for step in (1.0, 2.0):
        params, *slots = values
        rate, step = tf.constant(0.1), tf.constant(step)
        values, _, rows = optimizer._update_model(index, grads, params, slots, rate, step)
    return [np.asarray(x) for kind in values for x in kind], np.stack([rows[i] for i in index])


# Optimizers share their programs. Each case therefore has arguments that no other test has, so that
# its programs are made with the value of RECOMPUTE_ABOVE that the test sets.
CASES = {
    "LAMB": ("LAMB", {"beta_1": 0.6875}),
    "LAMB, groups": ("LAMB", {"beta_1": 0.703125, "layer_groups": ["w[04]$"]}),
    "N-LAMB": ("LAMB", {"beta_1": 0.71875, "nesterov": "first", "layer_axes": {"w2$": 2}}),
    "NN-LAMB": ("LAMB", {"beta_1": 0.734375, "nesterov": "both", "epsilon": 0.0}),
    "LARS": ("LARS", {"momentum": 0.6875}),
    "LARS, groups": ("LARS", {"momentum": 0.703125, "layer_groups": ["w[04]$"]}),
    "scaled LARS": ("LARS", {"momentum": 0.71875, "form": "tf-models-scaled", "nesterov": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["programs per layer", "one program"])
@pytest.mark.parametrize("case", CASES)
def test_the_update_on_a_cpu_agrees_with_the_eager_one(monkeypatch, case, whole):
    """In waves of 20,000 elements; u is computed twice in layers of more than 1,000."""
    monkeypatch.setattr(xla_cpu, "RECOMPUTE_ABOVE", 1000)
    monkeypatch.setattr(xla, "WAVE_ELEMENTS", 20_000)
    rule, told = CASES[case]
    shapes = [(700, 40), (40,), (3, 3, 64, 80), (), (30, 12, 64)]
    params, grads = arrays(1, shapes), arrays(2, shapes)

    def make():
        return getattr(tf_lamb, rule)(0.1, global_clipnorm=1.0, telemetry=True, **told)

    recomputed = []
    recomputing = xla_cpu.make_recomputing
    monkeypatch.setattr(
        xla_cpu, "make_recomputing", lambda rule: recomputed.append(rule) or recomputing(rule)
    )
    plain, plain_rows = updated_eagerly(make, grads, params)
    assert not recomputed
    found, rows = updated(make, grads, params, whole)
    assert recomputed
    for one, other in zip(plain, found, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(other, one, rtol=2e-6, atol=2e-7 * np.abs(one).max())
    np.testing.assert_allclose(rows, plain_rows, rtol=3e-6)
    moved = np.abs(plain[0] - params[0]).max()
    assert moved > 1e-4 * np.abs(params[0]).max()


def test_a_wave_depends_on_a_ratio_of_the_one_before(monkeypatch):
    """Only if the user compiles the step, and only if the wave before is full."""
    chained = []
    depend_on = xla_cpu.depend_on
    monkeypatch.setattr(
        xla_cpu, "depend_on", lambda ratio, x: chained.append(x.shape) or depend_on(ratio, x)
    )
    monkeypatch.setattr(xla, "WAVE_ELEMENTS", 100)
    shapes = [(60,), (61,), (62,), (63,), (64,)]
    params, grads = arrays(1, shapes), arrays(2, shapes)

    def make():
        return tf_lamb.LAMB(0.1, beta_1=0.765625, telemetry=True)

    updated(make, grads, params)
    assert chained == []
    updated(make, grads, params, whole=True)
    # Two layers make a wave of more than 100 elements: weights and gradients of the third, of the
    # fourth and of the fifth depend on a ratio.
    assert [tuple(shape) for shape in chained] == [shape for shape in shapes[2:] for _ in "xg"]


def test_depend_on_keeps_every_bit():
    x = np.float32([0.0, -0.0, 1e-30, -3.5, math.inf, math.nan])
    assert tf.constant(1.0) + 0.0 == 1.0  # puts 0.0 into TensorFlow's cache of constants
    for ratio in (1e-30, 1.0, [[2.0], [1e29]]):
        for compiled in (False, True):
            depend_on = (
                tf.function(xla_cpu.depend_on, jit_compile=True)
                if compiled
                else (xla_cpu.depend_on)
            )
            kept = depend_on(tf.constant(ratio), tf.constant(x)).numpy()
            assert kept.tobytes() == x.tobytes()
