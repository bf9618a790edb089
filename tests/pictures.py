"""Synthetic images and data sets for the tests that read images."""

import io
import json
import pathlib

import numpy as np
import PIL.Image
import tensorflow as tf

from inputs.images import prepare as prepare_images
from inputs.images.shards import open_images
from inputs.shards import read_records

NAMES = ("cat", "dog", "owl")


def smooth(height, width, seed=0):
    """[height, width, 3] uint8 of a few slow waves, which JPEG hardly changes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(y * rng.uniform(0.01, 0.05) + rng.uniform(0, 6))
        + np.cos(x * rng.uniform(0.01, 0.05) + rng.uniform(0, 6))
        for _ in range(3)
    ]
    return np.clip(np.stack(waves, -1) * 50 + 128, 0, 255).astype(np.uint8)


def encoded(pixels, kind="JPEG", mode="RGB"):
    """The bytes of an image file."""
    file = io.BytesIO()
    options = {"quality": 95} if kind == "JPEG" else {}
    PIL.Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def class_folders(folder, per_class=4, names=NAMES, size=(60, 80)):
    """FOLDER/cat/0.jpg and so on; returns the folder."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            (folder / name / f"{i}.jpg").write_bytes(encoded(smooth(*size, seed=label * 100 + i)))
    return folder


def prepare(*arguments):
    """Runs the command in this process; returns its exit status."""
    return prepare_images.main([str(argument) for argument in arguments])


def prepared(folder, **arguments):
    """Prepares the same class folders as train and validation; returns the folder of shards."""
    source = class_folders(folder / "source", **arguments)
    for split in ("train", "validation"):
        status = prepare("--source", source, "--output", folder / "out", "--split", split)
        assert status == 0
    return folder / "out"


def manifest(folder):
    """The manifest of a prepared folder."""
    return json.loads((folder / "manifest.json").read_text())


def records(folder):
    """[(shard, offset, record)] of all records of a prepared folder."""
    return [
        (path, *found) for path in open_images(str(folder)).paths for found in read_records(path)
    ]


def stored(folder):
    """[(bytes, label)] of all records of a prepared folder."""
    rows = []
    for *_, record in records(folder):
        features = tf.train.Example.FromString(record).features.feature
        rows.append((features["image"].bytes_list.value[0], features["label"].int64_list.value[0]))
    return rows


def damage(folder, number):
    """Changes a byte in the middle of a record; returns the shard and where the record begins."""
    path, offset, record = records(folder)[number]
    shard = pathlib.Path(path)
    content = bytearray(shard.read_bytes())
    content[content.index(record) + len(record) // 2] ^= 1
    shard.write_bytes(content)
    return shard, offset


def example(**features):
    """A serialized tf.train.Example; `a__b` names the feature a/b."""
    values = {}
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        else:
            feature = tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        values[name.replace("__", "/")] = feature
    return tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString()
