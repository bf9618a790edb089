"""Converts images that TensorFlow cannot decode to PNG: TIFF, AVIF, JPEG 2000, Netpbm."""

import io
import struct

import numpy as np
import PIL.Image

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


def to_png(data: bytes) -> tuple[bytes, str]:
    """Decodes an image file with Pillow and encodes it as an RGB PNG, with 8 bits per channel.

    Of an animation or a file with several pages, only the first image is converted.

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
            if image.mode.startswith("I;16"):
                image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("32-bit pixels, of an unknown range")
            png = io.BytesIO()
            image.convert("RGB").save(png, "PNG")
            return png.getvalue(), kind
    except PIL.UnidentifiedImageError:
        raise ValueError from None
    except DAMAGE as error:
        raise ValueError(str(error)) from None
