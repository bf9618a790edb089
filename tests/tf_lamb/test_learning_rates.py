"""A learning rate is a number, a schedule, a callable or a variable; each is saved and loaded."""

import contextlib
import functools
import json

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from drive import Run, assert_agrees, random_gradients, random_weights, run_eagerly

FEW = ("embed/table", "still/kernel", "conv/bias")
FIRST, THEN = 0.0625, 0.25  # exact in float32


class Number:
    """A number, which is changed as Keras's callbacks change it."""

    def __init__(self, flavour, kind):
        self.rate = kind(FIRST)

    def change(self, optimizer):
        optimizer.learning_rate = THEN


class Variable:
    """A variable that the user makes."""

    def __init__(self, flavour, kind):
        self.rate = self.variable = kind(FIRST)

    def change(self, optimizer):
        self.variable.assign(THEN)


class Callable(Variable):
    """A callable that computes the rate from a variable."""

    def __init__(self, flavour, kind):
        self.variable = tf.Variable(FIRST / 2)
        self.rate = lambda: 2.0 * self.variable

    def change(self, optimizer):
        self.variable.assign(THEN / 2)


class Replaced(Variable):
    """A callable that replaces another one, before anything is compiled."""

    def __init__(self, flavour, kind):
        self.rate = lambda: FIRST

    def change(self, optimizer):
        optimizer.learning_rate = lambda: np.float32(THEN)


KINDS = {
    "float": (Number, float),
    "tf.Variable": (Variable, tf.Variable),
    "float64": (Variable, functools.partial(tf.Variable, dtype="float64")),
    "keras.Variable": (Variable, keras.Variable),
    "callable": (Callable, None),
    "other callable": (Replaced, None),
}


def check_change(flavour, rule, kind, strategy=None, graph=True):
    """Four updates, the rate changed after two of them, agree with the oracle."""
    made = KINDS[kind][0](flavour, KINDS[kind][1])
    start = random_weights(names=FEW)
    make = getattr(flavour.lamb, rule)
    run = Run(flavour, lambda: make(made.rate), start, strategy, graph, FEW)
    gradients = random_gradients(2 if strategy else 1, names=FEW)[:4]
    weights = run.history(gradients[:2])
    made.change(run.optimizer)
    assert float(run.optimizer.learning_rate) == THEN
    weights += run.history(gradients[2:])[1:]
    layers = [{"LAMB": oracle.Lamb, "LARS": oracle.Lars}[rule](x) for x in start]
    assert_agrees(weights, oracle.history(layers, gradients, [FIRST] * 2 + [THEN] * 2))
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_changes_between_eager_updates(flavour, kind):
    check_change(flavour, "LAMB", kind, graph=False)


@pytest.mark.parametrize("kind", ["float", "tf.Variable", "keras.Variable", "callable"])
def test_a_rate_changes_in_a_step_that_was_compiled_before(flavour, kind):
    run = check_change(flavour, "LARS", kind)
    assert run.apply.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("kind", ["tf.Variable", "callable"])
def test_a_rate_made_outside_the_strategy_reaches_every_replica(flavour, mirrored, kind):
    check_change(flavour, "LAMB", kind, mirrored)


def test_a_variable_is_used_itself(flavour):
    """It is neither copied nor tracked twice."""
    given = tf.Variable(FIRST)
    optimizer = flavour.lamb.LAMB(given)
    optimizer.learning_rate = THEN
    assert given.numpy() == THEN
    rate = optimizer.learning_rate
    assert (rate.value if flavour.name == "keras3" else rate) is given
    own = keras.Variable(FIRST)
    rate = flavour.lamb.LAMB(own).learning_rate
    assert rate is (own if flavour.name == "keras3" else own.value)


def test_a_rate_may_be_any_kind_of_number(flavour):
    for make in (int, np.int64, np.float16, np.float32, np.float64, np.array, tf.constant):
        assert float(flavour.lamb.LAMB(make(1)).learning_rate) == 1.0
        assert float(flavour.lamb.LAMB(make(0)).learning_rate) == 0.0


