"""Runs a table of experiments, and writes its page: `python -m experiments TABLE`.

Finished runs are kept in OUTPUT, one file each with settings, seed, versions, curve and result. A
stopped command resumes; runs of train.py resume from their last checkpoint. Runs that another
command is doing are passed over. The page is written at the end, also when only some of the runs
are done, and so is the summary of all tables in docs/results, unless --output or --page is given.
`python -m experiments summary` writes that alone.
"""

import argparse
import dataclasses
import math
import os
import sys
import time

from inputs import process  # isort: split

from experiments import ROOT
from experiments.grid import chip_hours, find_cell
from experiments.runner import (
    IN_USE,
    InUse,
    Places,
    format_result,
    run_cell,
    run_table,
    state,
)
from experiments.tables import TABLES
from inputs.errors import InputError, refuse_below
from inputs.storage.files import check_file_writable, check_writable, is_remote

RESULTS = os.path.join(ROOT, "docs", "results")
SUMMARY = "summary"
# What a command that is not the whole run of a table uses, of the flags.
USED = {
    SUMMARY: {"page"},
    # Added to a command, it shows what that would run.
    "--list": {"list", *("data_dir", "runs", "output", "page", "jobs", "limit", "groups")},
    "--cell": {"cell", "data_dir", "runs", "output", "train_flag"},
}


def parser() -> argparse.ArgumentParser:
    """Returns the command's parser."""
    result = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    result.add_argument(
        "table", choices=[*sorted(TABLES), SUMMARY], help="the table to run; or the summary of all"
    )
    result.add_argument("--data_dir", help="the data; see the table's page for what it takes")
    result.add_argument("--runs", help="folder of logs, one per run; runs/experiments by default")
    result.add_argument("--output", help="folder of run files; docs/results/TABLE by default")
    result.add_argument("--page", help="the page to write; OUTPUT.md by default")
    result.add_argument(
        "--jobs",
        type=int,
        help="runs at the same time; by default one for each core, or one alone if the table's "
        "runs are for an accelerator",
    )
    result.add_argument("--limit", type=int, help="maximum number of runs; -1, the default, is all")
    result.add_argument("--groups", help="run these only; names separated by commas")
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
        with process.signals_as_interrupt():
            if options.table == SUMMARY:
                return _summary(options)
            return _table(options)
    except KeyboardInterrupt:
        print("experiments: stopped. The same command resumes.", file=sys.stderr)
        return process.INTERRUPTED
    except (InputError, RuntimeError, ValueError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return IN_USE if isinstance(error, InUse) else 1


def _refuse_unused(options, mode):
    for name, value in vars(options).items():
        given = not (value is None or value is False or value == [])
        if given and name not in {"table", *USED[mode]}:
            raise InputError(f"--{name} has no effect with {mode}. Leave it out.")


def _summary(options):
    from experiments.summary import write_summary  # imports matplotlib and SciPy

    _refuse_unused(options, SUMMARY)
    page = options.page or os.path.join(RESULTS, "summary.md")
    _check_page(page)
    write_summary(TABLES.values(), RESULTS, page)
    print(page)
    return 0


def _table(options):
    table = TABLES[options.table]
    mode = "--list" if options.list else "--cell" if options.cell else None
    if mode:
        _refuse_unused(options, mode)
    output = options.output or os.path.join(RESULTS, table.name)
    page = options.page or f"{os.path.abspath(output)}.md"
    runs = options.runs or os.path.join("runs", "experiments")
    places = Places(options.data_dir or "", runs, output, tuple(options.train_flag))
    names = _groups(table, options.groups)
    limit = -1 if options.limit is None else options.limit
    jobs = options.jobs
    if jobs is None:
        jobs = os.cpu_count() if table.one_core else 1
    refuse_below(1, jobs=jobs)
    if options.train_flag and table.program != "train":
        raise InputError(f"--train_flag: the table {table.name} does not run train.py.")
    if options.list:
        _check_folder(output, "--output")
        _list(state(table, output, names), table, jobs, limit)
        return 0
    if not options.data_dir and limit:
        raise InputError(f"--data_dir: the table {table.name} needs its data; see its page.")
    for flag, folder in (("--output", output), ("--runs", runs)):
        _check_folder(folder, flag)
        check_writable(folder, flag)
    if options.cell:
        run = run_cell(table, find_cell(table, options.cell), places)
        print(f"{options.cell}: {run['result']}")
        return 0
    _check_page(page)
    run_table(table, places, jobs, limit, names)
    # The page imports Keras, whose other backends need not be installed.
    os.environ["KERAS_BACKEND"] = table.groups[0].settings.get("backend", "tensorflow")
    from experiments.page import format_runs, write_page  # imports matplotlib and SciPy, too
    from experiments.summary import write_summary

    now = state(table, output)
    write_page(table, now, page, places)
    if not (options.output or options.page):
        write_summary(TABLES.values(), RESULTS, os.path.join(RESULTS, "summary.md"))
    print(f"{page}: {format_runs(len(now.runs))} done, {len(now.todo) + now.later} to do.")
    return 0


def _groups(table, given):
    """Returns the names of --groups; () if it is not given."""
    if given is None:
        return ()
    names = [name for name in map(str.strip, given.split(",")) if name]
    known = [group.name for group in table.groups]
    for name in names:
        if name not in known:
            raise InputError(
                f"--groups: the table {table.name} has no group {name!r}. Its groups are "
                f"{', '.join(known)}."
            )
    if not names:
        raise InputError(f"--groups={given} names no group. Leave it out to run all.")
    return names


def _check_folder(folder, flag):
    """Checks that a path on this machine's disk is that of a folder, or of nothing yet."""
    if is_remote(folder):
        raise InputError(f"{flag}: {folder} is not on the disk. Give a folder that is.")
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise InputError(f"{flag}: {folder} is not a folder. Give the path of a folder.")


def _check_page(page):
    if is_remote(page):
        raise InputError(f"--page: {page} is not on the disk. Give a file that is.")
    check_file_writable(page, "--page")
    if not page.endswith(".md"):  # it could be a run file, which the page would replace
        raise InputError(f"--page: {page} is no Markdown file. Give a path that ends in .md.")


def _list(now, table, jobs, limit):
    if limit >= 0:
        later = min(now.later, max(0, limit - len(now.todo)))
        now = dataclasses.replace(now, todo=now.todo[:limit], later=later)
    for name, run in now.runs.items():
        seconds = f"{run['processor_seconds']:.0f} s"
        print(f"done  {name}  {table.metric} {format_result(table, run)}  {seconds}")
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
