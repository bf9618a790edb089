"""The exception for bad input, shown to the user as one sentence without a stack trace."""


class InputError(ValueError):
    """The user gave something unusable. The message names the file, flag or value, and a fix."""


def refuse_empty(**flags: object) -> None:
    """Raises `InputError` if the value of a flag that was given is an empty string."""
    for name, value in flags.items():
        if isinstance(value, str) and not value.strip():
            raise InputError(
                f"--{name} is empty. Give a value, or leave --{name} out (was it to come from a "
                "variable that is not set?)."
            )
