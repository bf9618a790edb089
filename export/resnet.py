"""The SavedModel of an image classifier: takes the bytes of image files and decodes them."""

import functools

import tensorflow as tf
import tf_keras

from export.saved_model import Export
from inputs.images.decoding import decode_centre

TOP_K = 5
# The model returns this text, and clients may compare with it: do not change it. WebP is decoded,
# too, except animations; of BMP only 24 bits per pixel are decoded right.
NO_IMAGE = "no JPEG, PNG, BMP or GIF that can be decoded"


class ImageClassifier(tf.Module):
    """Classifies images.

    Args:
        model: from `models.resnet.build_classifier`.
        classes: list of (wnid, name) of each class, in the order of the labels.
        image_size: S, the height and width of an image in pixels.
        share: as for `inputs.images.decoding.decode_centre`.
    """

    def __init__(self, model: tf_keras.Model, classes, image_size: int, share: float):
        super().__init__()
        self._size = image_size
        self._share = share
        # Track only the weights: a tracked model would also save the functions of all its layers.
        self.weights = model.variables
        self._logits = functools.partial(model, training=False)
        wnids, names = zip(*classes, strict=True)
        self.wnids = tf.Variable(wnids, trainable=False, name="wnids")
        self.names = tf.Variable(names, trainable=False, name="names")
        self.classify_files = tf.function(
            self._classify_files,
            input_signature=[tf.TensorSpec([None], tf.string, name="image")],
            autograph=False,
        )
        pixels = tf.TensorSpec([None, image_size, image_size, 3], tf.float32, name="pixels")
        self.classify_pixels = tf.function(
            self._classify_pixels, input_signature=[pixels], autograph=False
        )

    def _classify_files(self, image):
        """Returns the most likely classes of each image file.

        Args:
            image: [N] strings, the bytes of JPEG, PNG, GIF, WebP (not animated) or BMP files (24
                bits per pixel, not compressed).

        Returns:
            `names`, `wnids`: [N, K] strings, the K most likely classes in descending order.
            `probabilities`: [N, K] float32. `error`: [N] strings, "" for an image. A file that is
            not an image has an error, empty names and probabilities of 0, and does not affect the
            other files.
        """
        pixels, is_image = self._decode_files(image)
        answer = self._classify_pixels(tf.cast(pixels, tf.float32))
        blank = {tf.string: "", tf.float32: 0.0}
        shown = {
            key: tf.where(is_image[:, tf.newaxis], value[:-1], blank[value.dtype])
            for key, value in answer.items()
        }
        return shown | {"error": tf.where(is_image, "", NO_IMAGE)}

    def _classify_pixels(self, pixels):
        """Returns the most likely classes of images that are already cropped and resized.

        Args:
            pixels: [N, S, S, 3] float32 in [0, 255].

        Returns:
            `names`, `wnids` and `probabilities`, as `_classify_files`.
        """
        count = tf.shape(pixels)[0]
        # The network cannot process an empty batch.
        some = tf.pad(pixels, [[0, tf.maximum(1 - count, 0)], [0, 0], [0, 0], [0, 0]])
        logits = tf.cast(self._logits(some), tf.float32)[:count]
        best = tf.math.top_k(tf.nn.softmax(logits), min(TOP_K, logits.shape[-1]))
        return {
            "names": tf.gather(self.names, best.indices),
            "wnids": tf.gather(self.wnids, best.indices),
            "probabilities": best.values,
        }

    def _decode_files(self, files):
        """Decodes [N] image files.

        Returns:
            A tuple: the pixels, [N + 1, S, S, 3] uint8, and [N] bool, whether each file is an
            image. The last image is black, so that the batch is never empty: the network cannot
            process an empty one.
        """
        count = tf.size(files, tf.int64)
        # A graph cannot catch an error, but a data set can skip an element that raises one.
        images = (
            tf.data.Dataset.from_tensor_slices((tf.range(count), files))
            .map(self._decode, num_parallel_calls=tf.data.AUTOTUNE)
            .ignore_errors()
        )
        blank = tf.zeros([self._size, self._size, 3], tf.uint8)
        images = images.concatenate(tf.data.Dataset.from_tensors((count, blank)))
        rows, pixels = images.batch(count + 1).get_single_element()
        # The position of each file in `pixels`, and -1 for a file that was skipped.
        place = tf.scatter_nd(rows[:, tf.newaxis], tf.range(tf.size(rows)) + 1, [count + 1]) - 1
        return tf.gather(pixels, tf.maximum(place, 0)), place[:-1] >= 0

    def _decode(self, index, file):
        return index, decode_centre(file, self._size, self._share)


def classifier_export(model, classes, image_size: int, share: float) -> Export:
    """Returns the `Export` of a trained classifier. Arguments as for `ImageClassifier`.

    Its signatures are `serving_default`, which takes image files, and `pixels`.
    """
    module = ImageClassifier(model, classes, image_size, share)
    signatures = {"serving_default": module.classify_files, "pixels": module.classify_pixels}
    return Export(module, signatures)
