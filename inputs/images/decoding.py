"""Decodes, crops and augments images in the TensorFlow graph: file bytes → uint8 pixels."""

import tensorflow as tf

from inputs.batching import integers_below, random_bits, uniform, unit_floats

# Szegedy et al., arXiv:1409.4842, section 6
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10
WIDTH = 16  # floats of the widest vector register
# A JPEG decodes faster at 1/2, 1/4 or 1/8 of its size. The remaining scale factor is below 2, at
# which bilinear scaling skips no pixel.
SHRINK = (1, 2, 4, 8)
# RandAugment: the defaults of tf-models 2.20. The magnitude is on a scale of 0 to 10.
LAYERS = 2
MAGNITUDE = 10
FILL = [128, 128, 128]
# Streams of random numbers, see `uniform`.
WINDOW_STREAMS = (10, 11, 12, 13)
SHIFT_STREAM = 10  # of images that are not cropped
FLIP_STREAM = 14
AUGMENT_STREAM = 20


def image_size(data):
    """(height, width) of an image file in pixels, int64 scalars.

    Args:
        data: scalar string, an image file. A JPEG is not decoded for this.
    """
    shape = tf.cond(
        tf.io.is_jpeg(data),
        lambda: tf.image.extract_jpeg_shape(data),
        lambda: tf.shape(_decode_any(data)),
    )
    shape = tf.cast(tf.ensure_shape(shape, [3]), tf.int64)
    return shape[0], shape[1]


def window_draws(*, seed: int, ids):
    """What `random_windows` tries for each image, in the order of trying.

    Args:
        seed: int.
        ids: [B] int64, example ids.

    Returns:
        [B, 4, ATTEMPTS] float32: share of the area, ratio of width to height, and how far down and
        to the right the crop lies, as shares of the remaining space.
    """
    # Exponentials of whole vector registers: the last elements of a tensor may be rounded
    # differently from the others, and an example would then depend on its place in the batch.
    draws = [uniform(seed, stream, ids, WIDTH) for stream in WINDOW_STREAMS]
    area = AREA[0] + (AREA[1] - AREA[0]) * draws[0]
    low, high = (tf.math.log(aspect) for aspect in ASPECT)
    aspect = tf.exp(low + (high - low) * draws[1])
    return tf.stack([area, aspect, *draws[2:]], axis=1)[:, :, :ATTEMPTS]


def random_windows(height, width, draws):
    """A random crop of each image: 8 to 100 % of its area, with an aspect ratio of 3/4 to 4/3.

    Takes the first of ten random crops that fits the image. If none fits, takes the central crop
    of the nearest possible shape.

    Args:
        height, width: [B] int64, pixels of the images.
        draws: [B, 4, ATTEMPTS], from `window_draws`.

    Returns:
        [B, 4] int32: top, left, height, width.
    """
    h, w = (tf.cast(size, tf.float32)[:, tf.newaxis] for size in (height, width))
    share, aspect, top, left = tf.unstack(draws, axis=1)
    area = h * w * share
    sides = tf.sqrt(area / aspect), tf.sqrt(area * aspect)
    crop_h, crop_w = (tf.maximum(tf.round(side), 1.0) for side in sides)
    fits = (crop_h <= h) & (crop_w <= w)
    first = tf.argmax(fits, axis=1)[:, tf.newaxis]
    crop_h, crop_w, top, left = (
        tf.gather(values, first, batch_dims=1) for values in (crop_h, crop_w, top, left)
    )
    found = tf.reduce_any(fits, axis=1, keepdims=True)
    crop_h = tf.where(found, crop_h, tf.minimum(h, tf.round(w / ASPECT[0])))
    crop_w = tf.where(found, crop_w, tf.minimum(w, tf.round(h * ASPECT[1])))
    top = tf.where(found, tf.floor(top * (h - crop_h + 1)), tf.floor((h - crop_h) / 2))
    left = tf.where(found, tf.floor(left * (w - crop_w + 1)), tf.floor((w - crop_w) / 2))
    return tf.cast(tf.concat([top, left, crop_h, crop_w], axis=1), tf.int32)


def decode_window(data, window, image_size: int):
    """Decodes a window of an image and scales it bilinearly: [S, S, 3] uint8.

    See `decode_crop` for the arguments.
    """
    # The kernel scales float32 in less time than uint8, also with the conversion, and to the same
    # values. Whole photographs (`decode_centre`) would take more to convert than it saves.
    return scale(tf.cast(decode_crop(data, window, image_size), tf.float32), image_size)


