"""Batches of labeled images from prepared shards.

A training example (its image, crop and flip) is a function of (seed, example id) alone, so any host
can compute any step without the steps before it. Only mixup depends on the batch, too. Each host
opens the TFRecord files that hold its images by itself.
"""

import functools

import numpy as np
import tensorflow as tf

from inputs.bad_records import BadRecords
from inputs.damage import Damage
from inputs.errors import InputError
from inputs.images import decoding
from inputs.images.shards import OWN_LAYOUT, open_images
from inputs.order import Order, by_block, number_of_lanes, row_batches
from inputs.shards import records_from

# Records that lie together are read about the same time, so that a file system that reads large
# parts has what is needed next; and their places are read together.
BLOCK = 16
WINDOW_BLOCKS = 64  # whose images are mixed
GROUP = 16  # images that are read one after the other; groups are read in parallel
FIELDS = 7  # of a row: number, weight, file, and the two halves of the offset and of the id
# Of image files, in evaluation: see `decode_centre`. tf-models' CENTER_CROP_FRACTION.
CENTRE_SHARE = 0.875
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
        bad_records: counts damaged records, and those with a label outside the class list. Such a
            record is replaced by another image of its batch, with weight 0. If None, the first one
            raises an error.
        lanes: see `inputs.text.examples.Examples`.
        damage_folder: see `inputs.damage.Damage`.

    Attributes:
        damage: the `Damage` found so far.
        manifest: the manifest of the folder.
        num_examples: number of images.
        centre_share: the `share` of `decoding.decode_centre`; 1 for raw pixels.

    Raises:
        InputError: the folder is not prepared, or its images are raw pixels of another size.
    """

    def __init__(
        self,
        folder,
        image_size,
        *,
        seed,
        augmentation="crop",
        mixup_alpha=0.0,
        bad_records=None,
        lanes=None,
        damage_folder="",
    ):
        found = open_images(folder)
        self.manifest = found.manifest
        self._paths = found.paths
        self._index = found.index
        self._lanes = lanes
        self.num_examples = len(found.index)
        bad_records = bad_records or BadRecords(0.0, skip=False, log=print)
        self.damage = Damage(bad_records, self.num_examples, damage_folder)
        layout = self.manifest.get("layout", OWN_LAYOUT)
        self._image = layout["image"]
        self._label = layout["label"]
        self._label_base = layout["label_base"]
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
        self._is_pixels = bool(pixels)
        self.centre_share = 1.0 if pixels else CENTRE_SHARE

    def order(self, global_batch_size) -> Order:
        """The order of the training examples."""
        return self._order(global_batch_size, self.num_examples, self._seed)

    def training_batches(self, global_batch_size, context=None, first_step=0) -> tf.data.Dataset:
        """Infinite data set of this host's batches: one per step for each of its replicas.

        Args:
            global_batch_size: examples per step over all replicas.
            context: `tf.distribute.InputContext` of this host; None means a single replica.
            first_step: the step to begin with; the steps before it are not read.
        """
        order = self.order(global_batch_size)
        training = self._augmentation != "none"
        return self._batches(order, context, first_step, training)

    def evaluation_batches(self, global_batch_size, limit, context=None) -> tf.data.Dataset:
        """The center of each of at most `limit` evenly spaced images, once.

        Images usually lie in the order of their classes, so that the first ones would be of few
        classes. The last batch is filled up with examples of weight 0.

        Args:
            global_batch_size: examples per step over all replicas.
            limit: maximum number of examples.
            context: as in `training_batches`.
        """
        order = self._order(global_batch_size, min(limit, self.num_examples), None)
        return self._batches(order, context, 0, training=False)

    def files_read(self, global_batch_size, context, steps) -> set[str]:
        """The TFRecord files of the images of a host's first training steps.

        Args:
            global_batch_size: examples per step over all replicas.
            context: `tf.distribute.InputContext` of the host.
            steps: the number of steps.
        """
        order = self.order(global_batch_size)
        rows = row_batches(order, context, 0, functools.partial(self._rows, order))
        replicas = context.num_replicas_in_sync // context.num_input_pipelines
        found = rows.take(steps * replicas).as_numpy_iterator()
        return {self._paths[file] for batch in found for file in np.unique(batch[:, 2])}

    def _order(self, batch, examples, seed):
        lanes = self._lanes or number_of_lanes(batch, examples)
        return Order(examples, batch, lanes, BLOCK, WINDOW_BLOCKS, seed)

    def files(self, count: int):
        """Yields (bytes of an image file, label) of at most `count` evenly spaced images.

        An image whose record is damaged, or has no label of the class list, is left out.
        """
        count = min(count, self.num_examples)
        chosen = (self._spaced(i, count) for i in range(count))
        places = [
            (self._paths[file], offset)
            for ((file, offset),) in self._index.slices([(i, i + 1) for i in chosen])
        ]
        if not places:
            return
        paths, offsets = zip(*places, strict=True)

        def image_file(path, offset):
            # Not `flat_map`, which never moves on from a file that cannot be opened.
            data, label = self._parsed(records_from(path, offset).take(1).get_single_element())
            if self._is_pixels:
                pixels = tf.reshape(tf.io.decode_raw(data, tf.uint8), self.manifest["pixels"])
                data = tf.io.encode_png(pixels)
            return data, label

        found = tf.data.Dataset.from_tensor_slices((list(paths), np.array(offsets, np.int64)))
        for data, label in found.map(image_file).ignore_errors().as_numpy_iterator():
            if self._is_class(label):
                yield data, int(label)

    def _spaced(self, number, count):
        """Which image is number `number` of `count` evenly spaced ones; all, if `count` is all."""
        return number * self.num_examples // count

    @property
    def _features(self):
        return {
            self._image: tf.io.FixedLenFeature([], tf.string),  # an image file, or raw pixels
            self._label: tf.io.FixedLenFeature([], tf.int64),
        }

    def _batches(self, order, context, first_step, training):
        rows = row_batches(order, context, first_step, functools.partial(self._rows, order))
        batch_size = rows.element_spec.shape[0]
        group = tf.autograph.experimental.do_not_convert(functools.partial(self._group, training))
        finish = tf.autograph.experimental.do_not_convert(
            functools.partial(self._finished, training)
        )
        images = rows.rebatch(GROUP).map(group, tf.data.AUTOTUNE)
        return images.rebatch(batch_size, drop_remainder=True).map(finish).prefetch(2)

    def _rows(self, order, examples, ids):
        """Where the record of each example is, see `FIELDS`."""
        last = order.examples - 1

        def block_rows(block, examples, ids):
            places, readable = self._index.read_block(BLOCK, block, examples, self.damage)
            file, offset = tf.unstack(places, axis=1)
            head = [examples, tf.cast(readable, tf.int64), file]
            return tf.concat(
                [
                    tf.cast(tf.stack(head, 1), tf.int32),
                    tf.bitcast(offset, tf.int32),
                    tf.bitcast(ids, tf.int32),
                ],
                axis=1,
            )

        chosen = self._spaced(tf.minimum(examples, last), order.examples)
        rows = by_block(BLOCK, chosen, ids, block_rows, FIELDS)
        counts = tf.cast(examples <= last, tf.int32)[:, tf.newaxis]
        return tf.concat([rows[:, :1], rows[:, 1:2] * counts, rows[:, 2:]], 1)

    def _group(self, training, rows):
        """Reads and decodes some images; one that is damaged, or of no class, has weight 0."""
        count = tf.shape(rows)[0]
        ids = tf.bitcast(rows[:, 5:7], tf.int64)
        places = tf.range(count)
        read = functools.partial(self._read, training)
        found = self._each({"place": places, "row": rows}, read)
        found["id"] = tf.gather(ids, found["place"])
        if training and not self._is_pixels:
            draws = decoding.window_draws(seed=self._seed, ids=ids)
            flips = decoding.random_flips(seed=self._seed, ids=ids)
            found["window"] = decoding.random_windows(
                found.pop("height"), found.pop("width"), tf.gather(draws, found["place"])
            )
            found["flip"] = tf.gather(flips, found["place"])
        found = self._each(found, functools.partial(self._decode, training))
        places = found["place"]
        images = found["image"]
        labels = found["label"]
        is_class = self._is_class(labels)

        def with_gaps():
            at = places[:, tf.newaxis]
            whole = tf.scatter_nd(at, tf.ones_like(places), [count]) > 0
            usable = tf.scatter_nd(at, tf.cast(is_class, tf.int32), [count]) > 0
            damaged = self._report(tf.boolean_mask(rows, ~whole))
            others = tf.boolean_mask(places, ~is_class)
            others = self._report(tf.gather(rows, others), tf.boolean_mask(labels, ~is_class))
            with tf.control_dependencies([damaged, others]):
                return (
                    tf.scatter_nd(at, images, [count, *images.shape[1:]]),
                    tf.scatter_nd(at, tf.where(is_class, labels, 0), [count]),
                    tf.identity(usable),
                )

        def complete():
            return images, labels, tf.ones([count], tf.bool)

        usable_count = tf.reduce_sum(tf.cast(is_class, tf.int32))
        images, labels, readable = tf.cond(usable_count < count, with_gaps, complete)
        return {
            "id": ids,
            "image": tf.ensure_shape(images, [None, self._size, self._size, 3]),
            "label": labels,
            "example_weights": tf.cast(rows[:, 1], tf.float32) * tf.cast(readable, tf.float32),
            "readable": readable,
        }

    def _each(self, inputs, function):
        """The results of a function for each of the inputs, without those that fail.

        An error inside a data set ends only the element that it occurs in, so this is a data set of
        its own. Starting it takes a fifth of the time of decoding an image, so one serves a whole
        group.

        Args:
            inputs: dictionary of tensors of the same first dimension, `GROUP` at most.
            function: from a slice of `inputs` to a dictionary of tensors of static shapes.
        """
        function = tf.autograph.experimental.do_not_convert(function)
        found = tf.data.Dataset.from_tensor_slices(inputs).map(function).ignore_errors()
        none = {key: tf.zeros([0, *s.shape], s.dtype) for key, s in found.element_spec.items()}
        found = found.batch(GROUP).concatenate(tf.data.Dataset.from_tensors(none))
        return found.take(1).get_single_element()

    def _read(self, training, inputs):
        """Reads the record of an image: its place, data and label, and its size for a crop."""
        path, offset = self._place_of(inputs["row"])
        data, label = self._parsed(records_from(path, offset).take(1).get_single_element())
        found = {"place": inputs["place"], "data": data, "label": label}
        if training and not self._is_pixels:
            found["height"], found["width"] = decoding.image_size(data)
        return found

    def _decode(self, training, inputs):
        """Decodes one image: its place, [S, S, 3] uint8, and its label."""
        data = inputs["data"]
        if self._is_pixels:  # they are augmented by the batch
            image = tf.reshape(tf.io.decode_raw(data, tf.uint8), [self._size, self._size, 3])
        elif training:
            image = decoding.decode_window(data, inputs["window"], self._size)
            # A slice with a step of -1 takes ten times as long, more than the decoding.
            image = tf.cond(inputs["flip"], lambda: tf.reverse(image, [1]), lambda: image)
            if self._augmentation == "randaugment":
                image = self._augmented((image, inputs["id"]))
        else:
            image = decoding.decode_centre(data, self._size, self.centre_share)
        return {"place": inputs["place"], "image": image, "label": inputs["label"]}

    def _place_of(self, row):
        """The path and the offset of an image's record."""
        return tf.gather(tf.constant(self._paths), row[2]), tf.bitcast(row[3:5], tf.int64)

    def _report(self, rows, labels=None):
        """Reports the images of `rows`: as damaged, or as having `labels` of no class."""

        def report(row_and_label):
            row, *label = row_and_label
            lost = tf.cast(row[0], tf.int64), tf.constant(1, tf.int64)
            told = self.damage.report(*self._place_of(row), *lost, *map(self._reason, label))
            with tf.control_dependencies([told]):
                return tf.constant(0)

        given = (rows,) if labels is None else (rows, labels)
        return tf.map_fn(report, given, fn_output_signature=tf.int32)

    def _reason(self, label):
        base = self._label_base
        last = base + len(self.manifest["classes"]) - 1
        return tf.strings.format(
            f"label {{}} is outside the labels {base} to {last} of the class list. Give "
            "--label_base or --classes to `python -m inputs.images.index`.",
            [label + base],
        )

    def _is_class(self, labels):
        return (labels >= 0) & (labels < len(self.manifest["classes"]))

    def _parsed(self, record):
        features = tf.io.parse_single_example(record, self._features)
        return features[self._image], tf.cast(features[self._label], tf.int32) - self._label_base

    def _augmented(self, image_and_id):
        image, example_id = image_and_id
        return decoding.rand_augment(image, seed=self._seed, example_id=example_id)

    def _finished(self, training, batch):
        """Augments raw pixels, replaces what could not be read, and adds the mixup weights."""
        ids = batch["id"]
        images = batch["image"]
        readable = batch.pop("readable")
        if training and self._is_pixels:
            images = decoding.random_shifts(images, seed=self._seed, ids=ids)
            flip = decoding.random_flips(seed=self._seed, ids=ids)
            images = tf.where(flip[:, None, None, None], tf.reverse(images, [2]), images)
            if self._augmentation == "randaugment":
                images = tf.map_fn(self._augmented, (images, ids), tf.uint8)
        # Batch statistics must not see black images.
        substitute = tf.where(
            readable, tf.range(tf.size(readable)), tf.argmax(readable, output_type=tf.int32)
        )
        images = tf.cond(
            tf.reduce_all(readable), lambda: images, lambda: tf.gather(images, substitute)
        )
        # With the image comes its label, which mixup gives to another example.
        labels = tf.gather(batch["label"], substitute)
        return self._with_mixup(training, batch | {"image": images, "label": labels})

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
