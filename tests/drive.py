"""Drives an optimizer over a few random layers, and measures it against the oracle.

The gradients are small integers times a power of two, so that their sum over the replicas is
exact in bfloat16 as well: what is left is the optimizer's own error.
"""

import contextlib

import numpy as np
import oracle
import tensorflow as tf

# name: (shape, norm of the weights, power of two in the gradients)
LAYERS = {
    "embed/table": ((13, 7), 1e3, 2),
    "conv/kernel": ((3, 3, 2, 4), 30.0, -3),
    "conv/bias": ((4,), 1e-3, -6),
    "attention/query": ((2, 3, 4), 0.1, 0),
    "norm/gamma": ((6,), 2.4, 3),
    "temperature": ((), 0.7, -1),
    "zero/kernel": ((4, 3), 0.0, -2),  # no weights: no ratio
    "still/kernel": ((3, 2), 5.0, None),  # no gradients
}
STEPS = 5


def random_weights(seed=0):
    """One float32 array per layer, of the norms above."""
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=shape) for shape, _, _ in LAYERS.values()]
    norms = [norm for _, norm, _ in LAYERS.values()]
    return [
        np.asarray(x * (norm / oracle.length(x)), np.float32)
        for x, norm in zip(drawn, norms, strict=True)
    ]


def random_gradients(replicas, seed=1):
    """float32 arrays `[step][replica][layer]`, every replica's different."""
    rng = np.random.default_rng(seed)

    def draw(shape, power, step, replica):
        if power is None:
            return np.zeros(shape, np.float32)
        # Sizes vary: over the steps, or the second moment's rate would hardly show; over the
        # replicas, or clipping before the sum would look like clipping after it.
        scale = 2.0 ** (power + (0, 2, -1, 3, 1)[step] + 2 * replica)
        return np.asarray(rng.integers(-25, 26, shape) * scale, np.float32)

    return [
        [
            [draw(shape, power, step, replica) for shape, _, power in LAYERS.values()]
            for replica in range(replicas)
        ]
        for step in range(STEPS)
    ]


def make_variables(flavour, weights, names=tuple(LAYERS), dtype="float32"):
    """Variables of the flavour whose full paths are `names`."""
    variables = []
    for name, x in zip(names, weights, strict=True):
        *scopes, own_name = name.split("/")
        with contextlib.ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(flavour.name_scope(scope))
            variables.append(flavour.Variable(tf.cast(x, dtype), name=own_name, dtype=dtype))
    return variables


def copies(strategy, variable):
    """The variable's value on each replica."""
    native = variable if isinstance(variable, tf.Variable) else variable.value
    native = getattr(native, "_self_value", native)
    if strategy is None:
        return [native.numpy()]
    return [copy.numpy() for copy in strategy.experimental_local_results(native)]


class Run:
    """An optimizer, its variables, and a function that applies one step's gradients.

    Args:
        flavour: the fixture.
        make: function without arguments that makes the optimizer, called in the scope.
        weights: list of arrays.
        strategy: a `tf.distribute` strategy or None.
        graph: whether a step is a `tf.function`.
        names, dtype: of the variables.
    """

    def __init__(
        self, flavour, make, weights, strategy=None, graph=True, names=None, dtype="float32"
    ):
        self.strategy = strategy
        with strategy.scope() if strategy else contextlib.nullcontext():
            self.variables = make_variables(flavour, weights, names or tuple(LAYERS), dtype)
            self.optimizer = make()
            self.optimizer.build(self.variables)
        self.apply = tf.function(self._apply) if graph else self._apply

    def _apply(self, stacked):
        def replica(stacked):
            own = tf.distribute.get_replica_context().replica_id_in_sync_group
            grads = [None if g is None else tf.gather(g, own) for g in stacked]
            self.optimizer.apply_gradients(zip(grads, self.variables, strict=True))

        (self.strategy or tf.distribute.get_strategy()).run(replica, (stacked,))

    def step(self, replicas, dtype="float32"):
        """One update with the gradients `[replica][layer]`, handed over in `dtype`."""
        shares = zip(*replicas, strict=True)
        self.apply([None if s[0] is None else tf.cast(np.stack(s), dtype) for s in shares])

    def weights(self):
        """float64 arrays, after a check that the replicas hold the same bits."""
        values = []
        for variable in self.variables:
            first, *others = copies(self.strategy, variable)
            assert all(first.tobytes() == other.tobytes() for other in others)
            values.append(np.asarray(first, np.float64))
        return values

    def history(self, gradients, dtype="float32"):
        """Weights before the first step and after each: arrays `[step][layer]`."""
        weights = [self.weights()]
        for replicas in gradients:
            self.step(replicas, dtype)
            weights.append(self.weights())
        return weights


def largest(values):
    return float(np.max(np.abs(values)))


def assert_agrees(weights, expected):
    """Holds float32 weights `[step][layer]` to the oracle's, three times.

    With |.| the largest element, d the change of one step, and |x| the layer's largest weight so
    far:

    - d is right to 1% of |d|: the least that tells one rule from another;
    - d is right to 3e-7 |d| + 2^-23 |x|: the update's own error (measured: 6e-8), and the
      rounding of x before and after the step, half a unit in the last place each;
    - x is right to 5e-7 |x| after every step (measured: 3.2e-7 after five of them).

    Where the oracle stands still, so must the layer, to the bit.
    """
    peaks = [largest(e) for e in expected[0]]
    moments = zip(weights[:-1], weights[1:], expected[:-1], expected[1:], strict=True)
    for step, layers in enumerate(moments, start=1):
        for layer, (x_0, x_1, e_0, e_1) in enumerate(zip(*layers, strict=True)):
            where = f"step {step}, layer {layer}"
            change, error = largest(e_1 - e_0), largest((x_1 - x_0) - (e_1 - e_0))
            peaks[layer] = peak = max(peaks[layer], largest(e_1))
            assert error <= 0.01 * change, f"{where}: {error} in a change of {change}"
            bound = 3e-7 * change + 2**-23 * peak
            assert error <= bound, f"{where}: {error} in a change of {change}, above {bound}"
            drift = largest(x_1 - e_1)
            assert drift <= 5e-7 * peak, f"{where}: {drift} in weights of {peak}"
