"""A SavedModel that takes the bytes of image files: decoding and scaling are in the graph."""

import functools

import tensorflow as tf
import tf_keras

from export.saved_model import Export
from inputs.images.decoding import decode_centre

TOP_K = 5
NO_IMAGE = "no JPEG, PNG, BMP or GIF that can be decoded"


class ImageClassifier(tf.Module):
    """Names what is in images.

    Args:
        model: from `models.resnet.build_classifier`.
        classes: (wnid, name) of each class, in the order of the labels.
        image_size: pixels each way, S.
        padding: as `decode_centre` takes it.
    """

    def __init__(self, model: tf_keras.Model, classes, image_size: int, padding: int):
        super().__init__()
        self._size, self._padding = image_size, padding
        # Only the weights are saved; a tracked model would bring all its layers' own functions.
        self.weights, self._logits = model.variables, functools.partial(model, training=False)
        self.wnids, self.names = (
            tf.Variable(column, trainable=False, name=name)
            for column, name in zip(zip(*classes, strict=True), ("wnids", "names"), strict=True)
        )
        self.classify_files = tf.function(
            self._classify_files, input_signature=[tf.TensorSpec([None], tf.string, name="image")]
        )
        pixels = tf.TensorSpec([None, image_size, image_size, 3], tf.float32, name="pixels")
        self.classify_pixels = tf.function(self._classify_pixels, input_signature=[pixels])

    def _classify_files(self, image):
        """The likeliest classes of each image file.

        Args:
            image: [N] strings, the bytes of JPEG, PNG, BMP or GIF files.

        Returns:
            `names`, `wnids`: [N, K] strings, the likeliest first; `probabilities`: [N, K] float32;
            `error`: [N] strings, "" for an image. What is no image has an error, empty names and
            probabilities of 0, and leaves the others alone.
        """
        pixels, decoded = self._decoded(image)
        answer = self._classify_pixels(tf.cast(pixels, tf.float32))
        blank = {tf.string: "", tf.float32: 0.0}
        shown = {
            key: tf.where(decoded[:, tf.newaxis], value[:-1], blank[value.dtype])
            for key, value in answer.items()
        }
        return shown | {"error": tf.where(decoded, "", NO_IMAGE)}

    def _classify_pixels(self, pixels):
        """The same of pixels [N, S, S, 3] float32 in [0, 255], cut and scaled already."""
        logits = tf.cast(self._logits(pixels), tf.float32)
        best = tf.math.top_k(tf.nn.softmax(logits), min(TOP_K, logits.shape[-1]))
        return {
            "names": tf.gather(self.names, best.indices),
            "wnids": tf.gather(self.wnids, best.indices),
            "probabilities": best.values,
        }

    def _decoded(self, files):
        """(pixels [N + 1, S, S, 3] uint8, [N] bool which of the files were images).

        The last row is black: the network does not bear an empty batch.
        """
        count = tf.size(files, tf.int64)
        # A graph cannot catch an error, but a data set can pass over the element that has it.
        images = (
            tf.data.Dataset.from_tensor_slices((tf.range(count), files))
            .map(self._decode, num_parallel_calls=tf.data.AUTOTUNE)
            .ignore_errors()
        )
        blank = tf.zeros([self._size, self._size, 3], tf.uint8)
        images = images.concatenate(tf.data.Dataset.from_tensors((count, blank)))
        rows, pixels = images.batch(count + 1).get_single_element()
        place = tf.scatter_nd(rows[:, tf.newaxis], tf.range(tf.size(rows)) + 1, [count + 1]) - 1
        return tf.gather(pixels, tf.maximum(place, 0)), place[:-1] >= 0

    def _decode(self, number, file):
        return number, decode_centre(file, self._size, self._padding)


def classifier_export(model, classes, image_size: int, padding: int) -> Export:
    """What is written of a trained classifier; arguments as `ImageClassifier`'s."""
    module = ImageClassifier(model, classes, image_size, padding)
    signatures = {"serving_default": module.classify_files, "pixels": module.classify_pixels}
    return Export(module, signatures)
