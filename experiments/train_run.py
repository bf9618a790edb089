"""One run of train.py, with a recipe and flags as settings."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from experiments import ROOT
from experiments.grid import Cell

DIVERGED = 3  # exit status of train.py for a run that diverged


def command(cell: Cell, data_dir: str, folder: str) -> list[str]:
    """Returns the `train.py` command of a cell.

    Args:
        cell: its settings are `recipe`; `flags`, name -> value; `set`, recipe field -> value;
            `rates`, recipe field -> factor, for fields that are set to the cell's rate times the
            factor; and `curve`, the fields of history.jsonl to keep.
        data_dir: as train.py expects it.
        folder: the run's `model_dir`.
    """
    settings = cell.group.settings
    fields = dict(settings["set"])
    for field, factor in settings["rates"].items():
        fields[field] = float(f"{cell.rate * factor:.6g}")
    flags = {"recipe": settings["recipe"], **settings["flags"], "seed": cell.seed}
    return [
        sys.executable,
        str(ROOT / "train.py"),
        *(f"--{name}={value}" for name, value in flags.items()),
        f"--data_dir={data_dir}",
        f"--model_dir={folder}",
        *(f"--set={name}={value}" for name, value in fields.items()),
    ]


def run(cell: Cell, data_dir: str, folder: str, say=print) -> dict:
    """Runs one cell, or resumes it where it was stopped.

    Args:
        cell: as in `command`.
        data_dir: as train.py expects it.
        folder: the run's `model_dir`. Weights and exports are deleted at the end, logs are kept.
        say: receives the command.

    Returns:
        A dictionary with `curve`: name -> list of values, one per line of history.jsonl; and
        `result`: the content of results.json (nothing if the run diverged), and `diverged`.

    Raises:
        RuntimeError: train.py ended with a status other than 0 or `DIVERGED`.
    """
    os.makedirs(folder, exist_ok=True)
    log = os.path.join(folder, "train.log")
    with open(log, "a", encoding="utf-8") as file:
        arguments = command(cell, data_dir, folder)
        say(" ".join(arguments))
        status = subprocess.run(arguments, stdout=file, stderr=file, check=False).returncode
    if status not in (0, DIVERGED):
        raise RuntimeError(f"train.py ended with status {status}; see {log}")
    result = {}
    if status == 0:
        result = json.loads(pathlib.Path(folder, "results.json").read_text(encoding="utf-8"))
    rows = pathlib.Path(folder, "history.jsonl").read_text(encoding="utf-8").splitlines()
    names = cell.group.settings["curve"]
    curve = {name: [] for name in ("step", *names)}
    for row in map(json.loads, rows):
        for name in curve:
            curve[name].append(row.get(name))
    for name in os.listdir(folder):
        if name.startswith("ckpt-") or name in ("best", "export", "checkpoint"):
            place = os.path.join(folder, name)
            shutil.rmtree(place) if os.path.isdir(place) else os.remove(place)
    return {"curve": curve, "result": {**result, "diverged": status == DIVERGED}}
