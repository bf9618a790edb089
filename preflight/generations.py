"""Compiles every recipe for every generation of TPU, and writes docs/results/generations.md.

    python -m preflight.generations [RECIPE...]

Each phase is compiled for the smallest slice, of one host or more, on which a replica's share of
the batch fits in memory. If it fits on no slice, the largest slice is used, with micro-batches. The
slice is found with the compiler's quick mode; of what fits, the bytes that a step moves are then
counted in the program that a run would have.
Without names, all recipes are compiled. This takes hours, so each result is kept in
docs/results/generations.json, and a second call compiles only what is missing there, was compiled
with another version of the compiler, or failed for another reason than memory.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import re
import sys

from inputs import process  # isort: split

import recipes
from inputs.storage.files import atomic_write, check_file_writable, read_json, temporary_folder
from preflight.compiler.children import (
    REQUIRED_VERSIONS,
    ChildFailed,
    Children,
    check_installed,
    show_progress,
)
from preflight.compiler.topology import Topology, slices_of
from preflight.estimate import needed_accumulation
from training.chips import SOURCES, TPU_CHIPS, TpuChip

GIB = 2**30
PAGE = pathlib.Path(__file__).parents[1] / "docs/results/generations.md"
RESULTS = PAGE.with_suffix(".json")
FIRST_TRY = 16  # examples per replica that are compiled first, to see how much memory one takes
# Fields of recipes that do not change the operations of a step on a TPU: what is read, evaluated
# and saved, and the dtype, which is bfloat16 there (`_examine_recipe`).
WITHOUT_EFFECT = set(
    """name reference expected phases evaluation_examples evaluate_every_examples
    evaluate_every_steps target save_every_steps keep_checkpoints profile init_from init_slots
    max_skipped_in_row max_loss on_divergence rollback_rate_factor max_rollbacks lanes
    max_bad_record_share on_bad_record lower_case whole_word packing augmentation
    normalization compute_dtype""".split()
)
HEAD = """# Every recipe on every generation

Written by `python -m preflight.generations`, which `make preflight` runs, without a TPU: the
training step of each phase in bfloat16, compiled with the TPU compiler (libtpu {version}) for the
smallest slice, of one host or more, on which a replica's share of the batch fits in memory. A cell
has

- the slice, and the examples per replica ("55 in 5" are 55 in 5 micro-batches, where no slice holds
  them in one);
- the memory of a replica: the sum of arguments, temporaries and program, which can be more than HBM
  where the compiler reuses the memory of arguments for temporaries. It is that of the compiler's
  quick mode, whose programs need about as much memory as those of a run;
- the bytes that a step of a replica moves in HBM, and in all memories, on-chip ones included. They
  are counted in the program of a run (`preflight/compiler/traffic.py`). If there are micro-batches,
  these are the bytes of one of them and of the update: the body of a loop counts once, as in the
  compiler's own count, "bytes accessed". That one is of the second kind, and has some copies more
  than once.

An empty cell has not been compiled yet, and one without bytes only in quick mode. Recipes that
differ only in batch size, steps and the values of rates and coefficients run the same program; the
one with the largest batch stands for them (listed below).
"""
CHIPS = """
## The chips

What the estimates hold for each generation, with the source of each number (`training/chips.py`).
Memory is what one program can use on one device.

