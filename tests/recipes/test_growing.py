"""Batch warm-up: examples, rates and steps of the phases fit together."""

import pytest

import recipes
from recipes.bert import BERT_MINI_DEMO as DEMO
from tf_lamb import tf_keras as optimizers


def test_phases_have_the_recipes_examples_and_its_rate_times_the_root():
    """2,000 steps of 64, 200 of them warm-up, as thirds of 32, 64 and 128."""
    grown = recipes.grow_batch(DEMO, [32, 64, 128])
    assert [phase.global_batch_size for phase in grown.phases] == [32, 64, 128]
    assert [phase.steps for phase in grown.phases] == [1_333, 667, 333]
    assert grown.examples_at(grown.steps) == pytest.approx(2_000 * 64, abs=64)
    assert [phase.warmup_steps for phase in grown.phases] == [400, 0, 0]
    grown.check()
    rates = optimizers.Phases([phase.schedule() for phase in grown.phases])
    (phase,) = DEMO.phases
    rate = optimizers.WarmupPolynomialDecay(**phase.schedule())
    for step in (0, 100, 399, 400, 900, 1_332, 1_333, 1_700, 1_999, 2_000, 2_332):
        batch = 32 if step < 1_333 else 64 if step < 2_000 else 128
        expected = float(rate(grown.examples_at(step) / 64)) * (batch / 64) ** 0.5
        assert float(rates(step)) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert float(rates(grown.steps)) == pytest.approx(0.0, abs=1e-5)


def test_the_same_batch_again_and_again_is_the_same_run():
    grown = recipes.grow_batch(DEMO, [64, 64])
    (phase,) = DEMO.phases
    rates = optimizers.Phases([part.schedule() for part in grown.phases])
    rate = optimizers.WarmupPolynomialDecay(**phase.schedule())
    for step in range(0, 2_001, 50):
        assert float(rates(step)) == pytest.approx(float(rate(step)), rel=1e-5, abs=1e-9)


def test_the_papers_decay_stays_its_line():
    recipe = recipes.find_recipe("mlperf-bert-batch-8192")
    grown = recipes.grow_batch(recipe, [4_096, 8_192])
    rates = optimizers.Phases([part.schedule() for part in grown.phases])
    rate = optimizers.WarmupPolynomialDecay(**recipe.phases[0].schedule())
    for step in (0, 200, 500, 599, 600, 800):
        seen, batch = grown.examples_at(step), 4_096 if step < 600 else 8_192
        expected = float(rate(seen / 8_192)) * (batch / 8_192) ** 0.5
        assert float(rates(step)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "batches", "message"),
    [
        ("bert-mini", [8, 16], "in a recipe of one phase. bert-mini has 2"),
        ("resnet50-lars-32k", [8, 16], "with a linear decay. Received: power=2"),
        ("bert-mini-demo", [0, 16], r"at least 1. Received: \[0, 16\]"),
        ("bert-mini-demo", [16, 32, 100_000], "batch size 100000 has 0 steps"),
        ("bert-mini-demo", [64] * 20, "batch size 64 has 100 steps, 200 of them warm-up"),
    ],
)
def test_a_batch_that_cannot_grow(recipe, batches, message):
    with pytest.raises(ValueError, match=message):
        recipes.grow_batch(recipes.find_recipe(recipe), batches)
