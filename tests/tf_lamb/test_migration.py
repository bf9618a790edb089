"""Five steps with another optimizer, `migrate`, five with ours: as ten with the other optimizer."""

import collections
import contextlib
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from drive import (
    LAYERS,
    largest,
    make_variables,
    random_gradients,
    random_weights,
    run_eagerly,
)
from official.modeling.optimization import lamb as official_lamb
from official.modeling.optimization import lars as official_lars

from tf_lamb.migration import migrate

NAMES = list(LAYERS)
EXCLUDED = ["bias", "gamma"]
FIRST, SECOND = (
    [replicas[0] for replicas in random_gradients(1, seed)] for seed in (1, 2)
)  # five steps of gradients each, `[step][layer]`


def official_lamb_optimizer():
    return official_lamb.LAMB(0.05, weight_decay_rate=0.01, exclude_from_weight_decay=EXCLUDED)


def official_lars_optimizer(classic_momentum=True):
    return official_lars.LARS(
        50.0,
        weight_decay_rate=0.01,
        exclude_from_weight_decay=EXCLUDED,
        classic_momentum=classic_momentum,
    )


# name: (the original, our class, our arguments)
DECAYED = {"weight_decay": 0.01, "exclude_from_weight_decay": EXCLUDED}
CASES = {
    "tf-models LAMB": (official_lamb_optimizer, "LAMB", "tf-models", 0.05, DECAYED),
    "tf-models LARS": (official_lars_optimizer, "LARS", "tf-models", 50.0, DECAYED),
    "tf-models LARS, rate at the end": (
        lambda: official_lars_optimizer(classic_momentum=False),
        "LARS",
        "tf-models-scaled",
        50.0,
        DECAYED,
    ),
    "Keras": (
        lambda: keras.optimizers.Lamb(0.05),
        "LAMB",
        "paper",
        0.05,
        {"weight_decay": 0.0, "epsilon": 1e-7},
    ),
}


class Original:
    """The original optimizer of a case on the layers of drive.py, after five steps."""

    def __init__(self, case, wrap=lambda optimizer: optimizer, strategy=None):
        make, self.rule, self.variant, self.rate, self.arguments = CASES[case]
        with strategy.scope() if strategy else contextlib.nullcontext():
            self.optimizer = wrap(make())
            flavour = _namespace(keras if case == "Keras" else tf_keras)
            self.variables = make_variables(flavour, random_weights())
        if strategy:
            strategy.run(self.apply, (FIRST,))
        else:
            self.apply(FIRST)

    def apply(self, gradients):
        apply(self.optimizer, self.variables, gradients)

    def ours(self, flavour, names=NAMES, **changed):
        """`(optimizer, variables)`: ours, built for copies of the original's weights."""
        values = [np.array(v.numpy()) for v in self.variables]
        variables = make_variables(flavour, values, names)
        arguments = self.arguments | changed
        rule = getattr(flavour.lamb, self.rule)
        optimizer = rule.variant(self.variant, learning_rate=self.rate, **arguments)
        optimizer.build(variables)
        return optimizer, variables


def _namespace(module):
    """The attributes of a flavour that `make_variables` reads."""
    keras3 = module is keras
    return collections.namedtuple("Flavour", ["Variable", "name_scope"])(
        keras.Variable if keras3 else tf.Variable, keras.name_scope if keras3 else tf.name_scope
    )


def apply(optimizer, variables, gradients):
    for grads in gradients:
        pairs = zip([tf.constant(g) for g in grads], variables, strict=True)
        optimizer.apply_gradients(list(pairs))


def assert_resumes(original, optimizer, variables, compiled=False):
    """Asserts that both end at the same weights after five more steps."""
    before = [v.numpy() for v in variables]
    original.apply(SECOND)
    with contextlib.nullcontext() if compiled else run_eagerly():
        apply(optimizer, variables, SECOND)
    for v, x, start in zip(original.variables, variables, before, strict=True):
        error, moved = largest(x.numpy() - v.numpy()), largest(v.numpy() - start)
        assert error <= 1e-5 * moved + 2**-21 * max(largest(start), largest(v.numpy()))
    assert int(optimizer.iterations) == int(original.optimizer.iterations) == 10


def state(optimizer):
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    slots = [np.array(x.numpy()) for slot in inner._plan.slots for x in slot]
    return [x.tobytes() for x in slots] + [int(inner.iterations)]


