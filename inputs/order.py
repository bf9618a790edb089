"""Which examples a step reads: a function of (seed, step, replica), whoever computes it."""

import numpy as np
import tensorflow as tf


def share(global_batch_size: int, context: tf.distribute.InputContext | None):
    """This host's part of each global batch.

    Returns:
        (local, numbers_of): batches per step that this host makes, one for each local replica;
        and `k -> [B] int64`, the numbers of the examples in its k-th batch.
    """
    replicas = context.num_replicas_in_sync if context else 1
    local = replicas // context.num_input_pipelines if context else 1
    first = context.input_pipeline_id * local if context else 0
    size = global_batch_size // replicas

    def numbers_of(k):
        step, replica = k // local, first + k % local
        return step * global_batch_size + replica * size + tf.range(size, dtype=tf.int64)

    return local, numbers_of


def shuffled(number, total: int, seed: int):
    """What the training examples [B] int64 of these numbers are made of, in [0, `total`).

    Every epoch of `total` examples is a permutation of its own.
    """
    epoch = number // total
    seeds = tf.stack([tf.fill(tf.shape(epoch), np.int64(seed)), epoch, epoch * 0], axis=1)
    # The public wrapper cannot take a seed for each index (TensorFlow 2.20); the op can.
    return tf.raw_ops.RandomIndexShuffle(
        index=number % total, seed=seeds, max_index=np.int64(total - 1)
    )
