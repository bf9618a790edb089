"""Every variant of both rules and every arithmetic option, against the float64 oracle.

test_golden.py compares variants with the installed libraries that they come from; test_slices.py
has layers that are not variables. An update is elementwise apart from its norms, and
test_updates.py has every shape, so two shapes are enough here.
"""

import numpy as np
import oracle
import pytest
import tensorflow as tf
from drive import FEW_LAYERS, STEPS, Run, assert_agrees, largest
from drive import random_gradients as all_gradients
from drive import random_weights as all_weights
from test_updates import RATES, schedule

OWN = {
    "LAMB": {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.05, "weight_decay": 0.1},
    "LARS": {"momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.2, "epsilon": 0.1},
}
ORACLE = {"LAMB": oracle.Lamb, "LARS": oracle.Lars}
NO_DECAY = ("conv/bias", "norm/gamma")
# (rule, variant): the oracle's arguments, its clipping, and whether layers without decay are
# adapted.
CLIP = {"global_clipnorm": 1.0}
VARIANTS = {
    ("LAMB", "paper-v1"): ({}, {}, False),
    ("LAMB", "paper-v3"): ({"bias_correction": False}, {}, False),
    ("LAMB", "paper"): ({}, {}, False),
    ("LAMB", "nvlamb"): ({}, CLIP, True),
    ("LAMB", "n-lamb"): ({"nesterov": "first"}, {}, False),
    ("LAMB", "nn-lamb"): ({"nesterov": "both"}, {}, False),
    ("LAMB", "tf-models"): ({}, {}, False),
    ("LAMB", "optax"): ({}, {}, True),
    ("LAMB", "apex"): ({}, CLIP, False),
    ("LAMB", "lambc"): ({"trust_ratio_bounds": (0.0, 1.0)}, {}, False),
    ("LAMB", "deepspeed"): (
        {"bias_correction": "rate", "trust_ratio_bounds": (0.01, 10.0)},
        {},
        True,
    ),
    ("LARS", "paper"): ({"form": "paper"}, {}, False),
    ("LARS", "you-2017"): ({"form": "mlperf"}, {}, False),
    ("LARS", "mlperf"): ({"form": "mlperf"}, {}, False),
    ("LARS", "tf-contrib"): ({"form": "tf-contrib"}, {}, False),
    ("LARS", "tf-models"): ({"form": "tf-models"}, {}, False),
    ("LARS", "tf-models-scaled"): ({"form": "tf-models-scaled"}, {}, False),
    ("LARS", "optax"): ({"form": "tf-models"}, {}, True),
}
OPTIONS = {
    "no bias correction": ("LAMB", {"bias_correction": False}),
    "l1": ("LAMB", {"norm": "l1"}),
    "linf": ("LAMB", {"norm": "linf"}),
    "bounds": ("LAMB", {"weight_norm_bounds": (0.5, 20.0)}),
    "bias correction of the rate": ("LAMB", {"bias_correction": "rate"}),
    "bounds of the ratio": ("LAMB", {"trust_ratio_bounds": (0.01, 0.5)}),
    "bounds of LARS's ratio": ("LARS", {"trust_ratio_bounds": (0.01, 0.5)}),
    "n-lamb without bias correction": ("LAMB", {"nesterov": "first", "bias_correction": False}),
    "nn-lamb without bias correction": ("LAMB", {"nesterov": "both", "bias_correction": False}),
    "l1 of LARS": ("LARS", {"norm": "l1"}),
    "linf of LARS": ("LARS", {"norm": "linf", "form": "tf-models-scaled"}),
}


def random_weights():
    return all_weights(names=FEW_LAYERS)


def random_gradients():
    return all_gradients(1, names=FEW_LAYERS)


def expected(rule, gradients, no_decay=(), no_adaptation=(), clip=None, **arguments):
    """The oracle's weights `[step][layer]`; `arguments` replace those of `OWN`."""
    layers = [
        ORACLE[rule](
            x,
            decayed=name not in no_decay,
            adapted=name not in no_adaptation,
            **OWN[rule] | arguments,
        )
        for name, x in zip(FEW_LAYERS, random_weights(), strict=True)
    ]
    return oracle.history(layers, gradients, RATES, **clip or {})


def history(flavour, rule, gradients, variant=None, **arguments):
    """Weights `[step][layer]`, and the run."""
    rule_class = getattr(flavour.lamb, rule)
    arguments = OWN[rule] | arguments

    def make():
        if variant is None:
            return rule_class(schedule(flavour), **arguments)
        return rule_class.variant(variant, schedule(flavour), **arguments)

    run = Run(flavour, make, random_weights(), graph=False, names=FEW_LAYERS)
    return run.history(gradients), run


def assert_differs(weights, other):
    """Asserts that the comparison rejects a wrong answer."""
    with pytest.raises(AssertionError):
        assert_agrees(weights, other)


@pytest.mark.parametrize(("rule", "variant"), VARIANTS, ids=[": ".join(case) for case in VARIANTS])
def test_a_variant_agrees_with_its_formula(flavour, rule, variant):
    gradients = random_gradients()
    told, clip, adapts_all = VARIANTS[rule, variant]
    patterns = ["bias$", "norm/"]
    weights, _ = history(flavour, rule, gradients, variant, exclude_from_weight_decay=patterns)
    no_adaptation = () if adapts_all else NO_DECAY
    exact = expected(rule, gradients, NO_DECAY, no_adaptation, clip, **told)
    assert_agrees(weights, exact)
    if told not in ({}, {"form": "mlperf"}):
        assert_differs(weights, expected(rule, gradients, NO_DECAY, no_adaptation, clip))
    if clip:
        assert_differs(weights, expected(rule, gradients, NO_DECAY, no_adaptation, **told))
    other = NO_DECAY if adapts_all else ()
    assert_differs(weights, expected(rule, gradients, NO_DECAY, other, clip, **told))


def test_adapt_undecayed_false_adapts_no_layer_without_decay(flavour):
    """Also if the list of layers that are not adapted is empty, or no layer is decayed."""
    gradients = random_gradients()
    arguments = {"adapt_undecayed": False, "exclude_from_layer_adaptation": []}
    patterns = ["bias$", "norm/"]
    weights, _ = history(
        flavour, "LAMB", gradients, exclude_from_weight_decay=patterns, **arguments
    )
    assert_agrees(weights, expected("LAMB", gradients, NO_DECAY, NO_DECAY))
    assert_differs(weights, expected("LAMB", gradients, NO_DECAY))
    weights, _ = history(flavour, "LAMB", gradients, weight_decay=0.0, **arguments)
    assert_agrees(weights, expected("LAMB", gradients, (), FEW_LAYERS, weight_decay=0.0))


def test_every_variant_is_tested(keras3):
    named = {(r, v) for r in OWN for v in getattr(keras3.lamb, r).variants}
    assert named == set(VARIANTS)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["mlperf", "tf-models", "tf-models-scaled", "tf-contrib", "paper"])
