"""tf.data pipelines: each gives static batches whose content is a function of (seed, step)."""
