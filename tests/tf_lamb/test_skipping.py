"""A gradient that is not finite skips the whole update; telemetry does not change the update."""

import math

import numpy as np
import oracle
import pytest
from drive import FEW_LAYERS, LAYERS, Run, assert_agrees, copies, random_gradients, random_weights
from test_contract import staged
from test_updates import EXCLUSIONS, RATES, RULES, expected, make

NAMES = list(LAYERS)
BAD = [
    ("lamb", 1, math.nan),
    ("lamb", 2, math.inf),
    ("lars", 1, -math.inf),
    ("lars", 2, math.nan),
]


def spoiled(replicas, value, replica=-1, layer="embed/table"):
    """A copy of the gradients `[replica][layer]` where one element of one replica is `value`."""
    replicas = [[np.array(g) for g in grads] for grads in replicas]
    replicas[replica][FEW_LAYERS.index(layer)].flat[-1] = value
    return replicas


def few_weights():
    return random_weights(names=FEW_LAYERS)


def few_gradients(replicas):
    return random_gradients(replicas, names=FEW_LAYERS)


def state(run, but=("skipped", "accumulator")):
    """Bytes of the weights and of the optimizer's variables, for every replica's copy."""
    held = [*run.variables, *run.optimizer.variables]
    return [
        [np.asarray(copy).tobytes() for copy in copies(run.strategy, variable)]
        for variable in held
        if not any(part in variable.name for part in but)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "replicas", "bad"), BAD)
def test_one_bad_element_skips_the_update(flavour, mirrored, rule, replicas, bad):
    strategy = mirrored if replicas == 2 else None
    run = Run(flavour, make(flavour, rule), few_weights(), strategy, names=FEW_LAYERS)
    good = few_gradients(replicas)
    run.step(good[0])
    run.step(good[1])
    assert run.optimizer.skipped_steps == 0
    before = state(run)
    run.step(spoiled(good[2], bad))
    run.step(spoiled(good[2], bad, replica=0, layer="norm/gamma"))
    assert state(run) == before
    assert run.optimizer.skipped_steps == 2
    assert int(run.optimizer.iterations.numpy()) == 2
    undisturbed = Run(flavour, make(flavour, rule), few_weights(), strategy, names=FEW_LAYERS)
    for gradients in good[2:]:
        run.step(gradients)
    for gradients in good:
        undisturbed.step(gradients)
    assert state(run) == state(undisturbed) != before
    assert run.optimizer.skipped_steps == 2


@pytest.mark.parametrize("spoil", [0, 1], ids=["first of two", "second of two"])
@pytest.mark.parametrize("rule", ["LAMB", "LARS"])
def test_one_bad_share_skips_the_accumulated_update(keras3, rule, spoil):
    def make_it():
        return getattr(keras3.lamb, rule)(0.1, gradient_accumulation_steps=2)

    run, undisturbed = (Run(keras3, make_it, few_weights(), names=FEW_LAYERS) for _ in range(2))
    good = few_gradients(1)[:4]
    for one in (run, undisturbed):
        one.step(good[0])
        one.step(good[1])
    before = state(run, but=("skipped",))
    pair = [good[2], good[3]]
    pair[spoil] = spoiled(pair[spoil], math.nan)
    for gradients in pair:
        run.step(gradients)
    assert state(run, but=("skipped",)) == before  # the accumulated gradient is dropped as well
    assert run.optimizer.skipped_steps == 1
    assert int(run.optimizer.iterations.numpy()) == 1
    for one in (run, undisturbed):
        one.step(good[2])
        one.step(good[3])
    assert state(run, but=("skipped",)) == state(undisturbed, but=("skipped",)) != before
    assert int(run.optimizer.iterations.numpy()) == 2


