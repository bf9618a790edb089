"""Estimates the time of a step from the compiler's figures.

The functions are pure. No constant is fitted to a measurement: peak rates are the published ones of
`training.chips`.
"""

import dataclasses
from collections.abc import Callable

from preflight.compiler.topology import Topology

# Latency of one link ("How to Scale Your Model", part 3: about 1 us per hop).
HOP_SECONDS = 1e-6
# Share of the backward pass in forward and backward: two of the three matrix products of a layer.
BACKWARD_SHARE = 2 / 3
TILE_ROWS = 8  # the search rounds batches down to a multiple of this
MAX_EXCESS = 0.1  # of the compiler's count of bytes over that of HBM, where it is that of HBM
# Compilations per search after the first, of which each takes minutes for a large model. If nothing
# has fitted until then, there are up to two more.
MAX_TRIES = 2
MIN_GAIN = 1.125  # a batch that is larger by less than this factor is not worth another compilation


def all_reduce_seconds(topology: Topology, num_bytes: int, link_bandwidth: float = 0.0) -> float:
    """Returns the time of a sum over all replicas on the torus, with the links at their peak rate.

    Each of n chips reduces a part of the sum and receives the other parts over all its links at
    once, so 2·num_bytes·(n-1)/n bytes leave a chip. The latency is that of twice the diameter of
    the mesh. The memory traffic of the sum is not included: the compiler's time contains it.

    Args:
        topology: the slice.
        num_bytes: bytes that each replica contributes.
        link_bandwidth: bytes/s of a link in one direction; 0 for that of the chip.

    Returns:
        Seconds.
    """
    chips = topology.chips
    if chips == 1:
        return 0.0
    sent = 2 * num_bytes * (chips - 1) / chips
    sending = sent / (topology.links_per_chip * (link_bandwidth or topology.chip.link_bandwidth))
    return sending + 2 * topology.diameter * HOP_SECONDS


def largest_batch(
    memory_needed: Callable[[int], int],
    start: int,
    fixed_bytes: int,
    limit_bytes: int,
    max_examples: int,
    wanted: int,
) -> int:
    """Searches for the largest batch that fits in memory.

    Memory grows linearly with the batch until the compiler starts to recompute activations, so
    the next batch to try is extrapolated from two points.

    Args:
        memory_needed: function from a number of examples to bytes. It compiles a program.
        start: number of examples to try first.
        fixed_bytes: memory that does not depend on the batch: weights and slots.
        limit_bytes: memory of a device.
        max_examples: upper bound of the search.
        wanted: the recipe's number of examples. A batch that is larger by less than `MIN_GAIN` is
            tried only if it decides whether this one fits.

    Returns:
        The largest number of examples that was tried and fits; 0 if not even one fits.
    """
    points = {0: fixed_bytes, start: memory_needed(start)}
    for _ in range(MAX_TRIES):
        batch = _extrapolate(points, limit_bytes, max_examples)
        largest = _largest_fitting(points, limit_bytes)
        decides = largest < wanted <= batch
        if batch in points or (largest < batch < MIN_GAIN * largest and not decides):
            break
        points[batch] = memory_needed(batch)
    if not _largest_fitting(points, limit_bytes) and 1 not in points:
        # Other memory that does not depend on the batch makes the estimates too high.
        points[1] = memory_needed(1)
        batch = _extrapolate(points, limit_bytes, max_examples)
        if points[1] <= limit_bytes and batch not in points:
            points[batch] = memory_needed(batch)
    return _largest_fitting(points, limit_bytes)


