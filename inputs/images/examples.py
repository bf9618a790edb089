"""Batches of labelled images from prepared shards.

A training example is a function of (seed, its number) and of nothing else: its image, its crop
and its flip. Any step can be made without the ones before it, by any host, and comes out the same.
"""

import numpy as np
import tensorflow as tf

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.images import decoding, rand_augment
from inputs.images.shards import ShardReader
from inputs.order import share, shuffled

KIND = "images"
FEATURES = {
    "image": tf.io.FixedLenFeature([], tf.string),  # an image file, or raw uint8 pixels
    "label": tf.io.FixedLenFeature([], tf.int64),  # from 0
    "height": tf.io.FixedLenFeature([], tf.int64),
    "width": tf.io.FixedLenFeature([], tf.int64),
}
CENTRE_PADDING = 32  # of photographs, in evaluation
AUGMENTATIONS = ("none", "crop", "randaugment")


def element_spec(batch_size: int, image_size: int):
    """What every image pipeline yields; synthetic data is made from it.

    `mixup` is the share of an example's own image where it is mixed with another one's.
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
        image_size: pixels each way.
        seed: int; another seed gives another order and other crops.
        augmentation: "crop" for random crops and flips (images of few pixels are shifted by up
            to 4 instead of cropped), "randaugment" for two random operations more, or "none" for
            what an evaluation sees.
        mixup_alpha: of the Beta distribution of the mixing weights; 0 mixes nothing.
        bad_records: as `ShardReader`'s; None: the first damaged one is an error. In place of a
            damaged record the next one is read, with weight 0.

    Raises:
        InputError: the folder is not prepared, or its pixels have another size.
    """

    def __init__(
        self, folder, image_size, *, seed, augmentation="crop", mixup_alpha=0.0, bad_records=None
    ):
        self.bad_records = bad_records or BadRecords(0.0, skip=False, say=print)
        self._reader = ShardReader(folder, KIND, self.bad_records)
        self.manifest, self.number = self._reader.manifest, self._reader.count
        self._size, self._seed = image_size, seed
        self._augmentation, self._mixup_alpha = augmentation, mixup_alpha
        pixels = self.manifest["pixels"]
        if pixels and pixels != [image_size, image_size, 3]:
            raise InputError(
                f"--set image_size={image_size}: {folder} holds pixels of "
                f"{'x'.join(map(str, pixels))}. Set image_size={pixels[0]}."
            )
        self.padding = centre_padding(self.manifest)
        self._is_pixels = bool(pixels)

    def training_batches(self, global_batch_size, context=None, first_step=0) -> tf.data.Dataset:
        """Endless batches, one per local replica and step, of the global batch's share.

        Args:
            global_batch_size: examples per step over all replicas.
            context: `tf.distribute.InputContext` of this host; None means one replica.
            first_step: the step to begin with; nothing before it is read.
        """
        local, numbers_of = share(global_batch_size, context)

        def numbered(k):
            number = numbers_of(k)
            return number, shuffled(number, self.number, self._seed), tf.ones_like(number)

        batches = tf.data.Dataset.range(first_step * local, np.iinfo(np.int64).max)
        training = self._augmentation != "none"
        return self._batches(batches.map(numbered), numbers_of(0).shape[0], training)

    def evaluation_batches(self, global_batch_size, limit, context=None) -> tf.data.Dataset:
        """Each of the first `limit` images once, its centre.

        The last batch is filled up with examples of weight 0.
        """
        local, numbers_of = share(global_batch_size, context)
        total = min(limit, self.number)

        def numbered(k):
            number = numbers_of(k)
            return number, tf.minimum(number, total - 1), tf.cast(number < total, tf.int64)

        batches = tf.data.Dataset.range(-(-total // global_batch_size) * local)
        return self._batches(batches.map(numbered), numbers_of(0).shape[0], training=False)

    def files(self, count: int):
        """Yields (bytes of an image file, label) of some images, evenly chosen."""
        chosen = range(0, self.number, max(1, self.number // count))
        for record in self._reader.read(chosen[:count])[0]:
            features = tf.io.parse_single_example(record, FEATURES)
            data = features["image"]
            if self._is_pixels:
                pixels = tf.reshape(tf.io.decode_raw(data, tf.uint8), self.manifest["pixels"])
                data = tf.io.encode_png(pixels)
            yield data.numpy(), int(features["label"])

    def _batches(self, numbered, batch_size, training):
        read = numbered.map(self._read, num_parallel_calls=2)
        if self._is_pixels:
            batches = read.map(lambda *columns: self._pixels(training, *columns), tf.data.AUTOTUNE)
        else:
            batches = (
                read.map(lambda *columns: self._windows(training, *columns))
                .unbatch()
                .map(lambda row: self._decoded(training, row), tf.data.AUTOTUNE)
                .batch(batch_size, drop_remainder=True)
            )
        return batches.map(lambda batch: self._mixed(training, batch)).prefetch(2)

    def _read(self, number, which, weight):
        # ArrayRecord has no TensorFlow op; one call a batch costs little beside decoding.
        types = [tf.string, tf.bool]
        records, whole = tf.numpy_function(self._reader.read, [which], types, stateful=False)
        records, whole = (tf.ensure_shape(part, number.shape) for part in (records, whole))
        weight *= tf.cast(whole, weight.dtype)
        return number, weight, tf.io.parse_example(records, FEATURES)

    def _labelled(self, number, weight, features):
        return {
            "number": number,
            "label": tf.cast(features["label"], tf.int32),
            "example_weights": tf.cast(weight, tf.float32),
        }

    def _pixels(self, training, number, weight, features):
        shape = [number.shape[0], self._size, self._size, 3]
        images = tf.reshape(tf.io.decode_raw(features["image"], tf.uint8), shape)
        if training:
            images = decoding.random_shifts(images, seed=self._seed, number=number)
            turned = decoding.flips(seed=self._seed, number=number)
            images = tf.where(turned[:, None, None, None], tf.reverse(images, [2]), images)
            if self._augmentation == "randaugment":
                images = tf.map_fn(self._distorted, (images, number), tf.uint8)
        return self._labelled(number, weight, features) | {"image": images}

    def _windows(self, training, number, weight, features):
        rows = self._labelled(number, weight, features) | {"data": features["image"]}
        if training:
            size = features["height"], features["width"]
            rows["window"] = decoding.random_windows(*size, seed=self._seed, number=number)
            rows["flip"] = decoding.flips(seed=self._seed, number=number)
        return rows

    def _decoded(self, training, row):
        data = row.pop("data")
        if not training:
            return row | {"image": decoding.decode_centre(data, self._size, self.padding)}
        image = decoding.decode_window(data, row.pop("window"), self._size)
        # A slice with a step of -1 takes ten times as long, more than the decoding.
        image = tf.cond(row.pop("flip"), lambda: tf.reverse(image, [1]), lambda: image)
        if self._augmentation == "randaugment":
            image = self._distorted((image, row["number"]))
        return row | {"image": image}

    def _distorted(self, image_and_number):
        image, number = image_and_number
        return rand_augment.distort(image, seed=self._seed, number=number)

    def _mixed(self, training, batch):
        number = batch.pop("number")
        own = tf.ones(number.shape, tf.float32)
        if training and self._mixup_alpha:
            # Beta(a, a) as a share of two gammas; the batch's first number stands for them all,
            # for who is mixed with whom depends on the batch anyhow.
            seed = tf.stack([np.int64(self._seed), number[0]])
            alpha = tf.constant(self._mixup_alpha, tf.float32)
            gammas = tf.random.stateless_gamma([2, *number.shape], seed, alpha)
            own = (gammas[0] + 1e-6) / (gammas[0] + gammas[1] + 2e-6)
        return batch | {"mixup": own}


def centre_padding(manifest) -> int:
    """What `decode_centre` is to leave out of a data set's images: nothing of raw pixels."""
    return 0 if manifest["pixels"] else CENTRE_PADDING
