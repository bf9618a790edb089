"""Recognises UTF-16 and UTF-32, whose bytes can look like UTF-8 with NULs between the letters."""

import codecs

from inputs.errors import InputError

BYTE_ORDER_MARKS = (  # UTF-32 first, because its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
NUL_SHARE = 0.25  # with at least this share of NUL bytes, a file is not UTF-8


def check_beginning(path: str, beginning: bytes, *, flag: str = "", compressed: bool = False):
    """Raises an error if a file is in UTF-16 or UTF-32.

    Args:
        path: path of the file, for the message.
        beginning: its first line, or more.
        flag: the flag that named it, for the message.
        compressed: whether `beginning` was decompressed.

    Raises:
        InputError: the file begins with a byte-order mark, or has NULs throughout.
    """
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if beginning.startswith(mark)), None)
    reason = "its first bytes are a byte-order mark"
    nuls = beginning.count(0)
    if encoding is None and nuls and nuls >= NUL_SHARE * len(beginning):
        reason = f"{nuls / len(beginning):.0%} of its first line are NUL bytes"
        width = 32 if nuls > 0.6 * len(beginning) else 16
        encoding = f"UTF-{width}{'BE' if beginning[0] == 0 else 'LE'}"
    if encoding:
        what = f"{flag}: {path}".removeprefix(": ")
        command = f"iconv -f {encoding} -t UTF-8"
        command = f"{command}` after decompression" if compressed else f"{command} {path} > NEW`"
        raise InputError(f"{what} is {encoding}, not UTF-8: {reason}. Convert it: `{command}.")
