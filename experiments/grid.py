"""What an experiment is: a table of groups of runs, and the rule that tunes each group."""

import dataclasses
import math
from collections.abc import Mapping

MOST_EXTENSIONS = 6  # rates beyond the first ones, so that a rule that fails comes to an end


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in their learning rate and seed.

    Attributes:
        name: Unique in the table, such as `lamb-1024`.
        settings: All other settings of the runs, by name. JSON values.
        rates: The peak learning rates to try with the first seed, in ascending order.
        rate_from: Instead of `rates`: the name of another group and a factor. The one rate is the
            best rate of that group times the factor, and nothing is tuned.
        seeds: The seeds of the best rate. The first one also tries all rates.
    """

    name: str
    settings: Mapping[str, object]
    rates: tuple[float, ...] = ()
    rate_from: tuple[str, float] | None = None
    seeds: tuple[int, ...] = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a group, a peak learning rate and a seed."""

    group: Group
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its run file, without the extension."""
        return f"{self.group.name}-rate{self.rate:g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Table:
    """One experiment, of which the results are one page.

    Attributes:
        name: As it is typed on the command line.
        title: The title of the page.
        program: What runs a cell: `keras` (`experiments/keras_run.py`) or `train`
            (`experiments/train_run.py`).
        metric: The result by which rates are compared, the higher the better.
        groups: In the order in which they are run and listed.
        pairs: Pairs of groups whose difference is tested.
        published: The published value of `metric` for a group, by name.
        x: The setting on the horizontal axis of the picture of `metric`, or an empty string.
        heat_maps: Groups whose trust ratios are drawn, those of the best rate and first seed.
        text: What the page says before the table.
    """

    name: str
    title: str
    program: str
    metric: str
    groups: tuple[Group, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    x: str = ""
    heat_maps: tuple[str, ...] = ()
    text: str = ""

    def group(self, name: str) -> Group:
        """Returns the group of a name."""
        return next(group for group in self.groups if group.name == name)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a group is.

    Attributes:
        todo: Cells that can be run now.
        later: The number of cells that will follow at the least, once those of `todo` are done.
        best: The best rate, or `None` while a rate is still to be tried.
        at_edge: Whether the best rate is still at the edge of those that were tried.
    """

    todo: list[Cell]
    later: int
    best: float | None
    at_edge: bool = False


def _rounded(rate: float) -> float:
    """Two significant digits, as rates are written in tables."""
    return float(f"{rate:.2g}")


def progress(table: Table, group: Group, metrics: Mapping[str, float]) -> Progress:
    """Applies the rule of tuning, which is the same for all groups, to the runs that are done.

    Each rate of the group is tried with the first seed. While the best of them is the lowest or the
    highest, the next one beyond it is tried, at the same ratio; a run that diverged is worse than
    all others. The best rate is then run with the other seeds.

    Args:
        table: The table of the group.
        group: A group of it.
        metrics: The metric of each run that is done, by the name of its cell; `-inf` for a run that
            diverged.
    """
    if group.rate_from:
        source = table.group(group.rate_from[0])
        tuned = progress(table, source, metrics).best
        if tuned is None:
            return Progress([], len(group.seeds), None)
        best, at_edge = _rounded(tuned * group.rate_from[1]), False
    else:
        rates = list(group.rates)
        for _ in range(MOST_EXTENSIONS + 1):
            cells = [Cell(group, rate, group.seeds[0]) for rate in rates]
            todo = [cell for cell in cells if cell.name not in metrics]
            if todo:
                return Progress(todo, len(group.seeds) - 1, None)
            best = max(cells, key=lambda cell: metrics[cell.name]).rate
            at_edge = len(rates) > 1 and best in (rates[0], rates[-1])
            if not at_edge or math.isinf(metrics[Cell(group, best, group.seeds[0]).name]):
                break
            if best == rates[-1]:
                rates.append(_rounded(best * rates[-1] / rates[-2]))
            else:
                rates.insert(0, _rounded(best * rates[0] / rates[1]))
        else:
            at_edge = True
    cells = [Cell(group, best, seed) for seed in group.seeds]
    return Progress([cell for cell in cells if cell.name not in metrics], 0, best, at_edge)


def find_cell(table: Table, name: str) -> Cell:
    """Returns the cell of a name, whether or not the rule asks for it.

    Raises:
        ValueError: The table has no such group, or the name has another form.
    """
    stem, _, seed = name.rpartition("-seed")
    group, _, rate = stem.rpartition("-rate")
    try:
        return Cell(table.group(group), float(rate), int(seed))
    except (StopIteration, ValueError):
        raise ValueError(
            f"{name!r} is no cell of the table {table.name}: a name is GROUP-rateRATE-seedSEED, "
            f"with one of the groups {', '.join(group.name for group in table.groups)}."
        ) from None
