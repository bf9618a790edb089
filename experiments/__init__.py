"""Experiments: tables of many runs, tuned by one rule. See `python -m experiments --help`."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
