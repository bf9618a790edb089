"""Operations on files and folders: walks, atomic writes, locks, and reads with clear errors."""

import collections
import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

from inputs.errors import InputError

LOCK = ".lock"
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


def list_folder(
    folder: str, flag: str, passed_over: PassedOver | None = None
) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
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
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if is_left_over(entry.name):
                    if passed_over is not None:
                        passed_over["hidden"] += 1
                    continue
                try:
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                except OSError:  # a link that leads to itself
                    is_folder = is_file = False
                if is_folder:
                    folders.append(entry)
                elif is_file or not os.path.exists(entry.path):  # reading a broken link fails later
                    files.append(entry)
                elif passed_over is not None:
                    passed_over["device or pipe"] += 1
    except OSError as error:
        raise _unreadable(folder, f"cannot be read ({error.strerror})", flag, "") from None
    return folders, files


def walk(
    top: str,
    flag: str,
    passed_over: PassedOver | None = None,
    *,
    enter: Callable[[str], bool] = lambda folder: True,
) -> Iterator[os.DirEntry]:
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
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        below, files = list_folder(folder, flag, passed_over)
        yield from files
        for entry in below:
            if enter(entry.path):
                (links if entry.is_symlink() else folders).append(entry.path)


def file_state(path: str) -> tuple[int, int]:
    """Returns (size in bytes, modification time in ns) of a file, to notice that it was changed.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[str]:
    """Yields a temporary path to write to; the file is renamed to `path` on success.

    If the block raises, the temporary file is removed and `path` is not changed. The temporary path
    is always PATH.new, so that the next writer replaces what a killed process left there.
    """
    path = os.fspath(path)
    try:
        yield path + NEW
        os.replace(path + NEW, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(path + NEW)


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file for writing, and renames it to `path` if the block does not raise.

    Args:
        path: the file; an existing one is replaced.
        mode: "w" for UTF-8 text, "wb" for bytes.
    """
    with atomic_file(path) as new:
        with open(new, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file


def write_json(path: str, value, *, indent: int | None = 1) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """Yields an empty temporary folder; it is renamed to `path` if the block does not raise.

    An existing folder `path` is replaced, with two renames. The temporary folder is always
    .NAME.new in the same parent, so that the next writer finds what a killed process left there.
    If it was killed between the renames, `recover_folder` gives the earlier folder its name back.
    """
    temporary = _temporary_folder(path)
    recover_folder(path)
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


def recover_folder(path: str) -> bool:
    """Restores the folder `path` if `atomic_folder` was interrupted between its two renames.

    Call it only where no other process writes the folder.

    Returns:
        Whether there was something to restore.
    """
    old = os.path.join(_temporary_folder(path), OLD)
    if os.path.exists(path) or not os.path.exists(old):
        return False
    os.replace(old, path)
    return True


def _temporary_folder(path: str) -> str:
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(parent, f".{name}{NEW}")


@contextlib.contextmanager
def locked(
    folder: str,
    flag: str,
    *,
    wait: bool = False,
    waiting: Callable[[str], object] = lambda holder: None,
    log: Callable[[str], object] = LOGGER.warning,
) -> Iterator[None]:
    """Holds the folder's lock during the block.

    The lock is `flock` on FOLDER/.lock. The kernel releases it when the process ends, also after
    `kill -9`, so a leftover file has no effect. On NFS, Linux asks the server, so the lock holds
    between machines; mounts with `nolock` or `local_lock` restrict it to one machine.

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
        yield


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


def check_writable(folder: str, flag: str) -> None:
    """Checks that a folder can be written; it is created if it is missing.

    Raises:
        InputError: the folder cannot be created or written, or its name is not UTF-8. The message
            starts with `flag`.
    """
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{flag}: the name {os.fspath(folder)!r} is not UTF-8, or the locale, whose encoding "
            f"is {sys.getfilesystemencoding()}, cannot decode it. Set LC_ALL=C.UTF-8, or choose "
            "another folder."
        ) from None
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{flag}: {folder} cannot be written ({error.strerror}). Choose another folder."
        ) from None


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
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror})", flag, fix) from None


def read_json(path: str, *, flag: str = "", fix: str = "") -> Any:
    """The content of a JSON file.

    See `read_bytes` for the arguments.

    Raises:
        InputError: the file cannot be read, or is not JSON in UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, f"cannot be read as JSON ({error})", flag, fix) from None


def _unreadable(path, problem, flag, fix):
    return InputError(f"{flag}: {path} {problem}. {fix}".removeprefix(": ").rstrip())
