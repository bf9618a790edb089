"""Measures the memory that this process can still allocate, within the limits of a container."""

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


def free_address_space(root: str = "/") -> int | None:
    """The bytes of address space that this process may still reserve; None without a limit.

    The limit is RLIMIT_AS, which `ulimit -v` and batch systems set. Memory that is reserved and not
    used counts, too.

    Args:
        root: as for `free_memory`.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    pages = _lines(pathlib.Path(root) / "proc/self/statm")
    used = int(pages[0].split()[0]) * resource.getpagesize() if pages else 0
    return max(0, limit - used)


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
)


def ran_out_of_memory(output: str, status: int) -> bool:
    """Whether a process failed because this machine, or a limit, had no more memory.

    Args:
        output: what the process printed.
        status: its exit status; negative if a signal ended it.
    """
    return status != 0 and (
        status == -signal.SIGKILL  # by the kernel
        or any(words in output for words in MEMORY_WORDS)
    )


def describe_shortage(needed: int, purpose: str) -> str | None:
    """A warning if less than `needed` bytes are free, else None.

    Args:
        needed: bytes.
        purpose: what needs the memory, as the subject of a sentence.
    """
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
