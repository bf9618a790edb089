"""Free memory is that of the machine and of all control groups, of both versions."""

import pathlib
import signal
import subprocess
import sys

import pytest

from inputs import memory
from inputs.memory import GIB, free_memory

ROOT = pathlib.Path(__file__).parents[2]
PAGE = memory.resource.getpagesize()
MACHINE = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {8 * GIB // 1024} kB\n"}
UNLIMITED = 2**63 - 4096  # as version 1 writes it


def version_1(path, limit, usage, cached=0):
    folder = f"sys/fs/cgroup/memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.stat": f"cache 1\ntotal_inactive_file {cached}\n",
    }


def version_2(path, limit, usage, cached=0, mount=""):
    folder = f"sys/fs/cgroup{mount}{path}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 1\ninactive_file {cached}\n",
    }


def group(text):
    return {"proc/self/cgroup": text}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MACHINE, 8 * GIB),
        (MACHINE | group("0::/\n") | version_2("", 2 * GIB, GIB), GIB),
        (MACHINE | group("0::/\n") | version_2("", 2 * GIB, 2 * GIB, GIB // 2), GIB // 2),
        (MACHINE | group("0::/\n") | version_2("", "max", GIB), 8 * GIB),
        (MACHINE | group("0::/a/b\n") | version_2("/a", 3 * GIB, GIB), 2 * GIB),
        # A container without a namespace of its own: the path is the host's.
        (MACHINE | group("0::/docker/1234\n") | version_2("", 3 * GIB, GIB), 2 * GIB),
        (MACHINE | group("4:cpu,memory:/\n0::/\n") | version_1("", 3 * GIB, GIB), 2 * GIB),
        (MACHINE | group("4:memory:/a\n") | version_1("/a", 3 * GIB, 2 * GIB, GIB), 2 * GIB),
        (MACHINE | group("4:memory:/a\n") | version_1("", UNLIMITED, GIB), 8 * GIB),
        (MACHINE | group("3:cpu:/a\n") | version_1("/a", GIB, 0), 8 * GIB),
        (MACHINE | group("0::/a\n") | version_2("/a", 2 * GIB, GIB, mount="/unified"), GIB),
        (MACHINE | group("0::/../b\n") | version_2("", 2 * GIB, GIB), GIB),
        (group("0::/\n") | version_2("", GIB, 2 * GIB), -GIB),
    ],
)
def test_free_memory(files, free, tmp_path):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory(tmp_path) == free


def test_this_machine_has_free_memory():
    assert 0 < free_memory() < 2**50


@pytest.fixture
def limit_memory(monkeypatch):
    """Returns a function that sets the limits which the process sees."""

    def limit_memory(address_space=-1, data=-1):
        soft = {memory.resource.RLIMIT_AS: address_space, memory.resource.RLIMIT_DATA: data}
        monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (soft[which], -1))

    return limit_memory


