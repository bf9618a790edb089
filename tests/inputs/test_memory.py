"""Free memory is that of the machine and of all control groups, of both versions."""

import pytest

from inputs import memory
from inputs.memory import GIB, free_memory

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


def test_a_limit_of_address_space_counts_what_is_reserved(monkeypatch, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/statm").write_text("1024 9 9 9 0 9 0\n")
    page = memory.resource.getpagesize()
    for limit, free in ((3 * GIB, 3 * GIB - 1024 * page), (page, 0), (-1, None)):
        monkeypatch.setattr(memory.resource, "getrlimit", lambda which, soft=limit: (soft, -1))
        assert memory.free_address_space(tmp_path) == free


def test_what_a_process_without_memory_prints_is_recognized():
    assert memory.ran_out_of_memory("", -9)
    assert memory.ran_out_of_memory("numpy...MemoryError: Unable to allocate", 1)
    abort = "F env.cc:80] Check failed: ret == 0 Thread tf_ creation via pthread_create() failed."
    assert memory.ran_out_of_memory(abort, -6)
    assert not memory.ran_out_of_memory("", -11)
    assert not memory.ran_out_of_memory("a MemoryError that was handled", 0)


def test_a_shortage_is_one_sentence(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: GIB // 2)
    assert memory.describe_shortage(GIB // 2, "a small run") is None
    said = memory.describe_shortage(GIB, "a small run")
    assert said.startswith("Only 0.50 GiB of memory are free") and "needs 1.00 GiB" in said
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    assert memory.describe_shortage(GIB, "a small run") is None
