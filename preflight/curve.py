"""Time and examples to the target over the number of chips, and the number beyond which none pay.

The step time of a slice and a batch size is extrapolated from one pre-flight: forward and backward
take the same time for each example, the update is the same for every batch, and the sum over the
replicas is that of `preflight.estimate`. A compiler does better or worse at very small batches.
"""

import dataclasses
import math
import textwrap

from inputs.errors import InputError
from inputs.storage.files import atomic_write
from preflight import estimate
from preflight.compiler.topology import Topology, parse_topologies
from recipes.evidence import Evidence, Prediction

CANDIDATES = 64  # batch sizes that are tried on each slice
SAVING = 0.1  # doubling the chips pays while it saves at least this share of the time


@dataclasses.dataclass(frozen=True)
class StepModel:
    """The time of a step for any slice and batch size.

    Attributes:
        per_example: Seconds of forward and backward pass for one example on one replica.
        update: Seconds of the update.
        all_reduce_bytes: Bytes that each replica contributes to the sum over the replicas.
        hidden_share: Share of the hideable part of that sum that overlaps with the backward pass.
    """

    per_example: float
    update: float
    all_reduce_bytes: int
    hidden_share: float

    @classmethod
    def from_result(cls, result) -> "StepModel":
        """Returns the model of a `preflight.run.PhaseResult` without an error."""
        time = result.time
        return cls(
            (time.work - time.update) / result.replica_batch_size,
            time.update,
            result.program["all_reduce_bytes"],
            time.hidden / time.hideable if time.hideable else 0.0,
        )

    def seconds(self, topology: Topology, batch: int) -> float:
        """Returns the time of a step with `batch` examples over all replicas of a slice."""
        forward_and_backward = self.per_example * batch / topology.replicas
        all_reduce = estimate.all_reduce_seconds(topology, self.all_reduce_bytes)
        hideable = min(all_reduce, estimate.BACKWARD_SHARE * forward_and_backward)
        return self.update + forward_and_backward + all_reduce - self.hidden_share * hideable


@dataclasses.dataclass(frozen=True)
class Point:
    """The fastest batch size of a slice.

    Attributes:
        topology: The slice.
        batch: Examples per step.
        prediction: What the evidence says of the batch size.
        step_seconds: The estimated time of a step.
    """

    topology: Topology
    batch: int
    prediction: Prediction
    step_seconds: float

    def minutes(self, examples: float | None = None) -> float:
        """Returns the time to the target; `examples` defaults to the expected number."""
        examples = self.prediction.examples if examples is None else examples
        return math.ceil(examples / self.batch) * self.step_seconds / 60


def slices(topology: Topology) -> list[Topology]:
    """Returns the slice and those of 1, 2, 4, ... chips where there are any, smallest first."""
    found = [topology]
    chip = topology.chip
    per_chip = chip.cores_per_chip if chip.type_counts == "cores" else 1
    chips = 1
    while chips < topology.chips:
        try:
            found += parse_topologies(f"{chip.name}-{chips * per_chip}")
        except InputError:
            pass  # there is no slice of this size
        chips *= 2
    return sorted(found, key=lambda slice_: slice_.chips)


def fastest(evidence: Evidence, model: StepModel, topology: Topology) -> Point | None:
    """Returns the batch size that reaches the target first, or None if none fits the replicas."""
    low, high = evidence.batches
    first, last = -(-low // topology.replicas), high // topology.replicas
    if first > last:
        return None
    ratio = (last / first) ** (1 / (CANDIDATES - 1))
    shares = sorted({round(first * ratio**k) for k in range(CANDIDATES)})
    # The points themselves, too: between them only an interpolation is known.
    shares += [p.batch // topology.replicas for p in evidence.references]
    points = [
        Point(topology, batch, evidence.predict(batch), model.seconds(topology, batch))
        for batch in {share * topology.replicas for share in shares if first <= share <= last}
    ]
    return min(points, key=lambda point: (point.minutes(), point.batch))


def curve(evidence: Evidence, model: StepModel, topology: Topology) -> list[Point]:
    """Returns the fastest batch size of each of `slices(topology)` that has one."""
    points = (fastest(evidence, model, slice_) for slice_ in slices(topology))
    return [point for point in points if point is not None]


def pays_until(points: list[Point]) -> Point:
    """Returns the last point before doubling the chips saves less than `SAVING` of the time."""
    for point in points:
        larger = [p for p in points if p.topology.chips >= 2 * point.topology.chips]
        if larger and larger[0].minutes() > (1 - SAVING) * point.minutes():
            return point
    return points[-1]


def draw(evidence: Evidence, points: list[Point], path: str) -> None:
    """Writes a PNG: time and examples to the target, and the batch size, over the chips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chips = [point.topology.chips for point in points]
    end = pays_until(points)
    figure, (time, examples) = plt.subplots(
        2, sharex=True, figsize=(8, 7), layout="constrained", height_ratios=[3, 2]
    )
    time.plot(chips, [point.minutes() for point in points], "o-", label="estimated")
    time.fill_between(
        chips,
        [point.minutes(point.prediction.low) for point in points],
        [point.minutes(point.prediction.high) for point in points],
        alpha=0.2,
        label="interval of the examples",
    )
    first = points[0]
    ideal = [first.minutes() * first.topology.chips / number for number in chips]
    time.plot(chips, ideal, "k:", label="in proportion to the chips")
    for panel in (time, examples):
        if end is not points[-1]:
            panel.axvline(
                end.topology.chips,
                color="tab:red",
                linestyle="--",
                label=f"twice as many chips save less than {SAVING:.0%}",
            )
        panel.grid(alpha=0.3)
    time.set(
        yscale="log", ylabel="minutes to the target", title=textwrap.fill(evidence.subject, 70)
    )
    time.yaxis.set_major_formatter("{x:g}")
    time.legend()
    values = [point.prediction.examples / 1e6 for point in points]
    examples.plot(chips, values, "o-")
    for point, number, value in zip(points, chips, values, strict=True):
        examples.annotate(
            f"{point.batch:,}",
            (number, value),
            textcoords="offset points",
            xytext=(0, 6),
            size=8,
            ha="center",
        )
    examples.set_title("at each point: the batch size", size="medium")
    examples.margins(x=0.08, y=0.15)  # room for the batch sizes
    examples.set(
        xscale="log",
        xlabel=f"{first.topology.chip.name} chips",
        ylabel=f"million {evidence.unit} to the target",
    )
    examples.set_xticks(chips, [f"{number:,}" for number in chips], minor=False)
    examples.minorticks_off()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
