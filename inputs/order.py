"""Defines the order in which the training examples of a run are read.

The examples of a run are numbered from 0: step s of a phase with a global batch of G has the ids
s G to (s + 1) G - 1, and the ids e N to (e + 1) N - 1 are epoch e of a data set of N examples. The
example of an id is a function of (seed, id) alone, so that any host can make any step without the
steps before it.

A batch consists of `lanes` equal parts, of consecutive ids. In each epoch, a lane has its own
contiguous range of the data set, 1/lanes of it, so that a host reads only the ranges of its lanes.
Within its range, a lane reads blocks of `block` consecutive examples, as they lie in the files, in
random order, and mixes the examples of `window` blocks at random, or of fewer at the start of an
epoch. The order does not depend on the number of hosts or replicas, and memory is limited to one
window for each lane.
"""

import dataclasses
import functools
import math

import numpy as np
import tensorflow as tf

from inputs.batching import mix
from inputs.errors import InputError

LANES = 256  # the most hosts that can each read a part of the data of their own
REPLICAS_OF_HOST = 4  # at least, of a slice of several hosts
EXAMPLES_PER_LANE = 512  # at least, so that a lane reads more than it mixes
ROWS_TOGETHER = 512  # examples of a host that are made together, if a step has fewer
# Streams of random numbers, see `inputs.batching.random_bits`.
_WINDOWS = 62
_BLOCKS = 63


def number_of_lanes(global_batch_size: int, examples: int) -> int:
    """The largest divisor of the batch, up to `LANES`, that the hosts of a slice can share.

    Their number is a power of two. A small data set has fewer lanes.
    """
    hosts = (global_batch_size & -global_batch_size) // REPLICAS_OF_HOST  # & -n: its power of two
    divisors = _divisors(global_batch_size, examples)
    return max(divisors, key=lambda lanes: (min(lanes & -lanes, hosts), lanes))


def earlier_number_of_lanes(global_batch_size: int, examples: int) -> int:
    """`number_of_lanes` of runs whose `recipe.json` has format 3."""
    return max(_divisors(global_batch_size, examples))


