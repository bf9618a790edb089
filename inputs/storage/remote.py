"""Objects at paths with a scheme (gs://, ram://, ...), through `tf.io.gfile`.

What is relied on: reading, writing and deleting an object by its name; a read returns the newest
content. What is not: listings are current, a rename is atomic, an append is cheap, or an object
that was not written to its end is invisible. (`gs://` shows an object only when its upload is
complete; other file systems of TensorFlow show its beginning.)

Errors are raised as `OSError`, as for local files. Only the first call imports TensorFlow.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
RAM = "ram://"  # TensorFlow's file system in memory, for tests
JOURNAL = ".new"  # suffix of the copy that `replace` writes first
PLAN = "complete.json"  # in a staged folder: name -> bytes of each file
DIGEST = 32  # bytes of a SHA-256, at the end of that copy
CHUNK = 2**20  # bytes of one read
CREDENTIALS = (
    "run `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS to a key "
    "file, or give the machine's service account the right to read and write objects"
)


def is_remote(path) -> bool:
    """Whether a path has a scheme."""
    return SCHEME.match(os.fspath(path)) is not None


def gfile():
    """`tf.io.gfile`. Imported here, because local files need no TensorFlow, which takes seconds."""
    import tensorflow as tf

    return tf.io.gfile


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Raises an error of TensorFlow in the block as an `OSError` whose `strerror` explains it."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        number, reason = _explain(path, error, tf.errors)
        raise OSError(number, reason, path) from error


def _explain(path: str, error, errors) -> tuple[int, str]:
    """(errno, text) of an error of TensorFlow."""
    lines = (error.message or type(error).__name__).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    scheme = SCHEME.match(path)
    if isinstance(error, errors.UnimplementedError) and "scheme" in reason and scheme:
        known = sorted(f"{name}://" for name in gfile().get_registered_schemes() if name)
        return errno.EOPNOTSUPP, (
            f"this TensorFlow has no file system for {scheme[0]}, only for {', '.join(known)}"
        )
    if isinstance(error, errors.NotFoundError):
        return errno.ENOENT, os.strerror(errno.ENOENT)
    if isinstance(error, errors.AlreadyExistsError):
        return errno.EEXIST, os.strerror(errno.EEXIST)
    if os.strerror(errno.ENOSPC) in reason:
        return errno.ENOSPC, os.strerror(errno.ENOSPC)
    denied = errors.PermissionDeniedError, errors.UnauthenticatedError
    if isinstance(error, denied) or re.search(r"\b40[13]\b", reason):
        advice = f": {CREDENTIALS}" if scheme and scheme[1] == "gs" else ""
        return errno.EACCES, f"no access, {reason}{advice}"
    return errno.EIO, reason


def exists(path: str) -> bool:
    """Whether there is an object or a folder of this name."""
    with os_errors(path):
        return gfile().exists(path) and not _is_only_a_prefix(path)


def is_folder(path: str) -> bool:
    """Whether there are objects below this name."""
    with os_errors(path):
        if not gfile().isdir(path):
            gfile().exists(path)  # unlike `isdir`, it raises if the storage cannot be asked
            return False
        return not _is_only_a_prefix(path)


def _is_only_a_prefix(path: str) -> bool:
    """Whether `path` only begins the name of another object, which ram:// takes for a folder."""
    folder, _, name = path.rstrip("/").rpartition("/")
    if not path.startswith(RAM) or f"{folder}/" == RAM or not gfile().isdir(path):
        return False
    return not gfile().isdir(folder) or name not in gfile().listdir(folder)


def _is_end_of_another(folder: str, name: str) -> bool:
    """Whether ram:// takes the end of a name for one in `folder`: "b" in a folder "a" for "ab"."""
    if not folder.startswith(RAM) or not gfile().exists(folder.rstrip("/") + name):
        return False
    return not gfile().exists(os.path.join(folder, name))


def stat(path: str):
    """Has the attributes `length`, in bytes, and `mtime_nsec`."""
    with os_errors(path):
        return gfile().stat(path)


def make_folder(path: str) -> None:
    """Creates a folder, and those above it, unless they exist."""
    with os_errors(path):
        gfile().makedirs(path)