@contextlib.contextmanager
def refused(optimizer, *parts):
    """Expects a `ValueError` that contains `parts`, and an unchanged optimizer."""
    before = state(optimizer)
    with pytest.raises(ValueError) as error:
        yield
    for part in parts:
        assert part in str(error.value)
    assert state(optimizer) == before


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_resumes(case, flavour):
    original = Original(case)
    optimizer, variables = original.ours(flavour)
    migrate(original.optimizer, optimizer)
    assert_resumes(original, optimizer, variables, compiled=True)


@pytest.mark.parametrize("case", CASES)
def test_without_migration_the_weights_differ(case, keras3):
    original = Original(case)
    with pytest.raises(AssertionError):
        assert_resumes(original, *original.ours(keras3))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "Keras"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_training_resumes_from_a_checkpoint(case, wrapped, flavour, tmp_path):
    original = Original(case)
    saved = original.optimizer
    if wrapped:
        saved = tf_keras.mixed_precision.LossScaleOptimizer(saved)
    checkpoint = tf.train.Checkpoint(model=list(original.variables), anything=saved)
    path = checkpoint.save(str(tmp_path / "model"))
    for place in (path, tmp_path):
        optimizer, variables = original.ours(flavour)
        migrate(place, optimizer)
    assert_resumes(original, optimizer, variables)


def test_loss_scale_optimizers_and_two_replicas(flavour, mirrored):
    wrap = tf_keras.mixed_precision.LossScaleOptimizer
    original = Original("tf-models LAMB", wrap, strategy=mirrored)
    with mirrored.scope():
        optimizer, _ = original.ours(flavour)
        if flavour.name == "keras3":
            outer = keras.optimizers.LossScaleOptimizer(optimizer)
        else:
            outer = wrap(optimizer)
    report = migrate(original.optimizer, outer)
    slots = original.optimizer.inner_optimizer
    for i, (variable, layer) in enumerate(zip(original.variables, report.layers, strict=True)):
        for slot, variables in zip("mv", optimizer._plan.slots, strict=True):
            theirs = slots.get_slot(variable, slot).numpy()
            native = variables[i].value if flavour.name == "keras3" else variables[i]
            for copy in mirrored.experimental_local_results(native):
                np.testing.assert_array_equal(copy.numpy(), theirs)
            assert layer.after[slot] == pytest.approx(np.linalg.norm(theirs), rel=1e-6)


def test_a_bfloat16_moment_and_accumulation(keras3):
    original = Original("tf-models LAMB")
    more = {"moment_dtype": "bfloat16", "gradient_accumulation_steps": 4}
    optimizer, _ = original.ours(keras3, **more)
    migrate(original.optimizer, optimizer)
    assert int(optimizer.iterations) == 5 and int(optimizer._iterations) == 20
    m = optimizer._plan.slots[0][0]
    theirs = original.optimizer.get_slot(original.variables[0], "m")
    assert m.dtype == "bfloat16"
    np.testing.assert_array_equal(m.numpy(), tf.cast(theirs, "bfloat16").numpy())


def test_the_report_shows_names_norms_and_steps(flavour):
    original = Original("tf-models LAMB")
    names = [name.replace("embed/", "encoder/") for name in NAMES]
    optimizer, _ = original.ours(flavour, names)
    report = migrate(original.optimizer, optimizer, mapping={"encoder/table": "embed/table"})
    assert (report.step_before, report.step_after) == (0, 5)
    assert [layer.name for layer in report.layers] == names
    first = report.layers[0]
    assert (first.source_name, first.shape) == ("embed/table", (13, 7))
    assert first.before == {"m": 0.0, "v": 0.0}
    m, v = (original.optimizer.get_slot(original.variables[0], s).numpy() for s in "mv")
    assert first.after == pytest.approx({"m": np.linalg.norm(m), "v": np.linalg.norm(v)})
    lines = str(report).splitlines()
    assert lines[0].split() == ["variable", "from", "shape", *"‖m‖ before ‖m‖ after".split()] + (
        "‖v‖ before ‖v‖ after".split()
    )
    assert lines[1].split()[:2] == ["encoder/table", "embed/table"]
    assert f"{np.linalg.norm(m):.6g}" in lines[1]
    assert lines[-1] == "step: 0 before, 5 after"
    again = migrate(original.optimizer, optimizer, by_order=True, step=7)
    assert again.layers[0].before == first.after
    assert (again.step_before, again.step_after, int(optimizer.iterations)) == (5, 7, 7)
    for bad in (-1, 1.7, True, "3", float("nan")):
        with pytest.raises(ValueError, match="`step` must be .* Received: step="):
            migrate(original.optimizer, optimizer, by_order=True, step=bad)
    assert int(optimizer.iterations) == 7


