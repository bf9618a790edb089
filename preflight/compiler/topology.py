"""TPU topologies: slices of a pod, with names such as v3:32x32 and v3-2048."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from inputs.errors import InputError
from training.chips import TPU_CHIPS, TpuChip, find_tpu

MAX_DIGITS = 9  # of a number in a name
MAX_SHOWN = 40  # characters of a wrong name in an error message
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
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension of the mesh has wrap-around links."""
        wraps = [side % self.chip.wrap_multiple == 0 for side in self.shape]
        if self.chip.mesh_dimensions == 3:
            # The optical switches, which close the rings, connect whole cubes of 4x4x4.
            return (all(wraps),) * len(wraps)
        return tuple(wraps)

    @property
    def links_per_chip(self) -> int:
        """The number of links over which every chip can send at the same time.

        In a dimension without wrap-around links, the chips at the ends have one link, and limit the
        others.
        """
        sides = zip(self.shape, self.wraps, strict=True)
        return sum(2 if wraps else 1 for side, wraps in sides if side > 1)

    @property
    def diameter(self) -> int:
        """The number of links on the shortest path between the two most distant chips."""
        sides = zip(self.shape, self.wraps, strict=True)
        return sum(side // 2 if wraps else side - 1 for side, wraps in sides)


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
    return list(dict.fromkeys(_parse(name, f"{flag}={_shown(name)}") for name in names))


def parse_topology(text: str, flag: str) -> Topology:
    """Reads one topology; see `parse_topologies`.

    Raises:
        InputError: as `parse_topologies`, or the text names several topologies.
    """
    topology, *others = parse_topologies(text, flag)
    if others:
        raise InputError(f"{flag}={text}: give one topology.")
    return topology


def slices_of(chip: TpuChip) -> Iterator[Topology]:
    """Yields a slice for each power of two of chips, the smallest first."""
    chips = 1
    while chips <= chip.max_chips:
        shape = _shape_of_chips(chips, chip)
        if shape:
            yield Topology(chip, shape)
        chips *= 2


def _shown(name: str) -> str:
    return name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."


def _parse(name: str, flag_and_name: str) -> Topology:
    match = re.fullmatch(r"(\w+)[:-](\d+)|(?:(\w+)[:-])?(\d+(?:x\d+)+)|(\w+)[:-]?", name.lower())
    if not match or re.search(rf"\d{{{MAX_DIGITS + 1}}}", name):
        raise InputError(f"{flag_and_name} is not the name of a TPU slice; give {EXAMPLES}.")
    generation, size, sides = match[1] or match[3] or match[5], match[2], match[4]
    if not generation or generation.isdecimal():
        text = _without_generation(sides or generation)
        raise InputError(f"{flag_and_name}: the generation is missing{text}.")
    chip = find_tpu(generation)
    if not chip:
        raise InputError(f"{flag_and_name}: {_unknown_generation(generation, name.lower())}.")
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
    return Topology(chip, _as_compiled(shape))


def _as_compiled(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the order of the sides that the compiler takes: a host's four chips are 2x2x1."""
    return (2, 2, 1) if sorted(shape) == [1, 2, 2] else shape


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
    shape = _shape_of_chips(chips, chip)
    if not shape:
        raise InputError(f"{flag_and_name}: {_no_slice(chips, chip, of_type=True)}.")
    return shape


def _shape_of_chips(chips: float, chip: TpuChip) -> tuple[int, ...] | None:
    """Returns the shape closest to a square or cube of a slice; None if there is no such slice."""
    sides = [n for n in range(1, min(int(chips), chip.max_chips) + 1) if chips % n == 0]
    shapes = [
        shape
        for shape in itertools.combinations_with_replacement(sides, chip.mesh_dimensions)
        if math.prod(shape) == chips and _is_slice(shape, chip)
    ]
    shape = min(shapes, key=sum, default=None)
    return shape and _as_compiled(shape)


def _type_name(chip: TpuChip, chips: int) -> str:
    """Returns the accelerator type of a number of chips, such as "v3-8" for 4 chips."""
    return f"{chip.name}-{chips * (chip.cores_per_chip if chip.type_counts == 'cores' else 1)}"


def _smallest(chip: TpuChip) -> Topology:
    return next(slices_of(chip))


def _without_generation(sides_or_size: str) -> str:
    """Returns what to give in place of sides or a size alone, as the end of a sentence."""
    if "x" in sides_or_size:
        shape = tuple(map(int, sides_or_size.split("x")))
        names = [
            f"{name}:{sides_or_size}" for name, chip in TPU_CHIPS.items() if _is_slice(shape, chip)
        ]
    else:
        size = int(sides_or_size)
        names = [
            f"{name}-{size}"
            for name, chip in TPU_CHIPS.items()
            if _shape_of_chips(chip.chips_of_type(size), chip)
        ]
    if not names:
        return f", and no TPU has a slice of {sides_or_size}; give a slice such as v3:32x32"
    return f"; give {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}"


def _unknown_generation(generation: str, name: str) -> str:
    """Returns what to give in place of a generation, as the end of a sentence.

    Args:
        generation: the part of the name that is not a generation.
        name: the whole name, in lower case.
    """
    separated = re.fullmatch(r"(\w+?)_(\d+(?:x\d+)*)", name)
    if separated and find_tpu(separated[1]):
        return f"give {separated[1]}{':' if 'x' in separated[2] else '-'}{separated[2]}"
    if generation in WITHOUT_TENSORFLOW:
        return "TensorFlow does not support TPU7x, so nothing can be compiled for it"
    if generation == "v5":
        return "there are two TPUs v5; give v5e or v5p in its place"
    if generation == "v6":
        return f"the TPU v6 is called v6e; give v6e{name.removeprefix('v6')}"
    return f"{generation} is not one of the TPUs {', '.join(TPU_CHIPS)}"


def _no_slice(chips: float, chip: TpuChip, of_type: bool = False) -> str:
    """Returns what is wrong with a number of chips, and the next slices.

    Args:
        chips: the number, not whole if the size of an accelerator type is that of a part of a chip.
        chip: the generation of TPU.
        of_type: whether the slice was named by an accelerator type.
    """
    largest = _type_name(chip, chip.max_chips)
    if chips > chip.max_chips:
        return f"the largest slice of {chip.name} is {largest}, {chip.max_chips:,} chips"
    sizes = {t.chips for t in slices_of(chip)}
    if chip.mesh_dimensions == 3:  # cubes of 4x4x4 in a row, and more compact slices of as many
        sizes.update(range(64, chip.max_chips + 1, 64))
    below = [n for n in sorted(sizes) if n <= chips][-1:]
    above = [n for n in sorted(sizes) if n > chips][:1]
    nearest = [Topology(chip, _shape_of_chips(n, chip)) for n in below + above]
    names = [f"{_type_name(chip, t.chips)} ({t.name})" if of_type else t.name for t in nearest]
    counted = f"; the number counts {chip.type_counts}" if of_type else ""
    return f"{chip.name} has no such slice; the next is {' or '.join(names)}{counted}"
