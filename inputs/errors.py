"""The exception for bad input, shown to the user as one sentence without a stack trace."""


class InputError(ValueError):
    """The user gave something unusable. The message names the file, flag or value, and a fix."""
