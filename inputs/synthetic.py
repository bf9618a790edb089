"""Made-up batches with the shapes and types of the real ones, to run a program without data."""

import tensorflow as tf


def synthetic_batches(spec, below, seed: int) -> tf.data.Dataset:
    """One random batch, again and again.

    Args:
        spec: dictionary of `tf.TensorSpec`s, the pipeline's element_spec; shapes are static.
        below: dictionary; an integer tensor of that name is uniform in [0, its value), 1 where
            the name is missing. Float tensors, the weights, are 1.
        seed: int.
    """
    batch = {}
    for salt, (name, tensor) in enumerate(sorted(spec.items())):
        if tensor.dtype.is_integer and name in below:
            numbers = tf.random.stateless_uniform(  # makes no small integers, such as pixels
                tensor.shape, [seed, salt], maxval=below[name], dtype=tf.int32
            )
            batch[name] = tf.cast(numbers, tensor.dtype)
        else:
            batch[name] = tf.ones(tensor.shape, tensor.dtype)
    return tf.data.Dataset.from_tensors(batch).repeat()