def list_folder(path: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of all entries, by name.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    with os_errors(path):
        names = [name for name in gfile().listdir(path) if not _is_end_of_another(path, name)]
        # gs:// marks folders, so that they need no request each.
        marked = path.startswith("gs://")
        entries = {
            name.rstrip("/"): name.endswith("/")
            or (not marked and gfile().isdir(os.path.join(path, name)))
            for name in names
        }
    return sorted((name, folder) for name, folder in entries.items() if name)


def list_tree(path: str) -> list[str]:
    """The names of all objects below a folder, relative to it, sorted."""
    found, folders = [], [""]
    while folders:
        below = folders.pop()
        for name, folder in list_folder(os.path.join(path, below) if below else path):
            (folders if folder else found).append(os.path.join(below, name))
    return sorted(found)


def remove(path: str) -> None:
    """Deletes an object; does nothing if there is none."""
    with contextlib.suppress(FileNotFoundError), os_errors(path):
        gfile().remove(path)


def remove_tree(path: str) -> None:
    """Deletes all objects below a name; does nothing if there are none."""
    with contextlib.suppress(FileNotFoundError), os_errors(path):
        gfile().rmtree(path)


def copy(source: str, target: str) -> None:
    """Copies an object on the same storage.

    Raises:
        OSError: it could not be copied, or not completely.
    """
    if target.startswith(RAM):
        remove(target)  # it would append
    with os_errors(source):
        gfile().copy(source, target, overwrite=True)
    if stat(source).length != stat(target).length:
        raise OSError(errno.EIO, f"{source} was not copied completely", target)


def move(source: str, target: str) -> None:
    """Copies an object and deletes it, in that order, which is not atomic."""
    with os_errors(source):
        gfile().rename(source, target, overwrite=True)


class _Reader(io.RawIOBase):
    """A `GFile` as Python's own readers (`io`, `gzip`, `tarfile`) expect a file."""

    def __init__(self, path: str, file):
        super().__init__()
        self.name = path
        self._file = file

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        with os_errors(self.name):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset, whence=os.SEEK_SET):
        with os_errors(self.name):
            self._file.seek(offset, whence)
            return self._file.tell()

    def tell(self):
        with os_errors(self.name):
            return self._file.tell()

    def close(self):
        self._file.close()
        super().close()


def open_reader(path: str) -> io.BufferedReader:
    """Opens an object for reading bytes.

    Raises:
        OSError: it cannot be read.
    """
    reader = io.BufferedReader(_Reader(path, gfile().GFile(path, "rb")), CHUNK)
    try:
        reader.peek(1)  # gs:// looks for the object only now
    except BaseException:
        reader.close()
        raise
    return reader


def open_sparse(path: str, size: int) -> io.RawIOBase:
    """Opens an object of which parts of `size` bytes are read.

    To go to a part, TensorFlow reads the byte before it. Nothing else is read: that was measured on
    file://, and never on gs://, of which TensorFlow reads blocks of 64 MiB unless
    GCS_READ_CACHE_BLOCK_SIZE_MB=0 is set before it is imported.

    Raises:
        OSError: it cannot be read.
    """
    # A `GFile` reads 512 KiB at a time, and has no public argument for it (2.20).
    from tensorflow.python.lib.io import _pywrap_file_io

    file = gfile().GFile(path, "rb")
    with os_errors(path):
        file._read_buf = _pywrap_file_io.BufferedInputStream(path, size)
    return _Reader(path, file)


