"""Counts main-memory traffic and matrix products in the text of a compiled TPU program.

From v4 on, the compiler keeps arrays in on-chip memory and copies them there ahead of their use.
Its own count, "bytes accessed", adds the traffic of all memories, so it is several times the bytes
that HBM moves, and its estimate of the time follows it. The compiled program names the memory of
each array in its layout: S(1) is VMEM, S(3) the common memory of v4, S(2) and S(6) hold semaphores
and scalars, and an array without S(n) is in HBM. Programs for v2 and v3 keep all arrays in HBM, so
there both counts agree.

The functions are pure and take the text of `HloModule.to_string()`.
"""

import collections
import dataclasses
import functools
import math
import re

# Bytes of an element.
WIDTHS = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f16": 2,
    "bf16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
# Operations that move no data: names, groups and views of other arrays. A conditional counts as
# one, because a branch may be empty; the programs of the recipes have none.
FREE = frozenset(
    "after-all bitcast conditional constant get-tuple-element opt-barrier parameter partition-id "
    "replica-id tuple".split()
)
VIEWS = ("bitcast", "reshape")
SLICES = ("dynamic-slice", "gather", "slice")  # read a part of their first operand
UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # in place: the operand that is the update
CONTROL = ("call", "while")
JOINED = 'custom_call_target="ConcatBitcast"'  # a view of slices that were copied side by side

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one run of a program moves and multiplies.

    Attributes:
        main_bytes: bytes read from and written to HBM, with arrays padded to tiles.
        copied_bytes: the part of `main_bytes` that is moved by copies beside other operations.
        products: tuple of (FLOPs, HBM bytes, count): the operations that contain matrix products or
            convolutions. Operations with the same figures share an entry.
    """

    main_bytes: int
    copied_bytes: int
    products: tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One instruction: `%name = type opcode(arguments), attributes`."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    @functools.cached_property
    def called(self) -> list[str]:
        """The names of the computations that it calls."""
        return _CALLED.findall(self.attributes)


def count_traffic(text: str) -> Traffic:
    """Returns the traffic of a program.

    A fusion reads each operand and writes each result once; of an operand that it only slices, it
    reads the slices, and of an array that it updates in place, it writes the update. The body of a
    loop counts once, as in the compiler's own figures.

    Args:
        text: the compiled HLO module.
    """
    computations, entry = _parse(text)
    main = copied = 0
    products: collections.Counter = collections.Counter()
    waiting, seen = [entry], {entry}
    while waiting:
        computation = computations[waiting.pop()]
        for instruction in computation.values():
            if instruction.opcode in CONTROL:
                called = set(instruction.called) - seen
                waiting += called
                seen |= called
                continue
            moved = _moved_bytes(instruction, computation, computations)
            main += moved
            flops = _product_flops(instruction, computation, computations)
            if flops:
                products[flops, moved] += 1
            elif instruction.opcode.endswith(("-start", "-done")):
                copied += moved
    entries = tuple((flops, moved, count) for (flops, moved), count in sorted(products.items()))
    return Traffic(main, copied, entries)


def count_all_bytes(text: str) -> int:
    """Returns the bytes that a program moves in all memories, on-chip ones included.

    Args:
        text: as for `count_traffic`, whose rules hold.
    """
    return count_traffic(re.sub(r"S\(\d+\)", "", text)).main_bytes


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Returns the instructions of each computation, by name, and the name of the entry."""
    computations: dict[str, dict[str, _Instruction]] = {}
    current: dict[str, _Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY ") else entry
        elif found := _INSTRUCTION.match(line):
            root, name, type_text, opcode, rest = found.groups()
            arguments, _, attributes = rest.partition(")")
            current[name] = _Instruction(
                name, type_text, opcode, arguments, attributes, root is not None
            )
    return computations, entry


# Bytes


def main_memory_bytes(type_text: str) -> int:
    """Returns the bytes in HBM of the arrays in a type, padded to tiles.

    Args:
        type_text: such as "f32[30522,256]{1,0:T(8,128)}", or a tuple of such types.
    """
    return sum(
        WIDTHS[kind] * _padded_elements(shape, order, layout)
        for kind, shape, order, layout in _ARRAY.findall(type_text)
        if kind in WIDTHS and "S(" not in layout
    )


def _bytes_in(memory_of: str, type_text: str) -> int:
    """Returns the bytes of an array if the array of type `memory_of` is in HBM, else 0."""
    if not main_memory_bytes(memory_of):
        return 0
    return main_memory_bytes(re.sub(r"S\(\d+\)", "", type_text))


@functools.cache
def _padded_elements(shape: str, order: str, layout: str) -> int:
    sides = [int(side) for side in shape.split(",") if side]
    if order:  # from the slowest-varying dimension to the fastest
        sides = [sides[int(dimension)] for dimension in reversed(order.split(","))]
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if tile:
        tiles = [int(side) for side in tile[1].split(",")]
        sides = [1] * (len(tiles) - len(sides)) + sides
        for place, side in enumerate(tiles, start=len(sides) - len(tiles)):
            sides[place] = -(-sides[place] // side) * side
    return math.prod(sides)


def _moved_bytes(instruction, computation, computations) -> int:
    """Returns the bytes that an instruction reads from HBM and writes to it."""
    opcode = instruction.opcode
    if opcode in FREE or JOINED in instruction.attributes:
        return 0
    if opcode.endswith("-done"):  # its type is that of the result alone
        return main_memory_bytes(instruction.type)
    types = [computation[name].type for name in instruction.operands if name in computation]
    if opcode == "fusion":
        return _moved_by_fusion(instruction, types, computations[instruction.called[0]])
    if opcode == "slice-start":  # ((operand), slice, semaphore)
        kind, shape, order, layout = _ARRAY.findall(instruction.type)[-2]
        slice_type = f"{kind}[{shape}]{{{order}{layout}}}"
        return _bytes_in(types[0], slice_type)
    if opcode.endswith("-start"):
        return sum(map(main_memory_bytes, types))
    written = main_memory_bytes(instruction.type)
    if opcode in SLICES:
        return _bytes_in(types[0], instruction.type) + written
    if opcode in UPDATES:
        update = types[UPDATES[opcode]]
        return main_memory_bytes(update) + _bytes_in(instruction.type, update)
    return sum(map(main_memory_bytes, types)) + written


def _moved_by_fusion(fusion, operand_types, fused) -> int:
    """Returns the bytes that a fusion moves; `fused` has the instructions of its computation."""
    users = collections.defaultdict(list)
    for inner in fused.values():
        for operand in inner.operands:
            users[operand].append(inner)
    read = sum(
        _read_bytes(operand_types[int(inner.arguments)], inner, users)
        for inner in fused.values()
        if inner.opcode == "parameter"
    )
    (root,) = (inner for inner in fused.values() if inner.is_root)
    if root.opcode != "tuple":
        return read + _written_bytes(fusion.type, root, fused)
    result_types = (found[0] for found in _ARRAY.finditer(fusion.type))
    return read + sum(
        _written_bytes(result_type, fused[name], fused)
        for result_type, name in zip(result_types, root.operands, strict=True)
    )


def _read_bytes(operand_type: str, parameter: _Instruction, users) -> int:
    """Returns the bytes of an operand that a fusion reads."""
    parts = 0
    waiting = [parameter]
    while waiting:
        source = waiting.pop()
        for user in users[source.name]:
            first = user.operands[0] == source.name
            if user.opcode in VIEWS:
                waiting.append(user)
            elif user.opcode in SLICES and first:
                parts += _bytes_in(operand_type, user.type)
            elif not (user.opcode in UPDATES and first):  # updated in place: not read
                return main_memory_bytes(operand_type)
    return min(parts, main_memory_bytes(operand_type))


def _written_bytes(result_type: str, result: _Instruction, fused) -> int:
    """Returns the bytes of a result that a fusion writes."""
    while result.opcode in VIEWS:
        result = fused[result.operands[0]]
    if result.opcode in UPDATES:
        return _bytes_in(result_type, fused[result.operands[UPDATES[result.opcode]]].type)
    return main_memory_bytes(result_type)


# Products


def _product_flops(instruction, computation, computations) -> int:
    """Returns the FLOPs of the products in an instruction and the computations that it fuses."""
    if instruction.opcode == "convolution":
        left, right = (computation[name].type for name in instruction.operands[:2])
        return _convolution_flops(left, right, instruction.type, instruction.attributes)
    if instruction.opcode != "fusion":
        return 0
    fused = computations[instruction.called[0]]
    return sum(_product_flops(inner, fused, computations) for inner in fused.values())


def _sides(type_text: str) -> list[int]:
    found = _ARRAY.search(type_text)
    return [int(side) for side in found[2].split(",") if side]


@functools.cache
def _convolution_flops(left: str, right: str, result: str, attributes: str) -> int:
    """Returns the FLOPs of a convolution. The compiler expresses matrix products as convolutions.

    A product with a position in the padding, or between dilated positions, is not counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    lefts, results = (
        dict(zip(label, _sides(type_text), strict=True))
        for label, type_text in ((labels[1], left), (labels[3], result))
    )
    written = re.search(r"window=\{(.*?)\}", attributes)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", written[1] if written else ""))
    spatial = sorted(label for label in lefts if label.isdigit())
    groups = {
        name: int(count) for name, count in re.findall(r"(\w+)_group_count=(\d+)", attributes)
    }
    pairs = math.prod(
        _valid_pairs(lefts[label], results[label], *_window_of(window, place))
        for place, label in enumerate(spatial)
    )
    channels = lefts["f"] // groups.get("feature", 1) * results["f"]
    return 2 * pairs * channels * lefts["b"] // groups.get("batch", 1)


def _window_of(window: dict, place: int) -> tuple[int, int, int, int, int]:
    """Returns (size, stride, padding before, dilation of the left, of the right operand)."""

    def part(name, default):
        return window[name].split("x")[place] if name in window else default

    return (
        int(part("size", "1")),
        int(part("stride", "1")),
        int(part("pad", "0_0").split("_")[0]),
        int(part("lhs_dilate", "1")),
        int(part("rhs_dilate", "1")),
    )


def _valid_pairs(left, result, size, stride, before, left_dilation, right_dilation) -> int:
    """Returns the number of pairs of a result and a window position that meet an element."""
    dilated = (left - 1) * left_dilation + 1
    count = 0
    for offset in range(size):
        start = offset * right_dilation - before
        places = range(start, start + result * stride, stride)
        count += sum(0 <= place < dilated and place % left_dilation == 0 for place in places)
    return count
