"""The order of examples: lanes, windows, and the steps that are made together."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import recipes
from inputs import order as orders
from inputs.order import (
    REPLICAS_OF_HOST,
    Order,
    earlier_number_of_lanes,
    number_of_lanes,
    row_batches,
    share_of,
)
from preflight.compiler.topology import slices_of
from training.chips import TPU_CHIPS


def test_the_hosts_of_every_slice_can_share_the_lanes_of_every_recipe():
    batches = {
        phase.global_batch_size for recipe in recipes.RECIPES.values() for phase in recipe.phases
    }
    slices = {
        (topology.replicas, topology.replicas // topology.replicas_per_host)
        for chip in TPU_CHIPS.values()
        for topology in slices_of(chip)
    }
    assert min(replicas // hosts for replicas, hosts in slices if hosts > 1) == REPLICAS_OF_HOST
    shared = 0
    for batch in batches:
        # Of a large data set, and of small ones, as those of evaluations are.
        for lanes in {number_of_lanes(batch, examples) for examples in (10**6, 10**5, 10**4, 10)}:
            order = Order(10**6, batch, lanes, 1, 1, None)
            for replicas, hosts in slices:
                if batch % replicas == 0:
                    share_of(order, tf.distribute.InputContext(hosts, 0, replicas))
                    shared += hosts > 1
    assert shared > 1_000


@pytest.mark.parametrize(
    ("batch", "earlier", "now"),
    [
        *((13_888, 248, 224), (3_264, 204, 192), (1_632, 204, 136), (67_456, 248, 128)),
        *((64, 64, 64), (32_768, 256, 256), (12_960, 240, 240), (100, 100, 100), (7, 7, 7)),
    ],
)
def test_lanes_that_hosts_could_share_stay_as_they_were(batch, earlier, now):
    assert earlier_number_of_lanes(batch, 10**6) == earlier
    assert number_of_lanes(batch, 10**6) == now


def test_lanes_begin_their_windows_at_different_steps():
    order = Order(examples=1_000, batch=16, lanes=4, block=10, window=4, seed=3)
    starts = []
    for lane in tf.range(4, dtype=tf.int64):
        for epoch in tf.range(2, dtype=tf.int64):
            blocks = order.blocks(epoch, lane)
            seen, sizes = [], []
            for window in tf.range(order.windows(epoch, lane)):
                read, ids, used = order.read_window(epoch, lane, window, blocks)
                assert [int(n) for n in order.window_of(len(seen), lane)] == [window, 0]
                assert sorted(used.numpy()) == list(range(len(read)))
                assert len(set(ids.numpy())) == len(read)
                sizes.append(len(read))
                seen.extend(read.numpy())
            assert max(sizes) == 40 and len(set(seen)) == len(seen) == order.count(epoch, lane)
        starts.append(sizes[0])
    assert starts == [40, 10, 20, 30]


@pytest.mark.parametrize("window", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("hosts", [1, 8, 32])
def test_lanes_of_a_host_begin_windows_at_different_steps(window, hosts):
    order = Order(10**6, 2**15, 256, block=16, window=window, seed=1)
    lanes = np.arange(256).reshape(hosts, -1)
    for host in lanes:
        shifts = order._shift(host)
        assert (shifts % 16 == 0).all() and shifts.max() < 16 * window
        assert np.unique(shifts, return_counts=True)[1].max() == -(-len(host) // window)
    small = dataclasses.replace(order, examples=256 * 16 * window, batch=256)
    assert small._shift(lanes) == 0 and set(small.windows(0, tf.range(256)).numpy()) == {1}


@pytest.mark.parametrize(
    ("hosts", "some", "places"),
    [(1, [0], range(16)), (2, [0, 1], range(16)), (8, [5], range(10, 12))],
)
def test_batches_do_not_depend_on_how_many_steps_are_made_together(
    hosts, some, places, monkeypatch
):
    """Of hosts with several lanes, and of one with half a lane; over the ends of epochs."""
    first_step = 5
    order = Order(examples=150, batch=16, lanes=4, block=10, window=2, seed=3)

    def rows(examples, ids):
        return tf.stack([ids, examples], 1)

    def batches(together):
        monkeypatch.setattr(orders, "ROWS_TOGETHER", together)
        made = []
        for host in some:
            context = tf.distribute.InputContext(hosts, host, 16)
            found = row_batches(
                order, context, first_step, rows, lambda some: {"doubled": 2 * some}
            )
            found = found.take(20 * 16 // hosts).as_numpy_iterator()
            made.append(np.stack([batch["doubled"] for batch in found]).reshape(20, -1, 2))
        return np.concatenate(made, 1)

    alone, together = batches(1), batches(48)
    np.testing.assert_array_equal(together, alone)
    ids = np.arange(16 * first_step, 16 * (first_step + 20)).reshape(20, 16)[:, places]
    np.testing.assert_array_equal(together[..., 0], 2 * ids)
    # The 150 examples of the second epoch, or the host's part of them: each once.
    epoch = together[..., 1][ids // 150 == 1]
    assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(0, 300, 2))
    assert len(epoch) == 150 or hosts == 8
