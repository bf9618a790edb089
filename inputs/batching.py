"""The random numbers and the synthetic batches of every pipeline.

Examples are numbered from 0 over the whole run. All randomness of an example is a function of
(seed, example id), so any host can compute any step without the steps before it.
"""

import tensorflow as tf

FEW = 2**18  # largest limit for which `integers_below` uses 24 random bits


def uniform(seed: int, stream: int, example_ids, columns: int):
    """Uniform random numbers for each example: [B, columns] float32 in [0, 1).

    TensorFlow's stateless generators take one seed for a whole tensor. Here each number is a hash
    of (seed, stream, example id, column), so that it does not depend on the rest of the batch.

    Args:
        seed: int, the same for the whole run.
        stream: int in [0, 64), different for each use of random numbers.
        example_ids: [B] int64.
        columns: how many numbers each example needs.
    """
    return unit_floats(random_bits(seed, stream, example_ids, columns))


def random_bits(seed: int, stream: int, example_ids, columns: int):
    """Uniform random bits for each example: [B, columns] uint64.

    See `uniform` for the arguments.
    """
    key = mix(tf.constant(seed * 64 + stream, tf.uint64))
    rows = mix(tf.cast(example_ids, tf.uint64) + key)[:, tf.newaxis]
    return mix(rows + tf.cast(tf.range(columns, dtype=tf.int64), tf.uint64)[tf.newaxis])


def unit_floats(bits):
    """The upper 24 bits of uint64 `bits` as float32 in [0, 1)."""
    return tf.cast(_upper(bits, 24), tf.float32) / 2.0**24


def integers_below(bits, limit):
    """Uniform random integers: int64 in [0, `limit`), or 0 where `limit` is below 1.

    For limits up to `FEW`, 24 bits are used as in `unit_floats`, so that examples are the same as
    in earlier versions. The probability of each number then differs from 1 / `limit` by at most
    1.6 %. For larger limits 53 bits are used, the precision of float64, so that each of up to 2^53
    numbers can occur.

    Args:
        bits: uint64, from `random_bits`.
        limit: integers, with a shape that broadcasts with that of `bits`.
    """
    limit = tf.cast(limit, tf.float64)
    few = tf.cast(_upper(bits, 24), tf.float64) / 2.0**24
    many = tf.cast(_upper(bits, 53), tf.float64) / 2.0**53
    scaled = tf.where(limit <= FEW, few, many) * limit
    return tf.maximum(tf.cast(scaled, tf.int64), 0)


def _upper(bits, count: int):
    """The upper `count` bits, as int64."""
    return tf.cast(tf.bitwise.right_shift(bits, tf.constant(64 - count, tf.uint64)), tf.int64)


def mix(x):
    """A hash of uint64 `x`: the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = x + tf.constant(0x9E3779B97F4A7C15, tf.uint64)
    x = _xor_shift(x, 30) * tf.constant(0xBF58476D1CE4E5B9, tf.uint64)
    x = _xor_shift(x, 27) * tf.constant(0x94D049BB133111EB, tf.uint64)
    return _xor_shift(x, 31)


def _xor_shift(x, bits: int):
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(bits, tf.uint64)))


def synthetic_batches(spec, limits, seed: int) -> tf.data.Dataset:
    """Repeats one random batch, to run a program without data.

    Args:
        spec: dictionary of `tf.TensorSpec`, a pipeline's `element_spec`; shapes are static.
        limits: dictionary of ints: the integer tensor of that name is uniform in [0, limit).
            Integer tensors without a limit, and float tensors (the weights), are 1.
        seed: int.
    """
    batch = {}
    for salt, (name, tensor) in enumerate(sorted(spec.items())):
        if tensor.dtype.is_integer and name in limits:
            # `stateless_uniform` does not make small integers such as uint8.
            values = tf.random.stateless_uniform(
                tensor.shape, [seed, salt], maxval=limits[name], dtype=tf.int32
            )
            batch[name] = tf.cast(values, tensor.dtype)
        else:
            batch[name] = tf.ones(tensor.shape, tensor.dtype)
    return tf.data.Dataset.from_tensors(batch).repeat()
