"""Bad arguments are refused with rule, value and fix; good ones are saved and loaded."""

import inspect
import json
import math

import numpy as np
import pytest
from drive import FEW_LAYERS, LAYERS, Run, make_variables, random_gradients, random_weights

import tf_lamb

RULES = ["LAMB", "LARS"]
NAN, INFINITY = math.nan, math.inf

# Rule, arguments, and a pattern for the message.
BAD = [
    ("LAMB", {"beta_1": 1.0}, r"`beta_1` must be a number in \[0, 1\)\. Received: beta_1=1\.0\."),
    ("LAMB", {"beta_2": -0.1}, r"`beta_2` .* \[0, 1\)\. Received: beta_2=-0\.1\."),
    ("LAMB", {"beta_2": NAN}, r"`beta_2` .* Received: beta_2=nan\."),
    ("LAMB", {"beta_1": "0.9"}, r"`beta_1` must be a number .* Received: beta_1='0\.9'\."),
    ("LAMB", {"beta_1": None}, r"`beta_1` must be a number .* Received: beta_1=None\."),
    ("LAMB", {"epsilon": np.False_}, r"`epsilon` must be a number .* Received: epsilon="),
    ("LAMB", {"bias_correction": "rates"}, r"`bias_correction` must be one of .*='rates'\."),
    ("LAMB", {"unit_gradient": "no"}, r"`unit_gradient` must be True or False\. .*='no'\."),
    ("LARS", {"nesterov": "no"}, r"`nesterov` must be True or False\. Received: nesterov='no'\."),
    ("both", {"skip_nonfinite": None}, r"`skip_nonfinite` must be True or False\. .*=None\."),
    ("LAMB", {"epsilon": -1e-6}, r"`epsilon` .* \[0, inf\)\. Received: epsilon=-1e-06\."),
    ("LARS", {"epsilon": NAN}, r"`epsilon` .* Received: epsilon=nan\."),
    ("LARS", {"momentum": 1}, r"`momentum` .* \[0, 1\)\. Received: momentum=1\."),
    ("LARS", {"trust_coefficient": 0}, r"`trust_coefficient` .* \(0, inf\)\. Received: .*=0\."),
    ("both", {"learning_rate": -1}, r"`learning_rate` .* \[0, inf\)\. .* learning_rate=-1\."),
    ("both", {"learning_rate": NAN}, r"`learning_rate` .* Received: learning_rate=nan\."),
    ("both", {"learning_rate": INFINITY}, r"`learning_rate` .* Received: learning_rate=inf\."),
    ("both", {"learning_rate": True}, r"`learning_rate` .* Received: learning_rate=True\."),
    ("both", {"weight_decay": -0.01}, r"`weight_decay` .* \[0, inf\)\. .* weight_decay=-0\.01\."),
    ("both", {"weight_decay": NAN}, r"`weight_decay` .* Received: weight_decay=nan\."),
    ("both", {"clipnorm": 0}, r"`clipnorm` .* \(0, inf\)\. Received: clipnorm=0\."),
    ("both", {"global_clipnorm": NAN}, r"`global_clipnorm` .* Received: global_clipnorm=nan\."),
    ("both", {"clipvalue": -1.0}, r"`clipvalue` .* Received: clipvalue=-1\.0\."),
    ("both", {"weight_decay": ""}, r"`weight_decay` must be a number .* weight_decay=''\."),
    (
        "both",
        {"use_ema": True, "ema_momentum": float("nan")},
        r"`ema_momentum` must be a number in \[0, 1\]\. Received: ema_momentum=nan\.",
    ),
    ("both", {"use_ema": True, "ema_momentum": None}, r"`ema_momentum` .* ema_momentum=None\."),
    ("both", {"clipnorm": 1.0, "clipvalue": 2.0}, r"only one .*: clipnorm=1\.0, clipvalue=2\.0"),
    ("both", {"clip_norm": 1.0}, r"no argument `clip_norm`\. .* `clipnorm`\. .* clip_norm=1\.0\."),
    ("LAMB", {"beta2": 0.9}, r"`LAMB` .* `beta2`\. Here it is `beta_2`\. Received: beta2=0\.9\."),
    ("LAMB", {"beta_3": 0.9}, r"`LAMB` .* `beta_3`\. Did you mean `beta_[12]`\? .*: beta_3=0\.9\."),
    (
        "LAMB",
        {"trust_ratio_bounds": (2, 1)},
        r"`trust_ratio_bounds` .* 0 <= low < high\. .*\(2, 1\)",
    ),
    ("LARS", {"momentun": 0.9}, r"`LARS` takes .* Did you mean `momentum`\?"),
    ("both", {"zzzzzz": 1}, r"takes no argument `zzzzzz`\. Received: zzzzzz=1\."),
    ("both", {"exclude_from_weight_decay": ["bias", "(x"]}, r"regular expressions.*'\(x' \("),
    ("both", {"exclude_from_weight_decay": 3}, r"a list of regular expressions\. Received: .*=3\."),
    ("both", {"exclude_from_weight_decay": [3]}, r"contain regular expressions.* Received: 3 \("),
    ("both", {"exclude_from_layer_adaptation": ["*"]}, r"`exclude_from_layer_adaptation`.*'\*' \("),
]

