"""Operations on files and folders: walks, atomic writes, locks, and reads with clear errors.

A path with a scheme, such as gs://bucket/folder, is on object storage: see `inputs.storage.remote`
for what is relied on there, and `inputs.storage.lease` for locks. `os.path.join` and
`os.path.basename` take such paths, too; for the others there are functions here.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import io
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from inputs.errors import InputError, refuse_misspelled
from inputs.storage import lease, remote
from inputs.storage.remote import is_remote

LOCK = ".lock"
ROUND_TRIPS = 32  # requests to object storage at the same time
NEW = ".new"  # suffix of a file that is not complete yet
OLD = "old"  # the folder that is being replaced
LOGGER = logging.getLogger(__name__)
# What operating systems and archivers leave among other files. Names that begin with a dot are
# left-overs, too: .ipynb_checkpoints, ._a.txt (macOS), .nfs0001, our own .lock.
LEFT_OVERS = {"thumbs.db", "desktop.ini", "__macosx", "lost+found", "$recycle.bin"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}


class PassedOver(collections.Counter):
    """Counts the files that were found but are not read, by kind."""

    def add(self, path: str) -> None:
        """Counts a file by its suffix, ignoring case."""
        name = os.path.basename(path).lower()
        stem, ending = os.path.splitext(name)
        if ending in COMPRESSIONS:
            ending = os.path.splitext(stem)[1] + ending
        self[ending or "without a suffix"] += 1

    def describe(self) -> str:
        """For a message, such as "4 passed over: 3 × .parquet, 1 × hidden"; "" if there is none."""
        kinds = ", ".join(f"{count:,} × {kind}" for kind, count in self.most_common())
        return f"{self.total():,} passed over: {kinds}" if kinds else ""


def is_left_over(name: str) -> bool:
    """Whether a file or folder of this name is not data: hidden, or made by the system."""
    return name.startswith(".") or name.lower() in LEFT_OVERS


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file or folder in a folder.

    Attributes:
        name: without the folder.
        path: with the folder.
        is_link: whether it is a symbolic link.
    """

    name: str
    path: str
    is_link: bool = False


def list_folder(
    folder: str, flag: str, passed_over: PassedOver | None = None
) -> tuple[list[Entry], list[Entry]]:
    """The (folders, files) in a folder, by name; links are followed, left-overs are skipped.

    Args:
        folder: path.
        flag: the flag that named it, for the error message.
        passed_over: counts the left-overs.

    Raises:
        InputError: the folder cannot be read.
    """
    folders, files = [], []
    try:
        for entry, is_folder, is_file in _scan(folder):
            if is_left_over(entry.name):
                if passed_over is not None:
                    passed_over["hidden"] += 1
            elif is_folder:
                folders.append(entry)
            elif is_file:
                files.append(entry)
            elif passed_over is not None:
                passed_over["device or pipe"] += 1
    except OSError as error:
        raise _unreadable(folder, f"cannot be read ({error.strerror})", flag, "") from None
    return folders, files


def _scan(folder: str) -> Iterator[tuple[Entry, bool, bool]]:
    """Yields (entry, whether it is a folder, whether it is a file) of a folder, by name."""
    if is_remote(folder):
        for name, below in remote.list_folder(folder):
            yield Entry(name, os.path.join(folder, name)), below, not below
        return
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link that leads to itself
                is_folder = is_file = False
            # Reading a broken link fails later.
            is_file = is_file or not (is_folder or os.path.exists(entry.path))
            yield Entry(entry.name, entry.path, entry.is_symlink()), is_folder, is_file


def walk(
    top: str,
    flag: str,
    passed_over: PassedOver | None = None,
    *,
    enter: Callable[[str], bool] = lambda folder: True,
) -> Iterator[Entry]:
    """Yields the files in a folder and in the folders below it.

    Links are followed. A folder that several paths lead to is read once, by its real path if that
    is below `top`, so that a link to a parent folder causes no loop.

    Args:
        top: path of the folder.
        flag: the flag that named it, for error messages.
        passed_over: counts the left-overs, see `is_left_over`.
        enter: takes the path of a folder below `top`; returns whether to read that folder.

    Raises:
        InputError: a folder cannot be read.
    """
    seen = set()
    folders, links = [top], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if not is_remote(folder):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
        below, files = list_folder(folder, flag, passed_over)
        yield from files
        for entry in below:
            if enter(entry.path):
                (links if entry.is_link else folders).append(entry.path)


