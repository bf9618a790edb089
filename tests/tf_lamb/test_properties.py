"""Properties of any model, with Hypothesis: no NaN from finite input, exclusions, invariances.

They are tested on `Layerwise._update_model`, which is not compiled, with shapes of rank 0 to 4,
empty ones included, norms from 1e-30 to 1e30, and every dtype of the weights.
"""

import contextlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import tf_lamb
from tf_lamb import lamb, lars, layerwise, norms, xla_cpu
from tf_lamb.layers import VariablePlan

checked = settings(deadline=None, derandomize=True, database=None, max_examples=50)
DTYPES = ("float16", "bfloat16", "float32", "float64")
flags = st.booleans()
shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
powers = st.one_of(st.none(), st.integers(-30, 30))  # of ten, in a norm; None: all zeros
RATE = 0.1


@st.composite
def layers(draw, adapted=flags):
    """One layer's decisions; what is not adapted is in no group (test_slices.py)."""
    shape, adapted = draw(shapes), draw(adapted)
    axes = tuple(range(draw(st.integers(0, len(shape)))))
    group = None if axes or not adapted else draw(st.sampled_from([None, "a", "b"]))
    return VariablePlan("w", shape, decayed=draw(flags), adapted=adapted, axes=axes, group=group)


def lambs():
    """Arguments of `LAMB`, but for those that change the gradients."""
    return st.fixed_dictionaries(
        {
            "learning_rate": st.sampled_from([1e-6, 0.1, 30.0]),
            "beta_1": st.sampled_from([0.0, 0.5, 0.9]),
            "beta_2": st.sampled_from([0.5, 0.999]),
            "epsilon": st.sampled_from([0.0, 1e-6]),
            "weight_decay": st.sampled_from([0.0, 0.01]),
            "bias_correction": st.sampled_from([True, False, "rate"]),
            "nesterov": st.sampled_from(lamb.NESTEROV),
            "norm": st.sampled_from(norms.NORMS),
            "weight_norm_bounds": st.sampled_from([None, (0.0, 10.0), (1e-3, 1e3)]),
            "trust_ratio_bounds": st.sampled_from([None, None, (0.0, 1.0), (0.01, 10.0)]),
            "skip_nonfinite": flags,
            "telemetry": flags,
        }
    )


def larses():
    """Arguments of `LARS`, but for those that change the gradients."""
    return st.fixed_dictionaries(
        {
            "learning_rate": st.sampled_from([1e-6, 0.1, 30.0]),
            "form": st.sampled_from(list(lars.FORMS)),
            "momentum": st.sampled_from([0.0, 0.5, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.01]),
            "trust_coefficient": st.sampled_from([0.001, 1.0]),
            "epsilon": st.sampled_from([0.0, 1e-6]),
            "nesterov": flags,
            "norm": st.sampled_from(norms.NORMS),
            "trust_ratio_bounds": st.sampled_from([None, None, (0.0, 1.0), (0.01, 10.0)]),
            "skip_nonfinite": flags,
            "telemetry": flags,
        }
    )


SETTINGS = {"LAMB": lambs(), "LARS": larses()}
SUMS = st.sampled_from([contextlib.nullcontext, xla_cpu.xla_sums, xla_cpu.tensorflow_sums])


def array(rng, shape, power, dtype="float32"):
    """Of norm 10**power, as far as the dtype goes; zeros if the power is None."""
    x = rng.normal(size=shape)
    if power is None or 0 in shape:
        return tf.zeros(shape, dtype)
    x = x * (10.0**power / np.sqrt(np.sum(x**2)))
    dtype = tf.as_dtype(dtype)
    return tf.cast(tf.constant(np.clip(x, float(dtype.min), float(dtype.max))), dtype)


def walk(rule, weights, gradients, plan, arguments, sums=contextlib.nullcontext):
    """Lists `(weights, *slots)` and telemetry `[layer]` after each of the steps."""
    optimizer = getattr(tf_lamb, rule)(**arguments)
    optimizer._plan = layerwise.Plan(tuple(plan), (), None, None)
    index = tuple(range(len(plan)))
    state = [weights] + [[tf.zeros(x.shape) for x in weights] for _ in optimizer.slot_names]
    rate = tf.constant(optimizer.hyperparameters.learning_rate, tf.float32)
    for step, grads in enumerate(gradients, start=1):
        params, *slots = state
        with sums():
            state, _, rows = optimizer._update_model(
                index, grads, params, slots, rate, tf.constant(float(step))
            )
        yield state, None if rows is None else [rows[i] for i in index]


def numbers(tensors):
    return [np.asarray(tf.cast(x, "float64")) for x in tensors]


