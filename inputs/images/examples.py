"""Batches of labelled images from prepared shards.

A training example (its image, crop and flip) is a function of (seed, example id) alone, so any host
can compute any step without the steps before it. Only mixup depends on the batch, too.
"""

import numpy as np
import tensorflow as tf

from inputs.bad_records import BadRecords
from inputs.batching import host_batches, shuffled
from inputs.errors import InputError
from inputs.images import decoding
from inputs.images.shards import ShardReader
from inputs.shards import IMAGES

FEATURES = {
    "image": tf.io.FixedLenFeature([], tf.string),  # an image file, or raw uint8 pixels
    "label": tf.io.FixedLenFeature([], tf.int64),  # from 0
    "height": tf.io.FixedLenFeature([], tf.int64),
    "width": tf.io.FixedLenFeature([], tf.int64),
}
CENTRE_PADDING = 32  # of image files, in evaluation; see `decode_centre`
AUGMENTATIONS = ("none", "crop", "randaugment")


def element_spec(batch_size: int, image_size: int):
    """The shapes and dtypes of a batch, as a dictionary of `tf.TensorSpec`.

    `mixup` is the weight of an example's own image when it is mixed with another one, else 1.

    Args:
        batch_size: B, examples per batch.
        image_size: S, pixels of each side.
    """
    return {
        "image": tf.TensorSpec([batch_size, image_size, image_size, 3], tf.uint8),
        "label": tf.TensorSpec([batch_size], tf.int32),
        "mixup": tf.TensorSpec([batch_size], tf.float32),
        "example_weights": tf.TensorSpec([batch_size], tf.float32),
    }


