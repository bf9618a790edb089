"""Measures the memory that this process can still allocate, within the limits of a container."""

import dataclasses
import errno
import os
import pathlib
import resource
import signal

GIB = 2**30
MINIMUM = 1 * GIB  # TensorFlow and a small model with its data


def free_memory(root: str = "/") -> int | None:
    """The bytes that can be allocated before the kernel kills the process; None if unknown.

    This is the minimum of the machine's available memory and, for the process's control group and
    each of its ancestors, the limit minus the usage. Container runtimes set these limits. Control
    groups v1 and v2 are supported. Inactive cached file contents count as free, because the kernel
    reclaims them first.

    Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html ("Memory Interface Files") and
    https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.

    Args:
        root: folder that contains proc/ and sys/; tests pass another one.
    """
    base = pathlib.Path(root)
    known = [_available(base / "proc/meminfo"), *_groups(base)]
    return min((amount for amount in known if amount is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit of this process, which the shell or a batch system set. Child processes inherit it.

    Memory that is reserved and not used counts, too.

    Attributes:
        command: the shell's command for it, such as "ulimit -v".
        kind: what it limits.
        minimum: bytes that TensorFlow and a small model with its data take of it.
        size: bytes.
        free: bytes that this process may still reserve.
    """

    command: str
    kind: str
    minimum: int
    size: int
    free: int

    @property
    def is_tight(self) -> bool:
        """Whether a process of its own is allowed less than TensorFlow and a small model take."""
        return self.size < self.minimum

    def __str__(self):
        return f"`{self.command}` allows each process {self.size / GIB:.1f} GiB of {self.kind}"


# Of each limit: the fields of `Limit`, the resource, and which number of /proc/self/statm counts
# against it, in pages. A dry run of bert-mini-demo takes 4.2 GiB of address space and 1.5 GiB of
# data (VmPeak and VmData of /proc/PID/status).
LIMITS = (
    ("ulimit -v", "address space", 4 * GIB, resource.RLIMIT_AS, 0),
    ("ulimit -d", "data", 3 * GIB // 2, resource.RLIMIT_DATA, 5),
)


def limits(root: str = "/") -> list[Limit]:
    """The limits of this process.

    Args:
        root: as for `free_memory`.
    """
    pages = _lines(pathlib.Path(root) / "proc/self/statm")
    found = []
    for command, kind, minimum, which, field in LIMITS:
        size, _ = resource.getrlimit(which)
        if size != resource.RLIM_INFINITY:
            used = int(pages[0].split()[field]) * resource.getpagesize() if pages else 0
            found.append(Limit(command, kind, minimum, size, max(0, size - used)))
    return found


def binding_limit() -> Limit | None:
    """The limit of this process that TensorFlow reaches first; None without one."""
    return min(limits(), key=lambda limit: limit.size / limit.minimum, default=None)


def describe_limit() -> str:
    """A sentence that names the limit of this process, after a space; "" without one."""
    limit = binding_limit()
    return f" {limit}." if limit else ""


# What Python, C++, TensorFlow and the dynamic linker print if memory cannot be allocated.
MEMORY_WORDS = (
    "MemoryError",
    "std::bad_alloc",
    "ResourceExhaustedError",
    "Cannot allocate memory",
    "LLVM ERROR: out of memory",
    "can't start new thread",
    "failed to map segment from shared object",
    "pthread_create() failed",  # there is no room for the stack of a thread
    "pthread_create failed",  # the same, of LLVM and OpenBLAS
)
# TensorFlow raises a ResourceExhaustedError for these, too.
OTHER_RESOURCES = tuple(
    os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
)
# How imports fail where a limit is tight. They may have other reasons. OpenBLAS raises SIGINT.
WORDS_WITH_TIGHT_LIMIT = ("SystemError", "KeyboardInterrupt")


def ran_out_of_memory(output: str, status: int) -> bool:
    """Whether a process failed because this machine, or a limit, had no more memory.

    If a limit is tight, that is taken to be the reason for a signal, too: code that does not check
    an allocation crashes.

    Args:
        output: what the process printed.
        status: its exit status; negative if a signal ended it.
    """
    if status == 0 or any(words in output for words in OTHER_RESOURCES):
        return False
    if status == -signal.SIGKILL or any(words in output for words in MEMORY_WORDS):
        return True  # the kernel sends SIGKILL
    limit = binding_limit()
    return (
        limit is not None
        and limit.is_tight
        and (status < 0 or any(word in output for word in WORDS_WITH_TIGHT_LIMIT))
    )


def describe_small_limit() -> str | None:
    """A warning if a limit of this process is below what any run takes, else None."""
    limit = binding_limit()
    if limit is None or not limit.is_tight:
        return None
    return (
        f"{limit}, and TensorFlow with a small model needs about {limit.minimum / GIB:.1f} GiB: "
        "this process may crash. Raise the limit."
    )


def describe_shortage(needed: int, purpose: str) -> str | None:
    """A warning if less than `needed` bytes are free, else None.

    Args:
        needed: bytes.
        purpose: what needs the memory, as the subject of a sentence.
    """
    limit = min(limits(), key=lambda limit: limit.free, default=None)
    if limit and limit.free < needed:
        return (
            f"{limit}, of which {limit.free / GIB:.2f} GiB are left, and {purpose} needs "
            f"{needed / GIB:.2f} GiB: this process may crash. Raise the limit, or use a smaller "
            "model or batch."
        )
    free = free_memory()
    if free is None or free >= needed:
        return None
    return (
        f"Only {max(free, 0) / GIB:.2f} GiB of memory are free, within the limits of this machine "
        f"or container, and {purpose} needs {needed / GIB:.2f} GiB: the system may kill this "
        "process. End other programs, raise the limit, or use a smaller model or batch."
    )


def _available(path) -> int | None:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(base) -> list[int | None]:
    """The bytes left in this process's control groups and their ancestors; None without a limit."""
    mounts = base / "sys/fs/cgroup"
    left = []
    for line in _lines(base / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2; where both are used, it is mounted on unified/
            top = mounts / "unified" if (mounts / "unified").is_dir() else mounts
            names = "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top = mounts / "memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # In a container, the path may be relative to the host's root group while the mount starts
        # at the container's own group. So the group of every prefix is read, if it exists.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            left.append(_left(top.joinpath(*parts[:depth]), *names))
    return left


def _left(group, limit, usage, reclaimable) -> int | None:
    limits = _lines(group / limit)
    used = _lines(group / usage)
    if not limits or not used or not limits[0].isdecimal():  # "max"
        return None
    statistics = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat"))
    return int(limits[0]) - int(used[0]) + int(statistics.get(reclaimable, 0))


def _lines(path) -> list[str]:
    """The lines of a file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError):
        return []
