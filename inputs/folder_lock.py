"""One process at a time writes in a folder."""

import contextlib
import fcntl
import os

from inputs.errors import InputError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: str, *, wait: bool):
    """Keeps other processes from writing in the folder; ends with the process at the latest.

    Raises:
        InputError: the folder cannot be written; or another process is at it, unless we wait.
    """
    try:
        file = open(os.path.join(folder, LOCK), "w")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process writes in it now. Wait for it, or choose "
                "another folder."
            ) from None
        yield