def test_names_that_differ_are_mapped_or_refused(flavour):
    original = Original("tf-models LAMB")
    names = [f"model/{name}" for name in NAMES]
    optimizer, variables = original.ours(flavour, names)
    with refused(optimizer, "Only in the source (8)", "Only in the optimizer (8)", *names, *NAMES):
        migrate(original.optimizer, optimizer)
    with refused(optimizer, "model/conv/bias", "conv/bias (renamed to x/conv/bias)"):
        migrate(original.optimizer, optimizer, rename=lambda name: f"x/{name}")
    with refused(optimizer, "have the same name: model"):
        migrate(original.optimizer, optimizer, rename=lambda name: "model")
    with refused(optimizer, "Only in `mapping` (2)", "nothing", "nobody"):
        mapping = {"nothing": "nobody"}
        migrate(original.optimizer, optimizer, rename=lambda n: f"model/{n}", mapping=mapping)
    migrate(original.optimizer, optimizer, rename=lambda name: f"model/{name}")
    assert_resumes(original, optimizer, variables)


def test_missing_variables_and_other_shapes_are_refused(flavour):
    original = Original("tf-models LAMB")
    values = [v.numpy() for v in original.variables]
    fewer = flavour.lamb.LAMB()
    fewer.build(make_variables(flavour, values[:-1], NAMES[:-1]))
    with refused(fewer, "Only in the source (1)", "still/kernel"):
        migrate(original.optimizer, fewer)
    with refused(fewer, "8 variables and the optimizer 7", "still/kernel"):
        migrate(original.optimizer, fewer, by_order=True)
    other = flavour.lamb.LAMB()
    other.build(make_variables(flavour, [*values[:-1], values[-1].T], NAMES))
    with refused(other, "still/kernel: (7, 13); the source's m of still/kernel: (13, 7)"):
        migrate(original.optimizer, other)


def test_another_rule_is_refused(flavour, tmp_path):
    lamb, lars = Original("tf-models LAMB"), Original("tf-models LARS")
    scaled = Original("tf-models LARS, rate at the end")
    ours, _ = lamb.ours(flavour)
    with refused(ours, "has the slots m, v, and the source has momentum"):
        migrate(lars.optimizer, ours)
    path = tf.train.Checkpoint(v=list(lars.variables), o=lars.optimizer).save(str(tmp_path / "a"))
    with refused(ours, "has the slots m, v, and the source has momentum"):
        migrate(path, ours)
    inside, _ = lars.ours(flavour)
    with refused(inside, "without the learning rate", "form='tf-models'"):
        migrate(scaled.optimizer, inside)
    outside, _ = scaled.ours(flavour)
    with refused(outside, "η r (g + λx)", "form='tf-models-scaled'"):
        migrate(lars.optimizer, outside)
    with refused(ours, "the source has none"):
        migrate(keras.optimizers.Lamb(), ours)
    with refused(ours, "Received: a dict"):
        migrate({}, ours)
    with pytest.raises(ValueError, match="must be a LAMB or LARS of tf_lamb"):
        migrate(lamb.optimizer, lamb.optimizer)
    with pytest.raises(ValueError, match="build"):
        migrate(lamb.optimizer, flavour.lamb.LAMB())


def test_a_path_that_is_no_checkpoint_is_a_value_error(keras3, tmp_path):
    optimizer = keras3.lamb.LAMB()
    optimizer.build([keras.Variable(np.float32([1, 2]), name="w")])
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "damaged.index").write_bytes(b"\0" * 100)
    for name in ("nowhere/ckpt-1", "notes.txt", "damaged", ""):
        with pytest.raises(ValueError, match="checkpoint") as error:
            migrate(tmp_path / name, optimizer)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with refused(optimizer, "A file of Keras", "give `model.optimizer`", "model.keras"):
        migrate(tmp_path / "model.keras", optimizer)
    for source in (tmp_path / "empty", "foo://nowhere/ckpt-1", "ram://nowhere"):
        with refused(optimizer, "`source` must be the path of a checkpoint", repr(str(source))):
            migrate(source, optimizer)


