"""Comparisons that train through train.py, run by run."""
