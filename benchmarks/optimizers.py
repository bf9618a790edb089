"""Times one update of each optimizer, relative to a memory copy: python -m benchmarks.optimizers

Measures everything in one process. The updates of an optimizer alternate with a copy that moves as
many floats as the rule must read and write at least (LAMB 10 N, LARS 7 N for N parameters), so that
other load on the machine affects both; compare the ratios.
"""

import argparse
import ctypes
import functools
import gc
import importlib.util
import os
import statistics
import threading
import time

from inputs import process  # isort: split

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed, JAX would wait for a TPU

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from official.modeling.optimization import lamb as tfm_lamb
from official.modeling.optimization import lars as tfm_lars

import tf_lamb
from benchmarks import shapes
from inputs.errors import InputError, refuse_below
from inputs.storage.files import check_file_writable, write_json
from tf_lamb import tf_keras as tf_lamb_2

FLOATS_MOVED = {"lamb": 10, "lars": 7}
OPTAX = "optax, JAX"
WAYS = ("eager", "function", "jit")


def optimizers(rule, excluded):
    """Name -> function that makes the optimizer; all of them use weight decay."""
    ours = {"exclude_from_weight_decay": list(excluded)}
    if rule == "lamb":
        return {
            "tf_lamb, Keras 3": lambda: tf_lamb.LAMB(1e-3, **ours),
            "tf_lamb, tf_keras": lambda: tf_lamb_2.LAMB(1e-3, **ours),
            "keras.optimizers.Lamb": lambda: keras.optimizers.Lamb(1e-3, weight_decay=0.01),
            "keras.optimizers.Lamb, no decay": lambda: keras.optimizers.Lamb(1e-3),
            "tf-models LAMB": lambda: tfm_lamb.LAMB(
                1e-3, weight_decay_rate=0.01, exclude_from_weight_decay=list(excluded)
            ),
        }
    return {
        "tf_lamb, Keras 3": lambda: tf_lamb.LARS(1e-3, **ours),
        "tf_lamb, tf_keras": lambda: tf_lamb_2.LARS(1e-3, **ours),
        "tf-models LARS": lambda: tfm_lars.LARS(
            1e-3, weight_decay_rate=1e-4, exclude_from_weight_decay=list(excluded)
        ),
    }


def tensorflow_update(make, layers, way):
    """A function that runs one update of new variables with these shapes, and waits for it."""
    optimizer = make()
    is_keras_3 = isinstance(optimizer, keras.optimizers.Optimizer)
    rng = np.random.default_rng(0)
    variables = []
    for name, shape in layers:
        value = 0.02 * rng.standard_normal(shape, np.float32)
        if is_keras_3:
            variable = keras.Variable(value, name=name.replace("/", "_"))
        else:
            variable = tf.Variable(value, name=name)
        variables.append(variable)
    grads = [tf.constant(1e-3 * rng.standard_normal(shape, np.float32)) for _, shape in layers]

    def apply(*grads):
        optimizer.apply_gradients(zip(grads, variables, strict=True))

    if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
        optimizer._create_all_weights(variables)  # a compiled function cannot create them
    else:
        optimizer.build(variables)
    if way != "eager":
        apply = tf.function(apply, jit_compile=way == "jit", autograph=False)
    last = variables[-1].value if is_keras_3 else variables[-1]

    def update():
        apply(*grads)
        last.numpy()  # on a CPU, eager calls and functions return only when the update is done

    return update


