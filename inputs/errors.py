"""The exception for bad input, shown to the user as one sentence without a stack trace."""


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
