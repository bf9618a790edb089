"""The planner: batch size, learning rate and steps from a family of recipes and a topology."""

import itertools
import re

import pytest

from preflight import curve, plan
from preflight import run as preflight
from preflight.compiler.topology import parse_topologies
from preflight.estimate import StepTime, all_reduce_seconds
from recipes import evidence
from recipes.evidence import Evidence


def topology_of(name):
    (topology,) = parse_topologies(name)
    return topology


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe=resnet50"], "several models or optimizers: resnet50-adagrad-16k, .*Give one"),
        (["--recipe=bert-large", "--batch=1001"], "--topology=v3:2x2: .* Try --batch=1000"),
        (["--recipe=bert-mini", "--batch=8"], "the batch of 4 of phase 2 .* Try --batch=16"),
        (["--recipe=bert-large", "--topology=v3-8,v3-32"], "give exactly one topology"),
        (
            ["--recipe=bert-mini-demo", "--topology=v3-2048"],
            "--topology=v3:32x32: with one example per replica, .* Give a smaller slice",
        ),
    ],
)
def test_an_impossible_plan_is_reported_in_one_sentence(arguments, message, capsys):
    assert plan.main(["--topology=v3:2x2", *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_the_nearest_recipe_of_a_family_is_scaled():
    members = plan.family("bert-large")
    assert {"bert-large-512", "bert-large-64k-32k"} <= {recipe.name for recipe in members}
    assert plan.scale_nearest(members, 65_536).name == "bert-large-64k-32k"
    scaled = plan.scale_nearest(members, 24_576)
    assert scaled.name == "bert-large-32k"
    assert scaled.phases[0].peak_learning_rate == pytest.approx(5e-3 * 0.75**0.5)
    assert scaled.phases[0].steps == 18_750  # 460.8 million sequences


def test_the_batch_is_the_largest_published_one_within_the_noise_scale():
    members, pod = plan.family("bert-large"), topology_of("v3-2048")
    assert plan.propose_batch(members, pod, None)[0] == 65_536
    assert plan.propose_batch(members, pod, 10_000.0) == (8_192, "at most the noise scale, 10,000")
    # The second phase's batch, half of it, must divide too.
    assert plan.propose_batch(plan.family("bert-mini"), topology_of("v3:2x2"), 60.0)[0] == 48


@pytest.mark.parametrize(
    ("family", "topology", "scale", "batch", "source"),
    [
        ("mlperf-bert", "v3-2048", 1e9, 12_288, "critical batch size .* points, 12,720$"),
        ("mlperf-bert", "v3-512", 3_000.0, 2_560, "at most the noise scale, 3,000$"),
        ("mlperf-bert", "v3-2048", 5.0, 2_048, "one example per replica, .* the noise scale, 5$"),
        ("mlperf-bert", "v3-8", 100.0, 256, "smallest of the evidence, 256, .* noise scale, 100$"),
        ("bert-large", "v3-2048", 1e9, 65_536, "the largest one published .*, 65,536$"),
        ("bert-large", "v3-2048", 5.0, 2_048, "one example per replica, .* the noise scale, 5$"),
        ("bert-base", "v3-2048", None, 2_048, "one example per replica, .* published .*, 256$"),
    ],
)
def test_the_source_of_the_batch_is_what_limits_it(family, topology, scale, batch, source):
    made = plan.make_plan(plan.family(family), topology_of(topology), scale=scale)
    assert made.recipe.phases[0].global_batch_size == batch
    assert re.search(source, made.batch_source)


@pytest.mark.parametrize(
    ("family", "batch"),
    [
        ("mlperf-bert", 16_384),
        ("mlperf-v0.7", 8_192),  # the only one with its target
        ("resnet50-lamb", 32_768),  # larger ones are published with LARS
        ("cifar10-lars-128", 128),  # 4,096 is published, and leaves fewer steps than the warm-up
    ],
)
def test_by_a_rule_the_batch_is_one_that_was_published_for_such_runs(family, batch):
    for rule in ("sqrt", "linear")[: 1 if family.startswith("cifar") else 2]:
        made = plan.make_plan(plan.family(family), topology_of("v3-8"), rule=rule)
        assert made.recipe.phases[0].global_batch_size == batch
        assert f"published for this model and optimizer, {batch:,}" in made.batch_source


def test_every_recipe_can_be_planned_by_a_rule():
    for name, rule in itertools.product(plan.recipes.RECIPES, ("sqrt", "linear")):
        assert plan.make_plan(plan.family(name), topology_of("v3-8"), rule=rule).recipe


def result(batch=12_288, topology="v3-2048", **fields):
    """A pre-flight's result of invented times: 0.5 ms for each example on a replica."""
    slice_ = topology_of(topology)
    replica_batch = batch // slice_.replicas
    work = 5e-4 * replica_batch + 1e-3
    time = StepTime(work, "compiler", work, 1e-3, 0.0, 0.0, 2e-3, 2e-3, 1e-3)
    return preflight.PhaseResult(
        1,
        500,
        batch,
        slice_,
        replica_batch,
        accumulation=1,
        program={"all_reduce_bytes": 1_340_000_000},
        time=time,
        **fields,
    )


BERT = plan.family("mlperf-bert")


def test_a_plan_by_evidence_says_where_each_number_comes_from():
    made = plan.make_plan(BERT, topology_of("v3-2048"))
    phase = made.recipe.phases[0]
    assert phase.global_batch_size == 12_288  # the critical batch, 12,720, in 2,048 replicas
    assert phase.peak_learning_rate == 0.0031 and made.prediction.exact
    text = plan.describe(made, [result()], examples=1_000_000)
    assert "Batch: critical batch size of the reference points, 12,720" in text
    assert "reference point 12,288 (mlcommons/logging" in text
    assert "4.47 million sequences (4.29 to 4.65), 364 steps" in text
    assert "4.47 times 1,000,000 examples" in text
    # 364 steps of 1 + 3 + 2 - 1 ms.
    assert "Time to the target: 0.03 minutes estimated" in text and "step 0.005 s" in text
    assert "Learning rate: known" not in text
    text = plan.describe(made, [result(search_error="killed by SIGABRT")])
    assert "\nThe search for a larger batch ended early: killed by SIGABRT\n" in text


def test_between_reference_points_the_plan_says_how_well_they_know():
    made = plan.make_plan(BERT, topology_of("v3-2048"), batch=10_240)
    text = plan.describe(made, [result(10_240)])
    assert "Batch: --batch" in text and "between the reference points 8,704 and 12,288" in text
    assert "Learning rate: known to 2%, the larger error of the two points" in text
    # The figures of the guide on batch sizes.
    errors = [evidence.BERT.predict(batch).rate_error for batch in (1_024, 5_000, 6_500, 15_000)]
    assert plan.describe_error(errors[0]).startswith("known to a factor of 1.7 only")
    assert plan.describe_error(errors[1]).endswith("try some around it")
    assert plan.describe_error(errors[2]).startswith("known to 6%") and errors[3] < errors[2]
    assert "the largest error of a point predicted from the others, 9%" in text


def test_the_noise_scale_and_the_rule_can_be_chosen():
    pod = topology_of("v3-512")
    assert plan.make_plan(BERT, pod, scale=3_000.0).recipe.phases[0].global_batch_size == 2_560
    made = plan.make_plan(BERT, pod, batch=1_024, rule="sqrt")
    assert made.evidence is None and "which no run at this size checks" in made.source
    start = made.recipe.name
    assert start == "mlperf-bert-batch-1536"
    assert made.recipe.phases[0].peak_learning_rate == pytest.approx(2e-3 * (2 / 3) ** 0.5)
    paper = plan.make_plan(plan.family("bert-large"), pod, batch=32_768, examples=3_276_800)
    assert paper.recipe.steps == 100 and "which no run" not in paper.source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe=mlperf-bert", "--batch=65536"], "65536 is outside the evidence for BERT-Large"),
        (["--recipe=bert-large", "--rule=evidence"], "there is no evidence for bert-large-512"),
        (["--recipe=bert-large", "--picture=a.png"], "--picture: there is no evidence for bert"),
        (["--recipe=mlperf-bert", "--examples=0"], "--examples must be at least 1"),
    ],
)
def test_what_has_no_evidence_is_said_in_one_sentence(arguments, message, capsys):
    assert plan.main(["--topology=v3:2x2", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_slice_with_more_replicas_than_the_largest_batch(monkeypatch):
    few = Evidence("BERT", "sequences", evidence.BERT.references[:2])
    monkeypatch.setattr(plan, "find_evidence", lambda recipe: few)
    with pytest.raises(ValueError, match="v3:32x32 has 2,048 replicas, and the evidence for BERT"):
        plan.make_plan(BERT, topology_of("v3-2048"))


def test_the_step_model_is_the_pre_flight_at_its_own_size():
    model = curve.StepModel.from_result(result())
    assert model.per_example == pytest.approx(5e-4) and model.update == pytest.approx(1e-3)
    slice_ = topology_of("v3-2048")
    all_reduce = all_reduce_seconds(slice_, 1_340_000_000)
    hidden = 0.5 * min(all_reduce, 2 / 3 * 3e-3)
    expected = 4e-3 + all_reduce - hidden
    assert model.seconds(slice_, 12_288) == pytest.approx(expected)
    assert model.seconds(slice_, 24_576) > expected + 2.9e-3 - 0.5 * 2e-3


def test_the_curve_has_the_fastest_batch_of_each_slice(tmp_path):
    """Time falls with the chips, in less than proportion; at last twice as many save little."""
    model = curve.StepModel(5e-4, 1e-3, 1_340_000_000, 0.0)
    points = curve.curve(evidence.BERT, model, topology_of("v3-2048"))
    assert [point.topology.chips for point in points] == [4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert all(point.batch % point.topology.replicas == 0 for point in points)
    minutes = [point.minutes() for point in points]
    assert minutes == sorted(minutes, reverse=True)
    ratios = [a / b for a, b in itertools.pairwise(minutes)]
    assert ratios[0] > 1.5 > ratios[-1] > 1
    # No other batch is faster on the largest slice.
    slice_ = points[-1].topology
    for batch in range(2_048, 16_385, 2_048):
        steps = evidence.BERT.predict(batch).steps
        assert minutes[-1] <= steps * model.seconds(slice_, batch) / 60 + 1e-12
    slow_links = curve.StepModel(5e-4, 1e-3, 40_000_000_000, 0.0)
    slow = curve.curve(evidence.BERT, slow_links, topology_of("v3-2048"))
    end = curve.pays_until(slow)
    larger = next(p for p in slow if p.topology.chips == 2 * end.topology.chips)
    assert larger.minutes() > 0.9 * end.minutes() and end is not slow[-1]
    assert f"From {end.topology.chips:,} chips on, twice as many" in plan.describe_curve(slow)
    curve.draw(evidence.BERT, slow, str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_recipe_is_reported_in_one_sentence(capsys):
    assert plan.main(["--recipe=bert-lrage", "--topology=v3-32"]) == 1
    assert capsys.readouterr().err.startswith("preflight.plan: no recipe is called 'bert-lrage'.")