def bits(tensors):
    return [np.asarray(x.numpy()).tobytes() for x in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("rule", SETTINGS)
@checked
@given(data=st.data(), seed=st.integers(0, 999))
def test_finite_input_gives_no_nan(rule, data, seed):
    """Telemetry neither, but for ‖u‖ of a gradient whose squares leave float32.

    An update too large for the dtype may be infinite.
    """
    rng = np.random.default_rng(seed)
    plan = data.draw(st.lists(layers(), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    scalings = [{}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}, {"clipvalue": 1.0}]
    scalings += [{"unit_gradient": True}] if rule == "LAMB" else []
    arguments = data.draw(SETTINGS[rule]) | data.draw(st.sampled_from(scalings))
    weights = [array(rng, layer.shape, data.draw(powers), dtype) for layer in plan]
    gradients = [[array(rng, layer.shape, data.draw(powers)) for layer in plan] for _ in range(2)]
    steps = walk(rule, weights, gradients, plan, arguments, data.draw(SUMS))
    for grads, (state, rows) in zip(gradients, steps, strict=False):
        for x, layer in zip(state[0], plan, strict=True):
            assert x.shape == layer.shape and x.dtype == dtype
        assert not any(np.isnan(x).any() for kind in state for x in numbers(kind))
        for row, g in zip(numbers(rows or []), numbers(grads), strict=False):
            too_large = arguments["skip_nonfinite"] and 4 * np.sum(g**2) > np.finfo("f4").max
            assert not np.isnan(row[[0, 2]]).any() and np.isnan(row[1]) == too_large
        if not all(np.isfinite(x).all() for x in numbers(state[0])):
            break  # what follows has no finite input


@pytest.mark.parametrize("rule", SETTINGS)
def test_a_rate_beyond_float32_gives_no_nan(rule):
    """A ratio of 1e38 times a rate of 30, where an element has no gradient: infinity times 0."""
    told = {"learning_rate": 30.0, "weight_decay": 0.0}
    if rule == "LAMB":
        told |= {"epsilon": 1e-6}  # u = g / epsilon
    else:
        told |= {"epsilon": 0.0, "trust_coefficient": 1.0}
    size = {"LAMB": 2e-25, "LARS": 2e-19}[rule]  # no square below float32
    plan = [VariablePlan("w", (2,), decayed=True, adapted=True)]
    weights, gradients = [tf.constant([1e19, 1e19])], [[tf.constant([size, 0.0])]]
    ((state, _),) = walk(rule, weights, gradients, plan, told)
    assert not any(np.isnan(x).any() for kind in state for x in numbers(kind))
    assert not np.array_equal(*numbers([state[0][0], weights[0]]))


@pytest.mark.slow
@pytest.mark.parametrize("rule", SETTINGS)
@checked
@given(data=st.data(), seed=st.integers(0, 999))
def test_an_excluded_rule_never_moves_a_weight(rule, data, seed):
    """Without a gradient only decay could; not decayed, the weights keep their bits."""
    rng = np.random.default_rng(seed)
    plan = data.draw(st.lists(layers(), min_size=1, max_size=3))
    still = [not layer.decayed for layer in plan]
    dtype = data.draw(st.sampled_from(DTYPES))
    weights = [array(rng, layer.shape, data.draw(powers), dtype) for layer in plan]
    gradients = [
        [tf.zeros(x.shape) if s else tf.ones(x.shape) for x, s in zip(weights, still, strict=True)]
    ] * 2
    arguments = data.draw(SETTINGS[rule])
    for state, _ in walk(rule, weights, gradients, plan, arguments, data.draw(SUMS)):
        for x, before, s in zip(bits(state[0]), bits(weights), still, strict=True):
            assert not s or x == before


SCALE_FREE = {
    "LAMB": ("LAMB", {"epsilon": 1e-30}),
    "LAMB without epsilon": ("LAMB", {"epsilon": 0.0}),
    "unit gradient": ("LAMB", {"epsilon": 1e-6, "unit_gradient": True}),
    "paper": ("LARS", {"form": "paper", "weight_decay": 0.0, "epsilon": 0.0}),
    "scaled": ("LARS", {"form": "tf-models-scaled", "weight_decay": 0.0, "epsilon": 0.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALE_FREE)
@checked
@given(data=st.data(), seed=st.integers(0, 999), power=st.integers(-12, 12))
def test_the_size_of_the_gradient_does_not_matter(name, data, seed, power):
    """To the bit for a power of two, as long as no square leaves float32."""
    rule, told = SCALE_FREE[name]
    rng = np.random.default_rng(seed)
    adapted = st.just(True) if rule == "LARS" else flags  # LARS's ratio is what is scale-free
    plan = data.draw(st.lists(layers(adapted), min_size=1, max_size=3))
    arguments = data.draw(SETTINGS[rule]) | told
    if rule == "LARS":
        arguments["trust_ratio_bounds"] = None  # its ratio has the gradient's size in it
    sums = data.draw(SUMS)
    weights = [array(rng, layer.shape, data.draw(st.integers(-3, 3))) for layer in plan]
    gradients = [[array(rng, layer.shape, 0) for layer in plan] for _ in range(2)]
    ends = []
    for scale in (1.0, 2.0**power):
        scaled = [[g * scale for g in grads] for grads in gradients]
        *_, (state, _) = walk(rule, weights, scaled, plan, arguments, sums)
        ends.append(bits(state[0]))
    assert ends[0] == ends[1]


@pytest.mark.slow
@pytest.mark.parametrize("rule", SETTINGS)
@checked
@given(data=st.data(), seed=st.integers(0, 999))
def test_the_order_of_the_variables_does_not_matter(rule, data, seed):
    rng = np.random.default_rng(seed)
    plan = data.draw(st.lists(layers(), min_size=2, max_size=4))
    arguments = data.draw(SETTINGS[rule]) | {"telemetry": True, "learning_rate": RATE}
    weights = [array(rng, layer.shape, data.draw(st.integers(-3, 3))) for layer in plan]
    gradients = [[array(rng, layer.shape, 0) for layer in plan] for _ in range(2)]
    order = data.draw(st.permutations(range(len(plan))))

    def shuffled(values):
        return [values[i] for i in order]

    *_, (state, rows) = walk(rule, weights, gradients, plan, arguments)
    *_, (other, other_rows) = walk(
        rule, shuffled(weights), [shuffled(g) for g in gradients], shuffled(plan), arguments
    )
    for before, after in zip(state, other, strict=True):
        for x, y in zip(numbers(shuffled(before)), numbers(after), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * np.max(np.abs(x), initial=0))
    # To the bit, but for what shares a norm: its sum has another order.
    for i, j in enumerate(order):
        if plan[j].group is None:
            assert bits([state[0][j], rows[j]]) == bits([other[0][i], other_rows[i]])
