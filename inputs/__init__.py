"""Data pipelines on `tf.data`: every batch has a static shape and depends only on (seed, step)."""
