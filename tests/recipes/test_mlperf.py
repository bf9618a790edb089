"""MLPerf's recipes have the figures of its logs; the evidence interpolates between them."""

import json
import math
import os
import statistics

import pytest

import recipes
from recipes import evidence, mlperf
from recipes.resnet import IMAGENET_IMAGES
from tf_lamb import tf_keras as optimizers

package = pytest.importorskip("mlperf_logging.rcp_checker.rcp_checker")


def points(round_, benchmark):
    """The reference points of the package `mlperf-logging`, by batch size."""
    folder = os.path.join(os.path.dirname(package.__file__), f"training_{round_}")
    with open(os.path.join(folder, f"rcps_{benchmark}.json")) as file:
        return {point["BS"]: point for point in json.load(file).values()}


def test_every_reference_point_of_bert_is_a_recipe():
    published = points("5.1.0", "bert")
    assert {reference.batch for reference in mlperf.BERT_REFERENCES} == set(published)
    for reference in mlperf.BERT_REFERENCES:
        point = published[reference.batch]
        runs, settings = point["Epochs to converge"], point["Hyperparams"]
        assert reference.examples == pytest.approx(statistics.mean(runs), abs=1)
        assert reference.deviation == pytest.approx(statistics.stdev(runs), abs=1)
        assert reference.runs == len(runs)
        recipe = reference.recipe
        (phase,) = recipe.phases
        assert recipe.name == f"mlperf-bert-batch-{point['BS']}"
        assert phase.peak_learning_rate == settings["opt_base_learning_rate"]
        assert phase.steps == settings["opt_learning_rate_training_steps"]
        assert recipe.beta_1 == settings["opt_lamb_beta_1"]
        assert recipe.beta_2 == settings["opt_lamb_beta_2"]
        assert recipe.epsilon == settings["opt_epsilon"]
        assert recipe.weight_decay == settings["opt_lamb_weight_decay_rate"]
        # Their schedule, as google-research/bert writes it.
        peak, total = phase.peak_learning_rate, phase.steps
        warmup, start = settings["num_warmup_steps"], settings["start_warmup_step"]
        rate = optimizers.WarmupPolynomialDecay(**phase.schedule())
        for step in (0, 5, 150, 400):
            inside = warmup and step - start < warmup
            expected = peak * ((step - start) / warmup if inside else 1 - step / total)
            assert float(rate(step)) == pytest.approx(expected, rel=1e-5)


def test_every_reference_point_of_resnet_is_a_recipe():
    published = points("4.0.0", "resnet")
    assert {reference.batch for reference in mlperf.RESNET_REFERENCES} == set(published)
    for reference in mlperf.RESNET_REFERENCES:
        point = published[reference.batch]
        epochs, settings = point["Epochs to converge"], point["Hyperparams"]
        mean = statistics.mean(epochs)
        assert reference.examples / IMAGENET_IMAGES == pytest.approx(mean, abs=0.01)
        assert reference.deviation / IMAGENET_IMAGES == pytest.approx(
            statistics.stdev(epochs), abs=0.01
        )
        assert reference.runs == len(epochs)
        recipe = reference.recipe
        (phase,) = recipe.phases
        assert phase.peak_learning_rate == settings["opt_base_learning_rate"]
        assert recipe.momentum == settings["opt_momentum"]
        assert recipe.weight_decay == settings["opt_weight_decay"]
        epoch = IMAGENET_IMAGES / phase.global_batch_size
        warmup = settings["opt_learning_rate_warmup_epochs"] * epoch
        assert phase.warmup_steps == math.floor(warmup)
        decay = settings["opt_learning_rate_decay_steps"]
        assert min(abs(phase.steps - decay), abs(phase.steps - decay - warmup)) < 2
        assert mean <= phase.steps / epoch < 1.07 * mean  # the schedule ends soon after the target
        assert (recipe.epsilon, recipe.label_smoothing, recipe.target) == (0.0, 0.1, 0.759)


