"""Object storage at its worst, between `inputs.storage.remote` and `tf.io.gfile`.

    with faulty_storage(monkeypatch) as storage:
        storage.kill_at(17)  # the 17th operation from now on does a half of its work, and no more

A write shows its first half before it is complete. A listing may be an earlier one of the folder,
as it was when the storage was put in place or since then. A rename is a copy and a delete. Reads
are slow. After a kill every operation raises `Killed`, as a process that has been killed does
nothing more; `restart` ends that.
"""

import contextlib
import random
import time

import tensorflow as tf

from inputs.storage import lease, remote


class Killed(BaseException):
    """Stands for the end of the process."""


class FaultyStorage:
    """Has the functions of `tf.io.gfile` that `inputs.storage.remote` calls.

    Args:
        seed: of which listings are stale and which reads are slow.
        stale: share of the listings that are out of date.
        slow: share of the operations that take 2 ms longer.
        failing: share of the writes that end with an error of the storage after a half.
    """

    def __init__(self, seed=0, stale=0.5, slow=0.05, failing=0.0):
        self._rng = random.Random(seed)
        self._stale = stale
        self._slow = slow
        self.failing = failing
        self._listings: dict[str, list[list[str]]] = {}
        self._left: int | None = None
        self._dead = False
        self.operations = 0
        self.writes: list[str] = []  # the names of all objects written

    def kill_at(self, operation: int) -> None:
        """Kills the process in an operation, counted from 1 from now on."""
        self._left = operation

    def restart(self) -> None:
        """A new process: operations work again."""
        self._left, self._dead = None, False

    def step(self) -> bool:
        """Counts an operation; returns whether the process is killed in the middle of it."""
        if self._dead:
            raise Killed
        self.operations += 1
        if self._rng.random() < self._slow:
            time.sleep(0.002)
        if self._left is not None:
            self._left -= 1
            self._dead = self._left <= 0
        return self._dead

    def __getattr__(self, name):
        function = getattr(tf.io.gfile, name)

        def call(*arguments, **named):
            if self.step():
                raise Killed
            return function(*arguments, **named)

        return call

    def get_registered_schemes(self):
        return tf.io.gfile.get_registered_schemes()

    def listdir(self, path):
        if self.step():
            raise Killed
        names = tf.io.gfile.listdir(path)
        seen = self._listings.setdefault(path.rstrip("/"), [names])
        if seen[-1] != names:
            seen.append(names)
        stale = self._rng.random() < self._stale
        return seen[-2] if stale and len(seen) > 1 else names

    def begin_change(self, path):
        """Keeps what the folder of `path` holds now, which a later listing may show."""
        folder = path.rstrip("/").rpartition("/")[0]
        if folder not in self._listings:
            there = tf.io.gfile.isdir(folder)
            self._listings[folder] = [tf.io.gfile.listdir(folder) if there else []]

    def rename(self, source, target, overwrite=False):
        with tf.io.gfile.GFile(source, "rb") as file:
            data = file.read()
        with self.GFile(target, "wb") as file:
            file.write(data)
        self.remove(source)

    def GFile(self, path, mode):
        if "w" in mode:
            self.begin_change(path)
            return _Writer(self, path)
        if self.step():
            raise Killed
        return tf.io.gfile.GFile(path, mode)

    def fails(self) -> bool:
        """Whether a write ends with an error of the storage."""
        return self._rng.random() < self.failing


class _Writer:
    def __init__(self, storage, path):
        self._storage = storage
        self._path = path
        self._data = b""

    def write(self, data):
        self._data += data

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        killed, failed = self._storage.step(), self._storage.fails()
        self._storage.writes.append(self._path)
        half = killed or failed or kind
        with contextlib.suppress(tf.errors.NotFoundError):
            tf.io.gfile.remove(self._path)  # ram:// would append
        with tf.io.gfile.GFile(self._path, "wb") as file:
            file.write(self._data[: len(self._data) // 2] if half else self._data)
        if killed:
            raise Killed
        if failed:
            raise tf.errors.UnavailableError(None, None, "the storage does not answer")


def lease_times(monkeypatch, heartbeat=600.0, stale=0.05, settle=0.0, poll=0.01):
    """Sets the times of leases, in seconds; by default they are short and not renewed."""
    times = {"HEARTBEAT": heartbeat, "STALE": stale, "SETTLE": settle, "POLL": poll}
    for name, seconds in times.items():
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)


@contextlib.contextmanager
def faulty_storage(monkeypatch, **arguments):
    """Yields a `FaultyStorage`, put under `inputs.storage.remote` and TensorFlow's checkpoints."""
    storage = FaultyStorage(**arguments)
    write = tf.train.Checkpoint.write

    def write_checkpoint(checkpoint, prefix, options=None):
        if not remote.is_remote(prefix):
            return write(checkpoint, prefix, options)
        storage.begin_change(prefix)
        killed, index = storage.step(), random.Random(storage.operations).random() < 0.5
        written = write(checkpoint, prefix, options)
        if killed:  # while TensorFlow wrote: there is a half, with or without an index
            remove = [f"{prefix}.data-00000-of-00001", *([] if index else [f"{prefix}.index"])]
            for path in remove:
                tf.io.gfile.remove(path)
            with tf.io.gfile.GFile(remove[0], "wb") as file:
                file.write(b"half")
            raise Killed
        return written

    with monkeypatch.context() as patch:
        patch.setattr(remote, "gfile", lambda: storage)
        patch.setattr(tf.train.Checkpoint, "write", write_checkpoint)
        yield storage
