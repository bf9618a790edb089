"""Images in formats that TensorFlow cannot decode become PNGs: TIFF, AVIF, JPEG 2000, Netpbm."""

import io
import struct

import numpy as np
import PIL.Image

# About these, TensorFlow's decoder has the last word.
TENSORFLOW = ("JPEG", "MPO", "PNG", "GIF")
# What Pillow raises for a damaged file.
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
    """Decodes an image file with Pillow, without loss except that 16 bits become 8.

    Of an animation or of several pages, the first one.

    Args:
        data: the bytes of the file.

    Returns:
        (the bytes of an RGB PNG, the format of `data`).

    Raises:
        ValueError: `data` is damaged. Its message is "" if TensorFlow's is better: the format is
            unknown, or one of `TENSORFLOW`.
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