def _extrapolate(points, limit_bytes, max_examples):
    """Returns the batch that fills the memory by the two nearest of `points`, batch -> bytes."""
    nearest = sorted(points.items(), key=lambda point: abs(point[1] - limit_bytes))[:2]
    (low, low_bytes), (high, high_bytes) = sorted(nearest)
    per_example = max((high_bytes - low_bytes) / (high - low), 1e-9)
    batch = min(int(low + (limit_bytes - low_bytes) / per_example), max_examples)
    return max(1, batch // TILE_ROWS * TILE_ROWS or batch)


def _largest_fitting(points, limit_bytes):
    """The largest batch of `points`, batch -> bytes, that fits; 0 if none does."""
    return max(batch for batch, size in points.items() if batch == 0 or size <= limit_bytes)


def needed_accumulation(replica_batch_size: int, largest: int, minimum: int) -> int | None:
    """Returns the smallest number of micro-batches that divides the batch and fits in memory.

    Args:
        replica_batch_size: examples per replica and step.
        largest: examples of the largest micro-batch that fits.
        minimum: smallest number of micro-batches to consider.

    Returns:
        The number of micro-batches, or None if not even a single example fits.
    """
    for count in range(minimum, replica_batch_size + 1):
        if replica_batch_size % count == 0 and replica_batch_size // count <= largest:
            return count
    return None


def modelled_seconds(topology: Topology, program: dict) -> float:
    """Returns the least time of one run of a program, from its main-memory traffic and products.

    An operation takes as long as its FLOPs at the peak rate or its HBM traffic at the peak
    bandwidth, whichever is longer, and operations run one after the other, as in the compiler's own
    estimate. Copies to and from on-chip memory run beside them as far as the bandwidth allows.
    On-chip traffic takes no time.

    Args:
        topology: the slice.
        program: `preflight.compiler.compile.figures`.
    """
    peak_flops = topology.chip.flops / topology.chip.devices_per_chip
    bandwidth = _bandwidth(topology)
    beside_products = program["main_bytes"] - program["copied_bytes"]
    products = 0.0
    for flops, moved, count in program["products"]:
        beside_products -= moved * count
        products += max(flops / peak_flops, moved / bandwidth) * count
    return max(products + beside_products / bandwidth, program["main_bytes"] / bandwidth)


def counts_main_memory(program: dict) -> bool:
    """Returns whether the compiler's count of bytes, and thus its time, is that of HBM alone.

    It is for v2 and v3. From v4 on, it contains on-chip traffic.

    Args:
        program: `preflight.compiler.compile.figures`.
    """
    return program["bytes_accessed"] <= (1 + MAX_EXCESS) * program["main_bytes"]


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The estimated time of one step and its parts, in seconds.

    Attributes:
        work: forward, backward and update, including the memory traffic of the all-reduce.
        source: whose figure `work` is: "compiler", or "model" where the compiler's time counts
            on-chip traffic (`modelled_seconds`).
        compiler: the compiler's estimate of the same, whether it is used or not.
        update: the optimizer's share of `work`: the time of the update alone, but at most what
            the products of forward and backward leave.
        compute: time of the FLOPs at the peak rate.
        memory: time of the HBM traffic at the peak bandwidth.
        all_reduce: time of the all-reduce on the links.
        hideable: part of `all_reduce` that could overlap with the backward pass.
        hidden: part of `all_reduce` that does overlap in the compiled program.
    """

    work: float
    source: str
    compiler: float
    update: float
    compute: float
    memory: float
    all_reduce: float
    hideable: float
    hidden: float

    @property
    def step(self) -> float:
        """The time of the whole step, in seconds."""
        return self.work + self.all_reduce - self.hidden

    @property
    def bound(self) -> str:
        """What limits the step: "compute" or "memory"."""
        return "compute" if self.compute > self.memory else "memory"


def whole_step(
    topology: Topology, program: dict, update: dict, accumulation: int, gradient_bytes: int
) -> dict:
    """Returns the costs of a step of one or more micro-batches.

    The compiler's figures cannot be used for such a step: they count only one iteration of the loop
    over micro-batches.

    Args:
        topology: the slice.
        program: `preflight.compiler.compile.figures` of a step with one micro-batch.
        update: `preflight.compiler.compile.figures` of the update alone.
        accumulation: micro-batches per step.
        gradient_bytes: bytes of the gradients of all weights, in the dtype in which they are
            accumulated. They may be summed over the replicas in another one.

    Returns:
        A dict with `flops`, `bytes_accessed`, `main_bytes`, and the compiler's `seconds`.
    """
    moved = _accumulation_bytes(program, accumulation, gradient_bytes)
    added = {
        "flops": 0,
        "bytes_accessed": moved,
        "main_bytes": moved,
        "seconds": moved / _bandwidth(topology),
    }
    return {
        name: _sum_over_micro_batches(program[name], update[name], accumulation) + more
        for name, more in added.items()
    }


def _sum_over_micro_batches(
    program: float, update: float, accumulation: int, least: float = 0
) -> float:
    """Returns a cost of a step, which runs the update once.

    Args:
        program: cost of a step with one micro-batch.
        update: cost of the update alone.
        accumulation: micro-batches per step.
        least: the least cost of forward and backward. In a small model the update alone may move
            more bytes than the whole step, in which gradients stay in on-chip memory.
    """
    return program + (accumulation - 1) * max(program - update, least)


def _accumulation_bytes(program: dict, accumulation: int, gradient_bytes: int) -> int:
    """Returns the HBM traffic that a step has in addition to that of its micro-batches.

    The all-reduce runs once per step, but each micro-batch's program counts it, with one read and
    one write of the gradients in the dtype of the sum. To accumulate, a micro-batch reads its
    gradients, and reads and writes the accumulated ones.
    """
    if accumulation == 1:
        return 0
    counted_too_often = 2 * (accumulation - 1) * program["all_reduce_bytes"]
    return 3 * accumulation * gradient_bytes - counted_too_often


def _bandwidth(topology: Topology) -> float:
    """Returns the HBM bandwidth of one device, in bytes/s."""
    return topology.chip.hbm_bandwidth / topology.chip.devices_per_chip


def step_time(
    topology: Topology, program: dict, update: dict, accumulation: int, gradient_bytes: int
) -> StepTime:
    """Returns the estimated time of a step. Arguments as for `whole_step`."""
    chip = topology.chip
    whole = whole_step(topology, program, update, accumulation, gradient_bytes)
    if counts_main_memory(program) and counts_main_memory(update):
        source = "compiler"
        program_seconds = program["seconds"]
        update_seconds = update["seconds"]
    else:
        source = "model"
        program_seconds, update_seconds = (
            modelled_seconds(topology, figures) for figures in (program, update)
        )
    compute = (program["flops"] - update["flops"]) * chip.devices_per_chip / chip.flops
    work = _sum_over_micro_batches(program_seconds, update_seconds, accumulation, compute)
    all_reduce = all_reduce_seconds(topology, program["all_reduce_bytes"])
    backward = BACKWARD_SHARE * max(program_seconds - update_seconds, compute)
    hideable = min(all_reduce, backward)
    asynchronous_share = 0
    if program["all_reduces"]:
        asynchronous_share = program["asynchronous"] / program["all_reduces"]
    accumulated = _accumulation_bytes(program, accumulation, gradient_bytes)
    return StepTime(
        work=work + accumulated / _bandwidth(topology),
        source=source,
        compiler=whole["seconds"],
        update=min(update_seconds, max(0.0, program_seconds - compute)),
        compute=whole["flops"] * chip.devices_per_chip / chip.flops,
        memory=whole["main_bytes"] / _bandwidth(topology),
        all_reduce=all_reduce,
        hideable=hideable,
        hidden=asynchronous_share * hideable,
    )
