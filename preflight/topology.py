"""TPU topologies: slices of a pod, with names such as v3:32x32 and v3-2048."""

import dataclasses
import itertools
import math
import re

from inputs.errors import InputError
from training.chips import TPU_CHIPS, TpuChip, find_tpu

# Shapes of three-dimensional slices smaller than 4x4x4.
SMALL_SHAPES = ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod.

    Args:
        chip: the generation of its chips.
        shape: chips along each dimension of the mesh.
    """

    chip: TpuChip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name that the compiler uses, such as "v3:32x32"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def replicas(self) -> int:
        """The number of devices. Each of them runs one replica."""
        return self.chips * self.chip.devices_per_chip

    @property
    def replicas_per_host(self) -> int:
        """The number of replicas that one host feeds with data."""
        chips = min(self.chips, self.chip.chips_per_host)
        return chips * self.chip.devices_per_chip

    @property
    def links_per_chip(self) -> int:
        """The number of links over which every chip can send at the same time.

        In a dimension without wrap-around links, the chips at the ends have one link, and limit the
        others.
        """
        wraps = self.chip.wrap_multiple
        return sum(2 if side % wraps == 0 else 1 for side in self.shape if side > 1)

    @property
    def diameter(self) -> int:
        """The number of links on the shortest path between the two most distant chips."""
        wraps = self.chip.wrap_multiple
        return sum(side // 2 if side % wraps == 0 else side - 1 for side in self.shape)


def parse_topologies(text: str, flag: str = "--preflight") -> list[Topology]:
    """Reads a comma-separated list of topologies.

    Args:
        text: names, each with sides ("v3:32x32") or with a size as in Cloud TPU's accelerator types
            ("v3-2048", which counts cores).
        flag: the flag that gave the text, for error messages.

    Returns:
        The topologies in the order given, without duplicates.

    Raises:
        InputError: a name is unknown, or there is none. The message lists the known ones.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{flag} needs a topology. {_known_topologies()}")
    return list(dict.fromkeys(_parse(name, f"{flag}={name}") for name in names))


def _parse(name: str, flag_and_name: str) -> Topology:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)|(\w+)-(\d+)", name)
    chip = match and find_tpu(match[1] or match[3])
    if not chip:
        raise InputError(f"{flag_and_name}: unknown TPU. {_known_topologies()}")
    if match[2]:
        shape = tuple(map(int, match[2].split("x")))
    else:
        shape = _shape_of_size(int(match[4]), chip)
    if not shape or not _is_slice(shape, chip):
        raise InputError(f"{flag_and_name}: no slice has this shape or size. {_known_topologies()}")
    return Topology(chip, shape)


def _is_slice(shape: tuple[int, ...], chip: TpuChip) -> bool:
    if len(shape) != chip.mesh_dimensions or math.prod(shape) > chip.max_chips:
        return False
    sides = tuple(sorted(shape))
    if chip.mesh_dimensions == 2:  # squares, and rectangles of two squares
        low, high = sides
        return low >= 2 and low & (low - 1) == 0 and high in (low, 2 * low)
    return sides in SMALL_SHAPES or (sides[0] >= 4 and not any(n % 4 for n in sides))


def _shape_of_size(size: int, chip: TpuChip) -> tuple[int, ...] | None:
    """Returns the shape of the slice of an accelerator type; None if there is no such slice.

    Of all shapes with this number of chips, it is the one closest to a square or cube.

    Args:
        size: the number in the accelerator type, which counts cores or chips.
        chip: the generation of TPU.
    """
    chips = int(chip.chips_of_type(size))
    if chips != chip.chips_of_type(size):
        return None
    sides = [n for n in range(1, min(chips, chip.max_chips) + 1) if chips % n == 0]
    shapes = [
        shape
        for shape in itertools.combinations_with_replacement(sides, chip.mesh_dimensions)
        if math.prod(shape) == chips and _is_slice(shape, chip)
    ]
    shape = min(shapes, key=sum, default=None)
    return (2, 2, 1) if shape == (1, 2, 2) else shape  # Cloud TPU writes this one 2x2x1


def _known_topologies() -> str:
    names = []
    for name, chip in TPU_CHIPS.items():
        per_chip = chip.cores_per_chip if chip.type_counts == "cores" else 1
        smallest = "2x2" if chip.mesh_dimensions == 2 else "2x2x1"
        names.append(f"{name}:{smallest} to {name}-{chip.max_chips * per_chip}")
    return (
        f"Known topologies: {', '.join(names)}. Give the sides, such as v3:32x32, or the size, "
        "such as v3-2048."
    )
