"""Learns 220 real photographs by heart: python -m experiments.one_batch --source=samples.tar

A proof that data, labels, model, optimizer and export agree: ResNet-50, all layers at a quarter of
their width, at 224, trains on one batch of all images of the source, and the SavedModel is then
asked for each of them as a file. Twelve minutes of processor time. The same command goes on where
it was stopped.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: its start-up notices

import subprocess

import tensorflow as tf

from inputs import prepare_images
from inputs.image_sources import Class, Item
from training.history import read_rows

RECIPE = "resnet50-one-batch"


def right(export_dir: str, items: list[Item], classes: list[Class]) -> int:
    """How many images the SavedModel names right, each from the bytes of its file."""
    classify = tf.saved_model.load(export_dir).signatures["serving_default"]
    hits = 0
    for item in items:
        answer = classify(image=tf.constant([item.data]))
        hits += answer["wnids"][0, 0].numpy().decode() == classes[item.label].wnid
    return hits


def main() -> int:
    """The command line; returns the exit status: 1 if it is no proof."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="220 images, as inputs.prepare_images")
    parser.add_argument("--output", default="runs/one-batch")
    flags = parser.parse_args()
    data, run = os.path.join(flags.output, "data"), os.path.join(flags.output, "run")
    for split in ("train", "validation"):  # the same images
        arguments = [f"--source={flags.source}", f"--output={data}", f"--split={split}"]
        if prepare_images.main(arguments):
            return 1
    train = [sys.executable, "train.py", f"--recipe={RECIPE}", f"--data_dir={data}"]
    train += [f"--model_dir={run}", "--steps_per_loop=1"]  # the history has each step
    if subprocess.run(train, check=False).returncode:
        return 1
    rows = read_rows(os.path.join(run, "history.jsonl"))
    best = max(rows, key=lambda row: (row["image_top1"], -row["image_loss"]))
    (source,) = prepare_images.find_sources(flags.source, "train", "", None)
    items = [item for part in source.parts for item in part.read()]
    hits = right(os.path.join(run, "export"), items, source.classes)
    print(
        f"In training, by step {best['step']}: top-1 {best['image_top1']:.4f}, "
        f"loss {best['image_loss']:.4f}; in the end {rows[-1]['image_loss']:.4f}. The "
        f" SavedModel names {hits} of {len(items)} files right."
    )
    proven = best["image_loss"] < 0.1 and best["image_top1"] == 1.0 and hits >= 0.95 * len(items)
    return int(not proven)


if __name__ == "__main__":
    sys.exit(main())
