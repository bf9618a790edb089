"""The private hooks of Keras that the optimizers override, and the programs that they compile.

When a new Keras renames a hook, the first test here fails.
"""

import inspect
from collections import Counter

import numpy as np
import oracle
import pytest
import tensorflow as tf
from drive import LAYERS, Run, assert_agrees, make_variables, random_gradients, random_weights

from tf_lamb import xla

HOOKS = {
    "keras3": {
        "_backend_apply_gradients": ["grads", "trainable_variables"],
        "_overwrite_variable_with_gradient": ["variable"],
    },
    "tf_keras": {
        "_distributed_apply_gradients_fn": ["distribution", "grads_and_vars", "kwargs"],
        "_clip_gradients": ["grads"],
        "_apply_weight_decay": ["variables"],
        "_deduplicate_sparse_grad": ["grads"],
    },
}
RULES = ["LAMB", "LARS"]


def staged(optimizer):
    """The `tf.function` that calls the programs of the layers."""
    return optimizer._plan.update._staged[False]


def operations(flavour, **arguments):
    """Operations in the graph of one LAMB step: outside XLA, and a Counter for each cluster."""
    variables = make_variables(flavour, random_weights())
    optimizer = flavour.lamb.LAMB(0.1, **arguments)
    optimizer.build(variables)

    @tf.function
    def step(grads):
        optimizer.apply_gradients(zip(grads, variables, strict=True))

    grads = [tf.constant(g) for g in random_gradients(1)[0][0]]
    graph = step.get_concrete_function(grads).graph.as_graph_def()
    functions = {f.signature.name: f for f in graph.library.function}
    outside, clusters = [], []

    def walk(nodes):
        for node in nodes:
            # A call names its function "f"; an update that may be skipped is in a branch.
            names = ("f", "then_branch", "else_branch")
            called = [functions[node.attr[name].func.name] for name in names if name in node.attr]
            if not called:
                outside.append(node.op)
            for function in called:
                if node.attr["_XlaMustCompile"].b:
                    ops = Counter(n.op for n in function.node_def)
                    clusters.append((function.signature.name, ops))
                else:
                    walk(function.node_def)

    walk(graph.node)
    return outside, clusters


def test_the_private_hooks_have_the_expected_parameters(flavour):
    base = flavour.keras.optimizers.Optimizer
    for name, parameters in HOOKS[flavour.name].items():
        found = [p for p in inspect.signature(getattr(base, name)).parameters if p != "self"]
        assert found == parameters, name


@pytest.mark.parametrize("rule", RULES)
def test_the_base_class_neither_clips_nor_decays(flavour, rule):
    """It would clip before the sum over the replicas, and decay outside the trust ratio."""
    variables = make_variables(flavour, random_weights())
    optimizer = getattr(flavour.lamb, rule)(0.1, weight_decay=0.5, clipnorm=1e-3)
    optimizer.build(variables)
    before = [v.numpy() for v in variables]
    grads = [tf.constant(g) for g in random_gradients(1)[0][0]]
    assert all(a is b for a, b in zip(optimizer._clip_gradients(grads), grads, strict=True))
    optimizer._apply_weight_decay(variables)
    assert all(np.array_equal(v, b) for v, b in zip(variables, before, strict=True))


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_one_trace_per_replica_and_none_on_the_second_call(flavour, mirrored, replicas, graph):
    strategy = mirrored if replicas == 2 else None
    run = Run(flavour, lambda: flavour.lamb.LAMB(0.1), random_weights(), strategy, graph)
    for gradients in random_gradients(replicas)[:3]:
        run.step(gradients)
        assert staged(run.optimizer).experimental_get_tracing_count() == replicas
    if graph:
        assert run.apply.experimental_get_tracing_count() == 1


def test_each_layer_is_an_xla_cluster(flavour):
    outside, clusters = operations(flavour, global_clipnorm=1.0)
    assert len(clusters) == len(LAYERS)
    assert all({"Sqrt", "Mul", "AssignVariableOp"} <= set(ops) for _, ops in clusters)
    # Each gradient is read once, for its sum of squares; nothing else outside depends on a layer.
    assert outside.count("L2Loss") == len(LAYERS)
    assert outside.count("AssignVariableOp") <= 1  # Keras 3 counts the steps with one


def test_similar_layers_share_a_program(flavour):
    names = [f"layer_{i}/kernel" for i in range(6)]
    beta_1 = {"keras3": 0.77, "tf_keras": 0.78}[flavour.name]
    weights = [np.ones((4, 3), np.float32)] * 5 + [np.ones((3, 4), np.float32)]
    run = Run(
        flavour,
        # Arguments that no other test has, because optimizers share their programs.
        lambda: flavour.lamb.LAMB(0.1, beta_1=beta_1, exclude_from_weight_decay=["layer_[01]"]),
        weights,
        names=names,
    )
    before = set(xla.PROGRAMS)
    for _ in range(3):
        run.step([weights])
    programs = [program for key, program in xla.PROGRAMS.items() if key not in before]
    assert len(programs) == 3  # excluded, not excluded, and the other shape
    assert {program.experimental_get_tracing_count() for program in programs} == {1}


