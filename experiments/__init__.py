"""Experiments: tables of many runs, tuned by the same rule. See `python -m experiments --help`."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
