"""Compiles HLO for a TPU without a TPU, and returns the compiler's estimates of cost and memory.

Import this in a separate process only: JAX and libtpu read their settings from the environment
once, when they are loaded. The extra `preflight` installs both.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import threading

# Without these, libtpu would ask the metadata server of a TPU VM for them before it compiles.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
# libtpu allows one process at a time, because a TPU can be opened once. Here no device is opened.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX must not look for a TPU

import jax
import numpy as np
from jax.experimental import topologies
from jaxlib import _jax, xla_client
from jaxlib.mlir import ir

from inputs.errors import InputError
from inputs.storage.files import locked, write_json
from preflight.compiler.children import WAITING
from preflight.compiler.traffic import WIDTHS, count_all_bytes, count_traffic

FORMAT = 2  # of the cached results of `figures`; increase it when their entries change
MAX_ERROR_LENGTH = 400  # characters
FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")  # environment variables that change what is compiled
LOOK_EVERY_SECONDS = 0.2  # for the dumped program


def open_topology(name: str) -> list:
    """Returns the devices of a TPU topology to compile for. No such TPU needs to exist.

    Args:
        name: such as "v3:2x2".
    """
    # The two cores of a v4 chip act as one device, as on Cloud TPU.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if name.endswith(":1x1"):  # a host has four chips by default
        options["chips_per_host_bounds"] = (1, 1, 1)
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return list(described.devices)


def from_hlo(hlo: bytes) -> bytes:
    """Converts a serialized HLO module, as TensorFlow lowers it, to StableHLO."""
    return _jax.mlir.hlo_to_stablehlo(hlo)


def compile_program(program: bytes, devices, donated: int | None = None, quick: bool = False):
    """Compiles a StableHLO program that runs on each of the devices.

    Args:
        program: from `from_hlo`.
        devices: from `open_topology`.
        donated: number n of donated arguments: the first n results reuse the buffers of the first n
            arguments. None keeps the aliasing of the program.
        quick: whether the compiler may leave out optimizations that take long. BERT-Large's step
            takes it a third of the time and two thirds of the memory (v5e); the compiled program
            needs about as much memory, but is not the one that a run would have.

    Returns:
        A `jaxlib` executable.
    """
    with jax.interpreters.mlir.make_ir_context():
        module = ir.Module.parse(program)
        (main,) = (op for op in module.body.operations if op.name.value == "main")
        if donated is not None:
            i32 = ir.IntegerType.get_signless(32)
            main.arg_attrs = ir.ArrayAttr.get(
                [
                    ir.DictAttr.get(
                        {"tf.aliasing_output": ir.IntegerAttr.get(i32, i)} if i < donated else {}
                    )
                    for i in range(len(main.arguments))
                ]
            )
        _prepare(module.operation, len(devices))
        options = xla_client.CompileOptions()
        options.num_replicas = len(devices)
        options.num_partitions = 1
        if quick:
            options.executable_build_options.exec_time_optimization_effort = -1.0
        options.device_assignment = xla_client.DeviceAssignment.create(
            np.array([[device.id] for device in devices], np.int32)
        )
        client = devices[0].client
        return client.compile(module, xla_client.DeviceList(tuple(devices)), options)


def _prepare(operation, replicas: int) -> None:
    """Makes every all-reduce span all replicas, and removes copies, which StableHLO cannot express.

    Changes the operations inside `operation`, recursively.
    """
    for region in operation.regions:
        for block in region:
            for inner in list(block.operations):
                inner = inner.operation
                _prepare(inner, replicas)
                if inner.name == "mhlo.copy":
                    inner.results[0].replace_all_uses_with(inner.operands[0])
                    inner.erase()
                elif inner.name == "stablehlo.all_reduce":
                    groups = np.arange(replicas, dtype=np.int64)[np.newaxis]
                    inner.attributes["replica_groups"] = ir.DenseElementsAttr.get(groups)


def figures(executable) -> dict:
    """Returns the compiler's figures for one run of a program on one device.

    Args:
        executable: from `compile_program`.

    Returns:
        A dict with the entries
        flops: number of floating-point operations.
        bytes_accessed: bytes of traffic in all memories, on-chip ones included, by the compiler,
            with tensors padded to tiles.
        seconds: the compiler's estimate of the time, which follows from `bytes_accessed`.
        main_bytes, copied_bytes, products: those of
            `preflight.compiler.traffic.Traffic`, bytes of HBM alone.
        argument_bytes, temporary_bytes, code_bytes: memory.
        hbm_bytes: the sum of these; results that reuse arguments' buffers count once. It can be
            more than the program needs at its peak, because temporaries can reuse the memory of
            arguments: 8.04 GiB and 6.80 GiB of v2's 7.48 for a step of BERT-Large that compiles.
        all_reduce_bytes: bytes that the device contributes to all-reduces.
        all_reduces, asynchronous: number of all-reduces, and how many of them overlap with other
            work.
    """
    costs = executable.cost_analysis()
    memory = executable.get_compiled_memory_stats()
    text = executable.hlo_modules()[0].to_string()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "flops": costs["flops"],
        "bytes_accessed": costs["bytes accessed"],
        "seconds": costs["optimal_seconds"] + _count_untimed(text),
        **dataclasses.asdict(count_traffic(text)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "hbm_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + kept,
        **_all_reduces(text),
    }


def _count_untimed(text: str) -> int:
    """Returns the number of operations without a time, each of which the compiler counts as -1 s.

    They split and join 64-bit integers such as the step counter.
    """
    in_fusion = False
    untimed = 0
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            in_fusion = line.startswith("%fused")
        elif not in_fusion and " custom-call(" in line:
            untimed += 1
    return untimed


def _all_reduces(text: str) -> dict:
    """Returns the entries of `figures` that describe all-reduces, from the text of the HLO."""
    total = 0
    count = 0
    asynchronous = 0
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%[\w.-]+ = (.*?) all-reduce(-start)?\(", line)
        if found:
            count += 1
            asynchronous += found[2] is not None
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
                sizes = [int(n) for n in shape.split(",") if n]
                total += WIDTHS.get(kind, 0) * int(np.prod(sizes, dtype=np.int64))
    return {"all_reduces": count, "asynchronous": asynchronous, "all_reduce_bytes": total}


PRODUCTS = ("stablehlo.convolution", "stablehlo.dot", "stablehlo.dot_general")


def count_products(program: bytes) -> dict:
    """Counts matrix products and convolutions of a StableHLO program.

    By default, a TPU multiplies float32 in bfloat16, too, in one pass, but a float32 operand has
    twice the bytes. (With the precision "highest", which TensorFlow asks for only without
    `enable_tensor_float_32_execution`, there are six passes.)

    Returns:
        A dict with `num_products`, the number of all products, and `float32_products`, the number
        of those that have a float32 operand.
    """
    with jax.interpreters.mlir.make_ir_context():
        operand_types = list(_operand_types(ir.Module.parse(program).operation))
    return {
        "num_products": len(operand_types),
        "float32_products": sum("f32" in types for types in operand_types),
    }


def _operand_types(operation):
    """Yields the element types of the operands of each product."""
    for region in operation.regions:
        for block in region:
            for inner in block.operations:
                inner = inner.operation
                yield from _operand_types(inner)
                if inner.name in PRODUCTS:
                    yield [str(ir.ShapedType(value.type).element_type) for value in inner.operands]


def compile_file(path: str, topology: str, cache: str, quick: bool = False) -> dict:
    """Compiles a file of HLO.

    Args:
        path: the file.
        topology: such as "v3:2x2".
        cache: folder of the cached results.
        quick: as for `compile_program`.

    Returns:
        A dict with the entries of `figures` and `count_products`. If the program does not compile,
        it has the entry `error`, one sentence, in place of those of `figures`, and `hbm_bytes` if
        the program needs too much memory.
    """
    program = _read_program(path)
    result = _cached(
        program,
        f"{topology} {FORMAT}{' quick' if quick else ''}",
        cache,
        lambda: figures(compile_program(program, open_topology(topology), quick=quick)),
    )
    return result | count_products(program)


def count_file(path: str, topology: str, cache: str, dump: str) -> dict:
    """Counts what a file of HLO moves, with the optimizations of a run, but without its code.

    The process must end after this: the compiler goes on to generate code, which takes it most of
    its time: a step of `squad-mini` with 16 examples for v5e took 57 s, and 7 s up to here.

    Args:
        path, topology, cache: as for `compile_file`.
        dump: an empty folder, where the compiler writes the program.

    Returns:
        A dict with the entries `main_bytes` and `all_bytes`, bytes of a run of the program in HBM
        and in all memories, by the rules of `preflight.compiler.traffic.count_traffic`. If the
        program does not compile, the entries are those of `compile_file`.
    """
    program = _read_program(path)

    def count():
        text = _optimize(program, topology, pathlib.Path(dump))
        return {"main_bytes": count_traffic(text).main_bytes, "all_bytes": count_all_bytes(text)}

    return _cached(program, f"{topology} {FORMAT} traffic", cache, count)


def _read_program(path):
    with open(path, "rb") as file:
        return from_hlo(file.read())


def _optimize(program, topology, dump):
    """Returns the text of the optimized HLO as soon as the compiler has written it to `dump`."""
    # libtpu reads its flags when it is loaded.
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=false"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
    compiled: concurrent.futures.Future = concurrent.futures.Future()

    def run():
        try:
            compiled.set_result(compile_program(program, open_topology(topology)))
        except BaseException as error:
            compiled.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        with contextlib.suppress(concurrent.futures.TimeoutError):
            return compiled.result(LOOK_EVERY_SECONDS).hlo_modules()[0].to_string()
        for path in dump.glob("*-TLP-hlo.txt"):
            stem = path.name.removesuffix("hlo.txt")
            if any(dump.glob(f"{stem}*dedup*")):  # it is written next, so the HLO is complete
                return path.read_text(encoding="utf-8")


def _cached(program, kind, cache, make):
    """Returns a cached result for a program, or makes it and adds it to the cache.

    One process compiles at a time: a large program takes all cores and several GB of memory. After
    waiting for another process, the result may be in the cache.

    Args:
        program: StableHLO.
        kind: what else the result depends on, beside the version of the compiler and the flags.
        cache: folder of the cached results.
        make: function that compiles and returns the result.
    """
    version = importlib.metadata.version("libtpu")
    flags = "".join(f" {os.environ[name]}" for name in FLAGS if os.environ.get(name))
    key = hashlib.sha256(program + f"{version} {kind}{flags}".encode()).hexdigest()
    cached = pathlib.Path(cache, f"{key}.json")
    result = _read(cached)
    if result is None:
        with _one_at_a_time(cached.parent):
            result = _read(cached) or _make(make, cached)
    return result


def _read(cached):
    """Returns the cached result; None if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(cached.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _one_at_a_time(folder):
    """Holds the lock of the cache during the block, unless its folder cannot be written."""

    def say(holder):
        print(f"{WAITING} {holder}", flush=True)

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, InputError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(str(folder), "--preflight", wait=True, waiting=say))
            print(flush=True)  # it no longer waits
        yield


def _make(make, cached):
    """Returns the result of `make`, or the compiler's error, and writes it to the file `cached`."""
    try:
        result = make()
    except jax.errors.JaxRuntimeError as error:
        result = _describe_error(str(error))
        if "hbm_bytes" not in result:  # the reason may be temporary: do not cache it
            return result
    with contextlib.suppress(OSError):  # the cache is optional
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_json(cached, result, indent=None)
    return result


def _describe_error(message: str) -> dict:
    """Returns the compiler's error as the entries `error` and `hbm_bytes` of `compile_file`.

    `error` contains the operation and the source line that the compiler names.
    """
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no reason given")
    result = {"error": first[:MAX_ERROR_LENGTH]}
    for pattern in (r'op_name="([^"]+)"', r'source_file="([^"]+)" source_line=(\d+)'):
        found = re.search(pattern, message)
        if found:
            result["error"] += f" ({':'.join(found.groups())})"
    sizes = re.search(r"(?:Used|required[^(]*\()\s*([\d.]+)([KMGT])", message)
    if sizes and "RESOURCE_EXHAUSTED" in first:
        result["hbm_bytes"] = int(float(sizes[1]) * 2 ** (10 * (1 + "KMGT".index(sizes[2]))))
    return result