def decode_crop(data, window, image_size: int):
    """Decodes a window of an image: [h, w, 3] uint8.

    A JPEG is decoded only in the window, and at a lower resolution if both sides are still at least
    S. Other formats (PNG, GIF, WebP, and BMP of 24 bits per pixel) are decoded completely, then
    cropped. The format is detected from the content. Gray and CMYK images become RGB.

    Args:
        data: scalar string, an image file.
        window: [4] int32: top, left, height and width, in pixels.
        image_size: S, pixels of each side after scaling.
    """
    shorter = tf.reduce_min(window[2:])
    # 0 to 3: number of halvings; 4: not a JPEG.
    halvings = tf.reduce_sum(tf.cast(shorter // tf.constant(SHRINK[1:]) >= image_size, tf.int32))
    kind = tf.where(tf.io.is_jpeg(data), halvings, len(SHRINK))
    branches = [lambda ratio=ratio: _decode_jpeg_window(data, window, ratio) for ratio in SHRINK]
    return tf.switch_case(kind, [*branches, lambda: _slice(_decode_any(data), window)])


def decode_centre(data, image_size: int, share: float):
    """Decodes the center of an image and scales it bilinearly: [S, S, 3] uint8.

    The crop is the central square with a share of the shorter side. With S = 224 and a share of
    0.875 this equals scaling that side to 256 and cropping the central 224 pixels.

    Args:
        data: scalar string, an image file.
        image_size: S.
        share: of the shorter side; 1 for the largest central square.

    Raises:
        tf.errors.InvalidArgumentError: `data` is not an image.
    """
    image = _decode_any(data)
    return scale(_slice(image, central_window(tf.shape(image), share)), image_size)


def central_window(shape, share: float):
    """The window of `decode_centre` in an image of `shape` [height, width, ...]: [4] int32."""
    side = tf.cast(tf.minimum(shape[0], shape[1]), tf.float32)
    side = tf.cast(tf.round(side * share), tf.int32)
    side = tf.maximum(side, 1)
    return tf.stack([(shape[0] - side) // 2, (shape[1] - side) // 2, side, side])


def scale(image, image_size: int):
    """Scales [H, W, 3] of uint8 or float32, 0 to 255, bilinearly to [S, S, 3] uint8, rounded."""
    scaled = tf.image.resize(image, [image_size, image_size])
    return tf.ensure_shape(tf.cast(scaled + 0.5, tf.uint8), [image_size, image_size, 3])


def random_shifts(images, *, seed: int, ids):
    """Shifts each image by up to 4 pixels in each direction, and fills the border with black.

    This is the augmentation of CIFAR-10 in He et al., arXiv:1512.03385, section 4.2.

    Args:
        images: [B, S, S, 3].
        seed: int.
        ids: [B] int64, example ids.

    Returns:
        [B, S, S, 3], of the same dtype as `images`.
    """
    size = images.shape[1]
    padded = tf.pad(images, [[0, 0], [4, 4], [4, 4], [0, 0]])
    draws = random_bits(seed, SHIFT_STREAM, ids, 2)
    start = tf.cast(integers_below(draws, 9), tf.int32)
    rows = start[:, :1] + tf.range(size)[tf.newaxis]
    columns = start[:, 1:] + tf.range(size)[tf.newaxis]
    shifted = tf.gather(padded, rows, batch_dims=1)
    return tf.gather(shifted, columns, axis=2, batch_dims=1)


def random_flips(*, seed: int, ids):
    """Whether to flip each image left to right, with probability 1/2: [B] bool."""
    return uniform(seed, FLIP_STREAM, ids, 1)[:, 0] < 0.5


@tf.autograph.experimental.do_not_convert  # has nothing to convert; conversion is slow
def rand_augment(image, *, seed: int, example_id):
    """Applies two random operations of tf-models to an image (Cubuk et al., arXiv:1909.13719).

    *Differs from* tf-models' `RandAugment`: that draws from TensorFlow's global random state; here
    the draws are a function of (seed, example id).

    Args:
        image: [S, S, 3] uint8.
        seed: int.
        example_id: int64 scalar.

    Returns:
        [S, S, 3] uint8.
    """
    shape = image.shape
    draws = random_bits(seed, AUGMENT_STREAM, tf.reshape(example_id, [1]), 2 * LAYERS)[0]
    for layer in range(LAYERS):
        sign = tf.where(unit_floats(draws[2 * layer]) < 0.5, -1.0, 1.0)
        operations = _augmentations(image, MAGNITUDE / 10, sign)
        chosen = integers_below(draws[2 * layer + 1], len(operations))
        image = tf.switch_case(tf.cast(chosen, tf.int32), operations)
        image = tf.ensure_shape(image, shape)
    return image


def _augmentations(image, level: float, sign):
    """Returns functions without arguments that each apply one operation to the image.

    The ranges are those of AutoAugment and RandAugment in tf-models 2.20. Cutout is left out, as in
    the ResNet-RS recipes of tf-models, because it draws its position from the global random state.

    Args:
        image: [S, S, 3] uint8.
        level: strength in [0, 1].
        sign: -1.0 or 1.0, the direction of shears, shifts and rotations.
    """
    # Imported here, so that an export, which only decodes, does not need tf-models.
    from official.vision.ops import augment

    enhanced = level * 1.8 + 0.1
    shear = sign * 0.3 * level
    angle = sign * 30.0 * level
    # A shift of 100 pixels would move an image of 32 pixels out of sight.
    shift = sign * 100.0 * level * min(1.0, image.shape[0] / 224)
    return [
        lambda: augment.autocontrast(image),
        lambda: augment.equalize(image),
        lambda: augment.invert(image),
        lambda: augment.wrapped_rotate(image, angle, FILL),
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


def _decode_jpeg_window(data, window, ratio: int):
    # libjpeg rounds the scaled size up, so a window that is rounded down lies inside the image.
    scaled = tf.concat([window[:2] // ratio, tf.maximum(window[2:] // ratio, 1)], axis=0)
    return tf.io.decode_and_crop_jpeg(data, scaled, channels=3, ratio=ratio)


def _decode_any(data):
    image = tf.io.decode_image(data, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def _slice(image, window):
    return tf.slice(image, [window[0], window[1], 0], [window[2], window[3], 3])
