"""Each optimizer gets the constants of the recipe, and decays the same weights."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import recipes
from recipes.bert import BERT_LARGE_32K as PAPER
from tf_lamb import tf_keras as ours
from training import optimizers

RATE = 0.1


def made(recipe, *changes):
    recipe = recipes.override(recipe, changes)
    recipe.check()
    return recipe, optimizers.make_optimizer(recipe, RATE)


def model():
    layers = [tf_keras.layers.Dense(3), tf_keras.layers.LayerNormalization(name="layer_norm")]
    made_up = tf_keras.Sequential([tf_keras.layers.Input([4]), *layers], name="m")
    for variable in made_up.trainable_variables:
        variable.assign(tf.random.stateless_uniform(variable.shape, [1, 2], 0.5, 1.0))
    return made_up


def test_lamb_has_the_recipes_constants():
    mlperf = recipes.find_recipe("mlperf-v0.7")
    _, optimizer = made(mlperf)
    assert type(optimizer) is ours.LAMB and optimizer.based_on is None
    config = optimizer.get_config()
    names = ("beta_1", "beta_2", "epsilon", "weight_decay")
    assert {name: config[name] for name in names} == {name: getattr(mlperf, name) for name in names}
    # Each replica's gradients are clipped before the sum, in the step.
    assert config["global_clipnorm"] is None
    assert mlperf.clip_each_replica and mlperf.global_clipnorm == 1.0
    assert config["exclude_from_weight_decay"] == list(mlperf.exclude_from_weight_decay)
    _, optimizer = made(recipes.find_recipe("nvlamb-64k-32k"))
    assert (optimizer.based_on, optimizer.global_clipnorm) == ("nvlamb", 1.0)
    assert optimizer.get_config()["exclude_from_layer_adaptation"] == []


def test_lars_and_its_variants():
    _, optimizer = made(PAPER, "optimizer=lars", "momentum=0.8", "epsilon=0")
    assert type(optimizer) is ours.LARS
    assert (optimizer.momentum, optimizer.trust_coefficient) == (0.8, 0.001)
    _, optimizer = made(PAPER, "optimizer=lars", "variant=paper")
    assert (optimizer.form, optimizer.trust_coefficient) == ("paper", 1.0)  # not LARS's default
    _, optimizer = made(PAPER, "optimizer=lars", "trust_coefficient=0.02")
    assert optimizer.trust_coefficient == 0.02


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["variant=huge"], "`variant` must be one of"),
        (["optimizer=adamw", "beta_1=1"], r"`beta_1` must be a number in \[0, 1\)"),
        (["optimizer=adamw", "weight_decay=-1"], "`weight_decay` must be a number in"),
        (["optimizer=momentum", "momentum=1"], r"`momentum` must be a number in \[0, 1\)"),
    ],
)
def test_a_value_outside_its_range_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        made(PAPER, *changes)


def moved_by(recipe, optimizer, gradient):
    """Returns name -> (old value, change by one update); all gradient elements are equal."""
    network = model()
    variables = network.trainable_variables
    optimizers.build(optimizer, recipe, variables)
    before = [v.numpy() for v in variables]
    optimizer.apply_gradients([(tf.fill(v.shape, gradient), v) for v in variables])
    return {
        v.name.split(":")[0]: (old, v.numpy() - old)
        for v, old in zip(variables, before, strict=True)
    }


@pytest.mark.parametrize("name", ["adamw", "adagrad", "momentum"])
def test_the_first_update_of_a_baseline_matches_its_formula(name):
    """Only the kernel is decayed: the bias and layer-norm variables are excluded."""
    recipe, optimizer = made(PAPER, f"optimizer={name}", "weight_decay=0.5")
    gradient, epsilon = 0.25, 1e-6
    update = {
        # tf_keras adds ε to √v before the bias correction: Kingma and Ba's ε-hat.
        "adamw": gradient / (gradient + epsilon / np.sqrt(1 - 0.999)),
        "adagrad": gradient / np.sqrt(0.1 + gradient**2 + epsilon),
        "momentum": gradient,
    }[name]
    for path, (old, moved) in moved_by(recipe, optimizer, gradient).items():
        decay = 0.5 * old if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(moved, -RATE * (update + decay), rtol=2e-5, err_msg=path)
    unknown, optimizer = made(PAPER, f"optimizer={name}", "exclude_from_weight_decay=nothing")
    with pytest.warns(UserWarning, match="'nothing' of `exclude_from_weight_decay` matches none"):
        optimizers.build(optimizer, unknown, model().trainable_variables)


@pytest.mark.parametrize("name", ["lamb", "lars", "adamw", "adagrad", "momentum"])
def test_all_take_the_recipes_schedule(name):
    recipe = recipes.override(PAPER, [f"optimizer={name}"])
    optimizer = optimizers.make_optimizer(recipe, optimizers.make_schedule(recipe))
    network = model()
    optimizers.build(optimizer, recipe, network.trainable_variables)
    rates = []
    for step in (0, 100, 14_063 + 31):
        optimizer.iterations.assign(step)
        optimizer.apply_gradients([(tf.ones_like(v), v) for v in network.trainable_variables])
        rates.append(float(optimizer.learning_rate))
    np.testing.assert_allclose(rates, [0, 5e-3 * 100 / 3125, 5e-3 * 31 / 312], rtol=1e-6)


def test_a_drop_of_the_rate_takes_effect_at_once_with_momentum():
    """x ← x - η m: arXiv:1706.02677, equation 9; with η inside, the steps would shrink slowly."""
    recipe = recipes.override(PAPER, ["optimizer=momentum", "weight_decay=0"])
    rate = tf.Variable(RATE)
    optimizer = optimizers.make_optimizer(recipe, rate)
    network = model()
    variables = network.trainable_variables
    optimizers.build(optimizer, recipe, variables)
    momentum = 0.0
    for step in range(6):
        if step == 4:
            rate.assign(RATE / 10)
        before = variables[0].numpy()
        optimizer.apply_gradients([(tf.fill(v.shape, 0.5), v) for v in variables])
        momentum = 0.9 * momentum + 0.5
        moved = variables[0].numpy() - before
        np.testing.assert_allclose(moved, -rate.numpy() * momentum, rtol=1e-4)
