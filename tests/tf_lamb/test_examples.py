"""The `Example:` blocks of docstrings run."""

import doctest
import importlib

import keras
import numpy as np
import pytest

import tf_lamb

MODULES = ["lamb", "lars", "batch_scaling", "schedules"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(keras3, name):
    module = importlib.import_module(f"tf_lamb.{name}")
    finder = doctest.DocTestFinder()
    names = {"keras": keras, "np": np, "tf_lamb": tf_lamb}
    examples = [test for test in finder.find(module, extraglobs=names) if test.examples]
    assert examples
    for test in examples:
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert results.failed == 0, test.name
