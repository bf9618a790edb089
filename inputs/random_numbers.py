"""Random numbers that each example has of its own, whatever batch or host makes it.

TensorFlow's stateless generators take one seed for a whole tensor. Here a number is a hash of
(seed, stream, example, column), so that a batch can be cut up among hosts and comes out the same.
"""

import tensorflow as tf


def uniform(seed: int, stream: int, example, columns: int):
    """[B, columns] float32 in [0, 1).

    Args:
        seed: int, one for a whole run.
        stream: int below 64, one for each use of the numbers.
        example: [B] int64, the examples' numbers.
        columns: how many numbers each of them needs.
    """
    key = _mix(tf.constant(seed * 64 + stream, tf.uint64))
    rows = _mix(tf.cast(example, tf.uint64) + key)[:, tf.newaxis]
    bits = _mix(rows + tf.cast(tf.range(columns, dtype=tf.int64), tf.uint64)[tf.newaxis])
    top = tf.bitwise.right_shift(bits, tf.constant(40, tf.uint64))
    return tf.cast(tf.cast(top, tf.int64), tf.float32) / 2.0**24


def below(draws, limit):
    """Whole numbers in [0, limit), int64, from draws in [0, 1); 0 where `limit` is below 1."""
    scaled = tf.cast(draws, tf.float64) * tf.cast(limit, tf.float64)
    return tf.maximum(tf.cast(scaled, tf.int64), 0)


def _mix(x):
    """SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014) on uint64."""
    x = x + tf.constant(0x9E3779B97F4A7C15, tf.uint64)
    x = _fold(x, 30) * tf.constant(0xBF58476D1CE4E5B9, tf.uint64)
    x = _fold(x, 27) * tf.constant(0x94D049BB133111EB, tf.uint64)
    return _fold(x, 31)


def _fold(x, bits: int):
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(bits, tf.uint64)))
