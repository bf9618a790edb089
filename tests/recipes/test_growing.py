"""Batch warm-up: examples, rates and steps of the phases fit together."""

import pytest
from absl.testing import flagsaver

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


def test_a_decay_that_begins_at_the_end_cannot_be_split():
    recipe = recipes.override(DEMO, ["decay_from=2000"])
    with pytest.raises(ValueError, match="decay must begin before .* 2000 steps, .*from=2000"):
        recipes.grow_batch(recipe, [32, 64])


@pytest.fixture
def choose():
    """A function of --set's values that returns the recipe of --grow_batch=32,64,128 with them."""
    import train

    train.FLAGS(["train.py"])

    def choose(*assignments):
        with flagsaver.flagsaver(grow_batch="32,64,128", set=list(assignments)):
            return train.choose_recipe()

    return choose


def test_fields_are_set_before_the_batch_grows(choose):
    grown = choose("peak_learning_rate=0.005", "steps=1000", "warmup_steps=100", "beta_2=0.9")
    changed = ["peak_learning_rate=0.005", "steps=1000", "warmup_steps=100", "beta_2=0.9"]
    assert grown == recipes.grow_batch(recipes.override(DEMO, changed), [32, 64, 128])
    first, second, third = grown.phases
    assert first.peak_learning_rate == pytest.approx(0.005 * 0.5**0.5)
    assert second.peak_learning_rate == pytest.approx(2**0.5 * first.end_learning_rate)
    assert third.peak_learning_rate == pytest.approx(2**0.5 * second.end_learning_rate)
    assert [phase.warmup_steps for phase in grown.phases] == [200, 0, 0]
    # The batch that rates and steps refer to.
    half = choose("global_batch_size=32")
    assert [phase.global_batch_size for phase in half.phases] == [32, 64, 128]
    assert half.phases[0].peak_learning_rate == pytest.approx(DEMO.phases[0].peak_learning_rate)


def test_fields_of_one_of_the_phases_are_set_afterwards(choose):
    grown = choose("phase2.peak_learning_rate=0.1", "telemetry=false")
    expected = [
        phase.peak_learning_rate for phase in recipes.grow_batch(DEMO, [32, 64, 128]).phases
    ]
    expected[1] = 0.1
    assert [phase.peak_learning_rate for phase in grown.phases] == expected
    assert not grown.telemetry


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("global_batch_size=0", "--set: global_batch_size must be at least 1"),
        ("power=2", "--grow_batch: .* a linear decay. Received: power=2"),
        ("phase4.steps=3", "--set: no field is called 'phase4.steps'"),
    ],
)
def test_fields_that_the_growing_batch_cannot_have(choose, assignment, message):
    with pytest.raises(ValueError, match=message):
        choose(assignment)


def test_a_grown_run_is_evaluated_after_as_many_examples_as_before():
    recipe = recipes.override(DEMO, ["evaluate_every_steps=100"])
    grown = recipes.grow_batch(recipe, [32, 64])
    grown.check()
    steps = grown.evaluation_steps(0, grown.steps)
    assert steps == [*range(200, 2_001, 200), *range(2_100, 3_001, 100)]
    assert [grown.examples_at(step) for step in steps] == [6_400 * i for i in range(1, 21)]
