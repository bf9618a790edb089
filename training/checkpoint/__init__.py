"""Checkpoints: their contents, writing and reading them, and saving on a signal."""
