"""Checkpoints: what they hold, writing and reading them, and stopping at one."""