def test_a_checkpoint_needs_exactly_one_optimizer(keras3, tmp_path):
    original = Original("tf-models LAMB")
    ours, _ = original.ours(keras3)
    path = tf.train.Checkpoint(v=list(original.variables)).save(str(tmp_path / "none"))
    with refused(ours, "the source has none"):
        migrate(path, ours)
    of_keras = keras.optimizers.Lamb()
    of_keras.build([keras.Variable(np.float32([1, 2]), name="w")])
    path = tf.train.Checkpoint(optimizer=of_keras).save(str(tmp_path / "of_keras"))
    with refused(ours, "an optimizer of Keras 3 does not say", "give `model.optimizer`"):
        migrate(path, ours)
    other = Original("tf-models LAMB")
    both = tf.train.Checkpoint(v=[original.variables, other.variables])
    both.optimizers = [original.optimizer, other.optimizer]
    with refused(ours, "one optimizer, and contains 2"):
        migrate(both.save(str(tmp_path / "both")), ours)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.get_variable("x", [2])
        session.run(x.initializer)
        named = tf.compat.v1.train.Saver([x]).save(session, str(tmp_path / "named"))
    with refused(ours, "with an object graph"):
        migrate(named, ours)


# `migrate` recognizes optax's state by the names of its types, so these need no optax.
ScaleByAdamState = collections.namedtuple("ScaleByAdamState", "count mu nu")
TraceState = collections.namedtuple("TraceState", "trace")
ScaleByScheduleState = collections.namedtuple("ScaleByScheduleState", "count")
MaskedState = collections.namedtuple("MaskedState", "inner_state")
EmptyState = collections.namedtuple("EmptyState", "")


def small(flavour, rule):
    """Ours on two variables, and gradients for them as nested dictionaries."""
    values = [np.float32([[1, 2], [3, 4]]), np.float32([5, 6])]
    optimizer = getattr(flavour.lamb, rule)()
    if rule == "LARS":
        optimizer = flavour.lamb.LARS.variant("optax")
    optimizer.build(make_variables(flavour, values, ["dense/kernel", "dense/bias"]))
    return optimizer, {"dense": {"bias": values[1], "kernel": values[0]}}


def test_a_state_of_optax_lamb(flavour):
    optimizer, mu = small(flavour, "LAMB")
    nu = {"dense": {name: 10 * x for name, x in mu["dense"].items()}}
    chain = (EmptyState(), (ScaleByAdamState(np.int32(5), mu, nu), ScaleByScheduleState(5)))
    report = migrate(chain, optimizer)
    assert report.step_after == int(optimizer.iterations) == 5
    for i, name in enumerate(["kernel", "bias"]):
        for slot, factor in zip(optimizer._plan.slots, (1, 10), strict=True):
            np.testing.assert_array_equal(slot[i].numpy(), factor * mu["dense"][name])
    with refused(optimizer, "one ScaleByAdamState, and contains 0. Received: TraceState"):
        migrate((TraceState(mu),), optimizer)
    with refused(optimizer, "contains 2"):
        migrate((chain, chain), optimizer)
    listed = [mu["dense"]["kernel"], mu["dense"]["bias"]]
    in_a_list = (ScaleByAdamState(6, listed, listed),)
    with refused(optimizer, "Only in the source (2):\n  0\n  1"):
        migrate(in_a_list, optimizer)
    assert migrate(in_a_list, optimizer, by_order=True).layers[1].source_name == "1"
    assert int(optimizer.iterations) == 6


def test_the_trace_of_optax_lars_changes_its_sign(flavour):
    optimizer, trace = small(flavour, "LARS")
    before = (EmptyState(), MaskedState(EmptyState()))
    constant = (*before, EmptyState(), TraceState(trace))
    with refused(optimizer, "Pass `step`"):
        migrate(constant, optimizer)
    migrate(constant, optimizer, step=3)
    assert int(optimizer.iterations) == 3
    scheduled = (*before, ScaleByScheduleState(np.int32(8)), TraceState(trace))
    migrate(scheduled, optimizer)
    assert int(optimizer.iterations) == 8
    np.testing.assert_array_equal(optimizer._plan.slots[0][1].numpy(), [-5, -6])
    with refused(optimizer, "the trace comes last"):
        migrate((MaskedState(TraceState(trace)), EmptyState()), optimizer)


