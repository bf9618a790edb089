"""Checks images, and converts those that TensorFlow does not decode to PNG.

These are TIFF, AVIF, JPEG 2000, Netpbm, and BMPs with a palette or bit fields.
"""

import io
import struct

import numpy as np
import PIL.ExifTags
import PIL.Image
import tensorflow as tf

from inputs.errors import first_line

# TensorFlow decodes these formats, so its error message is used for them.
TENSORFLOW = ("JPEG", "MPO", "PNG", "GIF")
# Exceptions that Pillow raises for a damaged file.
DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    EOFError,
    struct.error,
    PIL.Image.DecompressionBombError,
)
ORIENTATION = PIL.ExifTags.Base.Orientation
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF


def check_image(data: bytes) -> tuple[bytes, int, int, str, str]:
    """Decodes an image file.

    Returns:
        (an image file that TensorFlow can decode, height, width, the original format if `data` was
        converted or "", error message or "").
    """
    problem = "a BMP of an unknown kind"
    if not _is_misread(data):
        try:
            height, width, _ = _decode(data).shape
            return data, height, width, "", ""
        except tf.errors.OpError as error:
            problem = first_line(error)
    try:
        data, kind = to_png(data)
    except ValueError as error:
        return data, 0, 0, "", str(error) or problem
    height, width, _ = _decode(data).shape
    return data, height, width, kind, ""


def _decode(data):
    return tf.io.decode_image(data, channels=3, expand_animations=False)


def _is_misread(data):
    """Whether TensorFlow would decode a file to wrong colors, without an error.

    It takes the indices of a BMP's palette for brightness, and ignores bit fields. Only 24 bits per
    pixel without compression, after a header of at least 40 bytes, are sure to be decoded right.
    """
    if not data.startswith(b"BM"):
        return False
    header, bits, compression = (
        int.from_bytes(data[start:stop], "little") for start, stop in ((14, 18), (28, 30), (30, 34))
    )
    return header < 40 or (bits, compression) != (24, 0)


def to_png(data: bytes) -> tuple[bytes, str]:
    """Decodes an image file with Pillow and encodes it as an RGB PNG, with 8 bits per channel.

    Of an animation or a file with several pages, only the first image is converted. It is not
    turned as an EXIF tag says, because TensorFlow does not turn images either.

    Args:
        data: the bytes of the file.

    Returns:
        (the bytes of an RGB PNG, the format of `data`).

    Raises:
        ValueError: `data` is damaged. The message is "" if that of TensorFlow should be shown
            instead, because the format is unknown or one of `TENSORFLOW`.
    """
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            kind = image.format or ""
            if kind in TENSORFLOW:
                raise ValueError
            image.getexif().pop(ORIENTATION, None)  # Pillow turns a TIFF when it is loaded
            # Pillow scales 16-bit PGMs to the mode I, and all but TIFFs to 16 bits.
            if image.mode.startswith("I;16") or (image.mode, kind) == ("I", "PPM"):
                bits, pixels = 16, np.asarray(image)
                if kind == "TIFF":
                    (bits,) = image.tag_v2[BITS_PER_SAMPLE]
                    if image.tag_v2.get(PHOTOMETRIC) == 0:  # which Pillow ignores here
                        pixels = ~pixels  # 0 is white
                image = PIL.Image.fromarray((pixels >> (bits - 8)).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("32-bit pixels, of an unknown range")
            png = io.BytesIO()
            image.convert("RGB").save(png, "PNG")
            return png.getvalue(), kind
    except PIL.UnidentifiedImageError:
        raise ValueError from None
    except DAMAGE as error:
        raise ValueError(str(error)) from None