def test_results_are_complete():
    """One best run for each round; each recipe has its source, its target and its rule."""
    rounds = [result.round for result in mlperf.BERT_RESULTS]
    assert rounds == ["0.7", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1", "5.0"]
    assert [r.round for r in mlperf.RESNET_RESULTS] == [
        *("0.6", "0.7", "1.0", "1.1", "2.0", "2.1", "3.0")
    ]
    for result in mlperf.RESULTS:
        recipe = result.recipe
        assert recipes.find_recipe(recipe.name) == recipe
        recipe.check()
        assert result.source.startswith(f"mlcommons/training_results_v{result.round} ")
        assert recipe.target is not None and 0.1 < result.minutes < 1.3
    best = {r.round: r.recipe for r in mlperf.BERT_RESULTS}
    (phase,) = best["5.0"].phases  # its warm-up of 170,200 steps begins at step -200,000
    assert float(optimizers.WarmupPolynomialDecay(**phase.schedule())(60)) == pytest.approx(
        0.00344 * 0.9
    )
    assert {r.round for r in mlperf.BERT_RESULTS if r.recipe.sum_dtype == "bfloat16"} == {
        *("0.7", "1.0", "2.0")
    }
    assert {r.round for r in mlperf.BERT_RESULTS if not r.recipe.clip_each_replica} == {
        *("3.0", "3.1")
    }


def test_samples_between_evaluations():
    """The table of mlcommons/training, retired_benchmarks/bert/README.md."""
    table = {256: 150_000, 1_024: 150_000, 1_536: 150_000, 2_048: 150_000, 3_072: 175_000}
    table |= {4_096: 175_000, 8_192: 225_000}
    assert {batch: mlperf.bert_evaluation_examples(batch) for batch in table} == table


def test_a_reference_point_is_predicted_as_it_is():
    found = evidence.BERT.predict(8_192)
    assert found.exact and found.recipe.name == "mlperf-bert-batch-8192"
    assert (found.examples, found.rate_error) == (4_191_437, 0.0)
    assert found.low == pytest.approx(4_191_437 - 2 * 90_728)
    assert found.steps == 512


def test_between_two_points_the_logarithm_of_the_batch_decides():
    """The geometric mean of 4,096 and 16,384 is 8,192; so are examples and settings."""
    low, high = (evidence.BERT.references[i] for i in (4, 12))
    two = evidence.Evidence("two points", "sequences", (low, high))
    recipe, examples, _ = two._interpolate(two.references, 8_192)
    assert examples == pytest.approx(math.sqrt(low.examples * high.examples))
    (phase,) = recipe.phases
    assert phase.peak_learning_rate == pytest.approx(math.sqrt(2.4e-3 * 3.3e-3))
    assert 1 - recipe.beta_2 == pytest.approx(math.sqrt(0.002 * 0.1))
    assert recipe.weight_decay == pytest.approx(math.sqrt(0.01 * 0.0166629))
    scheduled = math.sqrt(855 * 4_096 * 600 * 16_384)
    assert phase.steps == round(scheduled / 8_192)
    assert phase.warmup_steps == pytest.approx(phase.steps * 290 / 600 / 2, abs=1)
    assert recipe.evaluate_every_examples == 225_000
    recipe.check()


def test_what_leaving_out_each_point_shows():
    """At the large end the evidence needs fewer assumptions than the rules, and errs less.

    Below batch 4,608 the published rates are scattered: the evidence does not know the rate better
    than the paper's rule does.
    """
    for known in evidence.EVIDENCE:
        rows = known.leave_one_out()
        assert [row.predictions["evidence"] is None for row in rows] == [
            *(True, *[False] * (len(rows) - 2), True)
        ]
        interior = rows[1:-1]
        by_evidence, by_rule = (
            statistics.mean(abs(row.errors(rule)[0]) for row in interior)
            for rule in ("evidence", "sqrt")
        )
        assert by_evidence < by_rule
        assert known.largest_error() < 0.1
        # The rules keep the number of examples, and differ in the rate.
        assert all(r.predictions["sqrt"][0] == r.predictions["linear"][0] for r in rows)
    assert evidence.BERT.largest_error(1) > 0.4
    large = [row for row in evidence.BERT.leave_one_out()[:-1] if row.reference.batch > 4_608]
    assert max(abs(row.errors("evidence")[1]) for row in large) < 0.06


def test_the_fit_of_the_critical_batch():
    smallest, critical = evidence.BERT.fit()
    assert smallest == pytest.approx(2.32e6, rel=0.005) and critical == pytest.approx(
        12_700, rel=0.01
    )
    smallest, critical = evidence.RESNET.fit()
    assert smallest / IMAGENET_IMAGES == pytest.approx(34.6, rel=0.005)
    assert critical == pytest.approx(46_900, rel=0.005)


def test_scaling_by_evidence():
    small = recipes.find_recipe("mlperf-bert-batch-256")
    for batch in (448, 8_192, 16_384):
        scaled = recipes.scale_recipe(small, batch, "evidence")
        point = recipes.find_recipe(f"mlperf-bert-batch-{batch}")
        assert scaled.phases == point.phases and scaled.beta_2 == point.beta_2
        assert scaled.evaluate_every_examples == point.evaluate_every_examples
        assert scaled.name == small.name
    between = recipes.scale_recipe(small, 10_000, "evidence")
    between.check()
    assert 2.9e-3 < between.phases[0].peak_learning_rate < 3.2e-3
    # The paper's rule would have 6.25 times the rate of batch 256.
    assert recipes.scale_recipe(small, 10_000).phases[0].peak_learning_rate == pytest.approx(
        3.5e-4 * 6.25
    )


def test_what_the_evidence_does_not_know():
    small = recipes.find_recipe("mlperf-bert-batch-256")
    with pytest.raises(ValueError, match="32768 is outside the evidence for BERT.* 256 to 16,384"):
        recipes.scale_recipe(small, 32_768, "evidence")
    with pytest.raises(ValueError, match="no evidence for bert-large-32k.* exists for: BERT-Large"):
        recipes.scale_recipe(recipes.find_recipe("bert-large-32k"), 512, "evidence")
    assert evidence.find_evidence(recipes.find_recipe("resnet50-lars-32k")) is evidence.RESNET
    assert evidence.find_evidence(recipes.find_recipe("mlperf-v0.7")) is None  # another target


@pytest.mark.parametrize(
    "name", [r.name for r in recipes.RECIPES.values() if evidence.find_evidence(r)]
)
def test_every_recipe_with_evidence_can_be_scaled_by_it(name):
    recipe = recipes.find_recipe(name)
    known = evidence.find_evidence(recipe).references
    for batch in (known[0].batch, 8_192, known[-1].batch):
        scaled = recipes.scale_recipe(recipe, batch, "evidence")
        scaled.check()
        assert scaled.phases[-1].global_batch_size == batch
