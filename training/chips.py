"""Published peak rates and sizes of TPU and GPU chips.

Used for model FLOPs utilization (`training.monitor.mfu`) and for the estimates of the pre-flight
(`preflight.estimate`). Rates are in FLOP/s and bytes/s, per chip unless stated otherwise.

Sources:

- FLOP/s in bfloat16, HBM bandwidth, and chips in a pod: the Cloud TPU documentation,
  docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p and v6e.
- v2: the documentation has no table. Google announced 180 TFLOP/s for a board of four chips and
  11.5 PFLOP/s for a pod of 64 boards, so 45 TFLOP/s per chip. Jouppi et al. (CACM 63(7), 2020)
  give 46 for the same chip; 45 agrees with both announcements. Bandwidths: the same
  paper (HBM 700 GB/s; links 496 Gbit/s).
- Bandwidth of a link: Austin et al., "How to Scale Your Model",
  jax-ml.github.io/scaling-book/tpus. For v3 the documentation's bisection bandwidth agrees:
  6.4 TB/s over 64 links.
- Where a mesh has wrap-around links: the scaling book; for v2 and v3, only at the side of a whole
  pod.
- HBM that one program can use: the limit that the compiler reports when a program is too large
  (libtpu 0.0.42.1).
- GPUs: NVIDIA's data sheets, without sparsity.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """One generation of TPU.

    Attributes:
        name: the compiler's name, such as "v5e".
        flops: peak bfloat16 FLOP/s of a chip. The matrix unit multiplies float32 in bfloat16, too.
        hbm_bandwidth: bytes/s of a chip.
        link_bandwidth: bytes/s of one link to a neighbour, in one direction.
        hbm_bytes: memory that one program can use, on one device.
        devices_per_chip: devices, each of which runs a program: one per core, or a single one
            where both cores of a chip act as one device (v4, v5p).
        cores_per_chip: TensorCores of a chip.
        type_counts: what the number of an accelerator type counts: "cores" (v4-32) or "chips"
            (v5litepod-16).
        mesh_dimensions: 2 or 3.
        chips_per_host: in a slice of several hosts.
        wrap_multiple: a dimension of the mesh has wrap-around links if its length is a multiple of
            this.
        max_chips: number of chips in the largest slice.
    """

    name: str
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    hbm_bytes: int
    devices_per_chip: int
    cores_per_chip: int
    type_counts: str
    mesh_dimensions: int
    chips_per_host: int
    wrap_multiple: int
    max_chips: int

    def chips_of_type(self, count: int) -> float:
        """Returns the number of chips of a type with this suffix, such as 4 for v3-8."""
        return count if self.type_counts == "chips" else count / self.cores_per_chip


TPU_CHIPS = {
    chip.name: chip
    for chip in (
        TpuChip(
            name="v2",
            flops=45e12,
            hbm_bandwidth=700e9,
            link_bandwidth=62e9,
            hbm_bytes=int(7.48 * GIB),
            devices_per_chip=2,
            cores_per_chip=2,
            type_counts="cores",
            mesh_dimensions=2,
            chips_per_host=4,
            wrap_multiple=16,
            max_chips=256,
        ),
        TpuChip(
            name="v3",
            flops=123e12,
            hbm_bandwidth=900e9,
            link_bandwidth=100e9,
            hbm_bytes=int(15.48 * GIB),
            devices_per_chip=2,
            cores_per_chip=2,
            type_counts="cores",
            mesh_dimensions=2,
            chips_per_host=4,
            wrap_multiple=32,
            max_chips=1024,
        ),
        TpuChip(
            name="v4",
            flops=275e12,
            hbm_bandwidth=1200e9,
            link_bandwidth=45e9,
            hbm_bytes=int(30.75 * GIB),
            devices_per_chip=1,
            cores_per_chip=2,
            type_counts="cores",
            mesh_dimensions=3,
            chips_per_host=4,
            wrap_multiple=4,
            max_chips=4096,
        ),
        TpuChip(
            name="v5e",
            flops=197e12,
            hbm_bandwidth=819e9,
            link_bandwidth=45e9,
            hbm_bytes=int(15.75 * GIB),
            devices_per_chip=1,
            cores_per_chip=1,
            type_counts="chips",
            mesh_dimensions=2,
            chips_per_host=8,
            wrap_multiple=16,
            max_chips=256,
        ),
        TpuChip(
            name="v5p",
            flops=459e12,
            hbm_bandwidth=2765e9,
            link_bandwidth=90e9,
            hbm_bytes=int(95.74 * GIB),
            devices_per_chip=1,
            cores_per_chip=2,
            type_counts="cores",
            mesh_dimensions=3,
            chips_per_host=4,
            wrap_multiple=4,
            max_chips=8960,
        ),
        TpuChip(
            name="v6e",
            flops=918e12,
            hbm_bandwidth=1638e9,
            link_bandwidth=90e9,
            hbm_bytes=int(31.25 * GIB),
            devices_per_chip=1,
            cores_per_chip=1,
            type_counts="chips",
            mesh_dimensions=2,
            chips_per_host=8,
            wrap_multiple=16,
            max_chips=256,
        ),
    )
}
ALIASES = {"v5litepod": "v5e"}  # Cloud TPU's accelerator type

# TFLOP/s by words in the device name that the driver reports. The first matching entry is used.
# The float32 entry is the TF32 rate on GPUs with TF32, which TensorFlow uses by default.
GPU_TFLOPS = (
    (("H200", "NVL"), {"float32": 417.5, "bfloat16": 835.5}),
    (("H200",), {"float32": 494.7, "bfloat16": 989.4}),
    (("H100", "NVL"), {"float32": 417.5, "bfloat16": 835.5}),
    (("H100", "PCIe"), {"float32": 378.0, "bfloat16": 756.0}),
    (("H100",), {"float32": 494.7, "bfloat16": 989.4}),
    (("A100",), {"float32": 156.0, "bfloat16": 312.0}),
    (("V100", "PCIE"), {"float32": 14.0}),
    (("V100", "SXM2"), {"float32": 15.7}),
)


def find_tpu(name: str) -> TpuChip | None:
    """Returns the chip with this name, such as "v3", "v5e" or "v5litepod"; None if unknown."""
    return TPU_CHIPS.get(ALIASES.get(name, name))


def tpu_peak_flops(accelerator_type: str) -> float | None:
    """Peak FLOP/s of a whole slice.

    Args:
        accelerator_type: such as "v3-8" (cores), "v5litepod-16" or "v5e-16" (chips).

    Returns:
        bfloat16 FLOP/s of all chips together; None if the type is unknown.
    """
    generation, _, count = accelerator_type.partition("-")
    chip = find_tpu(generation)
    if chip is None or not count.isdigit():
        return None
    return chip.chips_of_type(int(count)) * chip.flops


def gpu_peak_flops(name: str, compute_dtype: str) -> float | None:
    """Peak FLOP/s of one GPU.

    Args:
        name: as the driver reports it, such as "NVIDIA H200".
        compute_dtype: "float32" or "bfloat16".

    Returns:
        FLOP/s without sparsity; None if the GPU or the dtype is not in the table.
    """
    for words, tflops in GPU_TFLOPS:
        if all(word.lower() in name.lower() for word in words):
            return tflops[compute_dtype] * 1e12 if compute_dtype in tflops else None
    return None
