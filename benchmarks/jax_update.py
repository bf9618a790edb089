"""Times one update on JAX beside its peers': python -m benchmarks.jax_update

An update is one call of `stateless_apply`, compiled with `jax.jit`, which gives its arguments away
(`donate_argnums`), of 54 tensors with 16.5 million elements. The optimizers take turns in one run;
the ratio to `keras.optimizers.Lamb` is the figure to compare.
"""

import argparse
import os
import statistics
import time

from inputs import process  # isort: split

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed, JAX would wait for a TPU

import jax
import keras
import numpy as np
import optax

import tf_lamb
from inputs.errors import refuse_below

SHAPES = [*[(768, 768)] * 8, *[(768, 3072), (3072, 768)] * 2, *[(768,)] * 41, (3, 3, 512, 512)]
DECAY = 0.01
PEER = "keras.optimizers.Lamb"


def keras_update(optimizer):
    """(the compiled update, its first arguments) of a Keras optimizer."""
    variables = [keras.Variable(value) for value in _arrays()]
    optimizer.build(variables)
    state = [variable.value for variable in optimizer.variables]

    def update(gradients, state, weights):
        weights, state = optimizer.stateless_apply(state, gradients, weights)
        return state, weights

    return jax.jit(update, donate_argnums=(1, 2)), state


def optax_update():
    """The same of optax's LAMB."""
    rule = optax.lamb(1e-3, weight_decay=DECAY)

    def update(gradients, state, weights):
        steps, state = rule.update(gradients, state, weights)
        return state, optax.apply_updates(weights, steps)

    return jax.jit(update, donate_argnums=(1, 2)), rule.init(_arrays())


def _arrays():
    generator = np.random.default_rng(0)
    return [jax.numpy.asarray(generator.normal(size=s).astype(np.float32)) for s in SHAPES]


def measure(updates: dict, rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of an update in each round, after a first one that compiles."""
    gradients = [0.01 * value for value in _arrays()]
    arguments = {name: (state, _arrays()) for name, (_, state) in updates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for turn in range(rounds + 1):
        for name, (update, _) in updates.items():
            start = time.perf_counter()
            arguments[name] = jax.block_until_ready(update(gradients, *arguments[name]))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jax_update",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=20, help="updates of each optimizer")
    flags = parser.parse_args()
    refuse_below(1, rounds=flags.rounds)
    seconds = measure(
        {
            PEER: keras_update(keras.optimizers.Lamb(1e-3, weight_decay=DECAY)),
            "tf_lamb.LAMB": keras_update(tf_lamb.LAMB(1e-3, weight_decay=DECAY)),
            "skip_nonfinite=False": keras_update(
                tf_lamb.LAMB(1e-3, weight_decay=DECAY, skip_nonfinite=False)
            ),
            "optax.lamb": optax_update(),
        },
        flags.rounds,
    )
    print(f"{'':24}{'ms':>8}{'ratio':>8}")
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds[PEER], strict=True))
        print(f"{name:24}{1e3 * statistics.median(own):8.1f}{ratio:8.2f}")


if __name__ == "__main__":
    process.run(main)
