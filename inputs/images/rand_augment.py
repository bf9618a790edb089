"""RandAugment: two random operations of tf-models' own on each image.

Cubuk et al., arXiv:1909.13719. tf-models' `RandAugment` draws from TensorFlow's global state;
here what is drawn is a function of (seed, number), and its operations do the rest.
"""

import tensorflow as tf
from official.vision.ops import augment

from inputs import random_numbers

LAYERS, MAGNITUDE = 2, 10  # of 10; tf-models 2.20's defaults
FILL = [128, 128, 128]
STREAM = 20


def _operations(image, level: float, sign):
    """The image after each operation, as functions; `level` in [0, 1], `sign` is -1 or 1.

    Ranges as tf-models 2.20 has them for AutoAugment and RandAugment. Cutout, whose place it
    draws itself, is left out, as its ResNet-RS recipes leave it out.
    """
    enhanced = level * 1.8 + 0.1
    shear, shift, turn = sign * 0.3 * level, sign * 100.0 * level, sign * 30.0 * level
    # Images of 32 pixels would lose all of theirs by 100.
    shift = shift * min(1.0, image.shape[0] / 224)
    return [
        lambda: augment.autocontrast(image),
        lambda: augment.equalize(image),
        lambda: augment.invert(image),
        lambda: augment.wrapped_rotate(image, turn, FILL),
        lambda: augment.posterize(image, round(4 * level)),
        lambda: augment.solarize(image, round(256 * level)),
        lambda: augment.solarize_add(image, round(110 * level)),
        lambda: augment.color(image, enhanced),
        lambda: augment.contrast(image, enhanced),
        lambda: augment.brightness(image, enhanced),
        lambda: augment.sharpness(image, enhanced),
        lambda: augment.shear_x(image, shear, FILL),
        lambda: augment.shear_y(image, shear, FILL),
        lambda: augment.translate_x(image, shift, FILL),
        lambda: augment.translate_y(image, shift, FILL),
    ]


def distort(image, *, seed: int, number):
    """`image` [S, S, 3] uint8 after two operations, chosen by (seed, number): the same shape."""
    shape = image.shape
    draws = random_numbers.uniform(seed, STREAM, tf.reshape(number, [1]), 2 * LAYERS)[0]
    for layer in range(LAYERS):
        sign = tf.where(draws[2 * layer] < 0.5, -1.0, 1.0)
        operations = _operations(image, MAGNITUDE / 10, sign)
        chosen = random_numbers.below(draws[2 * layer + 1], len(operations))
        image = tf.switch_case(tf.cast(chosen, tf.int32), operations)
        image = tf.ensure_shape(image, shape)
    return image
