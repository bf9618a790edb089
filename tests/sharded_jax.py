"""Updates of a model that is sharded over eight devices, on the JAX backend.

test_imports.py runs it in a new interpreter, where XLA_FLAGS makes eight devices of the CPU.
"""

import jax
import keras
import numpy as np
import oracle
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tf_lamb

# name: (shape, norm of the weights, sharding)
VARIABLES = {
    "table": ((16, 3), 30.0, ("model",)),
    "kernel": ((5, 8), 0.1, (None, "model")),
    "bias": ((8,), 1e-2, ("model",)),
    "gamma": ((6,), 2.0, ()),
    "temperature": ((), 0.7, ()),
    "experts": ((8, 2, 3), 4.0, ("model",)),  # each slice is a layer, on a device of its own
}
STEPS = 4
LAMB, LARS = (tf_lamb.LAMB, oracle.Lamb, 0.05), (tf_lamb.LARS, oracle.Lars, 50.0)


def drawn():
    """Random float32 weights, and gradients `[step][variable]`."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) for shape, _, _ in VARIABLES.values()]
    norms = [norm for _, norm, _ in VARIABLES.values()]
    weights = [np.float32(w * n / oracle.length(w)) for w, n in zip(weights, norms, strict=True)]
    return weights, [[np.float32(rng.normal(size=w.shape)) for w in weights] for _ in range(STEPS)]


def expected(weights, gradients, layer_class, rate):
    """The oracle's weights after the last step; each slice of the experts is a layer."""
    *whole, experts = weights
    layers = [layer_class(w, decayed=w.ndim > 1, adapted=w.ndim > 1) for w in whole]
    layers += [layer_class(w) for w in experts]
    gradients = [[[*grads[:-1], *grads[-1]]] for grads in gradients]
    last = oracle.history(layers, gradients, [rate] * len(gradients), global_clipnorm=4.0)[-1]
    return [*last[: len(whole)], np.stack(last[len(whole) :])]


def slots_of(optimizer):
    """For each of `optimizer.variables`, the index of the variable whose slot it is, or None."""
    own = {id(s): i for slot in optimizer._plan.slots for i, s in enumerate(slot)}
    return [own.get(id(v)) for v in optimizer.variables]


def same(arrays, shardings):
    return all(
        a.sharding.is_equivalent_to(s, a.ndim) for a, s in zip(arrays, shardings, strict=True)
    )


def check_jit(rule, layer_class, rate):
    """`stateless_apply` under `jax.jit`: right results, with the sharding of their inputs."""
    mesh = Mesh(np.array(jax.devices()), ("model",))
    weights, gradients = drawn()
    variables = [keras.Variable(w, name=n) for n, w in zip(VARIABLES, weights, strict=True)]
    optimizer = rule(
        rate,
        exclude_from_weight_decay=["bias", "gamma", "temperature"],
        layer_axes={"experts": 0},
        global_clipnorm=4.0,
    )
    optimizer.build(variables)
    places = [NamedSharding(mesh, PartitionSpec(*place)) for _, _, place in VARIABLES.values()]
    everywhere = NamedSharding(mesh, PartitionSpec())
    slots = slots_of(optimizer)
    state_places = [everywhere if i is None else places[i] for i in slots]
    values = [jax.device_put(v.value, p) for v, p in zip(variables, places, strict=True)]
    state = [
        jax.device_put(v.value, p) for v, p in zip(optimizer.variables, state_places, strict=True)
    ]
    step = jax.jit(optimizer.stateless_apply)
    for grads in gradients:
        grads = [jax.device_put(g, p) for g, p in zip(grads, places, strict=True)]
        values, state = step(state, grads, values)
        assert same(values, places) and same(state, state_places)
    assert step._cache_size() == 1
    text = step.lower(state, grads, values).compile().as_text()
    assert (
        "all-reduce" in text and "all-gather" not in text
    )  # norms are communicated, weights are not
    for x, before, e in zip(
        values, weights, expected(weights, gradients, layer_class, rate), strict=True
    ):
        size = max(np.abs(e).max(), np.abs(before).max())
        np.testing.assert_allclose(np.asarray(x), e, rtol=0, atol=5e-7 * size)
        assert (
            np.abs(e - before).max() > 1e-3 * size
        )  # the change is 1000 times as large as the error


def trained(rule, rate, distribution=None):
    """A small model after `fit` with a distribution of Keras."""
    keras.utils.set_random_seed(0)
    keras.distribution.set_distribution(distribution)
    hidden, out = (
        keras.layers.Dense(units, use_bias=False, name=name)
        for units, name in ((8, "hidden"), (1, "out"))
    )
    model = keras.Sequential([keras.layers.Input((4,)), hidden, out])
    model.compile(rule(rate, telemetry=True), loss="mse")
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    model.fit(x, x[:, :1], batch_size=16, shuffle=False, verbose=0)
    keras.distribution.set_distribution(None)
    return model


def distributions():
    """One that shards the examples, and one that also shards the weights."""
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*hidden/kernel"] = (None, "model")
    layout[".*out/kernel"] = ("model", None)
    yield keras.distribution.DataParallel()
    yield keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def check_distribution(rule, layer_class, rate):
    """The slots have the sharding of their weights; the result is that of one device."""
    alone = trained(rule, rate)
    for distribution in distributions():
        model = trained(rule, rate, distribution)
        weights = [v.value for v in model.trainable_variables]
        split = [not w.sharding.is_fully_replicated for w in weights]
        parallel = isinstance(distribution, keras.distribution.ModelParallel)
        assert split == [parallel, parallel]
        for slot in model.optimizer._plan.slots:
            assert same([s.value for s in slot], [w.sharding for w in weights])
        # Gradients are summed in another order.
        for w, e in zip(weights, alone.trainable_variables, strict=True):
            e = np.asarray(e.value)
            np.testing.assert_allclose(np.asarray(w), e, rtol=0, atol=2e-6 * np.abs(e).max())


def main():
    """All checks."""
    assert keras.backend.backend() == "jax" and len(jax.devices()) == 8
    for kind in (LAMB, LARS):
        check_jit(*kind)
        check_distribution(*kind)
    print("agrees on jax")


if __name__ == "__main__":
    main()
