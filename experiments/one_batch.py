"""Overfits one batch of 220 photographs: python -m experiments.one_batch --source=samples.tar

This checks that data, labels, model, optimizer and export agree. A ResNet-50 with all layers at a
quarter of their width and image size 224 trains on one batch of all images of the source; then the
SavedModel classifies each image file. It takes about twelve minutes of CPU time. If it is stopped,
the same command resumes it.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tarfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # set before TensorFlow logs at import

import tensorflow as tf

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECIPE = "resnet50-one-batch"


def files(source: str) -> list[tuple[bytes, str]]:
    """Returns (image file, WordNet id of its class) for a tar with its CSV and classes.csv."""
    with open(os.path.join(os.path.dirname(source), "classes.csv"), encoding="utf-8") as table:
        wnids = {row["index"]: row["wnid"] for row in csv.DictReader(table)}
    with tarfile.open(source) as archive:
        with open(f"{source.removesuffix('.tar')}.csv", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        return [(archive.extractfile(row["file"]).read(), wnids[row["index"]]) for row in rows]


def right(export_dir: str, images: list[tuple[bytes, str]]) -> int:
    """Returns how many images the SavedModel classifies correctly from their files."""
    classify = tf.saved_model.load(export_dir).signatures["serving_default"]
    likeliest = (classify(image=tf.constant([data]))["wnids"][0, 0] for data, _ in images)
    return sum(
        wnid.numpy().decode() == own for wnid, (_, own) in zip(likeliest, images, strict=True)
    )


def main() -> int:
    """Runs the command line; returns the exit status, 1 if the check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="a tar; beside it its CSV, classes.csv")
    parser.add_argument("--output", default="runs/one-batch")
    flags = parser.parse_args()
    flags.source, flags.output = map(os.path.abspath, (flags.source, flags.output))
    data, run = os.path.join(flags.output, "data"), os.path.join(flags.output, "run")
    prepare = ["-m", "inputs.images.prepare", f"--source={flags.source}", f"--output={data}"]
    train = ["train.py", f"--recipe={RECIPE}", f"--data_dir={data}", f"--model_dir={run}"]
    train += ["--steps_per_loop=1"]  # so that the history has each step
    try:
        images = files(flags.source)
    except (OSError, KeyError, tarfile.TarError) as error:
        print(
            f"experiments.one_batch: --source={flags.source}: {error}. Give a tar with its CSV and "
            "classes.csv beside it.",
            file=sys.stderr,
        )
        return 1
    # Training and evaluation use the same images.
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
