"""Model cards: the steps and batch sizes of a run, and the versions of its packages."""

import importlib.metadata
import pathlib
import re
import types

import tensorflow as tf

import recipes
from export import model_card
from export.model_card import make_card

ROOT = pathlib.Path(__file__).parents[2]


def card(recipe, steps=None):
    task = types.SimpleNamespace(
        recipe=recipe, example_unit="sequences", data="books", amount="many", facts={"data": "f"}
    )
    return make_card(task, 1_234, {"masked_accuracy": 0.5}, "model(...)", steps)


def test_a_card_has_the_steps_and_batch_sizes_of_each_phase():
    mini = recipes.find_recipe("bert-mini")
    assert "1,234 parameters, 1,800 steps of 64 and 400 of 32 sequences." in card(mini)
    assert "1,234 parameters, 1,800 steps of 64 and 1 of 32 sequences." in card(mini, 1_801)
    assert "1,234 parameters, 7 steps of 64 sequences." in card(mini, 7)
    demo = recipes.find_recipe("bert-mini-demo")
    assert "1,234 parameters, 1 step of 64 sequences." in card(demo, 1)


def test_a_card_is_made_where_tensorflow_s_package_has_another_name(monkeypatch):
    """On a TPU VM it is tensorflow-tpu, and `make tpu` installs these packages and no others."""
    lines = (ROOT / "constraints-tpu.txt").read_text().splitlines()
    installed = {re.split("[=<>@ ]", line)[0].lower() for line in lines}
    assert "tensorflow-tpu" in installed and "tensorflow" not in installed
    version = importlib.metadata.version

    def of_a_tpu_vm(name):
        if name.lower() not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", of_a_tpu_vm)
    made = card(recipes.find_recipe("bert-mini-demo"))
    assert f"- tensorflow {tf.__version__}" in made
    assert all(f"- {name} " in made for name in model_card.PACKAGES)