def upload(path: str, data) -> None:
    """Writes an object: bytes, or a binary file from its position on. Not atomic.

    Raises:
        OSError: it could not be written, or has another size than what was written.
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    size = 0
    if path.startswith(RAM):
        remove(path)  # it would append
    with os_errors(path):
        with gfile().GFile(path, "wb") as file:
            while chunk := source.read(CHUNK):
                file.write(chunk)
                size += len(chunk)
            if not size:
                file.write(b"")  # otherwise no object is made
        found = gfile().stat(path).length
    if found != size:
        raise OSError(errno.EIO, f"{found} of {size} bytes were written", path)


def replace(path: str, data: bytes) -> None:
    """Writes an object such that `read` finds the old content or the new one, never a part.

    A copy is written first, with its SHA-256 at the end, and deleted last. Two processes must not
    replace the same object at a time.
    """
    upload(path + JOURNAL, data + hashlib.sha256(data).digest())
    upload(path, data)
    remove(path + JOURNAL)


def read(path: str) -> bytes:
    """The content of an object; if `replace` was interrupted, the new content if it is complete.

    Raises:
        OSError: there is no such object, or it cannot be read.
    """
    with contextlib.suppress(FileNotFoundError), open_reader(path + JOURNAL) as file:
        copy = file.read()
        data, digest = copy[:-DIGEST], copy[-DIGEST:]
        if hashlib.sha256(data).digest() == digest:
            return data
    with open_reader(path) as file:
        return file.read()


def replace_folder(source: str, path: str, staging: str, last: str = "") -> None:
    """Replaces a folder of objects by a copy of a local folder.

    All files are uploaded to `staging`; then a list of them, at whose presence `finish_folder` can
    complete the replacement; then they are moved to `path`.

    Args:
        source: local folder.
        path: the folder that is replaced.
        staging: a folder for the upload, on the same file system as `path`.
        last: name of the file that tells the folder's readers that it is complete. It is removed
            first and written last.
    """
    _discard(staging)
    sizes = {}
    for folder, _, names in sorted(os.walk(source)):
        make_folder(staging + folder.removeprefix(source))
        for name in sorted(names):
            file = os.path.join(folder, name)
            below = os.path.relpath(file, source)
            with open(file, "rb") as opened:
                upload(os.path.join(staging, below), opened)
            sizes[below] = os.path.getsize(file)
    replace(os.path.join(staging, PLAN), json.dumps(sizes).encode())
    if not finish_folder(path, staging, last):
        raise OSError(errno.EIO, f"what was written to {staging} is not there", path)


def can_finish(staging: str) -> bool:
    """Whether a staged folder has its list of files, so that `finish_folder` looks for them."""
    return _plan(staging) is not None


def _plan(staging: str) -> dict[str, int] | None:
    try:
        return json.loads(read(os.path.join(staging, PLAN)))
    except (FileNotFoundError, ValueError):
        return None


def finish_folder(
    path: str, staging: str, last: str = "", log: Callable[[str], object] = lambda line: None
) -> bool:
    """Completes a `replace_folder` that was interrupted; see there for the arguments.

    Args:
        log: receives a line if it cannot be completed, because files were deleted since then.

    Returns:
        Whether there was something to complete. If not, what is in `staging` is removed.
    """
    sizes = _plan(staging)
    if sizes is None:
        _discard(staging)
        return False
    for name, size in sizes.items():
        if size not in (_size(os.path.join(folder, name)) for folder in (staging, path)):
            _discard(staging)
            log(
                f"{path}: its replacement was interrupted and cannot be completed, because {name} "
                "was deleted since then"
            )
            return False
    if last and exists(os.path.join(staging, last)):
        remove(os.path.join(path, last))
    for name in sorted(sizes, key=lambda name: (name == last, name)):
        if name == last:
            _remove_others(path, sizes)
        target = os.path.join(path, name)
        if exists(os.path.join(staging, name)):
            make_folder(os.path.dirname(target))
            move(os.path.join(staging, name), target)
        if stat(target).length != sizes[name]:
            raise OSError(errno.EIO, f"{target} was not moved from {staging} completely", path)
    _remove_others(path, sizes)
    _discard(staging)
    return True


def _discard(staging: str) -> None:
    """Deletes a staged folder. Its list by name: an old listing may not show it, or its copy."""
    for name in (PLAN + JOURNAL, PLAN):
        remove(os.path.join(staging, name))
    remove_tree(staging)


def _size(path: str) -> int | None:
    try:
        return stat(path).length
    except FileNotFoundError:
        return None


def _remove_others(path: str, names) -> None:
    with contextlib.suppress(FileNotFoundError):
        for name in list_tree(path):
            if name not in names:
                remove(os.path.join(path, name))
