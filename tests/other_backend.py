"""Both rules on the backend that KERAS_BACKEND names: against the oracle, and in `fit`.

test_imports.py runs it, on another backend than TensorFlow in a new interpreter.
"""

import pathlib
import sys
import tempfile

import keras
import numpy as np
import oracle

import tf_lamb

SHAPES = [(5, 3), (4,), (), (2, 3, 4)]
EXCLUDED = 1


def apply(optimizer, grads, variables):
    """Applies one update; on JAX it is compiled, as in Keras's trainer."""
    if keras.backend.backend() != "jax":
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in grads], variables)
        return
    import jax

    values, state = jax.jit(optimizer.stateless_apply)(
        [v.value for v in optimizer.variables], grads, [v.value for v in variables]
    )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    for variable, value in zip(optimizer.variables, state, strict=True):
        variable.assign(value)


def check(rule, layer_class, rate):
    rng = np.random.default_rng(0)
    weights = [np.float32(rng.normal(size=s) * 10.0**i) for i, s in enumerate(SHAPES)]
    gradients = [[[np.float32(rng.normal(size=s)) for s in SHAPES]] for _ in range(5)]
    variables = [keras.Variable(w, name=f"w{i}") for i, w in enumerate(weights)]
    optimizer = rule(rate, exclude_from_weight_decay=[f"w{EXCLUDED}"], global_clipnorm=4.0)
    optimizer.build(variables)
    for grads in gradients:
        apply(optimizer, grads[0], variables)
    layers = [
        layer_class(w, decayed=i != EXCLUDED, adapted=i != EXCLUDED) for i, w in enumerate(weights)
    ]
    exact = oracle.history(layers, gradients, [rate] * 5, global_clipnorm=4.0)
    for variable, before, e in zip(variables, exact[0], exact[-1], strict=True):
        x = keras.ops.convert_to_numpy(variable.value)
        size = max(np.abs(e).max(), np.abs(before).max())
        np.testing.assert_allclose(x, e, rtol=0, atol=5e-7 * size)
        assert (
            np.abs(e - before).max() > 1e-3 * size
        )  # the change is 1000 times as large as the error


def moved(rule, *calls, twice=False, **arguments):
    """The optimizer and the weights after an `apply` of each list of two gradients."""
    variables = [keras.Variable(np.float32([[3, -4], [1, 2]]), name=name) for name in "ab"]
    optimizer = rule(0.5, weight_decay=0.01, **arguments)
    optimizer.build(variables)
    for grads in calls:
        grads = [g if is_sparse(g) else keras.ops.convert_to_tensor(g) for g in grads]
        optimizer.apply(grads, variables[:1] * 2 if twice else variables)
    return optimizer, numpy(variables)


def numpy(variables):
    return [keras.ops.convert_to_numpy(v.value) for v in variables]


def is_sparse(g):
    return not isinstance(g, np.ndarray)


def sparse(g):
    """The gradient in the sparse form that the backend has for an embedding."""
    if keras.backend.backend() == "jax":
        from jax.experimental.sparse import BCOO

        return BCOO.fromdense(g)
    if keras.backend.backend() == "torch":
        return keras.ops.convert_to_tensor(g).to_sparse()
    import tensorflow as tf

    return tf.IndexedSlices(tf.constant(g), tf.range(len(g)), g.shape)