def _divisors(global_batch_size, examples):
    most = max(1, min(LANES, examples // EXAMPLES_PER_LANE))
    return [n for n in range(1, most + 1) if global_batch_size % n == 0]


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a phase's examples.

    Methods take and return int64 tensors of one shape.

    Attributes:
        examples: N, the number of examples of the data set.
        batch: G, the number of examples per step over all replicas.
        lanes: the number of lanes, a divisor of `batch`.
        block: the number of examples that lie together and are read together.
        window: the number of blocks whose examples are mixed.
        seed: an integer; None keeps the order of the data set. Ids from N on have no example; they
            occur in the last batch of an evaluation.
    """

    examples: int
    batch: int
    lanes: int
    block: int
    window: int
    seed: int | None

    @property
    def per_lane(self) -> int:
        """The number of examples of a lane per step."""
        return self.batch // self.lanes

    @property
    def window_size(self) -> int:
        """The number of examples of a window."""
        return self.block * self.window

    @property
    def _epoch(self) -> int:
        """The number of ids of an epoch."""
        if self.seed is None:  # whole batches
            return -(-self.examples // self.batch) * self.batch
        return self.examples

    def place(self, step, lane):
        """(epoch, place in the lane's epoch) of a lane's first example of a step."""
        ids = step * self.batch + lane * self.per_lane
        epoch = ids // self._epoch
        return epoch, self._before(ids, lane) - self._before_epoch(epoch, lane)

    def count(self, epoch, lane):
        """The number of a lane's examples in an epoch."""
        return self._before_epoch(epoch + 1, lane) - self._before_epoch(epoch, lane)

    def windows(self, epoch, lane):
        """The number of a lane's windows in an epoch."""
        count = self.count(epoch, lane)
        last, _ = self.window_of(count - 1, lane)
        return tf.where(count > 0, last + 1, 0)

    def window_of(self, place, lane):
        """(window, place in the window) of a place in a lane's epoch."""
        window = (place + self._shift(lane)) // self.window_size
        return window, place - self._window_start(window, lane)

    def _window_start(self, window, lane):
        return tf.maximum(window * self.window_size - self._shift(lane), 0)

    def _shift(self, lane):
        """How many examples a lane's first window is shorter than the others.

        Whole blocks, of which neighboring lanes have different numbers: otherwise all lanes of a
        host would load a new window at the same step, which would be slow. A lane that has
        only one window in an epoch mixes all of it.
        """
        if self.seed is None or self.examples <= self.lanes * self.window_size:
            return 0
        around = round(0.618 * self.window)  # the golden ratio spreads any run of lanes evenly
        stride = next(n for n in range(around, 2 * self.window) if math.gcd(n, self.window) == 1)
        return lane * stride % self.window * self.block

    def blocks(self, epoch, lane):
        """The order in which a lane reads the whole blocks of its range in an epoch, [blocks]."""
        start = self._start(epoch, lane)
        first = (start + self.block - 1) // self.block
        count = tf.maximum((start + self.count(epoch, lane)) // self.block - first, 0)
        return first + self._permutation(count, _BLOCKS, epoch, lane)

    def read_window(self, epoch, lane, window, blocks):
        """What a lane reads and uses in a window.

        Args:
            epoch, lane, window: scalars.
            blocks: from `blocks`.

        Returns:
            A tuple of the examples in the order in which they are read, [n]: runs of consecutive
            numbers, each within one block; the id of each of them, [n]; and the order in which they
            are used, [n] positions in the former.
        """
        first = self._window_start(window, lane)
        stop = tf.minimum(self._window_start(window + 1, lane), self.count(epoch, lane))
        used = self._permutation(stop - first, _WINDOWS, epoch, lane, window)
        ids = self._ids(epoch, lane, tf.range(first, stop))
        ids = tf.scatter_nd(used[:, tf.newaxis], ids, tf.shape(used, tf.int64))
        return self._range(epoch, lane, tf.range(first, stop), blocks), ids, used

    def _range(self, epoch, lane, place, blocks):
        """The example that is read at a place: whole blocks in random order, then the rest.

        Blocks begin at multiples of `block` of the whole data set, and the ends of the lane's range
        lie within blocks. Their parts in the range are read last.
        """
        start, block = self._start(epoch, lane), self.block
        if self.seed is None:
            return start + place
        number = tf.size(blocks, tf.int64)
        with_one = tf.concat([blocks, [0]], 0)  # if the range has no whole block
        whole = tf.gather(with_one, tf.minimum(place // block, number)) * block + place % block
        rest = start + place - number * block  # as if the range had no whole block
        before = (start + block - 1) // block * block
        rest = tf.where(rest < before, rest, rest + number * block)
        return tf.where(place < number * block, whole, rest)

    def _permutation(self, count, stream, *parts):
        """A random order of 0 to `count` - 1 that depends on the seed and the `parts`."""
        places = tf.range(count)
        if self.seed is None:
            return places
        key = mix(tf.constant(self.seed * 64 + stream, tf.uint64))
        for part in parts:
            key = mix(key + tf.cast(part, tf.uint64))
        bits = mix(key + tf.cast(places, tf.uint64))
        return tf.cast(tf.argsort(tf.bitcast(bits, tf.int64)), tf.int64)

    def _before(self, ids, lane):
        """The number of a lane's ids below `ids`."""
        rest = ids % self.batch - lane * self.per_lane
        return ids // self.batch * self.per_lane + tf.clip_by_value(rest, 0, self.per_lane)

    def _before_epoch(self, epoch, lane):
        return self._before(epoch * self._epoch, lane)

    def _ids(self, epoch, lane, place):
        """The ids at places of a lane's epoch."""
        place += self._before_epoch(epoch, lane)
        step, rest = place // self.per_lane, place % self.per_lane
        return step * self.batch + lane * self.per_lane + rest

    def _start(self, epoch, lane):
        """Where the lane's range begins: the number of ids of the lanes before it in the epoch."""
        width = lane * self.per_lane

        def before(ids):
            return ids // self.batch * width + tf.minimum(ids % self.batch, width)

        return before((epoch + 1) * self._epoch) - before(epoch * self._epoch)


@dataclasses.dataclass(frozen=True)
class Share:
    """What a host contributes to each global batch.

    Attributes:
        first_lane: the number of its first lane, an integer or an int64 scalar.
        lanes: the number of its lanes, which are consecutive.
        part, parts: of several hosts with the same lane, this one has part `part` of `parts`;
            `part` is an integer or an int64 scalar.
        replica_batch: the number of examples of each of its replicas.
    """

    first_lane: int | tf.Tensor
    lanes: int
    part: int | tf.Tensor
    parts: int
    replica_batch: int


def share_of(order: Order, context: tf.distribute.InputContext | None) -> Share:
    """Splits the global batch among hosts and replicas.

    Args:
        order: an `Order`.
        context: `tf.distribute.InputContext` of this host, whose `input_pipeline_id` may be an
            int64 scalar, so that all hosts can have the same graph; None means a single replica.

    Raises:
        InputError: the hosts cannot share the lanes equally.
    """
    if context is None:
        return Share(0, order.lanes, 0, 1, order.batch)
    hosts, host = context.num_input_pipelines, context.input_pipeline_id
    replica_batch = order.batch // context.num_replicas_in_sync
    if order.lanes % hosts == 0:
        lanes = order.lanes // hosts
        return Share(host * lanes, lanes, 0, 1, replica_batch)
    if hosts % order.lanes == 0:
        parts = hosts // order.lanes
        return Share(host // parts, 1, host % parts, parts, replica_batch)
    raise InputError(
        f"--set lanes={order.lanes}: {hosts} hosts cannot share {order.lanes} lanes of the data "
        f"equally. Set lanes to a multiple of {hosts} that divides the batch, {order.batch:,}."
    )


def with_one_graph(input_fn):
    """Returns an input function with one graph for all hosts, which takes the number of a host.

    Otherwise TensorFlow sends the graph of each host's data set to all other hosts, too: traffic
    that grows with the square of the number of hosts. (What `TPUStrategy` adds to a data set, small
    functions for each device, still does.)

    Args:
        input_fn: `(tf.distribute.InputContext) -> tf.data.Dataset`. The `input_pipeline_id` that it
            gets is an int64 scalar if there are several hosts.
    """

    @functools.cache
    def traced(hosts, replicas):
        @tf.function(input_signature=[tf.TensorSpec([], tf.int64)], autograph=False)
        def dataset(host):
            return input_fn(tf.distribute.InputContext(hosts, host, replicas))

        return dataset.get_concrete_function()  # a strategy would trace it again for each device

    def dataset_of(context):
        if context.num_input_pipelines == 1:
            return input_fn(context)
        dataset = traced(context.num_input_pipelines, context.num_replicas_in_sync)
        return dataset(tf.constant(context.input_pipeline_id, tf.int64))

    return dataset_of


def row_batches(order: Order, context, first_step: int, make_rows, make_batch=None):
    """This host's batches: one per step for each of its replicas.

    Args:
        order: an `Order`. Without a seed the data set ends after one epoch.
        context: `tf.distribute.InputContext` of this host; None means a single replica.
        first_step: the step to begin with; what steps before it use is not read.
        make_rows: takes the examples to read, [n] int64, as described at `Order.read_window`, and
            their ids, [n] int64; returns the rows [n, C] of one dtype that they are made of.
        make_batch: takes the rows [n, C] of one batch or more; returns a tensor or a dictionary of
            tensors [n, ...], whose rows do not depend on each other. None returns the rows.

    Returns:
        A `tf.data.Dataset` of what `make_batch` returns, [B, ...] for B examples per replica.

    Raises:
        InputError: the hosts cannot share the lanes equally.
    """
    share = share_of(order, context)
    per_host = order.per_lane // share.parts
    per_step = share.lanes * per_host
    steps = 1
    if order.seed is not None:  # an evaluation ends, and its last group would not be full
        steps = max(1, min(ROWS_TOGETHER // per_step, order.examples // order.batch))
    make_batch = make_batch or (lambda rows: rows)

    def lane_rows(lane):
        first_epoch, first_place = order.place(tf.constant(first_step, tf.int64), lane)
        stop = 1 if order.seed is None else np.iinfo(np.int64).max
        epochs = tf.data.Dataset.range(first_epoch, stop)
        rows = epochs.flat_map(
            _graph(
                lambda epoch: epoch_rows(
                    lane, epoch, tf.where(epoch == first_epoch, first_place, 0)
                )
            )
        )
        rows = rows.rebatch(steps * order.per_lane, drop_remainder=True)
        return rows.map(_graph(own_part))

    def own_part(rows):
        rows = tf.reshape(rows, [steps, order.per_lane, rows.shape[-1]])
        begin = share.part * per_host
        return rows[:, begin : begin + per_host]

    def epoch_rows(lane, epoch, skipped):
        blocks = order.blocks(epoch, lane)
        first, inside = order.window_of(skipped, lane)
        windows = tf.data.Dataset.range(first, order.windows(epoch, lane))

        def window_rows(window):
            read, ids, used = order.read_window(epoch, lane, window, blocks)
            used = used[tf.where(window == first, inside, 0) :]
            return tf.gather(make_rows(read, ids), used)

        return windows.map(_graph(window_rows))

    def in_batches(values):
        return tf.reshape(values, [-1, share.replica_batch, *values.shape[1:]])

    def all_rows(lanes):
        rows = tf.transpose(lanes, [1, 0, 2, 3])  # [steps, lanes, examples, C]
        return tf.reshape(rows, [-1, rows.shape[-1]])

    first = share.first_lane
    lanes = tf.data.Dataset.range(first, first + share.lanes).interleave(
        _graph(lane_rows),
        cycle_length=share.lanes,
        block_length=1,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    lanes = lanes.batch(share.lanes, drop_remainder=True)
    if steps * per_step > ROWS_TOGETHER:
        rows = lanes.map(_graph(lambda lanes: in_batches(all_rows(lanes)))).unbatch()
        return rows.map(_graph(make_batch), num_parallel_calls=tf.data.AUTOTUNE)
    # A call for few rows costs as much as one for hundreds.
    made = lanes.map(
        _graph(lambda lanes: tf.nest.map_structure(in_batches, make_batch(all_rows(lanes)))),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return made.unbatch()


def by_block(size: int, examples, ids, make_rows, width: int):
    """Makes rows block by block.

    Args:
        size: the number of examples of a block; block b has the examples b `size` to (b + 1) `size`
            - 1.
        examples, ids: [n] int64; the examples of a block lie together.
        make_rows: takes a block, a scalar, and its part of `examples` and `ids`; returns [m, width]
            int32.
        width: as above.

    Returns:
        [n, width] int32.
    """
    blocks, _, counts = tf.unique_with_counts(examples // size, tf.int64)
    ends = tf.cumsum(counts)
    rows = tf.TensorArray(tf.int32, tf.size(blocks), infer_shape=False, element_shape=[None, width])

    def block_rows(i, rows):
        some = slice(ends[i] - counts[i], ends[i])
        return i + 1, rows.write(i, make_rows(blocks[i], examples[some], ids[some]))

    _, rows = tf.while_loop(lambda i, rows: i < tf.size(blocks), block_rows, (0, rows))
    return tf.ensure_shape(rows.concat(), [None, width])


# AutoGraph would convert the functions of each data set for seconds, and change nothing.
_graph = tf.autograph.experimental.do_not_convert