# For each argument, a value other than the default.
CHANGED = {
    "learning_rate": 0.25,  # exact in float32
    "beta_1": 0.8,
    "beta_2": 0.98,
    "momentum": 0.7,
    "trust_coefficient": 0.02,
    "form": "paper",
    "bias_correction": False,
    "adapt_undecayed": False,
    "trust_ratio_bounds": [0.5, 2.0],
    "norm": "l1",
    "weight_norm_bounds": [0.5, 2.0],
    "unit_gradient": True,
    "layer_axes": {"query": [0]},
    "layer_groups": ["norm|temp"],
    "moment_dtype": "bfloat16",
    "skip_nonfinite": False,
    "telemetry": True,
    "based_on": "paper",
    "epsilon": 1e-4,
    "weight_decay": 0.05,
    "exclude_from_weight_decay": ["bias", "norm/"],
    "exclude_from_layer_adaptation": ["conv/"],
    "name": "other",
    "clipnorm": 2.0,
    "clipvalue": 3.0,
    "global_clipnorm": 4.0,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 7,
    "loss_scale_factor": 8.0,
    "gradient_accumulation_steps": 2,
    "jit_compile": False,
}
CLIPS = ["clipnorm", "clipvalue", "global_clipnorm"]


def built(flavour, optimizer):
    optimizer.build(make_variables(flavour, random_weights()))
    return optimizer


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        pytest.param(rule, arguments, message, id=f"{rule}-{arguments}")
        for rules, arguments, message in BAD
        for rule in (RULES if rules == "both" else [rules])
    ],
)
def test_a_bad_argument_is_refused(flavour, rule, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(flavour.lamb, rule)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_accumulation_steps": 2.5}, "must be an integer"),
        ({"gradient_accumulation_steps": "2"}, r"must be a number in \[2, inf\)"),
        ({"gradient_accumulation_steps": 1}, r"must be a number in \[2, inf\)"),
        ({"ema_overwrite_frequency": 0}, r"must be a number in \[1, inf\)"),
        ({"ema_overwrite_frequency": 2.5}, "must be an integer"),
        ({"loss_scale_factor": 0}, r"must be a number in \(0, inf\)"),
        ({"loss_scale_factor": float("nan")}, r"must be a number in \(0, inf\)"),
    ],
)
def test_a_bad_argument_of_keras_3_is_refused(keras3, arguments, message):
    """Keras accepts some of them, with which no update is ever made."""
    with pytest.raises(ValueError, match=message):
        keras3.lamb.LAMB(**arguments)


@pytest.mark.parametrize("rule", RULES)
def test_none_means_no_decay_and_no_pattern(flavour, rule):
    rule = getattr(flavour.lamb, rule)
    none = ("exclude_from_weight_decay", "exclude_from_layer_adaptation", "layer_groups")
    optimizer = rule(0.0, weight_decay=None, **dict.fromkeys(none))
    assert float(optimizer.learning_rate) == optimizer.weight_decay == 0.0
    # Keras 3 counts the names of its optimizers.
    other = rule(0, weight_decay=0, name=optimizer.name)
    assert optimizer.get_config() == other.get_config()
    assert built(flavour, optimizer).layers == built(flavour, rule()).layers


@pytest.mark.parametrize(
    "argument", ["exclude_from_weight_decay", "exclude_from_layer_adaptation", "layer_groups"]
)
def test_a_pattern_without_a_match_warns_with_similar_names(flavour, argument):
    optimizer = flavour.lamb.LAMB(**{argument: ["bias", "layer_norm"]})
    with pytest.warns(UserWarning, match="'layer_norm'.* matches none of the 8 ") as warned:
        built(flavour, optimizer)
    (warning,) = warned
    assert f"`{argument}`" in str(warning.message) and "norm/gamma" in str(warning.message)
    assert len(optimizer.layers) == len(LAYERS)


@pytest.mark.parametrize("name", ["BERT_EXCLUSIONS", "RESNET_EXCLUSIONS"])
def test_a_default_list_may_match_nothing(flavour, name):
    optimizer = flavour.lamb.LAMB(exclude_from_weight_decay=getattr(tf_lamb, name))
    optimizer.build(make_variables(flavour, random_weights()[:1], ["embed/table"]))
    assert optimizer.layers[0].decayed


@pytest.mark.parametrize("name", ["loss_scale_factor", "gradient_accumulation_steps"])
def test_an_argument_of_keras_3_is_refused_by_tf_keras(flavour, name):
    arguments = {name: CHANGED[name]}
    if flavour.name == "keras3":
        assert getattr(flavour.lamb.LARS(**arguments), name) == CHANGED[name]
        return
    with pytest.raises(ValueError, match=rf"`{name}` exists in Keras 3 only\. Received: {name}="):
        flavour.lamb.LARS(**arguments)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("rule", RULES)