| | TFLOP/s, bfloat16 | memory, GiB | memory, GB/s | links, GB/s each way | devices per chip | \
cores per chip | chips per host | largest slice |
|---|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Cell:
    """The result of a phase of a recipe on a generation.

    Attributes:
        recipe, phase, chip: what was compiled; phases are counted from 1.
        compiler: version of libtpu.
        topology: the slice; "" if the batch does not divide by the replicas of any slice.
        replica_batch_size: examples per replica and step.
        accumulation: micro-batches per step.
        state_bytes: memory of weights and slots.
        hbm_bytes: memory of a replica.
        main_bytes, all_bytes: traffic of a step of a replica with one of its micro-batches, in HBM
            and in all memories; see `preflight.compiler.compile.count_file`. 0 if not counted.
        error: why it does not compile, or None.
    """

    recipe: str
    phase: int
    chip: str
    compiler: str
    topology: str = ""
    replica_batch_size: int = 0
    accumulation: int = 1
    state_bytes: int = 0
    hbm_bytes: int = 0
    main_bytes: float = 0
    all_bytes: float = 0
    error: str | None = None

    @property
    def final(self) -> bool:
        """Whether another compilation would give the same.

        That is not known of an error without a size: its reason may be temporary, such as a process
        that was killed.
        """
        return bool(self.main_bytes or (self.error and (self.hbm_bytes or not self.topology)))

    @property
    def micro_batch(self) -> int:
        """Examples of a micro-batch."""
        return self.replica_batch_size // self.accumulation

    def describe(self) -> str:
        """Returns the cell of the table."""
        if self.error:
            where = f"{self.topology.partition(':')[2]}: " if self.topology else ""
            return where + self.error.replace("|", "/")
        parts = f" in {self.accumulation}" if self.accumulation > 1 else ""
        sides = self.topology.partition(":")[2]
        text = f"{sides}, {self.replica_batch_size:,}{parts}, {self.hbm_bytes / GIB:.2f} GiB"
        if not self.main_bytes:
            return text
        moved = " / ".join(f"{x / 1e9:.3g}" for x in (self.main_bytes, self.all_bytes))
        return f"{text}, {moved} GB"


def programs() -> dict[str, list[str]]:
    """Returns the recipes whose programs differ, each with the others that run the same program."""
    groups = {}
    for recipe in recipes.RECIPES.values():
        # A coefficient changes the operations only if it becomes 0.
        fields = {
            name: value != 0 if isinstance(value, float) else value
            for name, value in dataclasses.asdict(recipe).items()
        }
        shapes = [
            tuple(getattr(phase, name, None) for name in ("sequence_length", "predictions"))
            for phase in recipe.phases
        ]
        key = (str({k: v for k, v in fields.items() if k not in WITHOUT_EFFECT}), tuple(shapes))
        groups.setdefault(key, []).append(recipe)
    result = {}
    for members in groups.values():
        largest = max(members, key=lambda recipe: recipe.phases[0].global_batch_size)
        result[largest.name] = [recipe.name for recipe in members if recipe is not largest]
    return result


def candidates(recipe, phase, chip: TpuChip) -> list[tuple[Topology, int]]:
    """Returns the slices of one host or more whose replicas divide the batch, and their shares.

    Args:
        recipe: a checked recipe.
        phase: one of its phases.
        chip: the generation.

    Returns:
        Pairs (topology, examples per replica), the smallest slice first.
    """
    found = []
    for topology in slices_of(chip):
        share, rest = divmod(phase.global_batch_size, topology.replicas)
        if topology.chips >= chip.chips_per_host and not rest and share % recipe.accumulation == 0:
            if share:
                found.append((topology, share))
    return found


def choose(slices, accumulation: int, compiled: list[Cell], limit: int):
    """Chooses what to compile next.

    Args:
        slices: from `candidates`.
        accumulation: micro-batches of the recipe.
        compiled: what has been compiled of the same phase, for any generation, also if it did not
            fit.
        limit: bytes of memory of a device.

    Returns:
        A tuple (topology, examples per replica, micro-batches): the smallest slice whose share
        fits, by the memory of an example in the largest micro-batch of `compiled`; else the largest
        slice with more micro-batches. If nothing has been compiled, the smallest slice with at most
        `FIRST_TRY` examples.
    """
    largest = FIRST_TRY
    if compiled:
        nearest = max(compiled, key=lambda cell: cell.micro_batch)
        per_example = max(nearest.hbm_bytes - nearest.state_bytes, 1) / nearest.micro_batch
        largest = int((limit - nearest.state_bytes) / per_example)
    for topology, share in slices:
        if share // accumulation <= largest:
            return topology, share, accumulation
    topology, share = slices[-1]
    return topology, share, needed_accumulation(share, max(largest, 1), accumulation)


