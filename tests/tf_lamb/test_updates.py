"""Both rules, in both flavours, agree with the float64 oracle and not with its mutants.

Each replica has its own gradients, the norms of the layers span six powers of ten, and the
tolerance is a small part of one step (`drive.assert_agrees`).
"""

import numpy as np
import oracle
import pytest
import tensorflow as tf
from drive import FEW_LAYERS, LAYERS, STEPS, Run, assert_agrees, random_gradients, random_weights

# Far from the defaults, so that a default in place of one of them is seen.
RULES = {
    "lamb": (
        "LAMB",
        oracle.Lamb,
        {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.05, "weight_decay": 0.1},
    ),
    "lars": (
        "LARS",
        oracle.Lars,
        {"momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.2, "epsilon": 0.1},
    ),
    "nesterov": (
        "LARS",
        oracle.Lars,
        {"weight_decay": 0.1, "trust_coefficient": 0.2, "nesterov": True},
    ),
}
# Patterns, and the layers that they exclude: from decay, from adaptation.
EXCLUSIONS = {
    "nothing": ({}, set(), set()),
    "decay alone": (
        {"exclude_from_weight_decay": ["bias$", "norm/"], "exclude_from_layer_adaptation": []},
        {"conv/bias", "norm/gamma"},
        set(),
    ),
    "one list for both": (
        {"exclude_from_weight_decay": ["bias$", "^norm", "zero"]},
        {"conv/bias", "norm/gamma", "zero/kernel"},
        {"conv/bias", "norm/gamma", "zero/kernel"},
    ),
    "a list for each": (
        {
            "exclude_from_weight_decay": ("bias", "still"),
            "exclude_from_layer_adaptation": ("conv", "temp.*ture"),
        },
        {"conv/bias", "still/kernel"},
        {"conv/bias", "conv/kernel", "temperature"},
    ),
    "adaptation of all": (
        {"exclude_from_layer_adaptation": ["."]},
        set(),
        set(LAYERS),
    ),
}
RATES = [0.05 - 0.045 * step / STEPS for step in range(STEPS)]


def schedule(flavour):
    """The rates above, computed by Keras."""
    return flavour.keras.optimizers.schedules.PolynomialDecay(0.05, STEPS, 0.005)


def expected(
    rule, gradients, exclusions="nothing", mutant=None, clip=(), names=tuple(LAYERS), **arguments
):
    """The oracle's weights `[step][layer]`; `arguments` replace those of `RULES`."""
    _, layer_class, own = RULES[rule]
    _, no_decay, no_adaptation = EXCLUSIONS[exclusions]
    layers = [
        layer_class(
            x,
            decayed=name not in no_decay,
            adapted=name not in no_adaptation,
            mutant=mutant,
            **own | arguments,
        )
        for name, x in zip(names, random_weights(names=names), strict=True)
    ]
    return oracle.history(layers, gradients, RATES, mutant, **dict(clip))


def make(flavour, rule, exclusions="nothing", **arguments):
    """A function that makes the optimizer with the schedule as its learning rate."""
    name, _, own = RULES[rule]
    arguments = own | EXCLUSIONS[exclusions][0] | arguments
    return lambda: getattr(flavour.lamb, name)(schedule(flavour), **arguments)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_oracle(flavour, mirrored, rule, replicas, graph):
    gradients = random_gradients(replicas)
    run = Run(
        flavour,
        make(flavour, rule, "a list for each"),
        random_weights(),
        mirrored if replicas == 2 else None,
        graph,
    )
    assert_agrees(run.history(gradients), expected(rule, gradients, "a list for each"))


@pytest.mark.parametrize("exclusions", EXCLUSIONS)
@pytest.mark.parametrize("rule", ["lamb", "lars"])
def test_exclusions_agree_with_the_oracle(flavour, rule, exclusions):
    gradients = random_gradients(1)
    run = Run(flavour, make(flavour, rule, exclusions), random_weights())
    assert_agrees(run.history(gradients), expected(rule, gradients, exclusions))


@pytest.mark.parametrize("rule", ["LAMB", "LARS"])
def test_the_defaults_are_the_documented_ones(flavour, rule):
    gradients = random_gradients(1)
    run = Run(flavour, lambda: getattr(flavour.lamb, rule)(0.05), random_weights())
    layer_class = oracle.Lamb if rule == "LAMB" else oracle.Lars
    layers = [layer_class(x) for x in random_weights()]
    # With LARS's default trust coefficient the steps are near float32's rounding, so the rate is
    # large.
    if rule == "LARS":
        run.optimizer.learning_rate = 10.0
    rates = [10.0 if rule == "LARS" else 0.05] * STEPS
    assert_agrees(run.history(gradients), oracle.history(layers, gradients, rates))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", ["lamb", "lars"])
def test_half_precision_gradients_are_exact(flavour, mirrored, rule, dtype):
    gradients, weights = random_gradients(2, names=FEW_LAYERS), random_weights(names=FEW_LAYERS)
    run = Run(flavour, make(flavour, rule), weights, mirrored, names=FEW_LAYERS)
    assert_agrees(run.history(gradients, dtype), expected(rule, gradients, names=FEW_LAYERS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", ["lamb", "lars"])
def test_half_precision_variables_have_float32_slots(flavour, rule, dtype):
    """The only error is the rounding of the weights: the oracle starts each step from the rounded
    weights, and keeps its own moments."""
    name, layer_class, own = RULES[rule]
    # float16 must hold the sum of their squares.
    weights = [x / 16 for x in random_weights(names=FEW_LAYERS)]
    run = Run(
        flavour,
        lambda: getattr(flavour.lamb, name)(0.05, **own),
        weights,
        graph=False,
        names=FEW_LAYERS,
        dtype=dtype,
    )
    layers = [layer_class(x, **own) for x in run.weights()]
    half_ulp = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    for replicas in random_gradients(1, names=FEW_LAYERS):
        for layer, x in zip(layers, run.weights(), strict=True):
            layer.x = x
        exact = oracle.history(layers, [replicas], [0.05])[-1]
        run.step(replicas, dtype)
        for x, e in zip(run.weights(), exact, strict=True):
            # The spacing of float16's subnormal numbers is 2^-24.
            np.testing.assert_allclose(x, e, rtol=1.01 * half_ulp, atol=2**-24)
    slots = [slot for kind in run.optimizer._plan.slots for slot in kind]
    moments = [layer.m for layer in layers]
    moments += [layer.v for layer in layers] if rule == "lamb" else []
    for slot, moment in zip(slots, moments, strict=True):
        assert tf.as_dtype(slot.dtype) == tf.float32
        np.testing.assert_allclose(
            slot.numpy(), moment, rtol=0, atol=1e-6 * max(np.abs(moment).max(), 1e-30)
        )


CLIPS = [("clipvalue", 3.0), ("clipnorm", 20.0), ("global_clipnorm", 100.0)]


@pytest.mark.parametrize("clip", CLIPS, ids=[name for name, _ in CLIPS])
@pytest.mark.parametrize("rule", ["lamb", "lars"])
def test_clipping_happens_after_the_sum_over_replicas(flavour, mirrored, rule, clip):
    gradients = random_gradients(2, names=FEW_LAYERS)
    exclusions = "adaptation of all" if rule == "lars" else "nothing"
    make_it = make(flavour, rule, exclusions, **dict([clip]))
    start = random_weights(names=FEW_LAYERS)
    weights = Run(flavour, make_it, start, mirrored, names=FEW_LAYERS).history(gradients)
    told = {"exclusions": exclusions, "names": FEW_LAYERS}
    assert_agrees(weights, expected(rule, gradients, clip=[clip], **told))
    with pytest.raises(AssertionError):  # the bound is small enough to clip
        assert_agrees(weights, expected(rule, gradients, **told))


def test_two_replicas_clip_together(flavour, mirrored):
    """Keras 3 clips (0, 4) and (3, 0) separately, which would give a step of (1, 1)."""
    run = Run(
        flavour,
        lambda: flavour.lamb.LARS(
            1.0,
            momentum=0.0,
            weight_decay=0.0,
            exclude_from_layer_adaptation=["."],
            global_clipnorm=1.0,
        ),
        [np.zeros(2, np.float32)],
        mirrored,
        names=["w"],
    )
    run.step([[np.array([0.0, 4.0])], [np.array([3.0, 0.0])]])
    np.testing.assert_allclose(run.weights()[0], [-0.6, -0.8], rtol=1e-6)


@pytest.fixture(scope="module")
def clipped_lamb(flavour, mirrored):
    """Weights of a run in which every mutant differs: decay, defaults, two replicas, clipping."""
    make_lamb = make(flavour, "lamb", beta_2=0.999, global_clipnorm=100.0)
    weights = random_weights(names=FEW_LAYERS)
    run = Run(flavour, make_lamb, weights, mirrored, names=FEW_LAYERS)
    return run.history(random_gradients(2, names=FEW_LAYERS))


@pytest.mark.parametrize("mutant", [None, *oracle.MUTANTS])
def test_every_mutant_is_rejected(clipped_lamb, mutant):
    mutated = expected(
        "lamb",
        random_gradients(2, names=FEW_LAYERS),
        names=FEW_LAYERS,
        mutant=mutant,
        clip=[("global_clipnorm", 100.0)],
        beta_2=0.999,
    )
    if mutant is None:
        assert_agrees(clipped_lamb, mutated)
    else:
        with pytest.raises(AssertionError):
            assert_agrees(clipped_lamb, mutated)


def test_keras3_accepts_tf_variables(keras3):
    weights = random_weights()
    variables = [tf.Variable(x, name=n) for n, x in zip(LAYERS, weights, strict=True)]
    optimizer = keras3.lamb.LAMB(0.05, exclude_from_weight_decay=["conv/bias$"])
    gradients = random_gradients(1)
    optimizer.apply_gradients(zip(gradients[0][0], variables, strict=True))
    assert [layer.name for layer in optimizer.layers] == list(LAYERS)
    excluded = [name == "conv/bias" for name in LAYERS]
    layers = [
        oracle.Lamb(x, decayed=not out, adapted=not out)
        for x, out in zip(weights, excluded, strict=True)
    ]
    exact = oracle.history(layers, gradients[:1], [0.05])
    assert_agrees([exact[0], [v.numpy().astype(np.float64) for v in variables]], exact)


def test_without_epsilon_an_element_without_a_gradient_does_not_move(flavour):
    """0/0 in m̂/√v̂ counts as 0, not as NaN: an embedding row that was never looked up."""
    table = flavour.Variable(np.ones(2, np.float32), name="table")
    optimizer = flavour.lamb.LAMB(0.1, epsilon=0.0, weight_decay=0.0)
    optimizer.apply_gradients([(tf.constant([0.0, 1.0]), table)])
    # u = (0, 1), so the step is the rate times the norm of the weights.
    np.testing.assert_allclose(table.numpy(), [1.0, 1 - 0.1 * 2**0.5], rtol=1e-6)
