"""The TPU compiler without a TPU: HLO in, the compiler's own figures out.

Only a process of its own may import this: JAX and libtpu read their settings once, from the
environment, when they are loaded. The extra `preflight` installs both.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import re
import sys
import tempfile

# What libtpu asks of the machine's metadata server before it compiles; then it asks nothing.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is opened, so none is shared
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX looks for no device to run on

import jax
import numpy as np
from jax.experimental import topologies
from jaxlib import _jax, xla_client
from jaxlib.mlir import ir

FORMAT = 1  # of `figures`; older results are not read
LONGEST = 400  # characters of an error


def open_topology(name: str) -> list:
    """The devices of a TPU that need not be there, to compile for."""
    # The two cores of a v4 chip act as one device, as Cloud TPU has them.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return list(described.devices)


def from_hlo(hlo: bytes) -> bytes:
    """StableHLO of a serialized HLO module, as TensorFlow lowers it."""
    return _jax.mlir.hlo_to_stablehlo(hlo)


def compile_program(program: bytes, devices, donated: int | None = None):
    """The executable of a StableHLO program, a copy of which runs on each of the devices.

    Args:
        program: from `from_hlo`.
        devices: from `open_topology`.
        donated: how many of the first results are written over the first arguments; None for
            what the program itself says.
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
        _settle(module.operation, len(devices))
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = len(devices), 1
        options.device_assignment = xla_client.DeviceAssignment.create(
            np.array([[device.id] for device in devices], np.int32)
        )
        client = devices[0].client
        return client.compile(module, xla_client.DeviceList(tuple(devices)), options)


def _settle(operation, replicas: int) -> None:
    """Lets every sum run over all replicas, and drops copies that StableHLO does not know."""
    for region in operation.regions:
        for block in region:
            for inner in list(block.operations):
                inner = inner.operation
                _settle(inner, replicas)
                if inner.name == "mhlo.copy":
                    inner.results[0].replace_all_uses_with(inner.operands[0])
                    inner.erase()
                elif inner.name == "stablehlo.all_reduce":
                    groups = np.arange(replicas, dtype=np.int64)[np.newaxis]
                    inner.attributes["replica_groups"] = ir.DenseElementsAttr.get(groups)


def figures(executable) -> dict:
    """What the compiler says of a program, for one device.

    Returns:
        flops, bytes_accessed: of one run; bytes of main memory, tensors filled up to whole tiles.
        seconds: its own estimate of one run.
        argument_bytes, temporary_bytes, code_bytes: memory.
        hbm_bytes: in all, results that take the place of arguments counted once.
        all_reduce_bytes: that one device puts into sums over the replicas.
        all_reduces, asynchronous: how many sums there are, and how many of them run beside
            other work.
    """
    counts, memory = executable.cost_analysis(), executable.get_compiled_memory_stats()
    text = executable.hlo_modules()[0].to_string()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "flops": counts["flops"],
        "bytes_accessed": counts["bytes accessed"],
        "seconds": counts["optimal_seconds"] + _unknown(text),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "hbm_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + kept,
        **_all_reduces(text),
    }


def _unknown(text: str) -> int:
    """How many operations the compiler has no time for: it counts each as -1 second.

    They are the halves that it splits a 64-bit integer into, such as the step, and joins.
    """
    fused, unknown = False, 0
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            fused = line.startswith("%fused")
        elif not fused and " custom-call(" in line:
            unknown += 1
    return unknown


WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "pred": 1}


def _all_reduces(text: str) -> dict:
    total = count = asynchronous = 0
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
    """Matrix products and convolutions of a StableHLO program, and those of float32 among them.

    A TPU multiplies bfloat16; a product of float32 takes it several passes.
    """
    with jax.interpreters.mlir.make_ir_context():
        factors = list(_factors(ir.Module.parse(program).operation))
    return {"products": len(factors), "float32_products": sum("f32" in pair for pair in factors)}


def _factors(operation):
    for region in operation.regions:
        for block in region:
            for inner in block.operations:
                inner = inner.operation
                yield from _factors(inner)
                if inner.name in PRODUCTS:
                    yield [str(ir.ShapedType(value.type).element_type) for value in inner.operands]


def attempt(path: str, topology: str, cache: str) -> dict:
    """`figures` and products of a file of HLO; or {"error": one sentence, "hbm_bytes": if that was
    too much}."""
    with open(path, "rb") as file:
        program = from_hlo(file.read())
    return _attempt(program, topology, cache) | count_products(program)


def _attempt(program, topology, cache):
    version = importlib.metadata.version("libtpu")
    key = hashlib.sha256(program + f"{version} {topology} {FORMAT}".encode()).hexdigest()
    kept = pathlib.Path(cache, f"{key}.json")
    with contextlib.suppress(OSError, ValueError):  # none there, or torn
        return json.loads(kept.read_text(encoding="utf-8"))
    try:
        result = figures(compile_program(program, open_topology(topology)))
    except jax.errors.JaxRuntimeError as error:
        result = _in_words(str(error))
        if "hbm_bytes" not in result:  # another time it may be another
            return result
    with contextlib.suppress(OSError):  # what cannot be kept is compiled again
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            json.dump(result, file)
        os.replace(file.name, kept)
    return result


def _in_words(message: str) -> dict:
    """What stops a program, with the operation and line that it names."""
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no reason given")
    result = {"error": first[:LONGEST]}
    for pattern in (r'op_name="([^"]+)"', r'source_file="([^"]+)" source_line=(\d+)'):
        found = re.search(pattern, message)
        if found:
            result["error"] += f" ({':'.join(found.groups())})"
    sizes = re.search(r"(?:Used|required[^(]*\()\s*([\d.]+)([KMGT])", message)
    if sizes and "RESOURCE_EXHAUSTED" in first:
        result["hbm_bytes"] = int(float(sizes[1]) * 2 ** (10 * (1 + "KMGT".index(sizes[2]))))
    return result


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as job:
        answer = attempt(**pickle.load(job))
    with open(sys.argv[2], "w", encoding="utf-8") as out:
        json.dump(answer, out)
