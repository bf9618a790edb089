"""From the compiler's figures to a step's time: what is modelled, as pure functions.

Nothing here was fitted to a measurement. Peaks and link rates are the published ones of
`preflight_topology`.
"""

import dataclasses
from collections.abc import Callable

from preflight.topology import Topology

# Seconds a message takes from chip to chip ("How to Scale Your Model", part 3: about 1 us a hop).
HOP_SECONDS = 1e-6
BACKWARD_SHARE = 2 / 3  # of forward and backward: two of a layer's three products
TILE = 8  # examples that a batch is rounded down to: a tile's rows
TRIES = 2  # compilations of the search, which take minutes for a large model


def all_reduce_seconds(topology: Topology, size: int) -> float:
    """A sum of `size` bytes from every replica over the torus, at the links' peak.

    Every chip has a part of the sum and hears the other parts, each over all its links at once:
    2·size·(n-1)/n bytes leave a chip. An open row is as slow as its ends, which have one link.
    Each way takes `hops` messages. The memory that the sum reads and writes is in the compiler's
    time.
    """
    chips = topology.chips
    sent = 2 * size * (chips - 1) / chips
    on_links = sent / (topology.link_ends * topology.generation.link_bandwidth)
    return on_links + 2 * topology.hops * HOP_SECONDS


def largest_batch(needed: Callable[[int], int], start: int, fixed: int, limit: int, most: int):
    """The largest batch found that needs no more than `limit` bytes; 0 if none that was tried.

    Memory grows in a straight line with the batch, until the compiler recomputes to save some.
    So two points give the next, and each is compiled.

    Args:
        needed: `examples -> bytes`.
        start: examples to begin with.
        fixed: bytes without any example: weights and slots.
        limit: bytes.
        most: examples beyond which nobody asks.
    """
    points = {0: fixed, start: needed(start)}
    for _ in range(TRIES):
        (low, below), (high, above) = sorted(
            sorted(points.items(), key=lambda point: abs(point[1] - limit))[:2]
        )
        each = max((above - below) / (high - low), 1e-9)
        batch = min(int(low + (limit - below) / each), most)
        batch = max(1, batch // TILE * TILE or batch)
        if batch in points:
            break
        points[batch] = needed(batch)
    return max(batch for batch, size in points.items() if batch == 0 or size <= limit)


def needed_accumulation(replica_batch_size: int, largest: int, least: int) -> int | None:
    """Micro-batches, `least` or more, that divide the batch into parts that fit; None if none."""
    for parts in range(least, replica_batch_size + 1):
        if replica_batch_size % parts == 0 and replica_batch_size // parts <= largest:
            return parts
    return None


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A step's estimated seconds, taken apart.

    compiler: forward, backward and update, by the compiler; the memory that the sum over the
        replicas touches included.
    update: of these, the optimizer's.
    compute: flops at the peak rate; `memory`: bytes at the peak rate. Each within `compiler`.
    all_reduce: by the link model.
    hideable: of that, what could run beside the backward pass if the compiler arranged it.
    hidden: what it does run beside it.
    """

    compiler: float
    update: float
    compute: float
    memory: float
    all_reduce: float
    hideable: float
    hidden: float

    @property
    def step(self) -> float:
        """One whole step."""
        return self.compiler + self.all_reduce - self.hidden

    @property
    def bound(self) -> str:
        """What the chip waits for most."""
        return "compute" if self.compute > self.memory else "memory"


def whole_step(topology: Topology, program: dict, update: dict, accumulation: int) -> dict:
    """`flops`, `bytes_accessed` and `seconds` of a step of several micro-batches.

    The compiler's own for such a step count one turn of the loop over them.

    Args:
        topology: where.
        program: `preflight_compile.figures` of a step on one micro-batch.
        update: of the update alone.
        accumulation: micro-batches in a step.
    """
    generation, size = topology.generation, program["all_reduce_bytes"]
    bandwidth = generation.hbm_bandwidth / generation.devices_per_chip
    # Once a step: the update, and the sum over the replicas, which is read and written. With each
    # micro-batch the running sum is read and written, and the new gradients read.
    once, each = 2 * size, 3 * size if accumulation > 1 else 0
    moved = accumulation * each - (accumulation - 1) * once
    added = {"flops": 0, "bytes_accessed": moved, "seconds": moved / bandwidth}
    return {
        name: accumulation * program[name] - (accumulation - 1) * update[name] + more
        for name, more in added.items()
    }


def step_time(topology: Topology, program: dict, update: dict, accumulation: int) -> StepTime:
    """The time of a step; arguments as `whole_step` has them."""
    generation = topology.generation
    whole = whole_step(topology, program, update, accumulation)
    on_links = all_reduce_seconds(topology, program["all_reduce_bytes"])
    backward = BACKWARD_SHARE * (program["seconds"] - update["seconds"])
    hideable = min(on_links, backward)
    share = program["asynchronous"] / program["all_reduces"] if program["all_reduces"] else 0
    per_chip = generation.devices_per_chip
    return StepTime(
        compiler=whole["seconds"],
        update=update["seconds"],
        compute=whole["flops"] * per_chip / generation.flops,
        memory=whole["bytes_accessed"] * per_chip / generation.hbm_bandwidth,
        all_reduce=on_links,
        hideable=hideable,
        hidden=share * hideable,
    )