@pytest.mark.parametrize(
    ("address_space", "data", "command", "free_pages"),
    [
        (-1, -1, None, None),
        (3 * GIB, -1, "ulimit -v", 3 * GIB // PAGE - 1024),
        (PAGE, -1, "ulimit -v", 0),
        (-1, 2 * GIB, "ulimit -d", 2 * GIB // PAGE - 512),
        (9 * GIB, 2 * GIB, "ulimit -d", 2 * GIB // PAGE - 512),
        (3 * GIB, 2 * GIB, "ulimit -v", 3 * GIB // PAGE - 1024),  # of which TensorFlow takes more
    ],
)
def test_the_limit_that_binds_counts_what_is_reserved(
    limit_memory, tmp_path, address_space, data, command, free_pages
):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/statm").write_text("1024 9 9 9 0 512 0\n")
    limit_memory(address_space, data)
    free = {limit.command: limit.free // PAGE for limit in memory.limits(tmp_path)}
    limit = memory.binding_limit()
    assert (limit and limit.command, limit and free[limit.command]) == (command, free_pages)


def test_this_process_can_be_limited():
    code = "from inputs.memory import binding_limit; print(binding_limit())"
    for option, kind in (("-v", "address space"), ("-d", "data")):
        command = ["bash", "-c", f'ulimit {option} 1048576 && exec "$0" "$@"']
        done = subprocess.run(
            [*command, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout == f"`ulimit {option}` allows each process 1.0 GiB of {kind}\n"


def test_what_a_process_without_memory_prints_is_recognized():
    assert memory.ran_out_of_memory("", -9)
    assert memory.ran_out_of_memory("numpy...MemoryError: Unable to allocate", 1)
    abort = "F env.cc:80] Check failed: ret == 0 Thread tf_ creation via pthread_create() failed."
    assert memory.ran_out_of_memory(abort, -6)
    assert not memory.ran_out_of_memory("", -11)
    assert not memory.ran_out_of_memory("a MemoryError that was handled", 0)
    assert memory.ran_out_of_memory("LLVM ERROR: pthread_create failed: Resource temporarily", -6)
    assert memory.ran_out_of_memory("ResourceExhaustedError: OOM when allocating tensor", 1)
    for other in ("No space left on device", "Too many open files"):
        assert not memory.ran_out_of_memory(f"ResourceExhaustedError: /tmp/x; {other}", 1)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("", -signal.SIGSEGV),
        ("", -signal.SIGABRT),
        ("", -signal.SIGBUS),
        ("", -signal.SIGINT),
        ("SystemError: error return without exception set", 1),
        ("KeyboardInterrupt", 1),
    ],
)
def test_a_crash_where_a_limit_is_tight_is_for_lack_of_memory(limit_memory, said, status):
    limit_memory(data=GIB)
    assert memory.ran_out_of_memory(said, status)
    for limits in ({}, {"address_space": 2**50}):
        limit_memory(**limits)
        assert not memory.ran_out_of_memory(said, status)


def test_an_error_is_an_error_where_a_limit_is_tight(limit_memory):
    limit_memory(address_space=GIB)
    assert not memory.ran_out_of_memory("ValueError: no", 1)
    assert not memory.ran_out_of_memory("KeyboardInterrupt, which was handled", 0)


def test_a_shortage_is_one_sentence(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: GIB // 2)
    assert memory.describe_shortage(GIB // 2, "a small run") is None
    said = memory.describe_shortage(GIB, "a small run")
    assert said.startswith("Only 0.50 GiB of memory are free") and "needs 1.00 GiB" in said
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    assert memory.describe_shortage(GIB, "a small run") is None


def test_a_limit_is_tight_if_a_new_process_would_lack_memory(monkeypatch):
    """Not if this process has used most of it: a child may use all of it."""
    monkeypatch.setattr(memory, "_lines", lambda path: [f"{5 * GIB // PAGE} 1 1 1 1 1 1"])
    monkeypatch.setattr(
        memory.resource,
        "getrlimit",
        lambda which: ((6 * GIB if which == memory.LIMITS[0][3] else -1), -1),
    )
    limit = memory.binding_limit()
    assert limit.free == GIB and not limit.is_tight
    assert not memory.ran_out_of_memory("", -signal.SIGSEGV)


def test_a_shortage_names_the_limit_that_binds(limit_memory):
    limit_memory(address_space=3 * GIB)
    said = memory.describe_small_limit()
    assert said.startswith("`ulimit -v` allows each process 3.0 GiB of address space, and")
    assert "needs about 4.0 GiB" in said
    limit_memory(data=2 * GIB)
    assert memory.describe_small_limit() is None
    said = memory.describe_shortage(2 * GIB, "each step's gradients alone")
    assert said.startswith("`ulimit -d` allows each process 2.0 GiB of data, of which ")
    assert "each step's gradients alone needs 2.00 GiB" in said
    limit_memory(data=2**50)
    assert memory.describe_shortage(1, "a small run") is None
