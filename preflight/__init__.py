"""Checks before a run: this machine, and estimates for TPU pods that need not exist."""
