"""Checks before a run: whether this machine can train, and what a run would need on a TPU pod."""
