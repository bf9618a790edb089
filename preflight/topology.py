"""TPU topologies by name, and what is published of their chips."""

import dataclasses
import itertools
import math
import re

from inputs.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU. All rates are peaks, of one chip.

    name: as the compiler calls it.
    devices_per_chip: programs that run on a chip: one for each core, or one where both cores act
        as one (v4, v5p).
    cores_per_chip: what names such as v4-32 count.
    hbm_bytes: of one device, what the compiler gives a program: its own figure, as it says when
        a program is too large (libtpu 0.0.42.1).
    flops: bfloat16 FLOP/s.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s of one link to a neighbour, in one direction.
    dimensions: of the mesh of chips.
    chips_per_host: of a slice of several hosts.
    rings_at: the mesh is closed to a ring in a dimension that is a multiple of this.
    """

    name: str
    devices_per_chip: int
    cores_per_chip: int
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    chips_per_host: int
    rings_at: int


# FLOP/s and memory: docs.cloud.google.com/tpu/docs/v3 and its siblings for v2 to v6e. Links: Austin
# et al., "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus (v3 and later; v3's is also
# the documentation's bisection bandwidth, 6.4 TB/s over 64 links); Jouppi et al., "A Domain-
# Specific Supercomputer for Training Deep Neural Networks", CACM 63(7), 2020 (v2: 496 Gbit/s).
# Where a mesh is closed to rings: as the scaling book has it; v2, v3: at the side of a whole pod.
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v2", 2, 2, int(7.48 * GIB), 45e12, 700e9, 62e9, 2, 4, 16),
        Generation("v3", 2, 2, int(15.48 * GIB), 123e12, 900e9, 100e9, 2, 4, 32),
        Generation("v4", 1, 2, int(30.75 * GIB), 275e12, 1200e9, 45e9, 3, 4, 4),
        Generation("v5e", 1, 1, int(15.75 * GIB), 197e12, 819e9, 45e9, 2, 8, 16),
        Generation("v5p", 1, 2, int(95.74 * GIB), 459e12, 2765e9, 90e9, 3, 4, 4),
        Generation("v6e", 1, 1, int(31.25 * GIB), 918e12, 1600e9, 90e9, 2, 8, 16),
    )
}
LARGEST = {"v2": 256, "v3": 1024, "v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256}  # chips
SMALL = ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # slices of a cube of 4x4x4
ALIASES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod.

    Args:
        generation: what its chips are.
        shape: chips along each dimension.
    """

    generation: Generation
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As the compiler has it, such as "v3:32x32"."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def replicas(self) -> int:
        """Programs that share a global batch: one a core, or one a chip that is one device."""
        return self.chips * self.generation.devices_per_chip

    @property
    def replicas_per_host(self) -> int:
        """That one host feeds."""
        chips = min(self.chips, self.generation.chips_per_host)
        return chips * self.generation.devices_per_chip

    @property
    def link_ends(self) -> int:
        """Links over which a chip sends at once; of an open row of chips, those of its ends."""
        at = self.generation.rings_at
        return sum(2 if side % at == 0 else 1 for side in self.shape if side > 1)

    @property
    def hops(self) -> int:
        """The longest way between two chips, in links."""
        at = self.generation.rings_at
        return sum(side // 2 if side % at == 0 else side - 1 for side in self.shape)


def parse_topologies(text: str, flag: str = "--preflight") -> list[Topology]:
    """Topologies of a comma-separated list, each "v3:32x32" or by its cores, "v3-2048".

    Args:
        text: the list.
        flag: what messages call it.

    Raises:
        InputError: a name that is none, with those that are known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{flag} needs a topology. {_known()}")
    return list(dict.fromkeys(_parsed(name, f"{flag}={name}") for name in names))


def _parsed(name: str, given: str) -> Topology:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)|(\w+)-(\d+)", name)
    kind = match and (match[1] or match[3])
    generation = GENERATIONS.get(ALIASES.get(kind, kind))
    if not generation:
        raise InputError(f"{given}: no such TPU. {_known()}")
    if match[2]:
        shape = tuple(map(int, match[2].split("x")))
    else:
        shape = _shape(int(match[4]), generation)
    if not shape or not _is_slice(shape, generation):
        raise InputError(f"{given}: no slice of a pod has that size. {_known()}")
    return Topology(generation, shape)


def _is_slice(shape: tuple[int, ...], generation: Generation) -> bool:
    if len(shape) != generation.dimensions or math.prod(shape) > LARGEST[generation.name]:
        return False
    sides = tuple(sorted(shape))
    if generation.dimensions == 2:  # squares, and two of them side by side
        low, high = sides
        return low >= 2 and low & (low - 1) == 0 and high in (low, 2 * low)
    return sides in SMALL or (sides[0] >= 4 and not any(n % 4 for n in sides))


def _shape(cores: int, generation: Generation) -> tuple[int, ...] | None:
    """The sides of the slice of so many cores, as near to a square or cube as can be."""
    chips, odd = divmod(cores, generation.cores_per_chip)
    if odd:
        return None
    sides = [n for n in range(1, min(chips, LARGEST[generation.name]) + 1) if chips % n == 0]
    shapes = [
        shape
        for shape in itertools.combinations_with_replacement(sides, generation.dimensions)
        if math.prod(shape) == chips and _is_slice(shape, generation)
    ]
    shape = min(shapes, key=sum, default=None)
    return (2, 2, 1) if shape == (1, 2, 2) else shape  # as the documentation has that one


def _known() -> str:
    names = [
        f"{name}:{'2x2' if g.dimensions == 2 else '2x2x1'} to "
        f"{name}-{LARGEST[name] * g.cores_per_chip}"
        for name, g in GENERATIONS.items()
    ]
    return f"There are: {', '.join(names)}; sides such as v3:32x32, or cores such as v3-2048."
