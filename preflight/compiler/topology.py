"""TPU topologies: slices of a pod, with names such as v3:32x32 and v3-2048."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from inputs.errors import InputError
from training.chips import TPU_CHIPS, TpuChip, find_tpu

# Shapes of three-dimensional slices smaller than 4x4x4.
SMALL_SHAPES = ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
ONE_CHIP = ((1, 1), (1, 1, 1))
SINGLE_CHIP = ("v5e", "v6e")  # whose smallest slice is one chip; of the others it is a host
# The documentation of TPU7x (Ironwood) names JAX and PyTorch, and says that TensorFlow is not
# supported (docs.cloud.google.com/tpu/docs/tpu7x).
WITHOUT_TENSORFLOW = ("tpu7x", "tpu7", "v7x", "v7", "ironwood")
EXAMPLES = "the sides, such as v3:32x32, or the size, such as v3-2048 or v5litepod-16"


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
        one_host = self.chips <= self.chip.max_chips_of_one_host
        chips = self.chips if one_host else self.chip.chips_per_host
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
            ("v3-2048", which counts cores, or "v5litepod-16", which counts chips).
        flag: the flag that gave the text, for error messages.

    Returns:
        The topologies in the order given, without duplicates.

    Raises:
        InputError: a name is unknown or incomplete, there is no such slice, or there is no name.
            The message is one sentence that says what to give instead.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{flag} needs a topology: {EXAMPLES}.")
    return list(dict.fromkeys(_parse(name, f"{flag}={name}") for name in names))


def slices_of(chip: TpuChip) -> Iterator[Topology]:
    """Yields a slice for each power of two of chips, the smallest first."""
    chips = 1
    while chips <= chip.max_chips:
        shape = _shape_of_chips(chips, chip)
        if shape:
            yield Topology(chip, shape)
        chips *= 2


def _parse(name: str, flag_and_name: str) -> Topology:
    match = re.fullmatch(r"(\w+)[:-](\d+)|(?:(\w+)[:-])?(\d+(?:x\d+)+)|(\w+)", name.lower())
    if not match:
        raise InputError(f"{flag_and_name} is not the name of a TPU slice; give {EXAMPLES}.")
    generation, size, sides = match[1] or match[3] or match[5], match[2], match[4]
    if not generation:
        raise InputError(f"{flag_and_name}: the generation is missing; give {_with_sides(sides)}.")
    chip = find_tpu(generation)
    if not chip:
        raise InputError(f"{flag_and_name}: {_unknown_generation(generation)}.")
    if size:
        return Topology(chip, _shape_of_type(int(size), chip, flag_and_name))
    if not sides:
        raise InputError(
            f"{flag_and_name}: the size is missing; give {_type_name(chip, _smallest(chip).chips)} "
            f"to {_type_name(chip, chip.max_chips)}, or the sides, such as {_smallest(chip).name}."
        )
    shape = tuple(map(int, sides.split("x")))
    if len(shape) != chip.mesh_dimensions:
        raise InputError(
            f"{flag_and_name}: a slice of {chip.name} has {chip.mesh_dimensions} sides, such as "
            f"{_smallest(chip).name}."
        )
    if not _is_slice(shape, chip):
        raise InputError(f"{flag_and_name}: {_no_slice(math.prod(shape), chip)}.")
    return Topology(chip, shape)


def _is_slice(shape: tuple[int, ...], chip: TpuChip) -> bool:
    if len(shape) != chip.mesh_dimensions or math.prod(shape) > chip.max_chips:
        return False
    sides = tuple(sorted(shape))
    if sides in ONE_CHIP:
        return chip.name in SINGLE_CHIP
    if chip.mesh_dimensions == 2:  # squares, and rectangles of two squares
        low, high = sides
        return low >= 2 and low & (low - 1) == 0 and high in (low, 2 * low)
    return sides in SMALL_SHAPES or (sides[0] >= 4 and not any(n % 4 for n in sides))


def _shape_of_type(size: int, chip: TpuChip, flag_and_name: str) -> tuple[int, ...]:
    """Returns the shape of the slice of an accelerator type.

    Args:
        size: the number in the accelerator type, which counts cores or chips.
        chip: the generation of TPU.
        flag_and_name: for the error message.

    Raises:
        InputError: there is no such slice.
    """
    chips = chip.chips_of_type(size)
    shape = _shape_of_chips(int(chips), chip) if chips == int(chips) else None
    if not shape:
        raise InputError(f"{flag_and_name}: {_no_slice(chips, chip)}.")
    return shape


def _shape_of_chips(chips: int, chip: TpuChip) -> tuple[int, ...] | None:
    """Returns the shape closest to a square or cube of a slice; None if there is no such slice."""
    sides = [n for n in range(1, min(chips, chip.max_chips) + 1) if chips % n == 0]
    shapes = [
        shape
        for shape in itertools.combinations_with_replacement(sides, chip.mesh_dimensions)
        if math.prod(shape) == chips and _is_slice(shape, chip)
    ]
    shape = min(shapes, key=sum, default=None)
    return (2, 2, 1) if shape == (1, 2, 2) else shape  # Cloud TPU writes this one 2x2x1


def _type_name(chip: TpuChip, chips: int) -> str:
    """Returns the accelerator type of a number of chips, such as "v3-8" for 4 chips."""
    return f"{chip.name}-{chips * (chip.cores_per_chip if chip.type_counts == 'cores' else 1)}"


def _smallest(chip: TpuChip) -> Topology:
    return next(slices_of(chip))


def _with_sides(sides: str) -> str:
    """Returns the names of the slices with these sides, or of some slices if there are none."""
    shape = tuple(map(int, sides.split("x")))
    names = [f"{name}:{sides}" for name, chip in TPU_CHIPS.items() if _is_slice(shape, chip)]
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or EXAMPLES


def _unknown_generation(name: str) -> str:
    if name in WITHOUT_TENSORFLOW:
        return "TensorFlow does not support TPU7x, so nothing can be compiled for it"
    if name == "v5":
        return "there are two TPUs v5; give v5e or v5p in its place"
    return f"{name} is not one of the TPUs {', '.join(TPU_CHIPS)}"


def _no_slice(chips: float, chip: TpuChip) -> str:
    """Returns what is wrong with a number of chips, and the next slices."""
    largest = _type_name(chip, chip.max_chips)
    if chips > chip.max_chips:
        return f"the largest slice of {chip.name} is {largest}, {chip.max_chips:,} chips"
    slices = list(slices_of(chip))
    below = [t.name for t in slices if t.chips <= chips][-1:]
    above = [t.name for t in slices if t.chips > chips][:1]
    return f"{chip.name} has no such slice; the next is {' or '.join(below + above)}"
