"""One run that overfits one batch of photographs, and classifies their files with the SavedModel.

This checks that data, labels, model, optimizer and export work together. A ResNet-50 with all
layers at a quarter of their width and image size 224 trains on one batch of all images of the
source; then the SavedModel classifies each image file.
"""

import csv
import json
import os
import sys
import tarfile

from experiments import ROOT, children
from experiments.grid import Cell
from inputs.errors import InputError


def run(cell: Cell, data_dir: str, folder: str, say=print) -> dict:
    """Runs one cell, or resumes it where it was stopped.

    Args:
        cell: its setting is `recipe`.
        data_dir: path of a tar of JPEG files, with its CSV and classes.csv in the same folder.
        folder: a folder for the prepared images and the run's `model_dir`.
        say: receives each command.

    Returns:
        A dictionary with `curve`: training loss and accuracy of each step; and `result`:
        `accuracy`, the share of files that the SavedModel classifies correctly, `loss` and
        `training_accuracy` of the best step, and `diverged`.

    Raises:
        InputError: `data_dir` cannot be read.
        RuntimeError: a command failed.
    """
    source = os.path.abspath(data_dir)
    try:
        images = _files(source)
    except (OSError, KeyError, tarfile.TarError) as error:
        raise InputError(
            f"--data_dir={source}: {error}. Give a tar with its CSV and classes.csv beside it."
        ) from None
    data = os.path.join(folder, "data")
    model_dir = os.path.join(folder, "run")
    prepare = ["-m", "inputs.images.prepare", f"--source={source}", f"--output={data}"]
    train = ["train.py", f"--recipe={cell.group.settings['recipe']}", f"--seed={cell.seed}"]
    train += [f"--data_dir={data}", f"--model_dir={model_dir}", "--steps_per_loop=1"]
    train += [f"--set=peak_learning_rate={cell.rate}"]
    # Training and evaluation use the same images.
    for command in (prepare, [*prepare, "--split=validation"], train):
        say(" ".join(command))
        child = children.run([sys.executable, *command], cwd=str(ROOT))
        if child.process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {child.describe_failure()}")
    with open(os.path.join(model_dir, "history.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    best = max(rows, key=lambda row: (row["image_top1"], -row["image_loss"]))
    names = {"step": "step", "loss": "image_loss", "accuracy": "image_top1"}
    result = {
        "accuracy": _right(os.path.join(model_dir, "export"), images) / len(images),
        "loss": best["image_loss"],
        "training_accuracy": best["image_top1"],
        "diverged": False,
    }
    curve = {name: [row[own] for row in rows] for name, own in names.items()}
    return {"curve": curve, "result": result}


def _files(source) -> list[tuple[bytes, str]]:
    """Returns (bytes of the image file, WordNet id of its class) of each image."""
    with open(os.path.join(os.path.dirname(source), "classes.csv"), encoding="utf-8") as table:
        wnids = {row["index"]: row["wnid"] for row in csv.DictReader(table)}
    with tarfile.open(source) as archive:
        with open(f"{source.removesuffix('.tar')}.csv", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        return [(archive.extractfile(row["file"]).read(), wnids[row["index"]]) for row in rows]


def _right(export_dir, images) -> int:
    import tensorflow as tf

    classify = tf.saved_model.load(export_dir).signatures["serving_default"]
    likeliest = (classify(image=tf.constant([data]))["wnids"][0, 0] for data, _ in images)
    return sum(
        wnid.numpy().decode() == own for wnid, (_, own) in zip(likeliest, images, strict=True)
    )
