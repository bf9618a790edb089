"""From an image file's bytes to the uint8 pixels that a network sees; all in the graph."""

import tensorflow as tf

from inputs import random_numbers

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # Szegedy et al., arXiv:1409.4842, section 6
ATTEMPTS = 10
# JPEG decodes to 1/2, 1/4 or 1/8 of its size for less than the whole; the crop is then scaled
# down by what is left, which is below 2 where bilinear scaling skips no pixel.
SHRINK = (1, 2, 4, 8)


def random_windows(height, width, *, seed: int, number):
    """A random crop of each image: 8 to 100 % of its area, its aspect from 3/4 to 4/3.

    Drawn again up to ten times where it does not fit; then the central one of the nearest
    possible shape. A function of (seed, number).

    Args:
        height, width: [B] int64, pixels of the images.
        seed: int.
        number: [B] int64, the examples' numbers.

    Returns:
        [B, 4] int32: top, left, height, width.
    """
    h, w = (tf.cast(size, tf.float32)[:, tf.newaxis] for size in (height, width))
    draws = [random_numbers.uniform(seed, stream, number, ATTEMPTS) for stream in range(10, 14)]
    area = h * w * (AREA[0] + (AREA[1] - AREA[0]) * draws[0])
    low, high = (tf.math.log(aspect) for aspect in ASPECT)
    aspect = tf.exp(low + (high - low) * draws[1])
    sides = tf.sqrt(area / aspect), tf.sqrt(area * aspect)
    crop_h, crop_w = (tf.maximum(tf.round(side), 1.0) for side in sides)
    fits = (crop_h <= h) & (crop_w <= w)
    first = tf.argmax(fits, axis=1)[:, tf.newaxis]
    crop_h, crop_w, top, left = (
        tf.gather(values, first, batch_dims=1) for values in (crop_h, crop_w, draws[2], draws[3])
    )
    found = tf.reduce_any(fits, axis=1, keepdims=True)
    crop_h = tf.where(found, crop_h, tf.minimum(h, tf.round(w / ASPECT[0])))
    crop_w = tf.where(found, crop_w, tf.minimum(w, tf.round(h * ASPECT[1])))
    top = tf.where(found, tf.floor(top * (h - crop_h + 1)), tf.floor((h - crop_h) / 2))
    left = tf.where(found, tf.floor(left * (w - crop_w + 1)), tf.floor((w - crop_w) / 2))
    return tf.cast(tf.concat([top, left, crop_h, crop_w], axis=1), tf.int32)


def decode_window(data, window, image_size: int):
    """The window of an image, scaled bilinearly: [S, S, 3] uint8.

    Args: as `decode_crop`'s.
    """
    return scale(decode_crop(data, window, image_size), image_size)


def decode_crop(data, window, image_size: int):
    """The window of an image, not smaller than S: [h, w, 3] uint8.

    Of a JPEG only the window is decoded, at a lower resolution where that is enough. Other
    files (PNG, BMP, GIF, whatever their names say) are decoded whole. Grey becomes RGB, as does
    CMYK.

    Args:
        data: scalar string, an image file.
        window: [4] int32: top, left, height, width.
        image_size: S; a window that is smaller is left as it is.
    """
    least = tf.reduce_min(window[2:])
    # 0..3: how often to halve; 4: not a JPEG.
    halvings = tf.reduce_sum(tf.cast(least // tf.constant(SHRINK[1:]) >= image_size, tf.int32))
    kind = tf.where(tf.io.is_jpeg(data), halvings, len(SHRINK))
    branches = [lambda ratio=ratio: _decode_jpeg_window(data, window, ratio) for ratio in SHRINK]
    return tf.switch_case(kind, [*branches, lambda: _slice(_decode_any(data), window)])


def decode_centre(data, image_size: int, padding: int):
    """The centre of an image, scaled bilinearly: [S, S, 3] uint8.

    The central square of S / (S + padding) of the shorter side: with S = 224 and padding = 32 what
    scaling that side to 256 and cutting out the middle 224 gives.

    Args:
        data: scalar string, an image file.
        image_size: S.
        padding: 32 for photographs, 0 for the whole square.

    Raises:
        tf.errors.InvalidArgumentError: no image.
    """
    image = _decode_any(data)
    return scale(_slice(image, central_window(tf.shape(image), image_size, padding)), image_size)


def central_window(shape, image_size: int, padding: int):
    """[4] int32, the window of `decode_centre` in an image of `shape` [height, width, ...]."""
    side = tf.cast(tf.minimum(shape[0], shape[1]), tf.float32)
    side = tf.cast(tf.round(side * (image_size / (image_size + padding))), tf.int32)
    side = tf.maximum(side, 1)
    return tf.stack([(shape[0] - side) // 2, (shape[1] - side) // 2, side, side])


def scale(image, image_size: int):
    """[H, W, 3] uint8 scaled bilinearly to [S, S, 3] uint8, rounded to the nearest."""
    scaled = tf.image.resize(image, [image_size, image_size])
    return tf.ensure_shape(tf.cast(scaled + 0.5, tf.uint8), [image_size, image_size, 3])


def random_shifts(images, *, seed: int, number):
    """Shifts each image by up to 4 pixels either way, black coming in: [B, S, S, 3] as before.

    He et al., arXiv:1512.03385, section 4.2, for CIFAR-10.
    """
    size = images.shape[1]
    padded = tf.pad(images, [[0, 0], [4, 4], [4, 4], [0, 0]])
    draws = random_numbers.uniform(seed, 10, number, 2)
    start = tf.cast(random_numbers.below(draws, 9), tf.int32)
    rows = start[:, :1] + tf.range(size)[tf.newaxis]
    columns = start[:, 1:] + tf.range(size)[tf.newaxis]
    shifted = tf.gather(padded, rows, batch_dims=1)
    return tf.gather(shifted, columns, axis=2, batch_dims=1)


def flips(*, seed: int, number):
    """[B] bool: which images are turned left to right, one in two."""
    return random_numbers.uniform(seed, 14, number, 1)[:, 0] < 0.5


def _decode_jpeg_window(data, window, ratio: int):
    # As libjpeg rounds a scaled image up, a window that is scaled down lies within it.
    scaled = tf.concat([window[:2] // ratio, tf.maximum(window[2:] // ratio, 1)], axis=0)
    return tf.io.decode_and_crop_jpeg(data, scaled, channels=3, ratio=ratio)


def _decode_any(data):
    image = tf.io.decode_image(data, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def _slice(image, window):
    return tf.slice(image, [window[0], window[1], 0], [window[2], window[3], 3])
