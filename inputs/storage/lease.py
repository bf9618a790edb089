"""A lease: the lock of a folder on object storage, where there are no file locks.

The lease is the object FOLDER/.lock. Its owner rewrites it every `HEARTBEAT_SECONDS`. Another
process takes it over after it did not change for `STALE_SECONDS`, or at once if the owner ran on
this machine and has ended, or if the lease is older than `OLD_SECONDS` by this machine's clock.

TensorFlow offers no atomic create-if-absent on object storage. Two processes that start within
`SETTLE_SECONDS` detect each other, because each reads the lease again after that time. If a write
takes longer than that, both continue until one of them calls
`Lease.check`, which is done before each write of a run. A process that was suspended between such a
check and its write still writes.
"""

import contextlib
import json
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from inputs.errors import InputError
from inputs.storage import remote

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 120.0  # several heartbeats, as one may fail or take long
OLD_SECONDS = 900.0  # more than clocks of two machines differ
SETTLE_SECONDS = 2.0
POLL_SECONDS = 2.0
DISK_LOCK = re.compile(rb"process \d+ on ")  # what `files.locked` writes on a disk; no lease


class LeaseLost(InputError):
    """Another process has taken over the folder, so this one must not write there any more."""


class Lease:
    """A lease that this process holds; see `held`.

    Args:
        path: of the object.
        flag: the flag that named the folder, for messages.
    """

    def __init__(self, path: str, flag: str):
        self._path = path
        self._flag = flag
        self._facts = {"owner": uuid.uuid4().hex} | _this_process()
        self._ended = threading.Event()
        self._beat = threading.Lock()
        self._failed = b""  # what a write that failed may have left a part of

    def take(self) -> None:
        """Writes the lease, and waits to see whether another process has done so, too.

        Raises:
            InputError: another process has.
        """
        before = _read(self._path)
        try:
            self._write()
        except OSError:
            content = _read(self._path)
            if content in (None, before) or self._is_own(content):
                raise
            # Another process wrote at the same time, and the object has the size of its lease.
            raise _in_use(self._path, self._flag, content) from None
        time.sleep(SETTLE_SECONDS)
        content = _read(self._path)
        if not self._is_own(content):
            raise _in_use(self._path, self._flag, content)

    def check(self) -> None:
        """Raises `LeaseLost` if this process does not hold the lease any more, or it was deleted.

        Raises:
            LeaseLost: see above.
            OSError: the lease cannot be read.
        """
        with self._beat:
            content = _read(self._path)
        if content is None:
            raise LeaseLost(
                f"{self._flag}: {self._path} was deleted during the run, so nothing keeps other "
                "processes from writing there. This one stops."
            )
        if not self._is_own(content):
            raise LeaseLost(
                f"{self._flag}: {os.path.dirname(self._path)} was taken over by "
                f"{_describe(content)}, because this process did not renew its lease for "
                f"{STALE_SECONDS:g} s. It stops."
            )

    def keep(self) -> None:
        """Renews the lease until `release`; runs in a thread."""
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with self._beat, contextlib.suppress(OSError):  # the next beat tries again
                if self._ended.is_set():
                    return
                if not self._is_own(_read(self._path)):
                    return  # `check` says so
                self._write()

    def release(self) -> None:
        """Ends `keep`, and removes the lease if it is this process's."""
        self._ended.set()
        with self._beat, contextlib.suppress(OSError):  # otherwise it becomes stale
            if self._is_own(_read(self._path)):
                remote.remove(self._path)

    def _write(self) -> None:
        self._failed = json.dumps(self._facts | {"time": time.time()}).encode()
        remote.upload(self._path, self._failed)
        self._failed = b""

    def _is_own(self, content: bytes | None) -> bool:
        if content is not None and self._failed.startswith(content):
            return bool(self._failed)
        return _parse(content).get("owner") == self._facts["owner"]


@contextlib.contextmanager
def held(
    path: str, flag: str, *, wait: bool, log: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Holds the lease at `path` during the block; yields `Lease.check`.

    Args:
        path: of the object, in an existing folder.
        flag: the flag that named the folder, for messages.
        wait: whether to wait for a process that renews its lease.
        log: receives a line if there is a lease that may be stale.

    Raises:
        InputError: another process holds the lease and `wait` is False; or the lease cannot be
            written.
    """
    lease = Lease(path, flag)
    try:
        _take_when_free(lease, path, flag, wait, log)
    except BaseException as error:
        lease.release()  # or what an interrupted write left would keep the next process waiting
        if isinstance(error, OSError):
            folder = os.path.dirname(path)
            raise InputError(f"{flag}: {folder} cannot be written: {error.strerror}.") from None
        raise
    heartbeat = threading.Thread(target=lease.keep, daemon=True)
    heartbeat.start()
    try:
        yield lease.check
    finally:
        lease.release()
        heartbeat.join()


def _take_when_free(lease, path, flag, wait, log) -> None:
    while True:
        _wait_until_free(path, flag, wait, log)
        try:
            lease.take()
            return
        except InputError:  # of several processes that found it free, another one has it
            if not wait:
                raise


def _wait_until_free(path, flag, wait, log) -> None:
    """Returns when there is no lease, or it is stale."""
    content = _read(path)
    since = time.monotonic()
    if content is None or _is_over(content):
        return
    log(
        f"{flag}: {os.path.dirname(path)} has a lease of {_describe(content)}. Waiting, for at "
        f"most {STALE_SECONDS:g} s, whether it is still renewed"
    )
    while time.monotonic() - since < STALE_SECONDS:
        time.sleep(POLL_SECONDS)
        now = _read(path)
        if now is None:  # or it is just being written, on a file system where that deletes it first
            time.sleep(POLL_SECONDS)
            now = _read(path)
        if now is None or _is_over(now):
            return
        if now != content and not wait:
            raise _in_use(path, flag, now)
        if now != content:
            content = now
            since = time.monotonic()


def _read(path: str) -> bytes | None:
    try:
        with remote.open_reader(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def _parse(content: bytes | None) -> dict:
    """The facts in a lease; {} if it is not complete."""
    with contextlib.suppress(ValueError):
        facts = json.loads(content or b"{}")
        return facts if isinstance(facts, dict) else {}
    return {}


def _describe(content: bytes | None) -> str:
    facts = _parse(content)
    if "pid" not in facts:
        return "another process"
    return f"process {facts['pid']} on {facts.get('host', 'another machine')}"


def _in_use(path, flag, content) -> InputError:
    return InputError(
        f"{flag}: {os.path.dirname(path)} is in use by {_describe(content)}. Let it end, stop it, "
        "or choose another folder."
    )


def _is_over(content: bytes) -> bool:
    """Whether the owner has certainly ended, or this is a lock that was copied from a disk."""
    if DISK_LOCK.match(content):
        return True
    facts = _parse(content)
    own = _this_process()
    if own["boot"] and facts.get("boot") == own["boot"] and isinstance(facts.get("pid"), int):
        return _start_of(facts["pid"]) != facts.get("start")
    age = time.time() - facts["time"] if isinstance(facts.get("time"), int | float) else 0
    return age > OLD_SECONDS


def _this_process() -> dict:
    """Facts that identify this process: where `boot` is equal, process numbers can be compared."""
    boot = ""
    with contextlib.suppress(OSError):
        started = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        boot = f"{started} {os.readlink('/proc/self/ns/pid')}"
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "start": _start_of(pid), "boot": boot}


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the boot; None if it has ended."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # after a kill, until its parent waits for it
