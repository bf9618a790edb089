"""Defines an experiment: a table of groups of runs, and the rule that tunes each group."""

import dataclasses
import functools
import math
from collections.abc import Mapping

from experiments import ROOT

PREFLIGHT = ROOT / "docs" / "results" / "preflight.md"
MOST_EXTENSIONS = 6  # maximum number of rates tried beyond those of a group


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in their learning rate and seed.

    Attributes:
        name: Unique in the table, such as `lamb-1024`.
        settings: All other settings of the runs, by name. JSON values.
        rates: The peak learning rates to try with the first seed, in ascending order.
        rate_from: Instead of `rates`: (name of another group, factor). The rate is the best rate of
            that group times the factor, and is not tuned.
        seeds: The seeds that the best rate is run with. All rates are tried with the first one.
        extended: Whether rates beyond those of `rates` are tried while the best is at the edge.
            False for a published grid that is to be repeated line by line.
        published: The published value of the metric, by rate.
        chip_hours_of: The recipe of the pre-flight's page (`chip_hours`) whose
            chip-hours a run of this group takes; an empty string for a group that needs no TPU.
    """

    name: str
    settings: Mapping[str, object]
    rates: tuple[float, ...] = ()
    rate_from: tuple[str, float] | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    extended: bool = True
    published: Mapping[float, float] = dataclasses.field(default_factory=dict)
    chip_hours_of: str = ""


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
    """One experiment, whose results are one page.

    Attributes:
        name: The name on the command line.
        title: The title of the page.
        program: The program that runs a cell, a key of `experiments.runner.PROGRAMS`: `keras`,
            `train` or `one_batch`.
        metric: The result that rates are compared by; higher is better.
        groups: The groups, in the order in which they are run and listed.
        pairs: Pairs of names of groups whose difference is tested.
        published: The published value of `metric`, by name of the group.
        x: The setting on the horizontal axis of the plot of `metric`; an empty string for no plot.
        heat_maps: Names of groups whose trust ratios are drawn, at the best rate and first seed.
        text: The introduction of the page.
        chance: A run whose metric is not above this has learned nothing, and counts as diverged in
            the choice of rates.
        one_core: Whether a run is made for one core of a CPU. Otherwise it is for an accelerator:
            it may use all cores, and by default one run is done at a time.
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
    chance: float = -math.inf
    one_core: bool = True

    def group(self, name: str) -> Group:
        """Returns the group with a name.

        Raises:
            StopIteration: There is no such group.
        """
        return next(group for group in self.groups if group.name == name)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a group.

    Attributes:
        todo: Cells that can be run now.
        later: The minimum number of cells that follow when those of `todo` are done.
        best: The best rate, or `None` if rates are still to be tried or none learns.
        at_edge: Whether the best rate is the lowest or highest of those that were tried.
    """

    todo: list[Cell]
    later: int
    best: float | None
    at_edge: bool = False


def _rounded(rate: float) -> float:
    """Rounds to two significant digits, as rates are written in tables."""
    return float(f"{rate:.2g}")


def progress(table: Table, group: Group, metrics: Mapping[str, float]) -> Progress:
    """Applies the tuning rule, which is the same for all groups, to the runs that are done.

    Each rate of the group is tried with the first seed. While the best rate is the lowest or the
    highest one, the next rate beyond it is tried, at the same ratio. A run that diverged, or whose
    metric is not above `table.chance`, is worse than all others. If all runs of a group are such,
    the next lower rate is tried, up to `MOST_EXTENSIONS` times; the group has no best rate if none
    of these learns either. The best rate is then run with the other seeds.

    Args:
        table: The table of the group.
        group: The group.
        metrics: The metric of each run that is done, by the name of its cell; `-inf` for a run that
            diverged.

    Returns:
        The cells to run and the best rate so far.
    """
    if group.rate_from:
        source = table.group(group.rate_from[0])
        tuned = progress(table, source, metrics)
        if tuned.best is None:  # its rates are still to be tried, or none of them learns
            return Progress([], len(group.seeds) if tuned.todo or tuned.later else 0, None)
        best = _rounded(tuned.best * group.rate_from[1])
        at_edge = False
    else:
        rates = list(group.rates)
        for _ in range(MOST_EXTENSIONS + 1):
            cells = [Cell(group, rate, group.seeds[0]) for rate in rates]
            todo = [cell for cell in cells if cell.name not in metrics]
            if todo:
                return Progress(todo, len(group.seeds) - 1, None)
            values = [metrics[cell.name] for cell in cells]
            if max(values) > table.chance:
                best = rates[values.index(max(values))]
            else:
                best = rates[0]
            at_edge = len(rates) > 1 and best in (rates[0], rates[-1])
            if not (at_edge and group.extended):
                break
            if best == rates[-1]:
                rates.append(_rounded(best * rates[-1] / rates[-2]))
            else:
                rates.insert(0, _rounded(best * rates[0] / rates[1]))
        else:
            at_edge = True
        if max(values) <= table.chance:
            return Progress([], 0, None)
    cells = [Cell(group, best, seed) for seed in group.seeds]
    return Progress([cell for cell in cells if cell.name not in metrics], 0, best, at_edge)


def find_cell(table: Table, name: str) -> Cell:
    """Returns the cell with a name, even if the rule does not ask for it.

    Raises:
        ValueError: The table has no such group; the name is not GROUP-rateRATE-seedSEED; or the
            rate is not positive and finite, or the seed not from 0 to 2³² - 1.
    """
    stem, _, seed = name.rpartition("-seed")
    group, _, rate = stem.rpartition("-rate")
    try:
        cell = Cell(table.group(group), float(rate), int(seed))
    except (StopIteration, ValueError):
        cell = None
    if cell is None or not (0 < cell.rate < math.inf and 0 <= cell.seed < 2**32):
        raise ValueError(
            f"{name!r} is no cell of the table {table.name}: a name is GROUP-rateRATE-seedSEED, "
            f"with one of the groups {', '.join(group.name for group in table.groups)}, a positive "
            "rate and a seed from 0 to 4294967295."
        )
    return cell


@functools.cache
def chip_hours(recipe: str) -> float:
    """Returns the estimated minutes of all phases of a recipe times the chips, in hours.

    This is a lower bound: see docs/results/preflight.md.

    Raises:
        KeyError: The page has no such recipe.
    """
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in PREFLIGHT.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    head = next(row for row in rows if row[0] == "recipe" and "minutes" in row)
    columns = [head.index(name) for name in ("recipe", "TPU", "minutes")]
    width = len(head)
    found = [[row[i] for i in columns] for row in rows if len(row) == width and row[0] == recipe]
    if not found:
        raise KeyError(f"{PREFLIGHT} has no recipe {recipe}")
    return sum(float(minutes) * _chips(tpu) / 60 for _, tpu, minutes in found)


def _chips(tpu):
    """The number of chips of a slice that is named by its sides, such as v3:32x32."""
    return math.prod(map(int, tpu.partition(":")[2].split("x")))
