"""The exception for bad input, shown to the user as one sentence without a stack trace."""

import math
import re


class InputError(ValueError):
    """Bad input from the user. The message names the file, flag or value, and how to fix it."""


def refuse_empty(**flags: object) -> None:
    """Checks that no flag has an empty value.

    Args:
        **flags: flag name without dashes -> value; values that are not strings are not checked.

    Raises:
        InputError: a value is an empty or blank string.
    """
    for name, value in flags.items():
        if isinstance(value, str) and not value.strip():
            raise InputError(
                f"--{name} is empty, perhaps because a shell variable is not set. Give a value, or "
                f"leave out --{name}."
            )


def refuse_below(least: int, **flags: int | None) -> None:
    """Checks that no flag has too small a number.

    Args:
        least: the smallest number that is accepted.
        **flags: flag name without dashes -> value; None is not checked.

    Raises:
        InputError: a number is below `least`.
    """
    for name, value in flags.items():
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}. Received: --{name}={value}.")


def refuse_above(most: int, **flags: int | None) -> None:
    """Checks that no flag has too large a number.

    Args:
        most: the largest number that is accepted.
        **flags: flag name without dashes -> value; None is not checked.

    Raises:
        InputError: a number is above `most`.
    """
    for name, value in flags.items():
        if value is not None and value > most:
            raise InputError(f"--{name} must be at most {most}. Received: --{name}={value}.")


def refuse_not_positive(**flags: float | None) -> None:
    """Checks that each flag has a positive and finite number.

    Args:
        **flags: flag name without dashes -> value; None is not checked.

    Raises:
        InputError: a number is 0, negative, infinite or not a number.
    """
    for name, value in flags.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} must be positive and finite. Received: --{name}={value:g}.")


def refuse_misspelled(path: str, flag: str) -> None:
    """Checks that a path with a scheme has the slashes that it needs.

    Args:
        path: a path. If it has no scheme, nothing is checked.
        flag: what the message starts with.

    Raises:
        InputError: there is one slash after the scheme, which makes it a relative path on the disk;
            or two after file:, where the first folder would be taken for a host.
    """
    if match := re.match(r"((gs|s3|hdfs|ram|file):)/(?!/)", path):
        slashes = "///" if match[2] == "file" else "//"
        right = f"{match[1]}{slashes}{path[match.end() :]}"
        raise InputError(f"{flag}: {path} has one slash after its scheme. Write {right}.")
    if re.match("file://[^/]", path):
        raise InputError(f"{flag}: {path} has two slashes after file:. Write file:///FOLDER.")


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a sentence; its type if it has no message.

    TensorFlow's messages have many lines, and that of a file which is cut off may be empty. The
    names of operations that TensorFlow puts around the reason are left out.
    """
    line = next(iter(str(error).strip().splitlines()), "")
    return re.sub(r"^\{\{.*?\}\} *| *\[Op:.*", "", line) or type(error).__name__


def message_in(error: Exception) -> str | None:
    """Returns the message of an `InputError` that TensorFlow passed on as text, or None.

    An `InputError` of the input pipeline ends as part of the text of an `OpError`. If it comes from
    `tf.debugging.Assert`, TensorFlow puts it in brackets and escapes it as in C.
    """
    found = re.search(r"(\[?)InputError: (.+)", str(error))
    if not found:
        return None
    bracket, message = found.groups()
    if not bracket:
        return message
    return re.sub(r"\\(['\"\\])", r"\1", message.removesuffix("]"))
