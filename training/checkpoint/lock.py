"""One run at a time in a model_dir, by a lock that ends with the process that holds it."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator

from inputs.errors import InputError

NAME = ".lock"


@contextlib.contextmanager
def held(model_dir: str, say: Callable[[str], object]) -> Iterator[None]:
    """Holds the folder's lock while inside.

    It is `flock` on MODEL_DIR/.lock. The kernel frees it when the process ends, by `kill -9` too,
    so the file that stays behind means nothing. On NFS, Linux asks the server, so that it holds
    among machines; mounts with `nolock` or `local_lock` keep it to one machine.

    Args:
        model_dir: an existing folder.
        say: takes a line where the file system has no locks; the run goes on.

    Raises:
        InputError: another run holds it; the message names its process and machine.
    """
    with open(os.path.join(model_dir, NAME), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise InputError(
                f"--model_dir: {model_dir} is in use by {holder}. Let it end, stop it, or choose "
                "another folder."
            ) from None
        except OSError as error:
            say(
                f"{model_dir} cannot be locked ({error.strerror}): see to it that no other run "
                "writes there."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
