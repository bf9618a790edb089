"""One run of train.py, with a recipe and flags as settings."""

import json
import os
import pathlib
import shutil
import sys

from experiments import ROOT, children
from experiments.grid import Cell

DIVERGED = 3  # exit status of train.py for a run that diverged


def command(cell: Cell, data_dir: str, folder: str, flags=()) -> list[str]:
    """Returns the `train.py` command of a cell.

    Args:
        cell: its settings are `recipe`; `flags`, name -> value; `set`, recipe field -> value;
            `rates`, recipe field -> factor, for fields that are set to the cell's rate times the
            factor; and `curve` and `evaluations`, the fields of history.jsonl and evaluations.jsonl
            to keep, the loss first.
        data_dir: as train.py expects it.
        folder: the run's `model_dir`.
        flags: further flags, such as --tpu=NAME.
    """
    settings = cell.group.settings
    fields = dict(settings["set"])
    for field, factor in settings["rates"].items():
        fields[field] = float(f"{cell.rate * factor:.6g}")
    own = {"recipe": settings["recipe"], **settings["flags"], "seed": cell.seed}
    return [
        sys.executable,
        str(ROOT / "train.py"),
        *(f"--{name}={value}" for name, value in own.items()),
        f"--data_dir={data_dir}",
        f"--model_dir={folder}",
        *(f"--set={name}={value}" for name, value in fields.items()),
        *flags,
    ]


def run(cell: Cell, data_dir: str, folder: str, say=print, flags=()) -> dict:
    """Runs one cell, or resumes it where it was stopped.

    Args:
        cell: as in `command`.
        data_dir: as train.py expects it.
        folder: a folder for the log and the run's `model_dir`, which is not the folder itself:
            the runner and train.py both lock theirs. Weights and exports are deleted at the end,
            logs are kept.
        say: receives the command.
        flags: as in `command`.

    Returns:
        A dictionary with `curve` and `evaluations`: name -> list of values, one per line of
        history.jsonl and of evaluations.jsonl; and `result`: the content of results.json (nothing
        if the run diverged), and `diverged`.

    Raises:
        RuntimeError: train.py ended with a status other than 0 or `DIVERGED`.
    """
    os.makedirs(folder, exist_ok=True)
    log = os.path.join(folder, "train.log")
    folder = os.path.join(folder, "run")
    arguments = command(cell, data_dir, folder, flags)
    say(" ".join(arguments))
    child = children.run(arguments, log)
    status = child.process.returncode
    if status not in (0, DIVERGED):
        raise RuntimeError(f"train.py failed: {child.describe_failure()}")
    result = {}
    if status == 0:
        result = json.loads(pathlib.Path(folder, "results.json").read_text(encoding="utf-8"))
    settings = cell.group.settings
    curve = _columns(os.path.join(folder, "history.jsonl"), settings["curve"])
    evaluations = _columns(os.path.join(folder, "evaluations.jsonl"), settings["evaluations"])
    for name in os.listdir(folder):
        if name.startswith("ckpt-") or name in ("best", "export", "checkpoint"):
            place = os.path.join(folder, name)
            shutil.rmtree(place) if os.path.isdir(place) else os.remove(place)
    result["diverged"] = status == DIVERGED
    return {"curve": curve, "evaluations": evaluations, "result": result}


def _columns(path, names) -> dict[str, list]:
    """Returns the step and these fields of each row of a JSON-lines file; no rows without it."""
    rows = []
    if os.path.exists(path):  # not written by a run that diverged before it
        rows = list(map(json.loads, pathlib.Path(path).read_text(encoding="utf-8").splitlines()))
    return {name: [row.get(name) for row in rows] for name in ("step", *names)}
