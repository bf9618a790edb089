"""One run at a time in a model_dir."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from inputs.files import locked


def held(model_dir: str, say: Callable[[str], object]) -> AbstractContextManager[None]:
    """Holds the lock of a model_dir, see `inputs.files.locked`.

    Args:
        model_dir: an existing folder.
        say: receives a warning if the file system has no locks; the run continues.

    Raises:
        InputError: another run holds it; the message names its process and machine.
    """
    return locked(model_dir, "--model_dir", log=say)