def optax_update(rule, layers):
    """Like `tensorflow_update`, for optax in a jitted function that donates its inputs."""
    import jax
    import jax.numpy as jnp
    import optax

    make = {
        "lamb": lambda: optax.lamb(1e-3, weight_decay=0.01),
        "lars": lambda: optax.lars(1e-3, weight_decay=1e-4),
    }
    optimizer = make[rule]()
    rng = np.random.default_rng(0)
    params = [jnp.asarray(0.02 * rng.standard_normal(shape, np.float32)) for _, shape in layers]
    grads = [jnp.asarray(1e-3 * rng.standard_normal(shape, np.float32)) for _, shape in layers]
    holder = [params, optimizer.init(params)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def apply(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def update():
        holder[:] = apply(*holder, grads)
        jax.block_until_ready(holder)

    return update


class Copy:
    """Copies between two buffers on all cores.

    Args:
        floats: number of floats moved; half of them are reads, half writes.
    """

    def __init__(self, floats: int):
        self._parts = np.array_split(np.ones(floats // 2, np.float32), os.cpu_count())
        self._targets = [np.zeros_like(part) for part in self._parts]

    def __call__(self):
        """Copies once."""
        threads = [
            threading.Thread(target=np.copyto, args=pair)
            for pair in zip(self._targets, self._parts, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def seconds(function) -> float:
    """Duration of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is the current memory, VmHWM the peak."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(field))
    return 1024 * int(line.split()[1])


def temporary_bytes(function) -> int:
    """Peak memory while the function runs, minus the memory before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset VmHWM
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


def measure(make_update, copy, rounds: int) -> dict:
    """Time of the first two updates (tracing and compilation), median time of an update, its ratio
    to the copy, and temporary memory."""
    update = make_update()
    first = seconds(update) + seconds(update)
    temporaries = temporary_bytes(update)
    pairs = [(seconds(update), seconds(copy)) for _ in range(rounds)]
    return {
        "first_two_seconds": first,
        "update_seconds": statistics.median(u for u, _ in pairs),
        "copy_seconds": statistics.median(c for _, c in pairs),
        "ratio": statistics.median(u / c for u, c in pairs),
        "temporary_bytes": temporaries,
    }


def check_name(part: str, rules, has_optax: bool) -> None:
    """Checks that the name of an optimizer contains the text of `--only`.

    Raises:
        InputError: there is none among those of the rules.
    """
    names = dict.fromkeys(name for rule in rules for name in optimizers(rule, ()))
    names |= {OPTAX: None} if has_optax else {}
    if not any(part in name for name in names):
        raise InputError(
            f"--only={part} is in the name of no optimizer. The names are {'; '.join(names)}."
        )


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--model",
        choices=shapes.MODELS,
        action="append",
        help="model whose variables are updated; repeatable (default: all)",
    )
    parser.add_argument(
        "--rule",
        choices=FLOATS_MOVED,
        action="append",
        help="optimizer to measure; repeatable (default: all)",
    )
    parser.add_argument("--only", default="", help="only optimizers whose name contains this")
    parser.add_argument(
        "--rounds", type=int, default=9, help="number of measurements; the median is printed"
    )
    parser.add_argument("--json", help="write the rows to this file")
    flags = parser.parse_args()
    refuse_below(1, rounds=flags.rounds)
    has_optax = importlib.util.find_spec("optax") is not None
    check_name(flags.only, flags.rule or FLOATS_MOVED, has_optax)
    if flags.json:
        check_file_writable(flags.json, f"--json={flags.json}")
    if not has_optax:
        print("optax is not installed and is skipped. Install it: pip install -e .[train,bench]")
    rows = []
    print(f"{'':68}update   ratio to copy    first two   temporaries")
    for model in flags.model or shapes.MODELS:
        layers = shapes.MODELS[model]()
        num_parameters = sum(int(np.prod(shape)) for _, shape in layers)
        for rule in flags.rule or FLOATS_MOVED:
            copy = Copy(FLOATS_MOVED[rule] * num_parameters)
            copy()
            cases = [
                (name, way, functools.partial(tensorflow_update, make, layers, way))
                for name, make in optimizers(rule, shapes.EXCLUDED[model]).items()
                for way in WAYS
            ]
            if has_optax:
                make_update = functools.partial(optax_update, rule, layers)
                cases.append((OPTAX, "jit", make_update))
            for name, way, make_update in cases:
                if flags.only not in name:
                    continue
                row = measure(make_update, copy, flags.rounds)
                rows.append({"model": model, "rule": rule, "name": name, "way": way} | row)
                print(
                    f"{model:10} {rule:5} {name:32} {way:9} {1e3 * row['update_seconds']:14.1f} ms "
                    f"{row['ratio']:12.2f} {row['first_two_seconds']:12.1f} s "
                    f"{row['temporary_bytes'] / (4 * num_parameters):8.2f} N",
                    flush=True,
                )
    if flags.json:
        write_json(flags.json, rows)


if __name__ == "__main__":
    process.run(main)
