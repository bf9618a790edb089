"""Estimates: the all-reduce, the search for the largest batch, and the parts of a step."""

import json
import pathlib

import pytest

from preflight import estimate
from preflight.compiler.topology import parse_topologies


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


def search(memory_needed, start, fixed, limit, most, wanted=1):
    return estimate.largest_batch(
        memory_needed, start, fixed_bytes=fixed, limit_bytes=limit, max_examples=most, wanted=wanted
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


@pytest.mark.parametrize(("wanted", "found"), [(32, 152), (152, 152), (153, 168), (168, 168)])
def test_a_little_larger_batch_is_tried_only_if_it_decides(wanted, found):
    """Memory as of BERT-Large's first phase, which grows less than the first example suggests."""
    tried = []

    def memory_needed(batch):
        tried.append(batch)
        return 629 + 7.3 * (batch - 32)

    assert search(memory_needed, 32, 370, 1625, 10**6, wanted) == found
    assert len(tried) == (3 if found == 168 else 2)


def test_the_search_returns_0_if_nothing_fits_and_the_maximum_if_everything_does():
    assert search(lambda batch: 5000, 8, 4900, 4000, 64) == 0
    assert search(lambda batch: 1000 + batch, 8, 1000, 4000, 64) == 64


def test_memory_beside_weights_and_batch_does_not_hide_what_fits():
    tried = []

    def memory_needed(batch):
        tried.append(batch)
        return 500 + 150 + 30 * batch  # weights, other fixed memory, memory per example

    # 7, and then 4, are what the weights alone suggest.
    assert search(memory_needed, 32, 500, 748, 256) == 3
    assert tried == [32, 7, 4, 1, 3]
    tried.clear()
    assert search(memory_needed, 32, 500, 675, 256) == 0 and tried[-1] == 1


def test_accumulation_is_the_smallest_divisor_that_fits():
    needed = estimate.needed_accumulation
    assert needed(96, largest=40, minimum=1) == 3
    assert needed(96, largest=96, minimum=2) == 2
    assert needed(7, largest=3, minimum=1) == 7
    assert needed(7, largest=0, minimum=1) is None


PROGRAM = {
    "seconds": 0.1,
    "flops": 4e12,
    "bytes_accessed": 41e9,
    "main_bytes": 40e9,
    "copied_bytes": 0,
    "products": [],
    "all_reduce_bytes": 10**9,
    "all_reduces": 2,
    "asynchronous": 1,
}
GRADIENT_BYTES = 10**9
UPDATE = PROGRAM | {
    "seconds": 0.02,
    "flops": 1e9,
    "bytes_accessed": 13e9,
    "main_bytes": 13e9,
}


def test_the_parts_of_a_step_add_up():
    time = estimate.step_time(topology_of("v3:32x32"), PROGRAM, UPDATE, 3, GRADIENT_BYTES)
    # Each of three micro-batches reads its gradients, and reads and writes the accumulated ones.
    # The all-reduce reads and writes them once, but each of the three programs counts it.
    moved = (3 * 3 - 2 * 2) * 10**9
    assert time.source == "compiler"
    assert time.work == pytest.approx(3 * 0.08 + 0.02 + moved / (900e9 / 2))
    assert time.compiler == pytest.approx(time.work)
    assert time.memory == pytest.approx((3 * 27e9 + 13e9 + moved) / (900e9 / 2))
    assert time.hideable == pytest.approx(time.all_reduce)
    assert time.hidden == pytest.approx(time.all_reduce / 2)
    assert time.step == pytest.approx(time.work + time.all_reduce / 2)
    assert time.compute == pytest.approx((3 * 3.999e12 + 1e9) * 2 / 123e12)


def test_gradients_that_are_summed_in_bfloat16_are_accumulated_in_float32():
    v3 = topology_of("v3:32x32")
    program = PROGRAM | {"all_reduce_bytes": GRADIENT_BYTES // 2}
    costs = [estimate.whole_step(v3, p, UPDATE, 3, GRADIENT_BYTES) for p in (PROGRAM, program)]
    # Only what the programs count for the all-reduce, two times too often, is half of it.
    assert costs[1]["main_bytes"] - costs[0]["main_bytes"] == 2 * 2 * GRADIENT_BYTES / 2


def test_where_the_compiler_counts_on_chip_memory_the_time_is_modelled():
    chip = topology_of("v5e:4x4").chip
    figures = {"bytes_accessed": 90e9, "copied_bytes": 10e9, "all_reduces": 0, "asynchronous": 0}
    # Two products are bound by FLOPs and one by HBM; 10 of the other 26 GB are copied beside them.
    products = [[1e12, 1e9, 2], [1e11, 12e9, 1]]
    program = PROGRAM | figures | {"products": products}
    time = estimate.step_time(topology_of("v5e:4x4"), program, UPDATE | figures, 1, GRADIENT_BYTES)
    in_line = 2 * 1e12 / chip.flops + 12e9 / chip.hbm_bandwidth + 16e9 / chip.hbm_bandwidth
    assert in_line < 40e9 / chip.hbm_bandwidth  # so all of the HBM traffic takes longer
    assert time.source == "model" and time.compiler == 0.1
    assert time.work == pytest.approx(40e9 / chip.hbm_bandwidth)
    assert time.update == pytest.approx(13e9 / chip.hbm_bandwidth)
    slow = program | {"products": [[1e12, 1e9, 20], [1e11, 1e9, 1]]}
    more = 20 * 1e12 / chip.flops + 1e9 / chip.hbm_bandwidth + 9e9 / chip.hbm_bandwidth
    assert estimate.modelled_seconds(topology_of("v5e:4x4"), slow) == pytest.approx(more)


def test_a_step_that_moves_less_than_its_update_alone_has_no_negative_parts():
    """In a small model on v6e, gradients and weights of a step stay in on-chip memory."""
    small = PROGRAM | {"bytes_accessed": 90e9, "main_bytes": 5e9, "flops": 2e12}
    topology = topology_of("v6e:2x2")
    time = estimate.step_time(topology, small, UPDATE, 8, GRADIENT_BYTES)
    compute = 1.999e12 / topology.chip.flops
    assert 0 <= time.update <= time.work and time.hideable >= 0
    one = estimate.step_time(topology, small, UPDATE, 1, GRADIENT_BYTES)
    accumulated = (3 * 8 - 2 * 7) * 10**9 / topology.chip.hbm_bandwidth
    assert time.work == pytest.approx(one.work + 7 * compute + accumulated)
    assert estimate.whole_step(topology, small, UPDATE, 8, GRADIENT_BYTES)["main_bytes"] >= 5e9


def test_the_least_time_of_resnet_50_on_v4_is_below_the_measured_one():
    """MLPerf Training v0.7, Google, tpu-v4-16 (8 chips), LARS, batch 2,048, result_0.

    The file has the compiler's figures of a step of resnet50-lars-32k with 256 images on v4:2x2x2.
    """
    measured_minutes, epochs, images = 30.81, 40, 1_281_167  # from run_start to run_stop
    path = pathlib.Path(__file__).parents[1] / "data/preflight/resnet50-lars-v4-256.json"
    program = json.loads(path.read_text())
    assert program["flops"] == pytest.approx(256 * 3 * 2 * 4.1e9, rel=0.05)
    in_products = sum(flops * count for flops, _, count in program["products"])
    assert 0.97 < in_products / program["flops"] < 1
    topology = topology_of("v4:2x2x2")
    time = estimate.step_time(topology, program, program, 1, GRADIENT_BYTES)
    minutes = epochs * images / 2048 * time.step / 60
    assert time.source == "model"
    assert 0.7 * measured_minutes < minutes < measured_minutes
    # The compiler's own time, which counts on-chip memory, is above what was measured.
    assert epochs * images / 2048 * time.compiler / 60 > 1.2 * measured_minutes
