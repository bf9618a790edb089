"""Model FLOPs utilization: the model's operations per second, divided by the devices' peak.

Counted as in PaLM, arXiv:2204.02311, appendix B: the forward pass, and twice as much for the
backward pass, without rematerialization and without the optimizer.
"""

import math
import os
import urllib.error
import urllib.request

import tensorflow as tf

BACKWARD = 2  # times the forward pass: a product has a gradient for each of its two factors

# Teraflop/s of a chip in bfloat16, what its matrix unit multiplies float32 in, too: Jouppi et al.,
# arXiv:2304.01433 (v2 to v4), cloud.google.com/tpu/docs/system-architecture-tpu-vm (the others).
# Of the accelerator type's number, the older generations count cores, two on a chip.
TPU_TERAFLOPS = {"v2": 46, "v3": 123, "v4": 275, "v5litepod": 197, "v5p": 459, "v6e": 918}
CHIPS_COUNTED = ("v5litepod", "v6e")

# Dense teraflop/s of a GPU, NVIDIA's data sheets; float32 is TF32 where there is TF32, which
# TensorFlow takes by itself. The first entry all of whose words are in the name counts.
GPU_TERAFLOPS = (
    (("H200", "NVL"), {"float32": 417.5, "bfloat16": 835.5}),
    (("H200",), {"float32": 494.7, "bfloat16": 989.4}),
    (("H100", "NVL"), {"float32": 417.5, "bfloat16": 835.5}),
    (("H100", "PCIe"), {"float32": 378.0, "bfloat16": 756.0}),
    (("H100",), {"float32": 494.7, "bfloat16": 989.4}),
    (("A100",), {"float32": 156.0, "bfloat16": 312.0}),
    (("V100", "PCIE"), {"float32": 14.0}),
    (("V100", "SXM2"), {"float32": 15.7}),
)

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type"


def peak_flops(strategy: tf.distribute.Strategy, compute_dtype: str) -> float | None:
    """Floating-point operations per second of all devices together, or None if unknown."""
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return tpu_peak(accelerator_type())
    if not tf.config.list_physical_devices("GPU"):
        return None
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    one = gpu_peak(details.get("device_name", ""), compute_dtype)
    return one and one * strategy.num_replicas_in_sync


def gpu_peak(name: str, compute_dtype: str) -> float | None:
    """The peak of one GPU by its driver's name, such as "NVIDIA H200", or None if unknown."""
    for words, teraflops in GPU_TERAFLOPS:
        if all(word.lower() in name.lower() for word in words):
            return teraflops[compute_dtype] * 1e12 if compute_dtype in teraflops else None
    return None


def tpu_peak(accelerator: str) -> float | None:
    """The peak of a whole slice by its accelerator type, such as "v3-8", or None if unknown."""
    generation, _, size = accelerator.partition("-")
    if generation not in TPU_TERAFLOPS or not size.isdigit():
        return None
    chips = int(size) if generation in CHIPS_COUNTED else int(size) / 2
    return chips * TPU_TERAFLOPS[generation] * 1e12


def accelerator_type() -> str:
    """The accelerator type, from TPU_ACCELERATOR_TYPE or the TPU VM's metadata, or ""."""
    if os.environ.get("TPU_ACCELERATOR_TYPE"):
        return os.environ["TPU_ACCELERATOR_TYPE"]
    request = urllib.request.Request(METADATA, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return ""


def training_flops(forward, batch_spec) -> float:
    """Operations of one training step; a multiplication with an addition counts as two.

    Args:
        forward: `batch -> tensors`, the model's forward pass. It is traced, not run.
        batch_spec: nested `tf.TensorSpec`s with static shapes.

    Returns:
        The operations of matrix products, einsums and convolutions: about 99 % of a Transformer or
        a ResNet. Loops and functions called from the graph are not counted.
    """
    graph = tf.function(forward).get_concrete_function(batch_spec).graph
    counted = [op for op in graph.get_operations() if op.type in _FLOPS]
    return float((1 + BACKWARD) * sum(_FLOPS[op.type](op) for op in counted))


def _size(tensor) -> int:
    return tensor.shape.num_elements()


def _matmul_flops(operation):
    left = operation.inputs[0]
    names = {a.name for a in operation.op_def.attr}
    transposed = operation.get_attr("transpose_a" if "transpose_a" in names else "adj_x")
    inner = left.shape[-2 if transposed else -1]
    return 2 * _size(operation.outputs[0]) * inner


def _einsum_flops(operation):
    labels = operation.get_attr("equation").decode().split("->")[0].split(",")
    sizes = {}
    for names, tensor in zip(labels, operation.inputs, strict=True):
        dots = len(tensor.shape) - len(names.replace("...", ""))
        spelled = names.replace("...", "".join(str(i) for i in range(dots)))
        sizes |= dict(zip(spelled, tensor.shape, strict=True))
    return 2 * math.prod(sizes.values())


def _convolution_flops(operation):
    height, width, channels, _ = operation.inputs[1].shape
    return 2 * _size(operation.outputs[0]) * height * width * channels


_FLOPS = {
    "MatMul": _matmul_flops,
    "BatchMatMulV2": _matmul_flops,
    "BatchMatMulV3": _matmul_flops,
    "Einsum": _einsum_flops,
    "Conv2D": _convolution_flops,
}