@pytest.mark.parametrize("rule", ["LAMB", "LARS"])
def test_skip_nonfinite_false_applies_a_nan(flavour, rule):
    def make_it():
        return getattr(flavour.lamb, rule)(0.1, skip_nonfinite=False)

    run = Run(flavour, make_it, few_weights(), graph=False, names=FEW_LAYERS)
    gradients = few_gradients(1)[0]
    run.step(spoiled(gradients, math.nan))
    assert np.isnan(run.weights()[0].flat[-1])
    assert run.optimizer.skipped_steps == 0
    assert int(run.optimizer.iterations.numpy()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_telemetry_rows_are_the_norms_and_ratios(flavour, mirrored, rule):
    """Also for excluded layers, whose ratio is 1."""
    exclusions = "a list for each"
    name, layer_class, own = RULES[rule]
    _, no_decay, no_adaptation = EXCLUSIONS[exclusions]
    run = Run(flavour, make(flavour, rule, exclusions, telemetry=True), random_weights(), mirrored)
    layers = [
        layer_class(x, decayed=n not in no_decay, adapted=n not in no_adaptation, **own)
        for n, x in zip(NAMES, random_weights(), strict=True)
    ]
    assert run.optimizer.telemetry_rows.tolist() == [[0, 0, 0]] * len(NAMES)
    gradients = random_gradients(2)
    for replicas, rate in zip(gradients, RATES, strict=True):
        run.step(replicas)
        oracle.history(layers, [replicas], [rate])
        rows = run.optimizer.telemetry_rows
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, [layer.seen for layer in layers], rtol=3e-6, err_msg=name)
    assert staged(run.optimizer).experimental_get_tracing_count() == 2  # one per replica
    assert_agrees([run.weights()], [expected(rule, gradients, exclusions)[-1]])


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_telemetry_and_the_ratio_use_the_same_norm(keras3, norm):
    make_it = make(keras3, "lamb", telemetry=True, norm=norm)
    run = Run(keras3, make_it, few_weights(), graph=False, names=FEW_LAYERS)
    layers = [oracle.Lamb(x, norm=norm, **RULES["lamb"][2]) for x in few_weights()]
    gradients = few_gradients(1)[:1]
    run.step(gradients[0])
    oracle.history(layers, gradients, RATES[:1])
    rows = [layer.seen for layer in layers]
    np.testing.assert_allclose(run.optimizer.telemetry_rows, rows, rtol=3e-6)


def test_telemetry_of_slices_is_their_mean_and_a_group_has_one_row(flavour):
    arguments = {"layer_axes": {"embed": 0}, "layer_groups": ["conv/"], "telemetry": True}
    run = Run(flavour, make(flavour, "lamb", **arguments), random_weights())
    gradients = random_gradients(1)[0]
    run.step(gradients)
    own, rate = RULES["lamb"][2], RATES[0]
    weights = random_weights()
    slices = [oracle.Lamb(x, **own) for x in weights[0]]
    for layer, g in zip(slices, gradients[0][0], strict=True):
        layer.descend(np.float64(g), rate)
    group = oracle.Lamb(np.concatenate([np.ravel(x) for x in weights[1:3]]), **own)
    group.descend(np.concatenate([np.ravel(g) for g in gradients[0][1:3]]).astype(float), rate)
    rows = [np.mean([layer.seen for layer in slices], axis=0), group.seen, group.seen]
    np.testing.assert_allclose(run.optimizer.telemetry_rows[:3], rows, rtol=3e-6)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # Keras 3's warning is correct
def test_a_layer_without_a_gradient_keeps_its_row(flavour):
    run = Run(flavour, make(flavour, "lamb", telemetry=True), random_weights())
    first, second, *_ = random_gradients(1)
    run.step(first)
    before = run.optimizer.telemetry_rows
    without = NAMES.index("conv/kernel")
    run.step([[None if i == without else g for i, g in enumerate(second[0])]])
    same = (run.optimizer.telemetry_rows == before).all(axis=1)
    # Of the layer whose gradient is 0, only the norm of the weights is the same.
    assert same[without] and not same[NAMES.index("embed/table")]
    assert sum(same) == 1


@pytest.mark.parametrize(("rule", "replicas"), [("lamb", 2), ("lars", 1)])
def test_telemetry_changes_no_bit(flavour, mirrored, rule, replicas):
    strategy = mirrored if replicas == 2 else None
    gradients = few_gradients(replicas)
    runs = [
        Run(
            flavour,
            make(flavour, rule, "one list for both", telemetry=telemetry),
            few_weights(),
            strategy,
            names=FEW_LAYERS,
        )
        for telemetry in (False, True)
    ]
    plain, watched = (run.history(gradients) for run in runs)
    for x, y in zip(plain, watched, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(x, y, strict=True))
    with pytest.raises(ValueError, match="telemetry=True"):
        _ = runs[0].optimizer.telemetry_rows
