"""Learns 220 real photographs by heart: python -m experiments.one_batch --source=samples.tar

A proof that data, labels, model, optimizer and export agree: ResNet-50, all layers at a quarter of
their width, at 224, trains on one batch of all images of the source, and the SavedModel is then
asked for each of them as a file. Twelve minutes of processor time. The same command goes on where
it was stopped.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tarfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: its start-up notices

import tensorflow as tf

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECIPE = "resnet50-one-batch"


def files(source: str) -> list[tuple[bytes, str]]:
    """(an image file's bytes, its class's WordNet id) of a tar with its CSV and classes.csv."""
    with open(os.path.join(os.path.dirname(source), "classes.csv"), encoding="utf-8") as table:
        wnids = {row["index"]: row["wnid"] for row in csv.DictReader(table)}
    with tarfile.open(source) as archive:
        with open(f"{source.removesuffix('.tar')}.csv", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        return [(archive.extractfile(row["file"]).read(), wnids[row["index"]]) for row in rows]


def right(export_dir: str, images: list[tuple[bytes, str]]) -> int:
    """How many images the SavedModel names right, each from the bytes of its file."""
    classify = tf.saved_model.load(export_dir).signatures["serving_default"]
    likeliest = (classify(image=tf.constant([data]))["wnids"][0, 0] for data, _ in images)
    return sum(
        wnid.numpy().decode() == own for wnid, (_, own) in zip(likeliest, images, strict=True)
    )


def main() -> int:
    """The command line; returns the exit status: 1 if it is no proof."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="a tar; beside it its CSV, classes.csv")
    parser.add_argument("--output", default="runs/one-batch")
    flags = parser.parse_args()
    flags.source, flags.output = map(os.path.abspath, (flags.source, flags.output))
    data, run = os.path.join(flags.output, "data"), os.path.join(flags.output, "run")
    prepare = ["-m", "inputs.images.prepare", f"--source={flags.source}", f"--output={data}"]
    train = ["train.py", f"--recipe={RECIPE}", f"--data_dir={data}", f"--model_dir={run}"]
    train += ["--steps_per_loop=1"]  # the history has each step
    try:
        images = files(flags.source)
    except (OSError, KeyError, tarfile.TarError) as error:
        print(
            f"experiments.one_batch: --source={flags.source}: {error}. Give a tar with its CSV and "
            "classes.csv beside it.",
            file=sys.stderr,
        )
        return 1
    # Training and evaluation have the same images.
    for command in (prepare, [*prepare, "--split=validation"], train):
        if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
            return 1
    with open(os.path.join(run, "history.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    best = max(rows, key=lambda row: (row["image_top1"], -row["image_loss"]))
    hits = right(os.path.join(run, "export"), images)
    print(
        f"In training, by step {best['step']}: top-1 {best['image_top1']:.4f}, "
        f"loss {best['image_loss']:.4f}; in the end {rows[-1]['image_loss']:.4f}. The "
        f"SavedModel names {hits} of {len(images)} files right."
    )
    proven = best["image_loss"] < 0.1 and best["image_top1"] == 1.0 and hits >= 0.95 * len(images)
    return int(not proven)


if __name__ == "__main__":
    sys.exit(main())
