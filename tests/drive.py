"""Runs an optimizer on a few random layers and compares its weights with the oracle's.

The gradients are small integers times a power of two. Their sum over the replicas is therefore
exact, also in bfloat16, and every difference from the oracle is the optimizer's own error.
"""

import contextlib
import warnings

import numpy as np
import oracle
import tensorflow as tf

# name: (shape, norm of the weights, power of two in the gradients)
# Every rank from 0 to 4, in five shapes: layers of one shape share a compiled program.
LAYERS = {
    "embed/table": ((13, 7), 1e3, 2),
    "conv/kernel": ((3, 3, 2, 4), 30.0, -3),
    "conv/bias": ((4,), 1e-3, -6),
    "attention/query": ((2, 3, 4), 0.1, 0),
    "norm/gamma": ((4,), 2.4, 3),
    "temperature": ((), 0.7, -1),
    "zero/kernel": ((13, 7), 0.0, -2),  # weights of 0: the trust ratio is 1
    "still/kernel": ((13, 7), 5.0, None),  # gradients of 0
}
# Two shapes: for tests of an argument whose effect does not depend on the shape of a layer.
FEW_LAYERS = ("embed/table", "conv/bias", "norm/gamma", "zero/kernel", "still/kernel")
STEPS = 5


@contextlib.contextmanager
def run_eagerly():
    """Runs every `tf.function` operation by operation, without tracing and compiling it."""
    tf.config.run_functions_eagerly(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Even though the `tf.config.experimental_run_func")
            yield
    finally:
        tf.config.run_functions_eagerly(False)


def random_weights(seed=0, names=tuple(LAYERS)):
    """One float32 array per layer, of the norms above."""
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=LAYERS[name][0]) for name in names]
    norms = [LAYERS[name][1] for name in names]
    return [
        np.asarray(x * (norm / oracle.length(x)), np.float32)
        for x, norm in zip(drawn, norms, strict=True)
    ]


def random_gradients(replicas, seed=1, names=tuple(LAYERS)):
    """float32 arrays `[step][replica][layer]`, different on every replica."""
    rng = np.random.default_rng(seed)

    def draw(shape, power, step, replica):
        if power is None:
            return np.zeros(shape, np.float32)
        # The size varies over the steps, so that a wrong decay rate of the second moment shows,
        # and over the replicas, so that clipping before the sum differs from clipping after it.
        scale = 2.0 ** (power + (0, 2, -1, 3, 1)[step] + 2 * replica)
        return np.asarray(rng.integers(-25, 26, shape) * scale, np.float32)

    return [
        [
            [draw(LAYERS[name][0], LAYERS[name][2], step, replica) for name in names]
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
        flavour: the fixture of that name.
        make: function without arguments that makes the optimizer; it is called in the scope of
            the strategy.
        weights: list of arrays.
        strategy: a `tf.distribute` strategy or None.
        graph: whether a step is a `tf.function`.
        compiled: whether the update is traced and compiled; otherwise it runs eagerly.
        names: full paths of the variables; `LAYERS` by default.
        dtype: dtype of the variables.
    """

    def __init__(
        self,
        flavour,
        make,
        weights,
        strategy=None,
        graph=True,
        names=None,
        dtype="float32",
        compiled=True,
    ):
        self.strategy = strategy
        self._mode = contextlib.nullcontext if compiled else run_eagerly
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
        """Applies one update with the gradients `[replica][layer]`, cast to `dtype`."""
        shares = zip(*replicas, strict=True)
        with self._mode():
            self.apply([None if s[0] is None else tf.cast(np.stack(s), dtype) for s in shares])

    def weights(self):
        """The weights as float64 arrays; asserts that all replicas hold the same bits."""
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
    """Asserts that float32 weights `[step][layer]` agree with the oracle's.

    With |.| the largest element, d the change of one step, and |x| the layer's largest weight so
    far, there are three bounds:

    - the error of d is at most 1% of |d|, which tells one rule from another;
    - the error of d is at most 3e-7 |d| + 2^-23 |x|: the error of the update (measured: 6e-8),
      and the rounding of x before and after the step, half a unit in the last place each;
    - the error of x is at most 5e-7 |x| after every step (measured: 3.2e-7 after five steps).

    Where the oracle does not change a layer, the layer must not change by a single bit.
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