def exists(path: str) -> bool:
    """Whether there is a file or folder of this name.

    Raises:
        OSError: the storage cannot be asked. (For a local path the answer is False.)
    """
    return remote.exists(path) if is_remote(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    """Whether `path` is a folder; see `exists`."""
    return remote.is_folder(path) if is_remote(path) else os.path.isdir(path)


def is_file(path: str) -> bool:
    """Whether `path` is a file; see `exists`."""
    if is_remote(path):
        return remote.exists(path) and not remote.is_folder(path)
    return os.path.isfile(path)


def list_names(folder: str) -> list[str]:
    """The names of all entries of a folder, sorted; on object storage it may be out of date.

    Raises:
        OSError: the folder does not exist or cannot be read.
    """
    if is_remote(folder):
        return [name for name, _ in remote.list_folder(folder)]
    return sorted(os.listdir(folder))


def make_folder(folder: str) -> None:
    """Creates a folder, and those above it, unless they exist.

    Raises:
        OSError: it cannot be created.
    """
    if is_remote(folder):
        remote.make_folder(folder)
    else:
        os.makedirs(folder, exist_ok=True)


def remove(path: str) -> None:
    """Deletes a file; does nothing if there is none.

    Raises:
        OSError: it cannot be deleted.
    """
    if is_remote(path):
        remote.remove(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def remove_folder(folder: str) -> None:
    """Deletes a folder with all that is in it, as far as that is possible."""
    if is_remote(folder):
        with contextlib.suppress(OSError):
            remote.remove_tree(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def absolute(path: str) -> str:
    """The path independent of the current folder, without a slash at its end."""
    path = os.fspath(path)
    if not is_remote(path):
        return os.path.abspath(path)
    scheme, name = path.split("://", 1)
    return f"{scheme}://{name.rstrip('/')}"


def parent(path: str) -> str:
    """The folder that contains a file or folder."""
    path = absolute(path)
    if not is_remote(path):
        return os.path.dirname(path)
    scheme, name = path.split("://", 1)
    return f"{scheme}://{os.path.dirname(name)}"


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is that of a folder or of something below it; links are followed."""
    path, folder = (
        one if is_remote(one) else os.path.realpath(one) for one in map(absolute, (path, folder))
    )
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def file_size(path: str) -> int:
    """The size of a file in bytes.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    return remote.stat(path).length if is_remote(path) else os.path.getsize(path)


def file_sizes(paths: Sequence[str]) -> list[int | None]:
    """The size of each file in bytes; None if it does not exist or cannot be read.

    The files are asked for at the same time: on object storage each answer takes a round trip, and
    a data set may have a thousand files.
    """

    def size_of(path):
        try:
            return file_size(path)
        except OSError:
            return None

    with concurrent.futures.ThreadPoolExecutor(ROUND_TRIPS) as pool:
        return list(pool.map(size_of, paths))


def file_state(path: str) -> tuple[int, int]:
    """Returns (size in bytes, modification time in ns) of a file, to notice that it was changed.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    if is_remote(path):
        found = remote.stat(path)
        return found.length, found.mtime_nsec
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def open_bytes(path: str) -> IO[bytes]:
    """Opens a file for reading bytes, at any place.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    return remote.open_reader(path) if is_remote(path) else open(path, "rb")


def open_sparse(path: str, size: int) -> IO[bytes]:
    """Opens a file of which parts of `size` bytes are read, far apart; the rest is not read.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    return remote.open_sparse(path, size) if is_remote(path) else open(path, "rb", buffering=0)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yields a path that programs without TensorFlow's file systems can read during the block.

    It is the file itself, or, of one on object storage, a copy in a temporary folder.

    Raises:
        OSError: the file cannot be read.
    """
    if not is_remote(path):
        yield path
        return
    with temporary_folder("copy-") as folder:
        copy = os.path.join(folder, os.path.basename(path))
        with open_bytes(path) as file, open(copy, "wb") as new:
            shutil.copyfileobj(file, new)
        yield copy


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[str]:
    """Yields a temporary path to write to; the file is renamed to `path` on success.

    If the block raises, the temporary file is removed and `path` is not changed. The temporary path
    is always PATH.new, so that the next writer replaces what a killed process left there.

    On object storage the temporary file is a local one, which is uploaded. See
    `inputs.storage.remote` for what a kill during the upload may leave.
    """
    path = os.fspath(path)
    if is_remote(path):
        with temporary_folder("upload-") as folder:
            new = os.path.join(folder, "new")
            yield new
            try:
                with open(new, "rb") as file:
                    remote.upload(path, file)
            except OSError:
                with contextlib.suppress(OSError):  # a part of it
                    remote.remove(path)
                raise
        return
    try:
        yield path + NEW
        os.replace(path + NEW, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(path + NEW)


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file for writing, and renames it to `path` if the block does not raise.

    On object storage it is written in memory, and read with `read_bytes` or `read_json`, which give
    the old content or the new one at every time.

    Args:
        path: the file; an existing one is replaced.
        mode: "w" for UTF-8 text, "wb" for bytes.
    """
    path = os.fspath(path)
    if is_remote(path):
        content = io.BytesIO()
        if "b" in mode:
            yield content
        else:
            text = io.TextIOWrapper(content, encoding="utf-8", newline="\n", write_through=True)
            yield text
        remote.replace(path, content.getvalue())
        return
    with atomic_file(path) as new:
        with open(new, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file


def write_json(path: str, value, *, indent: int | None = 1) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


@contextlib.contextmanager
def atomic_folder(path: str, *, last: str = "") -> Iterator[str]:
    """Yields an empty temporary folder; it is renamed to `path` if the block does not raise.

    An existing folder `path` is replaced, with two renames. The temporary folder is always
    .NAME.new in the same parent, so that the next writer finds what a killed process left there.
    If it was killed between the renames, `recover_folder` gives the earlier folder its name back.
    If `path` is a symbolic link, the folder that it leads to is replaced, and the link stays.

    On object storage the temporary folder is a local one. It is uploaded to .NAME.new and then
    moved, file by file. If that is interrupted, `recover_folder` completes it.

    Args:
        path: the folder.
        last: name of the file that tells the folder's readers that it is complete; it is written
            last where there is no rename.
    """
    temporary = _temporary_folder(path)
    recover_folder(path, last=last)
    if is_remote(path):
        with temporary_folder("upload-") as new:
            yield new
            remote.replace_folder(new, absolute(path), temporary, last)
        return
    path = os.path.realpath(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        new = os.path.join(temporary, "new")
        os.makedirs(new)
        yield new
        if os.path.exists(path):
            os.replace(path, os.path.join(temporary, OLD))
        os.replace(new, path)
    finally:
        recover_folder(path)
        shutil.rmtree(temporary, ignore_errors=True)


def can_recover(path: str) -> bool:
    """Whether `atomic_folder` was interrupted and may have left a part of the folder `path`."""
    return is_remote(path) and remote.can_finish(_temporary_folder(path))


def recover_folder(
    path: str, *, last: str = "", log: Callable[[str], object] = lambda line: None
) -> bool:
    """Repairs the folder `path` if `atomic_folder` was interrupted; see there for `last`.

    Call it only where no other process writes the folder.

    Args:
        path: the folder.
        last: see `atomic_folder`.
        log: receives a line if it cannot be repaired.

    Returns:
        Whether there was something to repair.
    """
    if is_remote(path):
        return remote.finish_folder(absolute(path), _temporary_folder(path), last, log)
    old = os.path.join(_temporary_folder(path), OLD)
    if os.path.exists(path) or not os.path.exists(old):
        return False
    os.replace(old, os.path.realpath(path))
    return True


def _temporary_folder(path: str) -> str:
    if not is_remote(path):
        path = os.path.realpath(path)
    return os.path.join(parent(path), f".{os.path.basename(absolute(path))}{NEW}")


@contextlib.contextmanager
def locked(
    folder: str,
    flag: str,
    *,
    wait: bool = False,
    waiting: Callable[[str], object] = lambda holder: None,
    log: Callable[[str], object] = LOGGER.warning,
) -> Iterator[Callable[[], None]]:
    """Holds the folder's lock during the block; yields a function that checks that it is held.

    The lock is `flock` on FOLDER/.lock. The kernel releases it when the process ends, also after
    `kill -9`, so a leftover file has no effect. On NFS, Linux asks the server, so the lock holds
    between machines; mounts with `nolock` or `local_lock` restrict it to one machine.

    On object storage the lock is a lease, which other processes may take over from one that was
    suspended: see `inputs.storage.lease`. The function that is yielded raises `LeaseLost` then.
    Call it before a write. For a local folder it does nothing.

    Args:
        folder: an existing folder.
        flag: the flag that named the folder, for the error message.
        wait: if True, waits until the lock is free.
        waiting: called before a wait, with the process that holds the lock and its machine.
        log: receives a warning if the file system has no locks; the block still runs.

    Raises:
        InputError: the folder is not writable; or another process holds the lock and `wait` is
            False. The message names that process and its machine.
    """
    if is_remote(folder):
        path = os.path.join(absolute(folder), LOCK)
        with lease.held(path, flag, wait=wait, log=log) as check:
            yield check
        return
    try:
        file = open(os.path.join(folder, LOCK), "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{flag}: {folder} cannot be written: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                raise InputError(
                    f"{flag}: {folder} is in use by {holder}. Let it end, stop it, or choose "
                    "another folder."
                ) from None
            waiting(holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log(
                f"{folder} cannot be locked ({error.strerror}): make sure that no other process "
                "writes there."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield lambda: None


def cache_folder() -> str:
    """~/.cache/tf_lamb, or a temporary folder for a user without a home folder."""
    folder = os.path.expanduser("~/.cache/tf_lamb")
    if folder.startswith("~"):  # HOME is not set, and the user has no entry in /etc/passwd
        return os.path.join(tempfile.gettempdir(), f"tf_lamb-{os.getuid()}")
    return folder


def first_writable(folders: list[str], flag: str, fix: str) -> str:
    """The first folder that can be written and locked; it is created if it is missing.

    Args:
        folders: paths, in order of preference.
        flag: the flag that named the first one, for the error message.
        fix: what to do, for the error message.

    Raises:
        InputError: none can be written.
    """
    reasons = []
    for folder in folders:
        try:
            if is_remote(folder):
                _try_to_write(folder)
                return folder
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder), open(os.path.join(folder, LOCK), "a"):
                return folder
        except OSError as error:
            reasons.append(f"{folder} cannot be written ({error.strerror})")
    raise InputError(f"{flag}: {', and '.join(reasons)}. {fix}")


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """Yields a new folder in the system's temporary folder, and removes it after the block.

    Raises:
        InputError: the folder cannot be created.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"no temporary folder can be made ({error.strerror or error}). Set the environment "
            "variable TMPDIR to a folder on a disk with free space."
        ) from None
    with folder as path:
        yield path


def check_file_writable(path: str, flag: str) -> None:
    """Checks that a file can be written, before the work whose result it will hold.

    Raises:
        InputError: there is no such folder, it cannot be written, or the path is that of a folder.
            The message starts with `flag`.
    """
    folder = parent(path)
    if not is_remote(path) and not is_folder(folder):
        raise InputError(f"{flag}: there is no folder {folder}. Create it first.")
    check_writable(folder, flag)
    if is_folder(path):
        raise InputError(f"{flag}: {path} is a folder. Give the name of a file.")


def check_checkpoint_path(path: str, flag: str) -> None:
    """Checks that TensorFlow can read checkpoints below a path, or with it as their prefix.

    Its readers match the path as a pattern, in which `[...]` and a backslash do not stand for
    themselves. It writes checkpoints to such a path that it cannot read again.

    Raises:
        InputError: it cannot. The message starts with `flag`.
    """
    if re.search(r"\[[^/]*\]|\\", absolute(path)):
        raise InputError(
            f"{flag}: TensorFlow cannot read checkpoints from {absolute(path)}, because it takes "
            "brackets and backslashes in a path for a pattern. Choose a folder without them."
        )


def check_writable(folder: str, flag: str) -> None:
    """Checks that a folder can be written; it is created if it is missing.

    Raises:
        InputError: the folder cannot be created or written, its name is not UTF-8, or slashes are
            missing after its scheme. The message starts with `flag`.
    """
    refuse_misspelled(os.fspath(folder), flag)
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{flag}: the name {os.fspath(folder)!r} is not UTF-8, or the locale, whose encoding "
            f"is {sys.getfilesystemencoding()}, cannot decode it. Set LC_ALL=C.UTF-8, or choose "
            "another folder."
        ) from None
    try:
        _try_to_write(folder)
    except OSError as error:
        reason = error.strerror
        if not is_remote(folder) and os.path.islink(folder) and not os.path.exists(folder):
            reason = f"it is a link to {os.path.realpath(folder)}, which does not exist"
        raise InputError(
            f"{flag}: {folder} cannot be written ({reason}). Choose another folder."
        ) from None


def _try_to_write(folder: str) -> None:
    """Creates a folder if it is missing, and writes and deletes a file in it."""
    make_folder(folder)
    if not is_remote(folder):
        with tempfile.TemporaryFile(dir=folder):
            return
    probe = os.path.join(folder, f".probe-{socket.gethostname()}-{os.getpid()}")
    remote.upload(probe, b"")
    remote.remove(probe)


def read_bytes(path: str, *, flag: str = "", fix: str = "") -> bytes:
    """The content of a file.

    Args:
        path: the file.
        flag: the flag that named it, for the error message.
        fix: what to do about it, for the error message.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return read_file(path)
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror})", flag, fix) from None


def read_json(path: str, *, flag: str = "", fix: str = "") -> Any:
    """The content of a JSON file.

    See `read_bytes` for the arguments.

    Raises:
        InputError: the file cannot be read, or is not JSON in UTF-8.
    """
    try:
        return json.loads(read_file(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, f"cannot be read as JSON ({error})", flag, fix) from None


def read_file(path: str) -> bytes:
    """The content of a file that `atomic_write` or another program wrote.

    Raises:
        OSError: it cannot be read.
    """
    if is_remote(path):
        return remote.read(path)
    with open(path, "rb") as file:
        return file.read()


def _unreadable(path, problem, flag, fix):
    return InputError(f"{flag}: {path} {problem}. {fix}".removeprefix(": ").rstrip())