def check_corners(rule):
    g, h = np.float32([[0.5, 0], [0, -2]]), np.float32([[1, 2], [-3, 0.25]])
    none = np.zeros_like(g)

    def same(left, right):
        for a, b in zip(left[1], right[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)

    start, dense = moved(rule), moved(rule, [g, h])
    assert all((a != b).any() for a, b in zip(start[1], dense[1], strict=True))
    same(moved(rule, [sparse(g), h]), dense)
    two = moved(rule, [g + h, h], [g - h, h], gradient_accumulation_steps=2)
    same(two, dense)
    # A variable that is passed twice moves by the sum; the other does not move.
    (a, b), twice = dense[1], moved(rule, [g - h, h], twice=True)[1]
    np.testing.assert_allclose(twice[0], a, rtol=1e-6)
    assert (twice[1] == start[1][1]).all() and (twice[1] != b).any()
    for bad in (np.nan, 1e20):
        optimizer, weights = moved(rule, [g, none + np.float32(bad)], use_ema=True)
        assert optimizer.skipped_steps == 1 and int(optimizer.iterations) == 0
        same((optimizer, weights), start)
        averages = numpy(optimizer._model_variables_moving_average)
        assert not np.any(averages)
        # The next update is the first one: the average begins as the weights.
        optimizer, weights = moved(rule, [g, none + np.float32(bad)], [g, h], use_ema=True)
        same((optimizer, weights), dense)
        same((None, numpy(optimizer._model_variables_moving_average)), dense)


def check_fit(rule, rate):
    """A loaded model trains exactly as the saved one; the rate is a `keras.Variable`."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1, use_bias=False)])
    optimizer = rule(keras.Variable(rate), telemetry=True)
    model.compile(optimizer, loss="mse")
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    fit = {"x": x, "y": x[:, :1], "shuffle": False, "verbose": 0}
    losses = model.fit(**fit, epochs=5).history["loss"]
    assert losses[-1] < losses[0]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
    assert model.fit(**fit).history == loaded.fit(**fit).history
    pairs = zip(
        [*model.weights, *model.optimizer.variables],
        [*loaded.weights, *loaded.optimizer.variables],
        strict=True,
    )
    for a, b in pairs:
        assert np.array_equal(*(keras.ops.convert_to_numpy(v.value) for v in (a, b)))


def check_failed_fit(rule, **arguments):
    """The error of a step that fails is not hidden by another one. Only JAX fails here.

    A second `fit` trains, also with moving averages, which the first one assigns to the weights.
    """
    x = np.ones((32, 4), "float32")
    model = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)]
    )
    optimizer = rule(0.01, **arguments)
    model.compile(optimizer, loss="mse")
    first, second = (model.fit(x, x[:, :1], verbose=0).history["loss"][0] for _ in range(2))
    assert second < first
    model.layers[0].trainable = False
    frozen = numpy(model.layers[0].weights)
    model.compile(optimizer, loss="mse")
    try:
        model.fit(x, x[:, :1], verbose=0)
    except ValueError as error:
        assert keras.backend.backend() == "jax" and "optimizer_variables" in str(error), error
    else:
        assert all(map(np.array_equal, frozen, numpy(model.layers[0].weights)))


def check_migration():
    """`fit` goes on after `migrate` with moving averages; on JAX it donated an array twice."""
    x = np.ones((32, 4), "float32")
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    source, optimizer = keras.optimizers.Lamb(0.01), tf_lamb.LAMB(0.01, use_ema=True)
    model.compile(source, loss="mse")
    losses = model.fit(x, x[:, :1], verbose=0).history["loss"]
    optimizer.build(model.trainable_variables)
    tf_lamb.migrate(source, optimizer)
    model.compile(optimizer, loss="mse")
    losses += model.fit(x, x[:, :1], verbose=0).history["loss"]
    assert losses[1] < losses[0]


def check_bfloat16(rule):
    """Accumulation trains where all floats are bfloat16."""
    keras.config.set_floatx("bfloat16")
    try:
        x = np.ones((32, 4), "float32")
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
        model.compile(rule(0.01, gradient_accumulation_steps=2, telemetry=True), loss="mse")
        before = numpy(model.weights)
        model.fit(x, x[:, :1], batch_size=8, verbose=0)
        assert not np.array_equal(before[0], numpy(model.weights)[0])
    finally:
        keras.config.set_floatx("float32")


def main():
    """All checks."""
    assert keras.backend.backend() == "tensorflow" or "tensorflow" not in sys.modules
    check(tf_lamb.LAMB, oracle.Lamb, 0.05)
    check(tf_lamb.LARS, oracle.Lars, 50.0)
    check_corners(tf_lamb.LAMB)
    check_corners(tf_lamb.LARS)
    check_fit(tf_lamb.LAMB, 0.05)
    check_fit(tf_lamb.LARS, 5.0)
    check_failed_fit(tf_lamb.LAMB)
    check_failed_fit(tf_lamb.LAMB, use_ema=True)
    check_migration()
    check_bfloat16(tf_lamb.LAMB)
    print("agrees on", keras.backend.backend())


if __name__ == "__main__":
    main()
