"""Labeled images: files → shards → batches."""
