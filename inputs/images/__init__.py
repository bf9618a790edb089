"""Labelled images: files → shards → batches."""
