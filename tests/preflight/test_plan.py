"""The planner: batch size, learning rate and steps from a family of recipes and a topology."""

import re

import pytest

from preflight import plan
from preflight.topology import parse_topologies


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
    assert plan.propose_batch(members, pod, None) == 65_536
    assert plan.propose_batch(members, pod, 10_000.0) == 8_192
    assert plan.propose_batch(members, pod, 5.0) == 2_048
    # The second phase's batch, half of it, must divide too.
    assert plan.propose_batch(plan.family("bert-mini"), topology_of("v3:2x2"), 60.0) == 48


def test_an_unknown_recipe_is_reported_in_one_sentence(capsys):
    assert plan.main(["--recipe=bert-lrage", "--topology=v3-32"]) == 1
    assert capsys.readouterr().err.startswith("preflight.plan: no recipe is called 'bert-lrage'.")
