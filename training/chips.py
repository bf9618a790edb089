"""Published peak rates and sizes of TPU and GPU chips.

Used for model FLOPs utilization (`training.monitor.mfu`) and for the estimates of the pre-flight
(`preflight.estimate`). Rates are in FLOP/s and bytes/s, per chip unless stated otherwise.

`SOURCES` says where those of TPUs are from; those of GPUs are from NVIDIA's data sheets, without
sparsity.
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30
# The names that `TpuChip.sources` has, and the conflicts, in Markdown.
SOURCES = """\
Sources:

- docs: the Cloud TPU documentation, docs.cloud.google.com/tpu/docs/NAME, where NAME is v3, v4, v5e,
  v5p or v6e.
- CACM: Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural Networks", CACM
  63(7), 2020.
- ISCA: Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer for Machine Learning with
  Hardware Support for Embeddings", ISCA 2023, Table 4.
- book: Austin et al., "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus.
- Google: its announcement of v2, see below.
- compiler: libtpu 0.0.42.1. The memory is its limit when a program is too large; the chips per host
  are those of the topology that it opens.

Published figures that contradict each other:

- Link of v3: 100 GB/s (book; the docs' bisection bandwidth agrees: 6.4 TB/s over 64 links), or 70
  (ISCA).
- Links of v4, v5e, v5p and v6e: the book's are 45, 45, 90 and 90 GB/s. ISCA gives v4 50, and the
  docs give v5e, v5p and v6e 400, 1,200 and 800 GB/s per chip, in both directions of 4, 6 and 4
  links: 50, 100 and 100.
- Peak of v2: Google announced 180 TFLOP/s for a board of four chips and 11.5 PFLOP/s for a pod of
  64 boards, so 45 for a chip. CACM has 46.
- Memory bandwidth of v5e: 819 GB/s; later versions of the docs have 800 GiB/s, which is 859.
- Chips per host of v5e and v6e: the 8 of the documentation is the physical machine, and the virtual
  machine of a slice of up to 8 chips. The virtual machines of larger slices have 4.
"""


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """One generation of TPU.

    Attributes:
        name: the compiler's name, such as "v5e".
        flops: peak bfloat16 FLOP/s of a chip. The matrix unit multiplies float32 in bfloat16, too.
        hbm_bandwidth: bytes/s of a chip.
        link_bandwidth: bytes/s of one link to a neighbor, in one direction.
        other_link_bandwidth: the same by another publication; equal if there is no conflict.
        hbm_bytes: memory that one program can use, on one device.
        devices_per_chip: devices, each of which runs a program: one per core, or a single one
            where both cores of a chip act as one device (v4, v5p).
        cores_per_chip: TensorCores of a chip.
        type_counts: what the number of an accelerator type counts: "cores" (v4-32) or "chips"
            (v5litepod-16).
        mesh_dimensions: 2 or 3.
        chips_per_host: in a slice of several hosts.
        max_chips_of_one_host: the largest slice of a single host.
        wrap_multiple: a dimension of the mesh has wrap-around links if its length is a multiple of
            this; with three dimensions, if the lengths of all three are.
        max_chips: number of chips in the largest slice.
        sources: name of a number -> where it is from, by a name in `SOURCES`, and how it follows.
    """

    name: str
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    other_link_bandwidth: float
    hbm_bytes: int
    devices_per_chip: int
    cores_per_chip: int
    type_counts: str
    mesh_dimensions: int
    chips_per_host: int
    max_chips_of_one_host: int
    wrap_multiple: int
    max_chips: int
    sources: Mapping[str, str] = dataclasses.field(hash=False)

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
            other_link_bandwidth=62e9,
            hbm_bytes=int(7.48 * GIB),
            devices_per_chip=2,
            cores_per_chip=2,
            type_counts="cores",
            mesh_dimensions=2,
            chips_per_host=4,
            max_chips_of_one_host=4,
            wrap_multiple=16,
            max_chips=256,
            sources={
                "flops": "Google; CACM: 46",
                "hbm_bandwidth": "CACM",
                "link_bandwidth": "CACM: 496 Gbit/s",
                "hbm_bytes": "compiler; CACM: 16 GiB of a chip for two cores",
                "devices_per_chip": "compiler",
                "cores_per_chip": "CACM",
                "mesh_dimensions": "CACM",
                "chips_per_host": "compiler",
                "max_chips_of_one_host": "compiler",
                "wrap_multiple": "book: the side of the pod",
                "max_chips": "CACM",
            },
        ),
        TpuChip(
            name="v3",
            flops=123e12,
            hbm_bandwidth=900e9,
            link_bandwidth=100e9,
            other_link_bandwidth=70e9,
            hbm_bytes=int(15.48 * GIB),
            devices_per_chip=2,
            cores_per_chip=2,
            type_counts="cores",
            mesh_dimensions=2,
            chips_per_host=4,
            max_chips_of_one_host=4,
            wrap_multiple=32,
            max_chips=1024,
            sources={
                "flops": "docs",
                "hbm_bandwidth": "docs",
                "link_bandwidth": "book",
                "other_link_bandwidth": "ISCA",
                "hbm_bytes": "compiler; docs: 32 GiB of a chip for two cores",
                "devices_per_chip": "compiler",
                "cores_per_chip": "docs",
                "mesh_dimensions": "docs",
                "chips_per_host": "compiler",
                "max_chips_of_one_host": "compiler",
                "wrap_multiple": "book: the side of the pod",
                "max_chips": "docs",
            },
        ),
        TpuChip(
            name="v4",
            flops=275e12,
            hbm_bandwidth=1200e9,
            link_bandwidth=45e9,
            other_link_bandwidth=50e9,
            hbm_bytes=int(30.75 * GIB),
            devices_per_chip=1,
            cores_per_chip=2,
            type_counts="cores",
            mesh_dimensions=3,
            chips_per_host=4,
            max_chips_of_one_host=4,
            wrap_multiple=4,
            max_chips=4096,
            sources={
                "flops": "docs",
                "hbm_bandwidth": "docs",
                "link_bandwidth": "book",
                "other_link_bandwidth": "ISCA",
                "hbm_bytes": "compiler; docs: 32 GiB",
                "devices_per_chip": "compiler",
                "cores_per_chip": "docs",
                "mesh_dimensions": "docs",
                "chips_per_host": "compiler",
                "max_chips_of_one_host": "compiler",
                "wrap_multiple": "docs; book: none below a cube of 4x4x4",
                "max_chips": "docs",
            },
        ),
        TpuChip(
            name="v5e",
            flops=197e12,
            hbm_bandwidth=819e9,
            link_bandwidth=45e9,
            other_link_bandwidth=50e9,
            hbm_bytes=int(15.75 * GIB),
            devices_per_chip=1,
            cores_per_chip=1,
            type_counts="chips",
            mesh_dimensions=2,
            chips_per_host=4,
            max_chips_of_one_host=8,
            wrap_multiple=16,
            max_chips=256,
            sources={
                "flops": "docs",
                "hbm_bandwidth": "docs",
                "link_bandwidth": "book",
                "other_link_bandwidth": "docs: 400 GB/s per chip, both directions of 4 links",
                "hbm_bytes": "compiler; docs: 16 GB",
                "devices_per_chip": "compiler",
                "cores_per_chip": "docs",
                "mesh_dimensions": "docs",
                "chips_per_host": "compiler",
                "max_chips_of_one_host": "docs",
                "wrap_multiple": "book",
                "max_chips": "docs",
            },
        ),
        TpuChip(
            name="v5p",
            flops=459e12,
            hbm_bandwidth=2765e9,
            link_bandwidth=90e9,
            other_link_bandwidth=100e9,
            hbm_bytes=int(95.74 * GIB),
            devices_per_chip=1,
            cores_per_chip=2,
            type_counts="cores",
            mesh_dimensions=3,
            chips_per_host=4,
            max_chips_of_one_host=4,
            wrap_multiple=4,
            max_chips=6144,
            sources={
                "flops": "docs",
                "hbm_bandwidth": "docs",
                "link_bandwidth": "book",
                "other_link_bandwidth": "docs: 1,200 GB/s per chip, both directions of 6 links",
                "hbm_bytes": "compiler; docs: 95 GiB",
                "devices_per_chip": "compiler",
                "cores_per_chip": "docs",
                "mesh_dimensions": "docs",
                "chips_per_host": "compiler",
                "max_chips_of_one_host": "compiler",
                "wrap_multiple": "docs; book: none below a cube of 4x4x4",
                "max_chips": "docs: the largest job, of the 8,960 chips of a pod",
            },
        ),
        TpuChip(
            name="v6e",
            flops=918e12,
            hbm_bandwidth=1638e9,
            link_bandwidth=90e9,
            other_link_bandwidth=100e9,
            hbm_bytes=int(31.25 * GIB),
            devices_per_chip=1,
            cores_per_chip=1,
            type_counts="chips",
            mesh_dimensions=2,
            chips_per_host=4,
            max_chips_of_one_host=8,
            wrap_multiple=16,
            max_chips=256,
            sources={
                "flops": "docs",
                "hbm_bandwidth": "docs",
                "link_bandwidth": "book",
                "other_link_bandwidth": "docs: 800 GB/s per chip, both directions of 4 links",
                "hbm_bytes": "compiler; docs: 32 GB",
                "devices_per_chip": "compiler",
                "cores_per_chip": "docs",
                "mesh_dimensions": "docs",
                "chips_per_host": "compiler",
                "max_chips_of_one_host": "docs",
                "wrap_multiple": "book",
                "max_chips": "docs",
            },
        ),
    )
}
# Cloud TPU's accelerator type, and the product's name.
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e"}

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
    """Returns the chip with this name, such as "v3", "V5e" or "v5litepod"; None if unknown."""
    name = name.lower()
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