def test_a_form_of_lars_agrees_with_its_formula(flavour, form, nesterov):
    gradients = random_gradients()
    weights, _ = history(flavour, "LARS", gradients, form=form, nesterov=nesterov)
    assert_agrees(weights, expected("LARS", gradients, form=form, nesterov=nesterov))
    assert_differs(weights, expected("LARS", gradients, form=form, nesterov=not nesterov))


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_agrees_with_its_formula(flavour, option):
    rule, told = OPTIONS[option]
    gradients = random_gradients()
    weights, _ = history(flavour, rule, gradients, **told)
    assert_agrees(weights, expected(rule, gradients, **told))
    for dropped in told:
        others = {name: value for name, value in told.items() if name != dropped}
        assert_differs(weights, expected(rule, gradients, **others))


@pytest.mark.parametrize("scale", [1.0, 2.0**-12], ids=["from above", "from below"])
def test_unit_gradient_scales_the_global_norm_to_1(flavour, scale):
    """It scales a small gradient up, which clipping does not."""
    gradients = [[[g * scale for g in gs] for gs in replicas] for replicas in random_gradients()]
    weights, _ = history(flavour, "LAMB", gradients, unit_gradient=True)
    assert_agrees(weights, expected("LAMB", gradients, clip={"unit_gradient": True}))
    assert_differs(weights, expected("LAMB", gradients))
    if scale < 1:
        assert_differs(weights, expected("LAMB", gradients, clip=CLIP))


