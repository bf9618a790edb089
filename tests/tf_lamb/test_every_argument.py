"""No argument is silently ignored: a value other than the default changes what an optimizer does.

That is: the weights after each of a few steps, the last with a NaN in it; the dtypes and number of
its variables; the telemetry; whether it compiles; its name and its `repr`.

The updates run eagerly. A program is looked up by its arguments there, too, so an argument that is
missing in the key of the cache is found, and nothing is traced or compiled.
"""

import contextlib
import inspect
import math

import numpy as np
import pytest
from drive import Run

from tf_lamb import layerwise

NAMES = ("dense/kernel", "dense/bias", "norm/gamma")
SHAPES = ((4, 3), (3,), (5,))
SIZES = (20.0, 0.3, 2.0)

SHARED = {
    "learning_rate": 0.25,
    "weight_decay": 0.5,
    "epsilon": 0.3,
    "exclude_from_weight_decay": ["bias"],
    "exclude_from_layer_adaptation": ["gamma"],
    "norm": "l1",
    "layer_axes": {"kernel": 1},
    "layer_groups": ["dense"],
    "moment_dtype": "bfloat16",
    "skip_nonfinite": False,
    "telemetry": True,
    "based_on": "paper",
    "name": "another",
    "clipnorm": 0.5,
    "clipvalue": 0.5,
    "global_clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.25,
    "ema_overwrite_frequency": 2,
    "loss_scale_factor": 64.0,
    "gradient_accumulation_steps": 2,
    "jit_compile": False,
    "adapt_undecayed": False,
    "trust_ratio_bounds": (0.5, 2.0),
}
VALUES = {
    "LAMB": SHARED
    | {
        "beta_1": 0.5,
        "beta_2": 0.9,
        "bias_correction": False,
        "nesterov": "first",
        "weight_norm_bounds": (1.0, 5.0),
        "unit_gradient": True,
    },
    "LARS": SHARED
    | {"momentum": 0.5, "trust_coefficient": 0.1, "nesterov": True, "form": "tf-models"},
}
# Arguments that have an effect only together with others.
BESIDE = {
    "ema_momentum": {"use_ema": True},
    "ema_overwrite_frequency": {"use_ema": True},
    "adapt_undecayed": {"weight_decay": 0.0},
}
CASES = [(rule, argument) for rule, values in VALUES.items() for argument in values]


def arguments_of(optimizer_class):
    """Names of the constructor's arguments, including those of Keras in this flavour."""
    own = inspect.signature(optimizer_class.__init__).parameters
    named = {name for name, p in own.items() if p.kind != p.VAR_KEYWORD and name != "self"}
    return named | set(optimizer_class._base_parameters())


def behaviour(flavour, rule, arguments):
    """Everything a user can see of an optimizer, as named bytes and strings."""
    rng = np.random.default_rng(7)
    weights = [np.float32(rng.normal(size=s) * z) for s, z in zip(SHAPES, SIZES, strict=True)]
    arguments = {"learning_rate": 0.05} | arguments
    make = lambda: getattr(flavour.lamb, rule)(**arguments)  # noqa: E731
    run = Run(flavour, make, weights, graph=False, names=NAMES, compiled=False)
    seen = {}
    for step in range(5):
        grads = [np.float32(rng.normal(size=shape) * 2.0**step) for shape in SHAPES]
        if step == 4:
            grads[0][0, 0] = math.nan
        run.step([grads])
        seen[f"weights after {step + 1}"] = [x.tobytes() for x in run.weights()]
    optimizer = run.optimizer
    # With EMA, Keras assigns the averages to the model at the end of training.
    if optimizer.use_ema:
        optimizer.finalize_variable_values(run.variables)
        seen["averages"] = [x.tobytes() for x in run.weights()]
    seen["dtypes"] = [str(v.dtype) for v in optimizer.variables]
    with contextlib.suppress(ValueError):
        seen["telemetry"] = optimizer.telemetry_rows.tobytes()
    seen["program"] = optimizer._plan.update._compiles("CPU")
    seen["loss"] = float(optimizer.scale_loss(1.0)) if flavour.name == "keras3" else 1.0
    return seen, (optimizer.name, repr(optimizer))


@pytest.fixture(scope="module")
def default_behaviour(flavour):
    """A function of (rule, other arguments) that returns the behaviour, computed once."""
    known = {}

    def look_up(rule, beside):
        key = rule, tuple(beside)
        if key not in known:
            known[key] = behaviour(flavour, rule, beside)
        return known[key]

    return look_up


def test_every_argument_is_tested(flavour):
    for rule, values in VALUES.items():
        assert arguments_of(getattr(flavour.lamb, rule)) == set(values)


def test_arguments_that_tf_keras_lacks_are_refused():
    from tf_lamb import tf_keras

    for name in layerwise.KERAS_3_ONLY:
        with pytest.raises(ValueError, match=f"`{name}` exists in Keras 3 only"):
            tf_keras.LAMB(**{name: SHARED[name]})


@pytest.mark.parametrize(("rule", "argument"), CASES, ids=["-".join(case) for case in CASES])
def test_no_argument_is_silently_ignored(flavour, default_behaviour, rule, argument):
    if flavour.name == "tf_keras" and argument in layerwise.KERAS_3_ONLY:
        return  # refused, see test_arguments_that_tf_keras_lacks_are_refused
    beside = BESIDE.get(argument, {})
    plain, (plain_name, plain_text) = default_behaviour(rule, beside)
    value = VALUES[rule][argument]
    seen, (name, text) = behaviour(flavour, rule, beside | {argument: value})
    if argument in ("name", "based_on"):  # these only name it
        assert seen == plain and (name, text) != (plain_name, plain_text)
    else:
        assert seen != plain
    shown = list(value) if isinstance(value, tuple) else value
    shown = {"kernel": [1]} if argument == "layer_axes" else shown
    assert f"{argument}={shown!r}" in text