def examine(recipe, phase_index: int, chip: TpuChip, children, compiled: list[Cell]) -> Cell:
    """Compiles a phase for one generation.

    Args:
        recipe: a checked recipe.
        phase_index: the phase, from 0.
        chip: the generation.
        children: `preflight.compiler.children.Children` for this recipe.
        compiled: as for `choose`; extended by what is compiled here.
    """
    phase = recipe.phases[phase_index]
    cell = Cell(recipe.name, phase_index + 1, chip.name, REQUIRED_VERSIONS["libtpu"])
    slices = candidates(recipe, phase, chip)
    if not slices:
        error = f"the batch of {phase.global_batch_size} does not divide by the replicas"
        return dataclasses.replace(cell, error=error)
    tried = {}
    while True:
        topology, share, accumulation = choose(
            slices, recipe.accumulation, compiled, chip.hbm_bytes
        )
        if (topology, accumulation) in tried:
            fitting = [key for key, one in tried.items() if not one.error]
            if fitting:
                best = min(fitting, key=lambda key: (key[0].chips, key[1]))
                tried[best] = count_cell(tried[best], recipe, children)
                # Without a size it does not compile, and more memory would not help.
                if not tried[best].error or not tried[best].hbm_bytes:
                    return tried[best]
                continue
        while (topology, accumulation) in tried:  # an example takes more memory than estimated
            more = needed_accumulation(share, share // accumulation - 1, accumulation + 1)
            if more is None:
                return tried[topology, accumulation]
            accumulation = more
        cell = dataclasses.replace(
            cell, topology=topology.name, replica_batch_size=share, accumulation=accumulation
        )
        cell = compile_cell(cell, recipe, children)
        if not cell.hbm_bytes:  # it does not compile, and more memory would not help
            return cell
        tried[topology, accumulation] = cell
        compiled.append(cell)


def compile_cell(cell: Cell, recipe, children) -> Cell:
    """Returns a cell with the memory of its program, or with the error.

    Args:
        cell: names the phase, the slice, the batch and the micro-batches.
        recipe, children: as for `examine`.
    """
    share, accumulation = cell.replica_batch_size, cell.accumulation
    try:
        children.lower(recipe, cell.phase - 1, [(share, accumulation)])
        result = children.compile(cell.phase - 1, share, accumulation, cell.topology, quick=True)
    except ChildFailed as error:
        return dataclasses.replace(cell, hbm_bytes=0, error=str(error))
    return dataclasses.replace(
        cell,
        state_bytes=children.facts["weight_bytes"] + children.facts["slot_bytes"],
        hbm_bytes=result.get("hbm_bytes", 0),
        error=result.get("error"),
    )


def count_cell(cell: Cell, recipe, children) -> Cell:
    """Returns a cell from `compile_cell` with the traffic of its program, or with the error."""
    share, accumulation = cell.replica_batch_size, cell.accumulation
    try:
        children.lower(recipe, cell.phase - 1, [(share, accumulation)])
        result = children.count_traffic(cell.phase - 1, share, accumulation, cell.topology)
    except ChildFailed as error:
        return dataclasses.replace(cell, hbm_bytes=0, error=str(error))
    if "error" in result:
        return dataclasses.replace(
            cell, hbm_bytes=result.get("hbm_bytes", 0), error=result["error"]
        )
    return dataclasses.replace(cell, main_bytes=result["main_bytes"], all_bytes=result["all_bytes"])


def read_results() -> dict[tuple, Cell]:
    """Returns the cells of `RESULTS` that this version of the compiler made, by their keys.

    Cells of recipes that no longer stand for a program are left out.

    Raises:
        InputError: the file cannot be read.
    """
    if not RESULTS.exists():
        return {}
    cells = [Cell(**entry) for entry in read_json(str(RESULTS))]
    version = REQUIRED_VERSIONS["libtpu"]
    known = programs()
    return {
        (cell.recipe, cell.phase, cell.chip): cell
        for cell in cells
        if cell.compiler == version and cell.recipe in known
    }


def write_results(cells: dict[tuple, Cell]) -> None:
    """Writes the results and the page."""
    entries = [dataclasses.asdict(cells[key]) for key in sorted(cells)]
    with atomic_write(str(RESULTS)) as file:
        file.write(json.dumps(entries, indent=0) + "\n")
    with atomic_write(str(PAGE)) as file:
        file.write(format_page(cells))


def format_page(cells: dict[tuple, Cell]) -> str:
    """Returns the page in Markdown."""
    lines = [
        HEAD.format(version=REQUIRED_VERSIONS["libtpu"]),
        f"| recipe | phase | {' | '.join(TPU_CHIPS)} |",
        "|---" * (2 + len(TPU_CHIPS)) + "|",
    ]
    for name, others in programs().items():
        for phase in range(1, len(recipes.find_recipe(name).phases) + 1):
            row = [cells.get((name, phase, chip)) for chip in TPU_CHIPS]
            texts = [cell.describe() if cell else "" for cell in row]
            label = f"{name} and {len(others)} more" if others else name
            lines.append(f"| {label} | {phase} | {' | '.join(texts)} |")
    lines += ["", "The same program as", ""]
    lines += [f"- {name}: {', '.join(others)}" for name, others in programs().items() if others]
    return (
        "\n".join(lines)
        + "\n"
        + CHIPS
        + "\n".join(map(format_chip, TPU_CHIPS.values()))
        + f"\n\n{SOURCES}"
    )


def format_chip(chip: TpuChip) -> str:
    """Returns a row of the table of chips."""

    def sourced(text, field):
        return f"{text} ({re.split('[:;,]', chip.sources[field])[0]})"

    links = {chip.link_bandwidth: "link_bandwidth"}
    if chip.other_link_bandwidth != chip.link_bandwidth:
        links[chip.other_link_bandwidth] = "other_link_bandwidth"
    either = " or ".join(sourced(f"{x / 1e9:.0f}", field) for x, field in sorted(links.items()))
    hosts = sourced(chip.chips_per_host, "chips_per_host")
    if chip.max_chips_of_one_host > chip.chips_per_host:
        hosts += f"; {sourced(chip.max_chips_of_one_host, 'max_chips_of_one_host')} of one host"
    values = (
        chip.name,
        sourced(f"{chip.flops / 1e12:.0f}", "flops"),
        sourced(f"{chip.hbm_bytes / GIB:.2f}", "hbm_bytes"),
        sourced(f"{chip.hbm_bandwidth / 1e9:,.0f}", "hbm_bandwidth"),
        f"{2 * chip.mesh_dimensions} of {either}",
        sourced(chip.devices_per_chip, "devices_per_chip"),
        sourced(chip.cores_per_chip, "cores_per_chip"),
        hosts,
        sourced(f"{chip.max_chips:,} chips", "max_chips"),
    )
    return f"| {' | '.join(values)} |"


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: the command's arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python -m preflight.generations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", metavar="RECIPE", nargs="*", help="a recipe; by default, all")
    names = parser.parse_args(arguments).names
    try:
        for path in map(str, (PAGE, RESULTS)):
            check_file_writable(path, path)
        check_installed()
        known = programs()
        asked = {recipes.find_recipe(name).name for name in names or known}
        # A recipe that runs the program of another one is represented by it.
        chosen = [
            recipes.find_recipe(name)
            for name, others in known.items()
            if asked.intersection([name, *others])
        ]
        cells = read_results()
        total = sum(len(recipe.phases) for recipe in chosen) * len(TPU_CHIPS)
        with show_progress(_print_line, total=total) as progress:
            for recipe in chosen:
                with process.signals_as_interrupt(), temporary_folder("generations-") as folder:
                    _examine_recipe(recipe, cells, Children(progress, folder), progress)
        write_results(cells)
    except (ValueError, OSError) as error:
        _print_line(f"preflight.generations: {error}")
        return 1
    _print_line(f"Written: {PAGE}")
    return int(any(cells[key].error for key in cells if cells[key].topology))


def _examine_recipe(recipe, cells, children, progress):
    """Adds the missing cells of a recipe to `cells`, and writes the page after each."""
    recipe = recipes.override(recipe, ["compute_dtype=bfloat16"])  # as `train.py` on a TPU
    for phase_index in range(len(recipe.phases)):
        row = {chip: (recipe.name, phase_index + 1, chip) for chip in TPU_CHIPS}
        known = [cells[key] for key in row.values() if key in cells and cells[key].hbm_bytes]
        compiled = list(known)
        uncounted = [cell for cell in known if not cell.final]
        with contextlib.suppress(ChildFailed):  # then each one says why
            # In one process, which builds the model once.
            shares = [(cell.replica_batch_size, cell.accumulation) for cell in uncounted]
            children.lower(recipe, phase_index, shares)
        for name, chip in TPU_CHIPS.items():
            cell = cells.get(row[name])
            if cell is None or not cell.final:
                progress.title(f"{recipe.name}, phase {phase_index + 1}, on {name}")
                found = count_cell(cell, recipe, children) if cell in uncounted else None
                if found is None or found.error:
                    found = examine(recipe, phase_index, chip, children, compiled)
                cells[row[name]] = found
                write_results(cells)
            progress.advance()


if __name__ == "__main__":
    process.run(main, sys.argv[1:])