def test_the_variable_made_from_a_number_can_be_assigned(flavour):
    optimizer = flavour.lamb.LAMB(FIRST)
    optimizer.learning_rate.assign(THEN)
    assert optimizer.get_config()["learning_rate"] == THEN


def test_a_callable_is_called_once_per_eager_update(flavour):
    calls = []
    rate = lambda: calls.append(0) or FIRST  # noqa: E731
    run = Run(
        flavour, lambda: flavour.lamb.LAMB(rate), random_weights()[:1], graph=False, names="x"
    )
    assert not calls
    for shares in random_gradients(1)[:3]:
        run.step([g[:1] for g in shares])
    assert len(calls) == 3


def plain():
    return FIRST


def registered(flavour):
    """A function that is registered with the flavour's Keras."""

    def rate():
        return FIRST

    return flavour.keras.utils.register_keras_serializable(f"test_{flavour.name}")(rate)


def through_json(optimizer, **custom_objects):
    config = json.loads(json.dumps(optimizer.get_config()))
    return type(optimizer).from_config(config, custom_objects or None)


def test_a_variable_is_saved_as_its_value(flavour):
    for make in (tf.Variable, keras.Variable):
        optimizer = flavour.lamb.LAMB(make(FIRST))
        optimizer.learning_rate.assign(THEN)
        assert optimizer.get_config()["learning_rate"] == THEN
        assert float(through_json(optimizer).learning_rate) == THEN


def test_a_function_is_saved_by_its_name(flavour):
    rate = registered(flavour)
    assert through_json(flavour.lamb.LAMB(rate))._learning_rate is rate
    optimizer = flavour.lamb.LAMB(plain)
    assert through_json(optimizer, plain=plain)._learning_rate is plain
    with pytest.raises(TypeError, match="Could not locate function 'plain'"):
        through_json(optimizer)


def test_a_lambda_is_saved_with_a_warning(flavour):
    """As with Keras's own optimizers, loading it needs `safe_mode=False`."""
    optimizer = flavour.lamb.LAMB(lambda: FIRST)
    with pytest.warns(UserWarning, match="includes a `lambda`"):
        config = flavour.keras.optimizers.serialize(optimizer)
    with pytest.raises(ValueError, match="lambda"):
        flavour.keras.optimizers.deserialize(config)


def test_a_callable_without_a_name_is_not_saved(flavour):
    rate = functools.partial(float, FIRST)
    optimizer = flavour.lamb.LAMB(rate)
    assert f"learning_rate={rate!r}" in repr(optimizer)
    with pytest.raises(ValueError, match=r"cannot be saved\. .*registered with .*functools"):
        optimizer.get_config()


def test_repr_shows_every_kind_of_rate(flavour):
    schedule = flavour.lamb.WarmupPolynomialDecay(0.5, 2, 4)
    for rate, shown in (
        (FIRST, "learning_rate=0.0625"),
        (tf.Variable(FIRST), "learning_rate=0.0625"),
        (plain, "learning_rate=<function plain"),
        (schedule, "'class_name': 'WarmupPolynomialDecay', 'config': {'peak_learning_rate': 0.5"),
    ):
        assert shown in repr(flavour.lamb.LAMB(rate))


