"""Comparisons of optimizers, run by run, through train.py."""

DIVERGED = 3  # exit status of train.py for a run that diverged
