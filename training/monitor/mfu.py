"""Model FLOPs utilization (MFU): the model's FLOP/s divided by the devices' peak FLOP/s.

FLOPs are counted as in PaLM, arXiv:2204.02311, appendix B: the forward pass, and twice as much for
the backward pass, without rematerialization and without the optimizer.
"""

import math
import os
import urllib.error
import urllib.request

import tensorflow as tf

from training.chips import gpu_peak_flops, tpu_peak_flops

BACKWARD = 2  # times the forward pass: a product has a gradient for each of its two factors

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type"


def peak_flops(strategy: tf.distribute.Strategy, compute_dtype: str) -> float | None:
    """Returns the peak FLOP/s of all devices together, or None if unknown."""
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return tpu_peak_flops(accelerator_type())
    if not tf.config.list_physical_devices("GPU"):
        return None
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    one = gpu_peak_flops(details.get("device_name", ""), compute_dtype)
    return one and one * strategy.num_replicas_in_sync


def accelerator_type() -> str:
    """Returns TPU_ACCELERATOR_TYPE, else the type in the TPU VM's metadata, else ""."""
    if os.environ.get("TPU_ACCELERATOR_TYPE"):
        return os.environ["TPU_ACCELERATOR_TYPE"]
    request = urllib.request.Request(METADATA, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return ""


def training_flops(forward, batch_spec) -> float:
    """Returns the FLOPs of one training step; a multiply-add counts as two.

    Args:
        forward: `batch -> tensors`, the model's forward pass. It is traced, not run.
        batch_spec: nested `tf.TensorSpec`s with static shapes.

    Returns:
        The FLOPs of matrix products, einsums and convolutions, about 99 % of those of a
        Transformer or a ResNet. The bodies of loops and of nested functions are not counted.
    """
    graph = tf.function(forward, autograph=False).get_concrete_function(batch_spec).graph
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