def fitted(flavour, rate, compiled=True, **fit):
    """A small model after two epochs, and its training data."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype("float32")
    flavour.keras.utils.set_random_seed(0)
    layers = flavour.keras.layers
    model = flavour.keras.Sequential([layers.Input((4,)), layers.Dense(3), layers.Dense(1)])
    model.compile(flavour.lamb.LAMB(rate), loss="mse")
    with contextlib.nullcontext() if compiled else run_eagerly():
        model.fit(x, x[:, :1], batch_size=16, epochs=2, shuffle=False, verbose=0, **fit)
    return model, (x, x[:, :1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tf.Variable", "callable"])
def test_training_resumes_after_saving_and_loading(flavour, tmp_path, kind):
    rates = {
        "tf.Variable": lambda: tf.Variable(FIRST),
        "callable": lambda: registered(flavour),
    }
    model, data = fitted(flavour, rates[kind]())
    expected, _ = fitted(flavour, FIRST)
    for w, e in zip(model.weights, expected.weights, strict=True):
        assert w.numpy().tobytes() == e.numpy().tobytes()
    model.save(tmp_path / "model.keras")
    loaded = flavour.keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert loaded.optimizer.iterations.numpy() == 4
    for each in (model, loaded):
        each.fit(*data, batch_size=16, shuffle=False, verbose=0)
    for w, e in zip(loaded.weights, model.weights, strict=True):
        assert w.numpy().tobytes() == e.numpy().tobytes()


def test_a_checkpoint_holds_the_variable(flavour, tmp_path):
    given = tf.Variable(THEN)
    path = tf.train.Checkpoint(optimizer=flavour.lamb.LAMB(given)).write(str(tmp_path / "c"))
    names = [name for name, _ in tf.train.list_variables(path) if "learning_rate" in name]
    other = tf.Variable(FIRST)
    tf.train.Checkpoint(optimizer=flavour.lamb.LAMB(other)).read(path).assert_consumed()
    assert other.numpy() == THEN and len(names) == 1


@pytest.mark.parametrize("make", [float, tf.Variable])
def test_callbacks_set_the_rate(flavour, make):
    callbacks = flavour.keras.callbacks
    rate = make(FIRST)
    schedule = callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    model, _ = fitted(flavour, rate, compiled=False, callbacks=[schedule])
    assert float(model.optimizer.learning_rate) == FIRST / 4
    plateau = callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    model, _ = fitted(flavour, make(FIRST), compiled=False, callbacks=[plateau])
    assert float(model.optimizer.learning_rate) == FIRST / 2


def test_a_schedule_or_callable_cannot_be_assigned_a_value(flavour):
    for rate in (plain, flavour.lamb.WarmupPolynomialDecay(0.5, 2, 4)):
        optimizer = flavour.lamb.LAMB(rate)
        with pytest.raises(TypeError, match=r"number or a variable.* Received: learning_rate=0\.1"):
            optimizer.learning_rate = 0.1
        optimizer.learning_rate = lambda: THEN
        assert float(optimizer.learning_rate) == THEN
        with pytest.raises(ValueError, match="`learning_rate` must be"):
            optimizer.learning_rate = lambda step: step


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), np.float32(-0.1), "0.1", None])
def test_the_setter_checks_the_value(flavour, bad):
    for make in (float, tf.Variable, keras.Variable):
        optimizer = flavour.lamb.LAMB(make(FIRST))
        with pytest.raises(ValueError, match=r"`learning_rate` must be a number in \[0, inf\)\."):
            optimizer.learning_rate = bad
        assert float(optimizer.learning_rate) == FIRST


# Functions, because the `two_cpus` fixture sets up the devices after this file is imported.
BAD = {
    "string": lambda: "0.1",
    "None": lambda: None,
    "negative": lambda: -0.1,
    "NaN": lambda: float("nan"),
    "infinite": lambda: np.float32("inf"),
    "bool": lambda: True,
    "list": lambda: [0.1],
    "array": lambda: np.array([0.1]),
    "tensor of one element": lambda: tf.constant([0.1]),
    "class": lambda: float,
    "takes the step": lambda: lambda step: 0.1,
    "variable of two": lambda: tf.Variable([0.1, 0.1]),
    "int variable": lambda: tf.Variable(1),
    "keras int variable": lambda: keras.Variable(1, dtype="int32"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_value_that_is_no_rate_is_refused(flavour, bad):
    rule = r"`learning_rate` must be a .*variable, or a number in \[0, inf\)\. Received: learning_"
    for make in (flavour.lamb.LAMB, flavour.lamb.LARS):
        with pytest.raises(ValueError, match=rule):
            make(BAD[bad]())


def test_a_schedule_of_the_other_flavour_is_refused(flavour):
    import tf_keras

    others = tf_keras if flavour.name == "keras3" else keras
    schedule = others.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    ours = {"keras3": "keras", "tf_keras": "tf_keras"}[flavour.name]
    with pytest.raises(ValueError, match=f"LearningRateSchedule of {ours}, "):
        flavour.lamb.LAMB(schedule)
