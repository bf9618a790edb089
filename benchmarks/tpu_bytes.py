"""Memory traffic of one update on a TPU, without a TPU: python -m benchmarks.tpu_bytes

The TPU compiler compiles the update of a whole model and reports how many bytes the program reads
and writes (the extras `preflight` and `bench` install it and optax). In floats per parameter (N)
the minimum is 10 for LAMB and 7 for LARS. Clipping by the global norm reads the gradients once
more. So does skipping in LAMB, which may not write its moments before all gradients are known to be
finite; the first pass of LARS writes nothing and includes the check. No times are measured. Takes
ten minutes on two cores.
"""

import argparse
import gc
import math

from inputs import process  # isort: split

from preflight.compiler.compile import compile_program, from_hlo, open_topology  # isort: skip
import jax
import keras
import numpy as np
import tensorflow as tf

import tf_lamb
from benchmarks import shapes
from inputs.storage.files import check_file_writable, write_json
from preflight.compiler.topology import parse_topology
from preflight.compiler.traffic import count_traffic
from preflight.estimate import counts_main_memory

FLOAT_BYTES = 4
OPTIMIZERS = {"lamb": tf_lamb.LAMB, "lars": tf_lamb.LARS}
CASES = {
    "plain": {"skip_nonfinite": False},
    "telemetry": {"skip_nonfinite": False, "telemetry": True},
    "global_clipnorm": {"skip_nonfinite": False, "global_clipnorm": 1.0},
    "skip_nonfinite": {},
    "all three": {"telemetry": True, "global_clipnorm": 1.0},
}


def tpu(topology="v3:2x2"):
    """A device of a TPU topology to compile for; no such TPU needs to exist."""
    return open_topology(topology)[0]


def parameters(layers) -> int:
    """Number of parameters, N, of (path, shape) pairs."""
    return sum(math.prod(shape) for _, shape in layers)


def make_optimizer(rule, layers, excluded, **arguments):
    """Our optimizer, built for variables with these shapes."""
    variables = [
        keras.Variable(np.zeros(shape, np.float32), name=name.replace("/", "_"))
        for name, shape in layers
    ]
    optimizer = OPTIMIZERS[rule](1e-3, exclude_from_weight_decay=list(excluded), **arguments)
    optimizer.build(variables)
    return optimizer


def update_program(optimizer, layers) -> bytes:
    """The optimizer's update of float32 layers as StableHLO, lowered by TensorFlow.

    The program's arguments are the weights, the tensors of each slot, the gradients, the learning
    rate and the step. Its first results are the new weights and slots, in that order.
    """
    number = len(layers)
    index = tuple(range(number))

    # A function of tensors only, because TensorFlow cannot lower reads of uninitialized variables.
    # The step is float32, because the cost model has no estimate for powers of int64.
    def update(*tensors):
        *tensors, learning_rate, step = tensors
        params, *slots, grads = (
            list(tensors[i : i + number]) for i in range(0, len(tensors), number)
        )
        values, finite, rows = optimizer._update_model(
            index, grads, params, slots, learning_rate, step
        )
        return [result for result in (values, finite, rows) if result is not None]

    tensors = [tf.TensorSpec(shape, tf.float32) for _, shape in layers]
    scalar = tf.TensorSpec([], tf.float32)
    arguments = [*tensors * (2 + len(optimizer.slot_names)), scalar, scalar]
    compiled = tf.function(update, jit_compile=True, autograph=False)
    hlo = compiled.experimental_get_compiler_ir(*arguments)(stage="hlo_serialized")
    return from_hlo(hlo)


def compile_ours(rule, layers, excluded, device, **arguments):
    """Compiles our update."""
    optimizer = make_optimizer(rule, layers, excluded, **arguments)
    donated = len(layers) * (1 + len(optimizer.slot_names))
    return compile_program(update_program(optimizer, layers), [device], donated)


def compile_optax(rule, layers, device):
    """Compiles optax's update, which donates the weights and the state."""
    import optax

    optimizer = {
        "lamb": optax.lamb(1e-3, weight_decay=0.01),
        "lars": optax.lars(1e-3, weight_decay=1e-4),
    }[rule]

    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    place = jax.sharding.SingleDeviceSharding(device)
    params = [jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for _, shape in layers]
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
    )
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params)
    return lowered.compile().runtime_executable()


def figures(executable, number: int) -> dict:
    """The compiler's counts in floats per parameter.

    Args:
        executable: the compiled update.
        number: number of parameters.

    Returns:
        A dict of
        moved: reads and writes of HBM, by the compiler, or from v4 on, where its count contains
            on-chip memory, as `preflight.compiler.traffic` counts them. Tensors count with their
            padding to tiles: a vector is padded to 1,024 floats, each layer's scalar to 256.
        arguments: memory of the arguments; 4 for LAMB and 3 for LARS, plus padding.
        temporary: memory besides arguments and results.
    """
    memory = executable.get_compiled_memory_stats()
    accessed = executable.cost_analysis()["bytes accessed"]
    main = count_traffic(executable.hlo_modules()[0].to_string()).main_bytes
    of_hbm = counts_main_memory({"bytes_accessed": accessed, "main_bytes": main})
    counts = {
        "moved": accessed if of_hbm else main,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }
    return {name: count / FLOAT_BYTES / number for name, count in counts.items()}


def our_figures(rule, case, layers, excluded, device) -> dict:
    """`figures` of our update in a case of `CASES`."""
    executable = compile_ours(rule, layers, excluded, device, **CASES[case])
    gc.collect()  # frees the optimizer, which is in a reference cycle, and its slots
    return figures(executable, parameters(layers))


def optax_figures(rule, layers, device) -> dict:
    """`figures` of optax's update."""
    return figures(compile_optax(rule, layers, device), parameters(layers))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_bytes", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--topology", default="v3:2x2", help="TPU to compile for, such as v3:2x2 or v5e:2x2"
    )
    parser.add_argument(
        "--model",
        choices=shapes.MODELS,
        action="append",
        help="model whose variables are updated; repeatable (default: all)",
    )
    parser.add_argument(
        "--rule",
        choices=OPTIMIZERS,
        action="append",
        help="optimizer to compile; repeatable (default: all)",
    )
    parser.add_argument("--json", help="write the rows to this file")
    flags = parser.parse_args()
    if flags.json:
        check_file_writable(flags.json, f"--json={flags.json}")
    topology = parse_topology(flags.topology, "--topology")
    device = tpu(topology.name)
    rows = []
    print(f"{device.device_kind:36}moved    arguments    temporary")
    for model in flags.model or shapes.MODELS:
        layers = shapes.MODELS[model]()
        for rule in flags.rule or OPTIMIZERS:
            for case in (*CASES, "optax"):
                if case == "optax":
                    row = optax_figures(rule, layers, device)
                else:
                    row = our_figures(rule, case, layers, shapes.EXCLUDED[model], device)
                rows.append(
                    {"topology": topology.name, "model": model, "rule": rule, "case": case} | row
                )
                print(
                    f"{model:10} {rule:5} {case:16} {row['moved']:6.3f} N "
                    f"{row['arguments']:10.3f} N {row['temporary']:10.3f} N",
                    flush=True,
                )
    if flags.json:
        write_json(flags.json, rows)


if __name__ == "__main__":
    process.run(main)
