"""Estimates: the all-reduce, the search for the largest batch, and the parts of a step."""

import pytest

from preflight import estimate
from preflight.topology import parse_topologies


def topology_of(name):
    (topology,) = parse_topologies(name)
    return topology


def test_an_all_reduce_sends_twice_its_bytes_over_all_links():
    pod, quarter = topology_of("v3:32x32"), topology_of("v3:16x16")
    size = 10**9
    on_links = 2 * size * 1023 / 1024 / (4 * 100e9)
    seconds = estimate.all_reduce_seconds(pod, size)
    assert seconds == pytest.approx(on_links + 2 * 32 * 1e-6)
    # A part of the pod has no wrap-around links: half the links, and a longer diameter.
    open_links = 2 * size * 255 / 256 / (2 * 100e9)
    seconds = estimate.all_reduce_seconds(quarter, size)
    assert seconds == pytest.approx(open_links + 2 * 30 * 1e-6)


def test_one_chip_sends_nothing():
    assert estimate.all_reduce_seconds(topology_of("v6e-1"), 10**9) == 0


def search(memory_needed, start, fixed, limit, most):
    return estimate.largest_batch(
        memory_needed, start, fixed_bytes=fixed, limit_bytes=limit, max_examples=most
    )


@pytest.mark.parametrize("largest", [1, 3, 7])
def test_the_search_finds_batches_smaller_than_a_tile(largest):
    assert search(lambda batch: 10 + batch, 32, 10, 10 + largest, 64) == largest


@pytest.mark.parametrize("start", [8, 16, 4096])
def test_the_search_finds_the_largest_batch_if_memory_is_linear(start):
    tried = []

    def memory_needed(batch):
        tried.append(batch)
        return 1000 + 70 + 3 * batch  # weights, other fixed memory, memory per example

    found = search(memory_needed, start, 1000, 4000, 10**6)
    assert found == (4000 - 1070) // 3 // 8 * 8
    assert len(tried) <= 1 + estimate.MAX_TRIES


def test_the_search_returns_0_if_nothing_fits_and_the_maximum_if_everything_does():
    assert search(lambda batch: 5000, 8, 4900, 4000, 64) == 0
    assert search(lambda batch: 1000 + batch, 8, 1000, 4000, 64) == 64


def test_accumulation_is_the_smallest_divisor_that_fits():
    needed = estimate.needed_accumulation
    assert needed(96, largest=40, minimum=1) == 3
    assert needed(96, largest=96, minimum=2) == 2
    assert needed(7, largest=3, minimum=1) == 7
    assert needed(7, largest=0, minimum=1) is None


def test_the_parts_of_a_step_add_up():
    program = {
        "seconds": 0.1,
        "flops": 4e12,
        "bytes_accessed": 40e9,
        "all_reduce_bytes": 10**9,
        "all_reduces": 2,
        "asynchronous": 1,
    }
    update = {"seconds": 0.02, "flops": 1e9, "bytes_accessed": 13e9}
    time = estimate.step_time(topology_of("v3:32x32"), program, update, accumulation=3)
    # Each of three micro-batches reads its gradients, and reads and writes the accumulated ones.
    # The all-reduce reads and writes them once, but each of the three programs counts it.
    moved = (3 * 3 - 2 * 2) * 10**9
    assert time.compiler == pytest.approx(3 * 0.08 + 0.02 + moved / (900e9 / 2))
    assert time.memory == pytest.approx((3 * 27e9 + 13e9 + moved) / (900e9 / 2))
    assert time.hideable == pytest.approx(time.all_reduce)
    assert time.hidden == pytest.approx(time.all_reduce / 2)
    assert time.step == pytest.approx(time.compiler + time.all_reduce / 2)
    assert time.compute == pytest.approx((3 * 3.999e12 + 1e9) * 2 / 123e12)
