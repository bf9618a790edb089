"""`scale_batch` reproduces the published tables, and agrees with how recipes are scaled."""

import dataclasses
import doctest
import math

import numpy as np
import pytest

import recipes
import tf_lamb
from tf_lamb import batch_scaling

# arXiv:1904.00962v3, Table 5 (BERT-Large): batch size, exponent k of the rate 5/(2^k · 10³), steps.
BERT = [(512 * 2**i, 3 - i / 2, 1_000_000 / 2**i) for i in range(7)]
# Table 6 (ResNet-50): batch size, exponent k of the rate 4/(2^k · 100).
RESNET = [(512 * 2**i, 3 - i / 2) for i in range(7)]
IMAGES = 1_281_167


def scale(batch_size_from=512, batch_size_to=1_024, **changes):
    """`scale_batch`, by default from the first column of Table 5."""
    schedule = {"learning_rate": 6.25e-4, "warmup_steps": 3_125, "total_steps": 1_000_000}
    return tf_lamb.scale_batch(batch_size_from, batch_size_to, **schedule | changes)


@pytest.mark.parametrize(("start", "k_start", "steps_start"), BERT)
def test_every_column_of_table_5_gives_every_other(start, k_start, steps_start):
    for batch, k, steps in BERT:
        scaled = scale(
            start, batch, learning_rate=5 / (2**k_start * 1e3), total_steps=int(steps_start)
        )
        assert scaled.learning_rate == pytest.approx(5 / (2**k * 1e3), rel=1e-12)
        assert (scaled.warmup_steps, scaled.total_steps) == (3_125, steps)


def test_the_columns_of_table_6():
    """782 steps of warm-up and 90 epochs at every batch size."""
    total_steps = round(90 * IMAGES / 512)
    for batch, k in RESNET:
        scaled = scale(512, batch, learning_rate=0.005, warmup_steps=782, total_steps=total_steps)
        assert scaled.learning_rate == pytest.approx(4 / (2**k * 100), rel=1e-12)
        assert scaled.warmup_steps == 782
        assert abs(scaled.total_steps - 90 * IMAGES / batch) <= 1


def test_linear_scales_the_rate_by_k_and_keeps_the_epochs_of_warmup():
    """Goyal et al., section 5.1: 0.1 at 256, 3.2 at 8,192, 5 epochs of warm-up at both."""
    scaled = scale(
        256,
        8_192,
        learning_rate=0.1,
        warmup_steps=5 * IMAGES // 256,
        total_steps=90 * IMAGES // 256,
        rule="linear",
    )
    expected = (pytest.approx(3.2), round(5 * IMAGES / 8_192), round(90 * IMAGES / 8_192))
    assert scaled == expected


@pytest.mark.parametrize("rule", batch_scaling.RULES)
def test_the_same_batch_size_changes_nothing(rule):
    assert scale(512, 512, rule=rule) == (6.25e-4, 3_125, 1_000_000)


def test_half_a_step_is_rounded_up():
    assert scale(1, 2, warmup_steps=0, total_steps=5).total_steps == 3
    assert scale(1, 2, warmup_steps=0, total_steps=1).total_steps == 1
    assert scale(1, 3, warmup_steps=0, total_steps=10).total_steps == 3


def test_the_result_consists_of_python_numbers():
    scaled = scale(
        np.int64(512),
        np.int32(2_048),
        learning_rate=np.float32(0.5),
        warmup_steps=np.int64(10),
        total_steps=np.int32(2**30),  # twice that overflows int32
    )
    assert scaled == (1.0, 10, 2**28)
    assert [type(value) for value in scaled] == [float, int, int]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "cubic"}, "`rule` must be one of 'sqrt', 'linear'. Received: rule='cubic'"),
        ({"batch_size_from": 0}, "`batch_size_from` must be an integer >= 1. Received: .*=0"),
        ({"batch_size_to": 1.5}, "`batch_size_to` must be an integer >= 1. Received: .*=1.5"),
        ({"batch_size_to": True}, "`batch_size_to` must be an integer >= 1"),
        ({"learning_rate": 0.0}, r"`learning_rate` must be a number in \(0, inf\)"),
        ({"learning_rate": math.nan}, "`learning_rate` must be a number"),
        ({"learning_rate": 1.5e308}, "beyond the range of a float. Received: learning_rate=1.5e"),
        ({"batch_size_to": 10**400}, "beyond the range of a float"),
        ({"batch_size_from": 10**400}, "beyond the range of a float"),
        ({"warmup_steps": -1}, "`warmup_steps` must be an integer >= 0. Received: .*=-1"),
        ({"warmup_steps": 2_000_000}, "`warmup_steps` must be a number in"),
        ({"total_steps": 0}, "`total_steps` must be an integer >= 1. Received: .*=0"),
        (
            {"batch_size_to": 2**18},
            "leaves 1953 steps in total, and warm-up takes 3125. Received: batch_size_to=262144",
        ),
    ],
)
def test_arguments_that_cannot_be_scaled_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        scale(**changes)


@pytest.mark.parametrize("rule", batch_scaling.RULES)
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_scaled_by_the_same_rule(name, rule):
    """`recipes` does not import the library, so it computes the two factors again."""
    recipe = recipes.find_recipe(name)
    # A published phase has a number of examples, from which its steps are computed.
    first = dataclasses.replace(recipe.phases[0], examples=None)
    recipe = dataclasses.replace(recipe, phases=(first,))
    compared = 0
    for batch in (1, 7, 64, 100, 1_000, 4_096, 10_000, 65_536):
        try:
            expected = tf_lamb.scale_batch(
                first.global_batch_size,
                batch,
                learning_rate=first.peak_learning_rate,
                warmup_steps=first.warmup_steps,
                total_steps=first.steps,
                rule=rule,
            )
        except ValueError:
            with pytest.raises(ValueError, match="and its warm-up takes"):
                recipes.scale_recipe(recipe, batch, rule)
            continue
        (phase,) = recipes.scale_recipe(recipe, batch, rule).phases
        assert (phase.peak_learning_rate, phase.warmup_steps, phase.steps) == expected
        compared += 1
    assert compared >= 3


def test_the_example_in_the_documentation_runs():
    failed, attempted = doctest.testmod(batch_scaling)
    assert attempted and not failed
