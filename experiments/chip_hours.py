"""The chip-hours of a recipe, from the page that `make preflight` wrote."""

import functools
import math

from experiments import ROOT

PAGE = ROOT / "docs" / "results" / "preflight.md"


@functools.cache
def chip_hours(recipe: str) -> float:
    """Returns the estimated minutes of all phases of a recipe times the chips, in hours.

    This is a lower bound: see docs/results/preflight.md.

    Raises:
        KeyError: The page has no such recipe.
    """
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    head = next(row for row in rows if row[0] == "recipe" and "minutes" in row)
    columns = [head.index(name) for name in ("recipe", "TPU", "minutes")]
    width = len(head)
    found = [[row[i] for i in columns] for row in rows if len(row) == width and row[0] == recipe]
    if not found:
        raise KeyError(f"{PAGE} has no recipe {recipe}")
    return sum(float(minutes) * _chips(tpu) / 60 for _, tpu, minutes in found)


def _chips(tpu):
    """The number of chips of a slice that is named by its sides, such as v3:32x32."""
    return math.prod(map(int, tpu.partition(":")[2].split("x")))
