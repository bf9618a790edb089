"""MNIST and CIFAR-10 as arrays, and shuffled, cropped batches of them."""

import gzip
import math
import os
import zlib

import keras
import numpy as np

from inputs.errors import InputError
from inputs.images.cifar import cifar_source

MNIST_FILES = {"train": "train", "validation": "t10k"}
# Mean and standard deviation of each channel of CIFAR-10's training images, as in
# github.com/fastalgo/davidnet-cifar.
CIFAR_MEAN = (125.30691805, 122.95039414, 113.86538318)
CIFAR_STDDEV = (62.99321928, 62.08870764, 66.70489964)
CROP_PADDING = 4
FOUR_FILES = "Give the folder with MNIST's four files, as they were published."


def load(name: str, data_dir: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a data set: images, float32 (count, height, width, channels); labels, int32 (count,).

    Args:
        name: "mnist", with pixels in [0, 1], or "cifar10", with each channel normalized to mean 0
            and standard deviation 1.
        data_dir: the folder with MNIST's four published files, gzipped or not; or CIFAR-10, in any
            layout that `python -m inputs.images.prepare --source` accepts.
        split: "train" or "validation"; the latter is the published test set.

    Raises:
        InputError: a file is missing or damaged.
    """
    if name == "mnist":
        stem = os.path.join(data_dir, MNIST_FILES[split])
        images = _read_idx(f"{stem}-images-idx3-ubyte", (28, 28))
        labels = _read_idx(f"{stem}-labels-idx1-ubyte", ())
        if len(images) != len(labels):
            raise InputError(
                f"--data_dir: {stem}-images-idx3-ubyte has {len(images)} images, and "
                f"{stem}-labels-idx1-ubyte has {len(labels)} labels. {FOUR_FILES}"
            )
        if len(labels) and labels.max() > 9:
            raise InputError(
                f"--data_dir: {stem}-labels-idx1-ubyte has the label {labels.max()}, which is "
                f"outside the labels 0 to 9. {FOUR_FILES}"
            )
        return images[..., None].astype(np.float32) / 255, labels.astype(np.int32)
    parts = cifar_source(data_dir, split, "--data_dir").parts
    items = [item for part in parts for item in part.read()]
    images = np.frombuffer(b"".join(item.data for item in items), np.uint8)
    images = images.reshape(-1, 32, 32, 3).astype(np.float32)
    images = (images - np.float32(CIFAR_MEAN)) / np.float32(CIFAR_STDDEV)
    return images, np.array([item.label for item in items], np.int32)


def _read_idx(path, shape):
    """Reads a file of unsigned bytes in the format IDX: (count, *shape)."""
    path = path if os.path.exists(path) else f"{path}.gz"
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--data_dir: {path} cannot be read ({reason}). {FOUR_FILES}") from None
    # Big-endian: 2,048 for unsigned bytes, plus the number of dimensions; then the dimensions.
    size = 4 * (2 + len(shape))
    header = content[:size].ljust(size, b"\0")
    magic, *found = np.frombuffer(header, ">u4").tolist()
    if magic != 2_049 + len(shape) or tuple(found[1:]) != shape:
        kind = "images of 28x28 pixels" if shape else "labels"
        raise InputError(f"--data_dir: {path} is no IDX file of {kind}. {FOUR_FILES}")
    if len(content) != size + math.prod(found):
        raise InputError(
            f"--data_dir: {path} has {len(content):,} bytes, and by its header it should have "
            f"{size + math.prod(found):,}. {FOUR_FILES}"
        )
    return np.frombuffer(content, np.uint8, offset=size).reshape(found)


class Batches(keras.utils.PyDataset):
    """Batches of images and labels for a range of steps of a run.

    The training set is shuffled in every epoch. A batch at the end of an epoch is completed with
    images of the next epoch, so that all batches have the same size and each epoch contains each
    image once.

    Args:
        images: float32 (count, height, width, channels).
        labels: int32 (count,).
        batch: the batch size.
        steps: (first step, last step + 1).
        seed: the seed of the order, the crops and the flips.
        crop: whether to pad each image by reflection with four pixels and crop it at random to its
            size, and to flip it left to right with probability 1/2.
    """

    def __init__(self, images, labels, batch, steps, seed, crop=False):
        super().__init__()
        self._images = images
        self._labels = labels
        self._batch = batch
        self._seed = seed
        self._crop = crop
        self._first, self._end = steps
        self._epoch = None
        self._order = None

    def __len__(self):
        return self._end - self._first

    def __getitem__(self, index):
        start = (self._first + index) * self._batch
        places = np.arange(start, start + self._batch)
        epochs, places = np.divmod(places, len(self._images))
        chosen = np.concatenate(
            [self._permutation(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        images = self._images[chosen]
        if self._crop:
            images = _cropped(images, np.random.default_rng((self._seed, 1, start)))
        return images, self._labels[chosen]

    def _permutation(self, epoch):
        if epoch != self._epoch:
            generator = np.random.default_rng((self._seed, 0, int(epoch)))
            self._epoch = epoch
            self._order = generator.permutation(len(self._images))
        return self._order


def _cropped(images, generator):
    count, height, width, _ = images.shape
    border = ((0, 0), (CROP_PADDING, CROP_PADDING), (CROP_PADDING, CROP_PADDING), (0, 0))
    padded = np.pad(images, border, mode="reflect")
    corners = generator.integers(0, 2 * CROP_PADDING + 1, (2, count, 1))
    rows = corners[0] + np.arange(height)
    columns = corners[1] + np.arange(width)
    mirrored = generator.random(count) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    every = np.arange(count)[:, None, None]
    return padded[every, rows[:, :, None], columns[:, None, :]]