def test_an_excluded_layer_adds_no_ops(flavour):
    def count(**arguments):
        total = Counter()
        for _, ops in operations(flavour, skip_nonfinite=False, **arguments)[1]:
            total += ops
        return total

    every_layer = count()
    no_bias = count(exclude_from_weight_decay=["bias"])
    no_layer = count(exclude_from_weight_decay=["."])
    # A ratio is a quotient of two norms, each a sum and a square root; the decay is one product.
    for op, each in {"Sum": 2, "Sqrt": 2, "DivNoNan": 1, "SelectV2": 2}.items():
        assert every_layer[op] - no_bias[op] == each, op
        assert every_layer[op] - no_layer[op] == each * len(LAYERS), op
    assert no_layer["Sum"] == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # Keras 3's warning is correct
def test_a_variable_without_a_gradient_does_not_change(flavour, rule):
    run = Run(flavour, lambda: getattr(flavour.lamb, rule)(0.1), random_weights())
    first, second, *_ = random_gradients(1)
    run.step(first)

    def state(layer):
        slots = [run.optimizer._plan.slots[k][layer] for k in range(len(run.optimizer.slot_names))]
        return [run.weights()[layer].tobytes(), *(slot.numpy().tobytes() for slot in slots)]

    before = [state(layer) for layer in range(len(LAYERS))]
    without = list(LAYERS).index("conv/kernel")
    run.step([[None if i == without else g for i, g in enumerate(share)] for share in second])
    same = [state(layer) == old for layer, old in enumerate(before)]
    assert same[without] and sum(same) == 1

    layer_class = {"LAMB": oracle.Lamb, "LARS": oracle.Lars}[rule]
    layers = [layer_class(x) for x in random_weights()]
    layers.pop(without)
    for share in first + second:
        share.pop(without)
    exact = oracle.history(layers, [first, second], [0.1, 0.1])[-1]
    weights = run.weights()
    weights.pop(without)
    for x, e in zip(weights, exact, strict=True):
        np.testing.assert_allclose(x, e, rtol=0, atol=3e-7 * np.abs(e).max())


@pytest.mark.parametrize("rule", RULES)
def test_methods_that_update_single_variables_are_refused(flavour, rule):
    optimizer = getattr(flavour.lamb, rule)(0.1)
    with pytest.raises(RuntimeError, match="exclude_from_weight_decay=\\[patterns\\]"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    with pytest.raises(RuntimeError, match="apply_gradients"):
        optimizer.update_step(0.0, None, 0.1)


def test_a_parameter_server_is_refused(flavour, monkeypatch):
    optimizer = flavour.lamb.LAMB(0.1)
    # The constructor of the strategy needs a cluster.
    server = object.__new__(tf.distribute.experimental.ParameterServerStrategy)
    monkeypatch.setattr(optimizer, "_distribution_strategy", server)
    with pytest.raises(ValueError, match="MirroredStrategy"):
        optimizer.build(make_variables(flavour, [np.ones(2, np.float32)], ["w"]))


def weights_of(flavour, optimizer, weights, gradients):
    """float64 weights `[step][layer]` of any optimizer of the flavour."""
    return Run(flavour, lambda: optimizer, weights, graph=False).history(gradients)


def test_lamb_without_ratio_and_decay_is_adam(flavour):
    weights, gradients = random_weights(), random_gradients(1)
    bare = flavour.lamb.LAMB(
        0.01, weight_decay=0.0, epsilon=1e-30, exclude_from_layer_adaptation=["."]
    )
    ours = weights_of(flavour, bare, weights, gradients)
    # Adam adds epsilon elsewhere, so both are tiny; its bias correction has an error of 1e-5.
    adam = flavour.keras.optimizers.Adam(0.01, epsilon=1e-30)
    for x, e in zip(ours[-1], weights_of(flavour, adam, weights, gradients)[-1], strict=True):
        np.testing.assert_allclose(x, e, rtol=0, atol=1e-6 + 3e-7 * np.abs(e).max())
    layers = [oracle.Lamb(x, weight_decay=0.0, epsilon=1e-30, adapted=False) for x in weights]
    assert_agrees(ours, oracle.history(layers, gradients, [0.01] * len(gradients)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_without_ratio_and_decay_is_momentum_sgd(flavour, nesterov):
    weights, gradients = random_weights(), random_gradients(1)
    bare = flavour.lamb.LARS(
        0.01, weight_decay=0.0, nesterov=nesterov, exclude_from_layer_adaptation=["."]
    )
    sgd = flavour.keras.optimizers.SGD(0.01, momentum=0.9, nesterov=nesterov)
    theirs = weights_of(flavour, sgd, weights, gradients)
    assert_agrees(weights_of(flavour, bare, weights, gradients), theirs)


@pytest.mark.parametrize("rule", RULES)
def test_scaling_the_gradients_changes_nothing(flavour, rule):
    """The scale is a power of two, so that not a single bit changes."""
    arguments = {"LAMB": {"epsilon": 1e-30}, "LARS": {"weight_decay": 0.0}}[rule]
    weights, gradients = random_weights(), random_gradients(1)
    zero = list(LAYERS).index(
        "zero/kernel"
    )  # with weights of 0 the ratio is 1, and LARS depends on the scale
    weights[zero] = np.ones_like(weights[zero])
    scaled = [[[g * 1024 for g in grads] for grads in replicas] for replicas in gradients]
    make = getattr(flavour.lamb, rule)
    small = weights_of(flavour, make(0.1, **arguments), weights, gradients)
    large = weights_of(flavour, make(0.1, **arguments), weights, scaled)
    assert all(np.array_equal(a, b) for a, b in zip(small[-1], large[-1], strict=True))
    assert not np.array_equal(small[-1][0], small[0][0])
