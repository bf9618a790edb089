"""Experiments that run train.py many times, such as comparisons of optimizers."""

DIVERGED = 3  # exit status of train.py for a run that diverged
