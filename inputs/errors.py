"""The exception for bad input, shown to the user as one sentence without a stack trace."""

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


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a sentence; its type if it has no message.

    TensorFlow's messages have many lines, and that of a file which is cut off may be empty.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