@pytest.mark.parametrize("clip", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_unit_gradient_and_clipping_exclude_each_other(flavour, clip):
    with pytest.raises(ValueError, match=f"unit_gradient.*{clip}=2.0"):
        flavour.lamb.LAMB(0.1, unit_gradient=True, **{clip: 2.0})


@pytest.mark.slow
@pytest.mark.parametrize("rule", OWN)
def test_a_bfloat16_first_moment_takes_half_the_memory(flavour, rule):
    """The rounding error of m is at most 2^-9 a step, and that of the weights a few times that."""
    gradients = random_gradients()
    full, _ = history(flavour, rule, gradients)
    half, run = history(flavour, rule, gradients, moment_dtype="bfloat16")
    changes = [0.0] * len(FEW_LAYERS)
    for step in range(1, STEPS + 1):
        for i, (h, f) in enumerate(zip(half[step], full[step], strict=True)):
            changes[i] = max(changes[i], largest(f - full[0][i]))
            assert largest(h - f) <= 2**-7 * changes[i]  # measured: 2^-8.2
    assert not all(np.array_equal(h, f) for h, f in zip(half[-1], full[-1], strict=True))
    first, *second = run.optimizer._plan.slots
    for m, x in zip(first, run.variables, strict=True):
        m = tf.convert_to_tensor(m)
        assert m.dtype == tf.bfloat16 and m.shape == x.shape
        assert 2 * m.numpy().nbytes == np.asarray(x.numpy()).nbytes
    assert all(tf.as_dtype(v.dtype) == tf.float32 for slot in second for v in slot)


@pytest.mark.parametrize(("rule", "variant"), VARIANTS, ids=[": ".join(case) for case in VARIANTS])
def test_a_variant_is_shown_and_saved(flavour, rule, variant):
    rule_class = getattr(flavour.lamb, rule)
    optimizer = rule_class.variant(variant, 0.5, exclude_from_weight_decay=["bias"])
    config = optimizer.get_config()
    assert config["based_on"] == variant
    assert f"based_on={variant!r}" in repr(optimizer)
    for name, value in rule_class.variants[variant].arguments.items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value)
        default = rule_class(0.5).get_config()[name]
        assert config[name] == default or f"{name}={config[name]!r}" in repr(optimizer)
    serialized = flavour.keras.optimizers.serialize(optimizer)
    loaded = flavour.keras.optimizers.deserialize(serialized)
    assert type(loaded) is rule_class
    assert loaded.get_config() == config and repr(loaded) == repr(optimizer)


def test_arguments_override_those_of_a_variant(flavour):
    lamb = flavour.lamb.LAMB

    def config(optimizer):
        return optimizer.get_config() | {"name": ""}  # Keras 3 counts names

    ours = config(lamb.variant("nvlamb", 0.5, global_clipnorm=3.0, beta_1=0.5))
    theirs = config(lamb.variant("nvlamb", 0.5))
    assert {name for name in ours if ours[name] != theirs[name]} == {
        "global_clipnorm",
        "beta_1",
        "based_on",
    }
    assert lamb.variant("nvlamb", global_clipnorm=None, clipnorm=2.0).clipnorm == 2.0
    plain = lamb.variant("n-lamb", nesterov=None, based_on=None)
    assert config(plain) == config(lamb())
    form = flavour.lamb.LARS.variant("tf-contrib", form="mlperf")
    assert config(form) == config(flavour.lamb.LARS())


def test_based_on_is_none_if_an_argument_changes_the_variants_rule(flavour):
    """The variant's settings and the formula are the rule; rate, decay and momentum are not."""
    variant = flavour.lamb.LAMB.variant
    for kept in ({"beta_1": 0.5}, {"weight_decay": 0.5}, {"global_clipnorm": 1}, {"norm": "l2"}):
        assert variant("nvlamb", 0.5, **kept).based_on == "nvlamb"
    for changed in (
        {"global_clipnorm": 2.0},
        {"exclude_from_layer_adaptation": ["bias"]},
        {"norm": "l1"},
        {"bias_correction": False},
    ):
        assert variant("nvlamb", 0.5, **changed).based_on is None
    assert variant("deepspeed", 0.5, epsilon=1e-3).based_on is None
    assert flavour.lamb.LARS.variant("tf-contrib", form="mlperf").based_on is None


@pytest.mark.parametrize("rule", OWN)
def test_an_unknown_variant_is_refused(flavour, rule):
    rule_class = getattr(flavour.lamb, rule)
    with pytest.raises(ValueError, match="'paper', .*Received: variant='papper'"):
        rule_class.variant("papper")
    with pytest.raises(ValueError, match="Received: based_on='papper'"):
        rule_class(based_on="papper")


@pytest.mark.parametrize("rule", OWN)
def test_an_optimizer_of_a_variant_can_have_a_name(flavour, rule):
    optimizer = getattr(flavour.lamb, rule).variant("paper", 1e-3, name="my")
    assert (optimizer.name, optimizer.based_on) == ("my", "paper")
