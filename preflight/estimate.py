"""Estimates a step's time from the compiler's figures.

Pure functions. No constant is fitted to a measurement: peak rates are the published ones of
`training.chips`.
"""

import dataclasses
from collections.abc import Callable

from preflight.topology import Topology

# Latency of one link ("How to Scale Your Model", part 3: about 1 us per hop).
HOP_SECONDS = 1e-6
BACKWARD_SHARE = 2 / 3  # of forward and backward: two of the three matrix products of a layer
TILE_ROWS = 8  # batches are rounded down to a multiple of this
MAX_TRIES = 2  # compilations per search; one takes minutes for a large model


def all_reduce_seconds(topology: Topology, num_bytes: int) -> float:
    """Time of a sum over all replicas on the torus, with the links at their peak rate.

    Each chip reduces a part of the sum and receives the other parts over all its links at once,
    so 2·num_bytes·(n-1)/n bytes leave a chip. Latency is twice the diameter of the mesh. The
    compiler's time already contains the memory traffic of the sum.

    Args:
        topology: the slice.
        num_bytes: bytes that each replica contributes.

    Returns:
        Seconds.
    """
    chips = topology.chips
    sent = 2 * num_bytes * (chips - 1) / chips
    on_links = sent / (topology.links_per_chip * topology.chip.link_bandwidth)
    return on_links + 2 * topology.diameter * HOP_SECONDS


def largest_batch(
    memory_needed: Callable[[int], int],
    start: int,
    fixed_bytes: int,
    limit_bytes: int,
    max_examples: int,
) -> int:
    """Searches for the largest batch that fits in memory.

    Memory grows linearly with the batch until the compiler starts to recompute activations, so
    the next batch to try is extrapolated from two points.

    Args:
        memory_needed: number of examples -> bytes; compiles a program.
        start: number of examples to try first.
        fixed_bytes: memory without any example: weights and slots.
        limit_bytes: memory of a device.
        max_examples: upper bound of the search.

    Returns:
        The largest number of examples that was tried and fits; 0 if none fits.
    """
    points = {0: fixed_bytes, start: memory_needed(start)}
    for _ in range(MAX_TRIES):
        (low, below), (high, above) = sorted(
            sorted(points.items(), key=lambda point: abs(point[1] - limit_bytes))[:2]
        )
        per_example = max((above - below) / (high - low), 1e-9)
        batch = min(int(low + (limit_bytes - below) / per_example), max_examples)
        batch = max(1, batch // TILE_ROWS * TILE_ROWS or batch)
        if batch in points:
            break
        points[batch] = memory_needed(batch)
    return max(batch for batch, size in points.items() if batch == 0 or size <= limit_bytes)


def needed_accumulation(replica_batch_size: int, largest: int, least: int) -> int | None:
    """Smallest number of micro-batches, from `least` up, that divides the batch and fits.

    Args:
        replica_batch_size: examples per replica and step.
        largest: examples of the largest micro-batch that fits.
        least: smallest number of micro-batches to consider.

    Returns:
        The number of micro-batches, or None if not even single examples fit.
    """
    for count in range(least, replica_batch_size + 1):
        if replica_batch_size % count == 0 and replica_batch_size // count <= largest:
            return count
    return None


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The estimated time of one step and its parts, in seconds.

    Attributes:
        compiler: forward, backward and update, by the compiler's estimate; includes the memory
            traffic of the all-reduce.
        update: the optimizer's share of `compiler`.
        compute: time of the FLOPs at the peak rate.
        memory: time of the memory traffic at the peak bandwidth.
        all_reduce: time on the links.
        hideable: part of `all_reduce` that could overlap with the backward pass.
        hidden: part of `all_reduce` that does overlap in the compiled program.
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
        """The whole step."""
        return self.compiler + self.all_reduce - self.hidden

    @property
    def bound(self) -> str:
        """What limits the step: "compute" or "memory"."""
        return "compute" if self.compute > self.memory else "memory"


def whole_step(topology: Topology, program: dict, update: dict, accumulation: int) -> dict:
    """Costs of a step of several micro-batches.

    The compiler's own figures for such a step count one iteration of the loop over micro-batches.

    Args:
        topology: the slice.
        program: `preflight.compile.figures` of a step with one micro-batch.
        update: `preflight.compile.figures` of the update alone.
        accumulation: micro-batches per step.

    Returns:
        `flops`, `bytes_accessed` and `seconds`.
    """
    chip, gradient_bytes = topology.chip, program["all_reduce_bytes"]
    bandwidth = chip.hbm_bandwidth / chip.devices_per_chip
    # Update and all-reduce run once per step; the all-reduce reads and writes the gradients. Each
    # micro-batch reads its gradients, and reads and writes the accumulated ones.
    per_step = 2 * gradient_bytes
    per_micro_batch = 3 * gradient_bytes if accumulation > 1 else 0
    moved = accumulation * per_micro_batch - (accumulation - 1) * per_step
    added = {"flops": 0, "bytes_accessed": moved, "seconds": moved / bandwidth}
    return {
        name: accumulation * program[name] - (accumulation - 1) * update[name] + more
        for name, more in added.items()
    }


def step_time(topology: Topology, program: dict, update: dict, accumulation: int) -> StepTime:
    """Estimated time of a step; arguments as for `whole_step`."""
    chip = topology.chip
    whole = whole_step(topology, program, update, accumulation)
    on_links = all_reduce_seconds(topology, program["all_reduce_bytes"])
    backward = BACKWARD_SHARE * (program["seconds"] - update["seconds"])
    hideable = min(on_links, backward)
    share = program["asynchronous"] / program["all_reduces"] if program["all_reduces"] else 0
    return StepTime(
        compiler=whole["seconds"],
        update=update["seconds"],
        compute=whole["flops"] * chip.devices_per_chip / chip.flops,
        memory=whole["bytes_accessed"] * chip.devices_per_chip / chip.hbm_bandwidth,
        all_reduce=on_links,
        hideable=hideable,
        hidden=share * hideable,
    )
