"""Runs a table of experiments, and writes its page: `python -m experiments TABLE`.

Finished runs are kept in OUTPUT, one file each with settings, seed, versions, curve and result. A
stopped command resumes; runs of train.py resume from their last checkpoint. The page
is written at the end, also when only some of the runs are done, and so is the summary of all tables
in docs/results, unless --output or --page is given. `python -m experiments summary` writes that
alone.
"""

import argparse
import math
import os
import sys
import time

from inputs import process  # isort: split

from experiments import ROOT
from experiments.grid import chip_hours, find_cell
from experiments.runner import Places, run_cell, run_table, state
from experiments.tables import TABLES
from inputs.errors import InputError, refuse_below

RESULTS = os.path.join(ROOT, "docs", "results")
SUMMARY = "summary"


def parser() -> argparse.ArgumentParser:
    """Returns the command's parser."""
    result = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    result.add_argument(
        "table", choices=[*sorted(TABLES), SUMMARY], help="the table to run; or the summary of all"
    )
    result.add_argument("--data_dir", help="the data; see the table's page for what it takes")
    result.add_argument("--runs", default="runs/experiments", help="folder of logs, one per run")
    result.add_argument("--output", help="folder of run files; docs/results/TABLE by default")
    result.add_argument("--page", help="the page to write; docs/results/TABLE.md by default")
    result.add_argument(
        "--jobs",
        type=int,
        help="runs at the same time; by default one for each core, or one alone if the table's "
        "runs are for an accelerator",
    )
    result.add_argument(
        "--limit", type=int, default=-1, help="maximum number of runs; -1 for no limit"
    )
    result.add_argument("--groups", default="", help="run these only; names separated by commas")
    result.add_argument("--list", action="store_true", help="list runs and the time still needed")
    result.add_argument("--cell", help="run one cell, GROUP-rateRATE-seedSEED, in this process")
    result.add_argument(
        "--train_flag",
        action="append",
        default=[],
        help="a further flag of train.py for its runs, such as --train_flag=--tpu=NAME; repeatable",
    )
    return result


def main(arguments=None) -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.table == SUMMARY:
            return _summary(options)
        return _table(options)
    except KeyboardInterrupt:
        print("experiments: stopped. The same command resumes.", file=sys.stderr)
        return 130
    except (InputError, RuntimeError, ValueError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1


def _summary(options):
    from experiments.summary import write_summary  # imports matplotlib and SciPy

    given = {"--output": options.output, "--cell": options.cell, "--list": options.list}
    if wrong := [name for name, value in given.items() if value]:
        raise InputError(f"{wrong[0]}: the summary reads docs/results and runs nothing.")
    page = options.page or os.path.join(RESULTS, "summary.md")
    write_summary(TABLES.values(), RESULTS, page)
    print(page)
    return 0


def _table(options):
    table = TABLES[options.table]
    output = options.output or os.path.join(RESULTS, table.name)
    page = options.page or os.path.join(RESULTS, f"{table.name}.md")
    names = [name for name in options.groups.split(",") if name]
    places = Places(options.data_dir or "", options.runs, output, tuple(options.train_flag))
    known = [group.name for group in table.groups]
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"--groups: the table {table.name} has no group {unknown[0]!r}. Its groups are "
            f"{', '.join(known)}."
        )
    jobs = options.jobs
    if jobs is None:
        jobs = os.cpu_count() if table.one_core else 1
    refuse_below(1, jobs=jobs)
    if options.train_flag and table.program != "train":
        raise InputError(f"--train_flag: the table {table.name} does not run train.py.")
    if options.list:
        _list(state(table, output, names), table, jobs)
        return 0
    if not options.data_dir and options.limit:
        raise InputError(f"--data_dir: the table {table.name} needs its data; see its page.")
    if options.cell:
        run = run_cell(table, find_cell(table, options.cell), places)
        print(f"{options.cell}: {run['result']}")
        return 0
    run_table(table, places, jobs, options.limit, names)
    # The page imports Keras, whose other backends need not be installed.
    os.environ["KERAS_BACKEND"] = table.groups[0].settings.get("backend", "tensorflow")
    from experiments.page import write_page  # imports matplotlib and SciPy, too
    from experiments.summary import write_summary

    now = state(table, output)
    write_page(table, now, page, places)
    if not (options.output or options.page):
        write_summary(TABLES.values(), RESULTS, os.path.join(RESULTS, "summary.md"))
    print(f"{page}: {len(now.runs)} runs done, {len(now.todo) + now.later} to do.")
    return 0


def _list(now, table, jobs):
    for name, run in now.runs.items():
        result = run["result"]
        value = "diverged" if result["diverged"] else f"{result[table.metric]:.4f}"
        print(f"done  {name}  {table.metric} {value}  {run['processor_seconds']:.0f} s")
    for cell in now.todo:
        notes = []
        if cell.rate in cell.group.published:
            notes.append(f"published {cell.group.published[cell.rate]:.4f}")
        if cell.group.chip_hours_of:
            notes.append(f"{chip_hours(cell.group.chip_hours_of):.1f} chip-hours")
        print("  ".join([f"to do {cell.name}", *notes]))
    chips = [cell.group.chip_hours_of for cell in now.todo if cell.group.chip_hours_of]
    if chips:
        time_left = f"{sum(map(chip_hours, chips)):,.0f} TPU chip-hours by the pre-flight, at least"
    else:
        left = now.seconds_left(jobs)
        hours = "unknown" if math.isnan(left) else f"at least {left / 3600:.1f} h"
        time_left = f"{hours} with --jobs={jobs} ({time.strftime('%H:%M')})"
    print(
        f"{len(now.runs)} done, {len(now.todo)} to do, at least {now.later} more after them; "
        f"time still needed: {time_left}."
    )


if __name__ == "__main__":
    process.run(main)
