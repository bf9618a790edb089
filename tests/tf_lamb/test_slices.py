"""Layers that are not variables: slices of a stacked variable, groups of variables; and sparse
gradients.

In the oracle, each slice is a layer of its own, and a group is one layer: its members concatenated.
"""

import math

import numpy as np
import oracle
import pytest
import tensorflow as tf
from drive import LAYERS, Run, assert_agrees, largest, random_gradients, random_weights
from test_updates import RATES, schedule

RULES = {
    "LAMB": (oracle.Lamb, {"beta_2": 0.95, "epsilon": 0.05, "weight_decay": 0.1}),
    "LARS": (oracle.Lars, {"momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.2}),
    "scaled LARS": (
        oracle.Lars,
        {"trust_coefficient": 0.2, "weight_decay": 0.1, "form": "tf-models-scaled"},
    ),
}
NAMES = list(LAYERS)
AXES = {"embed": 0, "conv/kernel": (2,), "attention": (0, -1)}
GROUPS = {
    "conv/": ["conv/kernel", "conv/bias"],
    "query|gamma|temperature": ["attention/query", "norm/gamma", "temperature"],
}


def make(flavour, rule, **arguments):
    name = rule.split()[-1]
    return lambda: getattr(flavour.lamb, name)(schedule(flavour), **RULES[rule][1] | arguments)


def places(shape, axes):
    """The index of each slice along the axes."""
    axes = [axis % len(shape) for axis in ((axes,) if isinstance(axes, int) else axes)]
    for place in np.ndindex(*(shape[axis] for axis in axes)):
        index = [slice(None)] * len(shape)
        for axis, position in zip(axes, place, strict=True):
            index[axis] = position
        yield tuple(index)


class Sliced:
    """A variable of the oracle that holds one layer for each slice."""

    def __init__(self, layer_class, x, axes, **arguments):
        self.x = np.array(x, np.float64)
        self.parts = [
            (place, layer_class(self.x[place], **arguments)) for place in places(x.shape, axes)
        ]

    def descend(self, g, rate):
        self.x = self.x.copy()
        for place, part in self.parts:
            part.descend(g[place], rate)
            self.x[place] = part.x


def axes_of(name):
    return next((axes for pattern, axes in AXES.items() if pattern in name), ())


def expected_slices(rule, gradients, **arguments):
    layer_class, own = RULES[rule]
    layers = [
        Sliced(layer_class, x, axes_of(name), **own | arguments)
        for name, x in zip(NAMES, random_weights(), strict=True)
    ]
    return oracle.history(layers, gradients, RATES)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_each_slice_is_a_layer(flavour, mirrored, rule, replicas):
    gradients = random_gradients(replicas)
    strategy = mirrored if replicas == 2 else None
    run = Run(flavour, make(flavour, rule, layer_axes=AXES), random_weights(), strategy)
    weights = run.history(gradients)
    assert_agrees(weights, expected_slices(rule, gradients))
    whole = [RULES[rule][0](x, **RULES[rule][1]) for x in random_weights()]
    with pytest.raises(AssertionError):
        assert_agrees(weights, oracle.history(whole, gradients, RATES))


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_another_norm_of_each_slice(keras3, norm):
    gradients = random_gradients(1)
    run = Run(keras3, make(keras3, "LAMB", layer_axes=AXES, norm=norm), random_weights())
    assert_agrees(run.history(gradients), expected_slices("LAMB", gradients, norm=norm))


@pytest.mark.parametrize("rule", RULES)
def test_slices_equal_the_same_slices_as_variables(flavour, rule):
    """Except for the order of additions within a norm."""
    rng = np.random.default_rng(5)
    stacked = np.float32(rng.normal(size=(3, 4, 5)) * np.array([1e-3, 1, 50])[:, None, None])
    grads = [np.float32(rng.normal(size=stacked.shape)) for _ in range(4)]
    arguments = {"layer_axes": {"w": 0}}
    one = Run(flavour, make(flavour, rule, **arguments), [stacked], names=["w"])
    three = Run(flavour, make(flavour, rule), list(stacked), names=["a", "b", "c"])
    for g in grads:
        one.step([[g]])
        three.step([list(g)])
    for together, apart in zip(one.weights()[0], three.weights(), strict=True):
        np.testing.assert_allclose(together, apart, rtol=0, atol=5e-7 * largest(apart))


def concatenated(arrays, names):
    """One flat array for each group, then the other arrays unchanged."""
    by_name = dict(zip(names, arrays, strict=True))
    flat = [
        np.concatenate([np.ravel(by_name.pop(name)) for name in members])
        for members in GROUPS.values()
    ]
    return flat + list(by_name.values())


def split_groups(joined):
    """The inverse of `concatenated`."""
    shapes = {name: shape for name, (shape, _, _) in LAYERS.items()}
    flats, others = joined[: len(GROUPS)], list(joined[len(GROUPS) :])
    by_name = {}
    for flat, members in zip(flats, GROUPS.values(), strict=True):
        ends = np.cumsum([math.prod(shapes[name]) for name in members])
        for name, part in zip(members, np.split(flat, ends[:-1]), strict=True):
            by_name[name] = part.reshape(shapes[name])
    return [by_name[name] if name in by_name else others.pop(0) for name in NAMES]


def expected_groups(rule, gradients, **arguments):
    layer_class, own = RULES[rule]
    layers = [layer_class(x, **own | arguments) for x in concatenated(random_weights(), NAMES)]
    joined = [[concatenated(grads, NAMES) for grads in replicas] for replicas in gradients]
    return [split_groups(layers) for layers in oracle.history(layers, joined, RATES)]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_a_group_shares_one_ratio(flavour, mirrored, rule, replicas):
    gradients = random_gradients(replicas)
    strategy = mirrored if replicas == 2 else None
    groups = {"layer_groups": list(GROUPS)}
    run = Run(flavour, make(flavour, rule, **groups), random_weights(), strategy)
    assert_agrees(run.history(gradients), expected_groups(rule, gradients))


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_another_norm_of_a_group(keras3, norm):
    gradients = random_gradients(1)
    make_lamb = make(keras3, "LAMB", layer_groups=list(GROUPS), norm=norm)
    run = Run(keras3, make_lamb, random_weights())
    assert_agrees(run.history(gradients), expected_groups("LAMB", gradients, norm=norm))


@pytest.mark.parametrize("rule", RULES)
def test_a_group_equals_one_variable(flavour, rule):
    gradients = random_gradients(1)
    groups = Run(flavour, make(flavour, rule, layer_groups=list(GROUPS)), random_weights())
    joined = concatenated(random_weights(), NAMES)
    names = [f"v{i}" for i in range(len(joined))]
    ones = Run(flavour, make(flavour, rule), joined, names=names)
    for replicas in gradients:
        groups.step(replicas)
        ones.step([concatenated(replicas[0], NAMES)])
    for together, apart in zip(groups.weights(), split_groups(ones.weights()), strict=True):
        np.testing.assert_allclose(together, apart, rtol=0, atol=1e-6 * largest(apart))


@pytest.mark.slow
@pytest.mark.parametrize("telemetry", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_an_excluded_variable_is_in_no_group(flavour, rule, telemetry):
    """Its weights and gradient do not affect the ratio of the others, with or without telemetry."""
    gradients = random_gradients(1)
    arguments = {"layer_groups": ["conv/"], "exclude_from_layer_adaptation": ["conv/kernel"]}
    make_it = make(flavour, rule, telemetry=telemetry, **arguments)
    layer_class, own = RULES[rule]
    layers = [
        layer_class(x, adapted=name != "conv/kernel", **own)
        for name, x in zip(NAMES, random_weights(), strict=True)
    ]
    run = Run(flavour, make_it, random_weights())
    assert_agrees(run.history(gradients), oracle.history(layers, gradients, RATES))


@pytest.mark.parametrize("rule", RULES)
def test_a_group_with_members_without_decay_shares_one_ratio(flavour, rule):
    gradients = random_gradients(1)
    arguments = {"exclude_from_weight_decay": ["bias"], "exclude_from_layer_adaptation": []}
    run = Run(
        flavour, make(flavour, rule, layer_groups=list(GROUPS), **arguments), random_weights()
    )
    layer_class, own = RULES[rule]
    decays = [
        np.full(shape, 0.0 if "bias" in name else own["weight_decay"])
        for name, (shape, _, _) in LAYERS.items()
    ]
    layers = [
        layer_class(x, **own | {"weight_decay": decay})
        for x, decay in zip(
            concatenated(random_weights(), NAMES), concatenated(decays, NAMES), strict=True
        )
    ]
    joined = [[concatenated(grads, NAMES) for grads in replicas] for replicas in gradients]
    exact = [split_groups(layers) for layers in oracle.history(layers, joined, RATES)]
    assert_agrees(run.history(gradients), exact)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_sparse_gradient_equals_the_dense_one(flavour, rule, graph):
    """Every bit of weights and slots, for rows 2 and 5, one of them twice."""
    rng = np.random.default_rng(6)
    table, bias = np.float32(rng.normal(size=(7, 3))), np.ones(3, np.float32)
    rows = tf.constant(rng.integers(-9, 10, size=(3, 3)), tf.float32)
    sparse = tf.IndexedSlices(rows, tf.constant([5, 2, 5]), tf.constant([7, 3]))
    results = []
    for g in (sparse, tf.convert_to_tensor(sparse)):
        run = Run(flavour, make(flavour, rule), [table, bias], names=["table", "bias"])

        def step(g=g, run=run):
            grads = [g, tf.ones(3)]
            run.optimizer.apply_gradients(zip(grads, run.variables, strict=True))

        step = tf.function(step) if graph else step
        for _ in range(3):
            step()
        state = [*run.variables, *(v for slot in run.optimizer._plan.slots for v in slot)]
        results.append([np.asarray(v.numpy()).tobytes() for v in state])
    assert results[0] == results[1]
    assert results[0][0] != table.tobytes()