@pytest.mark.parametrize("rule", ["lamb", "lars"])
def test_training_resumes_from_optax(rule, flavour):
    optax = pytest.importorskip("optax")
    rate = {"lamb": 0.05, "lars": 50.0}[rule]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns about the devices of some machines
        jax = pytest.importorskip("jax")
        original = getattr(optax, rule)(optax.constant_schedule(rate), weight_decay=0.01)
        params = dict(zip(NAMES, random_weights(), strict=True))
        state = original.init(params)
    update = jax.jit(original.update)

    def go_on(params, state, gradients):
        for grads in gradients:
            grads = dict(zip(NAMES, grads, strict=True))
            steps, state = update(grads, state, params)
            params = optax.apply_updates(params, steps)
        return params, state

    params, state = go_on(params, state, FIRST)
    values = [np.asarray(params[name]) for name in NAMES]
    variables = make_variables(flavour, values)
    optimizer = getattr(flavour.lamb, rule.upper()).variant("optax", rate, weight_decay=0.01)
    optimizer.build(variables)
    migrate(state, optimizer)
    apply(optimizer, variables, SECOND)
    params, _ = go_on(params, state, SECOND)
    for name, variable, start in zip(NAMES, variables, values, strict=True):
        end = np.asarray(params[name])
        error, moved = largest(variable.numpy() - end), largest(end - start)
        assert error <= 1e-5 * moved + 2**-21 * max(largest(start), largest(end))
    assert int(optimizer.iterations) == 10


@pytest.mark.parametrize("accumulation", [None, 2])
def test_averages_start_at_the_weights_and_accumulated_gradients_are_dropped(keras3, accumulation):
    """Averages of 0 took the place of the weights at the end of `fit`."""
    keras, g = keras3.keras, keras3.keras.ops.ones(2)
    source, old = keras.optimizers.Lamb(0.01), keras.Variable([3.0, 4.0])
    source.build([old])
    for _ in range(5):
        source.apply([g], [old])
    averages, weights = [], []
    for leftover in (False, True):
        new = keras.Variable(keras.ops.copy(old.value))
        arguments = {"use_ema": True, "gradient_accumulation_steps": accumulation}
        optimizer = keras3.lamb.LAMB(0.01, **arguments)
        optimizer.build([new])
        if leftover and accumulation:
            optimizer.apply([100 * g], [new])
        migrate(source, optimizer, by_order=True)
        for _ in range(accumulation or 1):
            optimizer.apply([g], [new])
        weights.append(keras.ops.convert_to_numpy(new.value))
        optimizer.finalize_variable_values([new])
        averages.append(keras.ops.convert_to_numpy(new.value))
    np.testing.assert_allclose(averages[0], 0.99 * old.numpy() + 0.01 * weights[0], rtol=1e-6)
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(averages[0], averages[1])


def test_a_source_in_the_middle_of_an_accumulation_is_refused(keras3):
    keras = keras3.keras
    source, variable = keras.optimizers.Lamb(gradient_accumulation_steps=2), keras.Variable([3.0])
    source.build([variable])
    for _ in range(3):
        source.apply([keras.ops.ones(1)], [variable])
    optimizer = keras3.lamb.LAMB()
    optimizer.build([variable])
    with pytest.raises(ValueError, match="the gradients of 1 micro-batches and not applied them"):
        migrate(source, optimizer, by_order=True)
    MultiSteps = collections.namedtuple("MultiStepsState", "mini_step inner_opt_state acc_grads")
    Adam = collections.namedtuple("ScaleByAdamState", "count mu nu")
    state = Adam(np.int32(1), [np.ones(1)], [np.ones(1)])
    with pytest.raises(ValueError, match="the gradients of 3 micro-batches"):
        migrate(MultiSteps(np.int32(3), state, [np.ones(1)]), optimizer, by_order=True)
    migrate(MultiSteps(np.int32(0), state, [np.ones(1)]), optimizer, by_order=True)
    assert int(optimizer.iterations) == 1