class Images:
    """One split of a prepared data set at one image size.

    Args:
        folder: with the shards and their manifest.
        image_size: S, pixels of each side.
        seed: int, decides the order, the crops and the flips.
        augmentation: one of `AUGMENTATIONS`: "crop" for random crops and flips (raw pixels are
            shifted by up to 4 pixels instead of cropped), "randaugment" for two random operations
            in addition, "none" for images as in evaluation.
        mixup_alpha: parameter of the Beta distribution of mixup weights; 0 turns mixup off.
        bad_records: counts damaged records. A damaged record is replaced by the next one, with
            weight 0. If None, the first damaged record raises an error.

    Attributes:
        bad_records: as given.
        manifest: the manifest of the folder.
        num_examples: number of images.
        padding: see `decoding.decode_centre`.

    Raises:
        InputError: the folder is not prepared, or its images are raw pixels of another size.
    """

    def __init__(
        self, folder, image_size, *, seed, augmentation="crop", mixup_alpha=0.0, bad_records=None
    ):
        self.bad_records = bad_records or BadRecords(0.0, skip=False, log=print)
        self._reader = ShardReader(folder, IMAGES[1], self.bad_records)
        self.manifest = self._reader.manifest
        self.num_examples = self._reader.count
        self._size = image_size
        self._seed = seed
        self._augmentation = augmentation
        self._mixup_alpha = mixup_alpha
        pixels = self.manifest["pixels"]
        if pixels and pixels != [image_size, image_size, 3]:
            raise InputError(
                f"--set image_size={image_size}: {folder} holds images of "
                f"{'x'.join(map(str, pixels))} raw pixels. Use --set image_size={pixels[0]}."
            )
        self.padding = centre_padding(self.manifest)
        self._is_pixels = bool(pixels)

    def training_batches(self, global_batch_size, context=None, first_step=0) -> tf.data.Dataset:
        """Infinite data set of this host's batches: one per step for each of its replicas.

        Args:
            global_batch_size: examples per step over all replicas.
            context: `tf.distribute.InputContext` of this host; None means a single replica.
            first_step: the step to begin with; the steps before it are not read.
        """
        local, ids_of = host_batches(global_batch_size, context)

        def selection(k):
            ids = ids_of(k)
            return ids, shuffled(ids, self.num_examples, self._seed), tf.ones_like(ids)

        indices = tf.data.Dataset.range(first_step * local, np.iinfo(np.int64).max)
        training = self._augmentation != "none"
        return self._batches(indices.map(selection), ids_of(0).shape[0], training)

    def evaluation_batches(self, global_batch_size, limit, context=None) -> tf.data.Dataset:
        """The centre of each of the first `limit` images, once.

        The last batch is filled up with examples of weight 0.

        Args:
            global_batch_size: examples per step over all replicas.
            limit: maximum number of examples.
            context: as in `training_batches`.
        """
        local, ids_of = host_batches(global_batch_size, context)
        total = min(limit, self.num_examples)

        def selection(k):
            ids = ids_of(k)
            return ids, tf.minimum(ids, total - 1), tf.cast(ids < total, tf.int64)

        indices = tf.data.Dataset.range(-(-total // global_batch_size) * local)
        return self._batches(indices.map(selection), ids_of(0).shape[0], training=False)

    def files(self, count: int):
        """Yields (bytes of an image file, label) of at most `count` evenly spaced images."""
        chosen = range(0, self.num_examples, max(1, self.num_examples // count))
        for record in self._reader.read(chosen[:count])[0]:
            features = tf.io.parse_single_example(record, FEATURES)
            data = features["image"]
            if self._is_pixels:
                pixels = tf.reshape(tf.io.decode_raw(data, tf.uint8), self.manifest["pixels"])
                data = tf.io.encode_png(pixels)
            yield data.numpy(), int(features["label"])

    def _batches(self, selections, batch_size, training):
        """Makes batches of (example ids, record indices, weights), each [B] int64."""
        read = selections.map(self._read, num_parallel_calls=2)
        if self._is_pixels:
            batches = read.map(lambda *columns: self._pixels(training, *columns), tf.data.AUTOTUNE)
        else:
            batches = (
                read.map(lambda *columns: self._windows(training, *columns))
                .unbatch()
                .map(lambda row: self._decoded(training, row), tf.data.AUTOTUNE)
                .batch(batch_size, drop_remainder=True)
            )
        return batches.map(lambda batch: self._with_mixup(training, batch)).prefetch(2)

    def _read(self, ids, indices, weight):
        # ArrayRecord has no TensorFlow op. One Python call per batch is cheap beside decoding.
        types = [tf.string, tf.bool]
        records, is_own = tf.numpy_function(self._reader.read, [indices], types, stateful=False)
        records, is_own = (tf.ensure_shape(part, ids.shape) for part in (records, is_own))
        weight *= tf.cast(is_own, weight.dtype)
        return ids, weight, tf.io.parse_example(records, FEATURES)

    def _labels(self, ids, weight, features):
        return {
            "id": ids,
            "label": tf.cast(features["label"], tf.int32),
            "example_weights": tf.cast(weight, tf.float32),
        }

    def _pixels(self, training, ids, weight, features):
        """A batch of raw pixels."""
        shape = [ids.shape[0], self._size, self._size, 3]
        images = tf.reshape(tf.io.decode_raw(features["image"], tf.uint8), shape)
        if training:
            images = decoding.random_shifts(images, seed=self._seed, ids=ids)
            flip = decoding.random_flips(seed=self._seed, ids=ids)
            images = tf.where(flip[:, None, None, None], tf.reverse(images, [2]), images)
            if self._augmentation == "randaugment":
                images = tf.map_fn(self._augmented, (images, ids), tf.uint8)
        return self._labels(ids, weight, features) | {"image": images}

    def _windows(self, training, ids, weight, features):
        """A batch of image files, each with its random window and flip."""
        rows = self._labels(ids, weight, features) | {"data": features["image"]}
        if training:
            size = features["height"], features["width"]
            rows["window"] = decoding.random_windows(*size, seed=self._seed, ids=ids)
            rows["flip"] = decoding.random_flips(seed=self._seed, ids=ids)
        return rows

    def _decoded(self, training, row):
        """One example of `_windows`, with its image decoded."""
        data = row.pop("data")
        if not training:
            return row | {"image": decoding.decode_centre(data, self._size, self.padding)}
        image = decoding.decode_window(data, row.pop("window"), self._size)
        # A slice with a step of -1 takes ten times as long, more than the decoding.
        image = tf.cond(row.pop("flip"), lambda: tf.reverse(image, [1]), lambda: image)
        if self._augmentation == "randaugment":
            image = self._augmented((image, row["id"]))
        return row | {"image": image}

    def _augmented(self, image_and_id):
        image, example_id = image_and_id
        return decoding.rand_augment(image, seed=self._seed, example_id=example_id)

    def _with_mixup(self, training, batch):
        ids = batch.pop("id")
        weights = tf.ones(ids.shape, tf.float32)
        if training and self._mixup_alpha:
            # Beta(a, a) as a ratio of gamma variates. They are seeded with the first id of the
            # batch, because the image that an example is mixed with depends on the batch anyway.
            seed = tf.stack([np.int64(self._seed), ids[0]])
            alpha = tf.constant(self._mixup_alpha, tf.float32)
            gammas = tf.random.stateless_gamma([2, *ids.shape], seed, alpha)
            weights = (gammas[0] + 1e-6) / (gammas[0] + gammas[1] + 2e-6)
        return batch | {"mixup": weights}


def centre_padding(manifest) -> int:
    """The `padding` of `decode_centre` for a data set: 0 for raw pixels."""
    return 0 if manifest["pixels"] else CENTRE_PADDING