def test_every_argument_is_saved(flavour, rule, clip):
    rule = getattr(flavour.lamb, rule)
    parameters = inspect.signature(rule.__init__).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind != p.VAR_KEYWORD}
    own.pop("self")
    own.pop("unit_gradient", None)  # cannot be combined with clipping; see the next test
    left_out = set(CLIPS) - {clip}
    if flavour.name == "tf_keras":
        left_out |= {"loss_scale_factor", "gradient_accumulation_steps"}
    values = CHANGED | {"nesterov": "both" if rule.__name__ == "LAMB" else True}
    changed = {
        name: values[name] for name in (own.keys() | rule._base_parameters().keys()) - left_out
    }
    assert all(changed[name] != own[name] for name in changed)

    config = json.loads(json.dumps(rule(**changed).get_config()))
    assert {name: config[name] for name in changed} == changed
    clone = rule.from_config(config)
    assert clone.get_config() == config
    assert {name for name in CLIPS if getattr(clone, name) is not None} == {clip}


def test_unit_gradient_is_saved(flavour):
    config = flavour.lamb.LAMB(unit_gradient=True).get_config()
    assert flavour.lamb.LAMB.from_config(config).unit_gradient is True


@pytest.mark.parametrize("rule", RULES)
def test_keras_finds_the_class_by_its_registered_name(flavour, rule):
    optimizer = getattr(flavour.lamb, rule)(exclude_from_layer_adaptation=["bias"])
    serialized = json.loads(json.dumps(flavour.keras.optimizers.serialize(optimizer)))
    assert serialized["registered_name"] == f"tf_lamb>{rule}"
    clone = flavour.keras.optimizers.deserialize(serialized)
    assert type(clone) is type(optimizer)
    assert built(flavour, clone).layers == built(flavour, optimizer).layers


@pytest.mark.parametrize("adaptation", [None, [], ["conv"]])
def test_none_and_an_empty_list_differ(flavour, adaptation):
    optimizer = flavour.lamb.LAMB(
        exclude_from_weight_decay=["bias"], exclude_from_layer_adaptation=adaptation
    )
    clone = flavour.lamb.LAMB.from_config(optimizer.get_config())
    excluded = {layer.name for layer in built(flavour, clone).layers if not layer.adapted}
    expected = {None: {"conv/bias"}, "[]": set(), "['conv']": {"conv/kernel", "conv/bias"}}
    assert excluded == expected[adaptation if adaptation is None else str(adaptation)]


@pytest.mark.parametrize("rule", RULES)
def test_a_rate_of_zero_loads(flavour, rule):
    optimizer = getattr(flavour.lamb, rule)(0.5, weight_decay=0.25)
    optimizer.learning_rate = 0.0
    config = optimizer.get_config()
    clone = type(optimizer).from_config(config)
    assert float(clone.learning_rate) == 0.0
    assert clone.get_config() == config == optimizer.get_config()


def test_a_single_string_is_one_pattern(flavour):
    optimizer = flavour.lamb.LAMB(exclude_from_weight_decay="bias|norm")
    assert optimizer.get_config()["exclude_from_weight_decay"] == ["bias|norm"]
    layers = built(flavour, optimizer).layers
    assert [layer.name for layer in layers if not layer.decayed] == ["conv/bias", "norm/gamma"]


def test_the_layer_table_shows_decay_adaptation_and_groups(flavour):
    optimizer = flavour.lamb.LAMB(
        exclude_from_weight_decay=["bias"],
        exclude_from_layer_adaptation=["kernel$"],
        layer_axes={"query": 0},
        layer_groups=["norm|temp"],
    )
    with pytest.raises(ValueError, match=r"optimizer\.build\(model\.trainable_variables\)"):
        optimizer.layer_table()
    lines = []
    built(flavour, optimizer).layer_table(lines.append)
    assert lines == [
        "variable         shape         decayed  adapted  group",
        "embed/table      (13, 7)       yes      yes      -",
        "conv/kernel      (3, 3, 2, 4)  yes      -        -",
        "conv/bias        (4,)          -        yes      -",
        "attention/query  (2, 3, 4)     yes      yes      slices of 0",
        "norm/gamma       (4,)          yes      yes      norm|temp",
        "temperature      ()            yes      yes      norm|temp",
        "zero/kernel      (13, 7)       yes      -        -",
        "still/kernel     (13, 7)       yes      -        -",
    ]


def test_the_rate_can_be_set_between_steps(flavour):
    """As a callback does; an update that is traced already must use the new rate."""
    weights = random_weights(names=FEW_LAYERS)
    run = Run(flavour, lambda: flavour.lamb.LAMB(0.5), weights, names=FEW_LAYERS)
    first, second, *_ = random_gradients(1, names=FEW_LAYERS)
    run.step(first)
    run.optimizer.learning_rate = 0.0
    before = run.weights()
    run.step(second)
    assert all(np.array_equal(x, y) for x, y in zip(before, run.weights(), strict=True))
