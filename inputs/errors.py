"""The one error that a user's mistake raises: shown as its sentence, without a stack trace."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names file, flag or value, and the cure."""
