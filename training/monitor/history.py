"""The figures that a run leaves beside its checkpoints, one JSON object a line."""

import contextlib
import json
import math
import os

HISTORY = "history.jsonl"  # an object per logged step
EVALUATIONS = "evaluations.jsonl"  # an object per evaluation


def read_rows(path) -> list[dict]:
    """The rows of such a file; none if there is no such file. A torn last line is dropped."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
    return rows


def append_row(path, row: dict) -> None:
    """Adds a row; JSON has no NaN and no infinity, so they become null."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({key: _finite(row[key]) for key in row}, allow_nan=False) + "\n")


def drop_rows_after(path, step: int) -> None:
    """Takes away the rows of steps that come again, because the run goes on from `step`."""
    if not os.path.exists(path):
        return
    kept = [row for row in read_rows(path) if row["step"] <= step]
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
    os.replace(f"{path}.new", path)


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
