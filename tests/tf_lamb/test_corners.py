"""Unusual situations, most of them from public bug reports."""

import contextlib
import inspect
import json
import warnings

import numpy as np
import oracle
import pytest
import tensorflow as tf
from drive import run_eagerly

import tf_lamb
from tf_lamb import layerwise, xla

NAN, INF = float("nan"), float("inf")
RULES = ["LAMB", "LARS"]


def tensors(*arrays):
    return [None if a is None else tf.constant(a, tf.float32) for a in arrays]


def make_variables(flavour, *arrays, names=None, **arguments):
    names = names or [f"w{i}" for i in range(len(arrays))]
    return [
        flavour.Variable(np.float32(a), name=name, **arguments)
        for a, name in zip(arrays, names, strict=True)
    ]


def apply(optimizer, variables, *grads):
    optimizer.apply_gradients(zip(tensors(*grads), variables, strict=True))


def values(variables):
    return [np.asarray(v.numpy()) for v in variables]


def all_bits(optimizer, variables):
    """Bytes of all variables except the count of skipped updates."""
    held = [v for v in optimizer.variables if "skipped" not in v.name]
    return [v.numpy().tobytes() for v in (*variables, *held)]


# Skipped updates and averages.


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_skipped_first_update_leaves_the_averages(flavour, rule, graph):
    variables = make_variables(flavour, [1, 1, 1])
    optimizer = getattr(flavour.lamb, rule)(0.1, use_ema=True, ema_overwrite_frequency=2)
    optimizer.build(variables)

    def step(g):
        optimizer.apply_gradients([(g, variables[0])])

    step = tf.function(step) if graph else step
    before = all_bits(optimizer, variables)
    for _ in range(3):
        step(tf.constant([NAN, 0, 0]))
    assert all_bits(optimizer, variables) == before
    assert optimizer.skipped_steps == 3

    undisturbed = make_variables(flavour, [1, 1, 1])
    other = getattr(flavour.lamb, rule)(0.1, use_ema=True, ema_overwrite_frequency=2)
    other.build(undisturbed)
    for i in range(5):
        g = tf.constant([1.0, 2.0 + i, 3.0])
        step(g)
        step(tf.constant([INF, 0, 0]))
        other.apply_gradients([(g, undisturbed[0])])
    for ours, theirs in zip(optimizer.variables, other.variables, strict=True):
        if "skipped" not in ours.name:
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    np.testing.assert_array_equal(variables[0].numpy(), undisturbed[0].numpy())


def test_ema_agrees_with_float64(flavour):
    variables = make_variables(flavour, [3.0, 4.0])
    optimizer = flavour.lamb.LAMB(0.1, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=3)
    optimizer.build(variables)
    layer = oracle.Lamb([3.0, 4.0])
    average = np.array([3.0, 4.0])
    for i in range(7):
        g = np.array([1.0 + i, -2.0])
        apply(optimizer, variables, g)
        layer.descend(g, 0.1)
        first = i == 0 and flavour.name == "keras3"  # tf_keras starts at the initial weights
        average = layer.x if first else 0.75 * average + 0.25 * layer.x
        if (i + 1) % 3 == 0:
            layer.x = average
        np.testing.assert_allclose(variables[0].numpy(), layer.x, rtol=1e-6)


# Numbers near the limits of float32.

HUGE = [2e19, 1e20, 1e30, 3e38, -1e20]


@pytest.mark.parametrize("clip", [{}, {"global_clipnorm": 1.0}, {"clipnorm": 1.0}])
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_whose_square_is_not_finite_is_skipped(flavour, rule, clip):
    variables = make_variables(flavour, [1.0, 2.0], [3.0])
    optimizer = getattr(flavour.lamb, rule)(0.1, **clip)
    optimizer.build(variables)
    apply(optimizer, variables, [0.5, 1.0], [1.0])
    before = all_bits(optimizer, variables)
    for skipped, value in enumerate(HUGE, start=1):
        apply(optimizer, variables, [value, 1.0], [1.0])
        assert all_bits(optimizer, variables) == before, value
        assert optimizer.skipped_steps == skipped, value


@pytest.mark.parametrize("value", [1e15, 1e18])
@pytest.mark.parametrize("clip", [{}, {"global_clipnorm": 1.0}])
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_whose_square_is_finite_is_exact(flavour, rule, value, clip):
    start, grads = [1.0, 2.0], [np.array([value, -value / 3]), np.array([1.0, 2.0])]
    variables = make_variables(flavour, start)
    optimizer = getattr(flavour.lamb, rule)(0.1, **clip)
    layer = {"LAMB": oracle.Lamb, "LARS": oracle.Lars}[rule](start)
    for g in grads:
        apply(optimizer, variables, g)
    exact = oracle.history([layer], [[[g]] for g in grads], [0.1, 0.1], **clip)
    np.testing.assert_allclose(variables[0].numpy(), exact[-1][0], rtol=2e-6)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("rule", RULES)
def test_without_skipping_no_moment_becomes_infinite(flavour, rule):
    variables = make_variables(flavour, [1.0, 2.0], [3.0, 1.0])
    optimizer = getattr(flavour.lamb, rule)(0.1, skip_nonfinite=False, global_clipnorm=1.0)
    optimizer.build(variables)
    start = [(v, v.numpy()) for v in (*variables, *optimizer.variables)]
    for value in (*HUGE, INF):
        for variable, x in start:
            variable.assign(x)
        for g in ([value, 1.0], [0.5, 1.0]):
            apply(optimizer, variables, g, [1.0, 1.0])
        for variable, _ in start:
            assert np.isfinite(variable.numpy()).all(), (value, variable.name)
        # Clipping scales the gradient down, so the step is neither 0 nor infinite.
        assert not np.array_equal(variables[0].numpy(), [1.0, 2.0]), value


@pytest.mark.parametrize("rule", RULES)
def test_weights_whose_norm_is_not_finite_do_not_move(flavour, rule):
    variables = make_variables(flavour, [1e20, 1e20])
    optimizer = getattr(flavour.lamb, rule)(0.1)
    apply(optimizer, variables, [1.0, 1.0])
    np.testing.assert_array_equal(variables[0].numpy(), np.float32([1e20, 1e20]))


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_a_tiny_update_norm_is_not_zero(flavour, norm):
    """η·ratio is finite, so an element whose gradient is 0 does not become NaN."""
    variables = make_variables(flavour, [1e3, 1e3])
    optimizer = flavour.lamb.LARS(1.0, trust_coefficient=1.0, weight_decay=0.0, norm=norm)
    apply(optimizer, variables, [1e-18, 0.0])
    size = {"l2": 1e3 * 2**0.5, "l1": 2e3, "linf": 1e3}[norm]
    np.testing.assert_allclose(variables[0].numpy(), [1e3 - size, 1e3], rtol=1e-5)


# Variables.


@pytest.mark.parametrize("rule", RULES)
def test_a_variable_that_is_passed_twice_moves_by_the_sum(flavour, rule):
    twice, once = make_variables(flavour, [1.0, 2.0], [1.0, 2.0])
    for variable, grads in ((twice, [[1.0, 0.5], [2.0, -3.0]]), (once, [[3.0, -2.5]])):
        optimizer = getattr(flavour.lamb, rule)(0.1)
        optimizer.build([variable])
        for _ in range(2):
            optimizer.apply_gradients([(g, variable) for g in tensors(*grads)])
    np.testing.assert_array_equal(twice.numpy(), once.numpy())


@pytest.mark.parametrize("dtype", ["complex64", "int32"])
@pytest.mark.parametrize("rule", RULES)
def test_complex_and_integer_variables_are_refused(flavour, rule, dtype):
    variable = tf.Variable(tf.cast([1.0, 2.0], dtype), name="odd")
    optimizer = getattr(flavour.lamb, rule)(0.1)
    with pytest.raises(ValueError, match=f"real floating-point.*'odd' of dtype {dtype}"):
        optimizer.build([variable])


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("rule", RULES)
def test_any_variables_may_lack_a_gradient(flavour, monkeypatch, rule):
    """Eagerly, only the first few sets of variables are traced; the results are the same."""
    subsets = [(0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (0, 1), (1,)]

    def train(limit):
        monkeypatch.setattr(xla, "MAX_TRACED_SETS", limit)
        variables = make_variables(flavour, [1.0, 2.0], [3.0], [[4.0, 5.0]])
        optimizer = getattr(flavour.lamb, rule)(0.1, telemetry=True, use_ema=True)
        optimizer.build(variables)
        for i, subset in enumerate(subsets):
            grads = [
                np.full(v.shape, 1.0 + i) if j in subset else None for j, v in enumerate(variables)
            ]
            apply(optimizer, variables, *grads)
        return optimizer, [v.numpy() for v in (*variables, *optimizer.variables)]

    optimizer, all_traced = train(100)
    assert (
        sum(f.experimental_get_tracing_count() for f in optimizer._plan.update._staged.values())
        == 6
    )
    optimizer, two_traced = train(2)
    assert (
        sum(f.experimental_get_tracing_count() for f in optimizer._plan.update._staged.values())
        == 2
    )
    for traced, eager in zip(all_traced, two_traced, strict=True):
        np.testing.assert_allclose(eager, traced, rtol=1e-6)


def test_telemetry_does_not_depend_on_the_order_of_the_gradients(flavour):
    variables = make_variables(flavour, [1.0, 1.0], [100.0, 100.0, 100.0])
    optimizer = flavour.lamb.LAMB(0.01, telemetry=True)
    optimizer.build(variables)
    grads = tensors([1.0, 2.0], [1.0, 2.0, 3.0])
    optimizer.apply_gradients(zip(grads[::-1], variables[::-1], strict=True))
    np.testing.assert_allclose(optimizer.telemetry_rows[:, 0], [2**0.5, 100 * 3**0.5], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("rule", RULES)
def test_a_group_member_without_a_gradient_counts_in_the_weights_norm(flavour, rule):
    variables = make_variables(flavour, [3.0, 0.0], [4.0], names=["part_a", "part_b"])
    optimizer = getattr(flavour.lamb, rule)(0.1, layer_groups=["part"], weight_decay=0.0)
    optimizer.build(variables)
    apply(optimizer, variables, [1.0, 2.0], None)
    if rule == "LAMB":  # each element of u is 1, except for ε; ‖x‖ = 5, ‖u‖ = √2
        expected = np.array([3.0, 0.0]) - 0.1 * 5 / 2**0.5
    else:  # r = κ‖x‖/‖g‖ = 0.001 · 5 / √5
        expected = np.array([3.0, 0.0]) - 0.1 * 0.001 * 5 / 5**0.5 * np.array([1.0, 2.0])
    np.testing.assert_allclose(variables[0].numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(variables[1].numpy(), [4.0])


def test_a_group_of_a_zero_member_and_one_without_a_gradient(flavour):
    """Alone, the zero member would have the ratio 1; the group has that of all its weights."""
    variables = make_variables(flavour, [0.0], [4.0], names=["part_a", "part_b"])
    optimizer = flavour.lamb.LAMB(0.1, layer_groups=["part"], weight_decay=0.0)
    optimizer.build(variables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply(optimizer, variables, [1.0], None)
    np.testing.assert_allclose(variables[0].numpy(), [-0.4], rtol=1e-5)


def test_float8_scales_are_not_layers(keras3):
    import keras

    layer = keras.layers.Dense(4, name="dense")
    layer.build((None, 4))
    layer.quantize("float8")
    optimizer = keras3.lamb.LAMB(0.1, telemetry=True)
    optimizer.build(layer.trainable_variables)
    overwritten = [plan for plan in optimizer.layers if plan.overwritten]
    assert len(overwritten) == 6
    assert not any(plan.decayed or plan.adapted for plan in overwritten)
    lines = []
    optimizer.layer_table(lines.append)
    assert sum("overwritten by its gradient" in line for line in lines) == 6


# Accumulation.


def fit_with_averages(rule, strategy, batch_size, accumulation):
    """The weights after two epochs with averages, and the number of updates."""
    import keras

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    y = rng.normal(size=(64, 1)).astype("float32")
    with strategy.scope() if strategy else contextlib.nullcontext():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1, name="d")])
        optimizer = rule(0.05, gradient_accumulation_steps=accumulation, use_ema=True)
        model.compile(optimizer, loss="mse")
    model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    return [v.numpy() for v in model.weights], int(model.optimizer.iterations.numpy())


@pytest.fixture(scope="module", params=RULES)
def whole_batches(request, keras3):
    """A rule, and the result of training with it without accumulation."""
    rule = getattr(keras3.lamb, request.param)
    return rule, fit_with_averages(rule, None, 32, None)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_accumulation_in_fit_equals_the_whole_batch(whole_batches, mirrored, replicas):
    """Keras's own optimizers fail under a strategy (its issue 20582)."""
    rule, (whole, whole_updates) = whole_batches
    strategy = mirrored if replicas == 2 else None
    ours, updates = fit_with_averages(rule, strategy, 16, 2)
    assert updates == whole_updates == 4
    for a, b in zip(ours, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_schedule_can_count_updates(keras3):
    schedule = keras3.lamb.WarmupPolynomialDecay(
        1.0, warmup_steps=100, total_steps=1000, gradient_accumulation_steps=4
    )
    plain = keras3.lamb.WarmupPolynomialDecay(1.0, warmup_steps=100, total_steps=1000)
    for call, update in ((0, 0), (3, 0), (4, 1), (399, 99), (400, 100), (3999, 999)):
        assert float(schedule(call)) == float(plain(update))
    assert type(schedule).from_config(schedule.get_config()).get_config() == schedule.get_config()
    phases = keras3.lamb.Phases(
        ({"peak_learning_rate": 1.0, "warmup_steps": 2, "total_steps": 5} for _ in range(2)),
        gradient_accumulation_steps=3,
    )
    assert float(phases(3)) == 0.5 and float(phases(3 * 6)) == 0.5


def test_a_schedule_takes_an_iterator(flavour):
    schedule = flavour.lamb.WarmupStepDecay(1.0, 0, 100, iter([10, 20]), 0.5)
    assert [float(schedule(step)) for step in (0, 10, 20)] == [1.0, 0.5, 0.25]
    assert schedule.get_config()["decay_steps"] == [10, 20]
    with pytest.raises(ValueError, match="at least one dictionary"):
        flavour.lamb.Phases(iter([]))


# Patterns.


def test_the_default_exclusions_never_warn(flavour):
    for patterns in (tf_lamb.BERT_EXCLUSIONS, tf_lamb.RESNET_EXCLUSIONS):
        optimizer = flavour.lamb.LAMB(0.1, exclude_from_weight_decay=patterns)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.build(make_variables(flavour, [1.0], names=["kernel"]))


def test_a_pattern_without_a_match_is_one_warning(flavour):
    variables = make_variables(flavour, [1.0], [1.0], names=["my_kernel", "my_bias"])
    optimizer = flavour.lamb.LAMB(0.1, exclude_from_weight_decay=["my_biass", "kernel"])
    with pytest.warns(UserWarning) as caught:
        optimizer.build(variables)
    assert len(caught) == 1
    assert "'my_biass' of `exclude_from_weight_decay` matches none" in str(caught[0].message)
    assert "my_bias" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(optimizer, variables, [1.0], [1.0])


def test_a_model_saved_before_freezing_loads(flavour, tmp_path):
    keras = flavour.keras
    model = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dense(3, name="body"), keras.layers.Dense(1)]
    )
    optimizer = flavour.lamb.LAMB(0.1, exclude_from_weight_decay=["body/bias", "bias$"])
    model.compile(optimizer, loss="mse")
    x = np.ones((8, 4), np.float32)
    with run_eagerly():
        model.fit(x, x[:, :1], verbose=0)
    model.layers[0].trainable = False
    model.compile(flavour.lamb.LAMB.from_config(optimizer.get_config()), loss="mse")
    with pytest.warns(UserWarning, match="'body/bias'"), run_eagerly():
        model.fit(x, x[:, :1], verbose=0)
    model.save(tmp_path / "frozen.keras")
    with pytest.warns(UserWarning, match="'body/bias'"), run_eagerly():
        loaded = keras.models.load_model(tmp_path / "frozen.keras")
        loaded.fit(x, x[:, :1], verbose=0)


# Arguments: values of other types, names from other libraries.


@pytest.mark.parametrize(
    "arguments",
    [
        {"weight_decay": None},
        {"exclude_from_weight_decay": None},
        {"layer_groups": None},
        {"layer_axes": None},
        {"learning_rate": 0},
        {"learning_rate": "tensor"},
        {"learning_rate": np.float32(0.25)},
        {"learning_rate": np.array(0.25)},
        {"weight_decay": np.float64(0.25), "epsilon": np.float32(0.5)},
        {"global_clipnorm": np.float32(0.5)},
        {"weight_norm_bounds": np.array([0.5, 2.0])},
        {"learning_rate": np.int64(1)},
        {"moment_dtype": np.dtype("float32")},
        {"moment_dtype": tf.bfloat16},
        {"use_ema": True, "ema_overwrite_frequency": np.int64(2)},
    ],
    ids=str,
)
def test_numbers_of_other_types_are_accepted(flavour, arguments):
    if arguments.get("learning_rate") == "tensor":
        arguments = {"learning_rate": tf.constant(0.25)}
    optimizer = flavour.lamb.LAMB(**arguments)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert flavour.lamb.LAMB.from_config(config).get_config() == optimizer.get_config()
    apply(optimizer, make_variables(flavour, [1.0, 2.0]), [1.0, 1.0])


@pytest.mark.parametrize(
    ("rule", "arguments", "said"),
    [
        ("LAMB", {"lr": 0.1}, "`learning_rate`"),
        ("LARS", {"eeta": 0.1}, "`trust_coefficient`"),
        ("LARS", {"skip_list": ["bias"]}, "`exclude_from_layer_adaptation`"),
        ("LAMB", {"weight_decay_rate": 0.1}, "`weight_decay`"),
        ("LARS", {"classic_momentum": True}, '`form`: "tf-models" for True'),
        ("LAMB", {"max_grad_norm": 1.0}, "`global_clipnorm`"),
        ("LAMB", {"betas": (0.9, 0.99)}, "`beta_1` and `beta_2`"),
        ("LAMB", {"weight_norm_bounds": 5}, r"\(low, high\) with 0 <= low < high"),
        ("LAMB", {"trust_ratio_bounds": "ab"}, r"\(low, high\) with 0 <= low < high"),
        ("LAMB", {"trust_ratio_bounds": (2, 1)}, r"\(low, high\) with 0 <= low < high"),
    ],
)
def test_arguments_of_other_libraries_are_translated(flavour, rule, arguments, said):
    (name,) = arguments
    with pytest.raises(ValueError, match=said) as error:
        getattr(flavour.lamb, rule)(**arguments)
    assert f"`{name}`" in str(error.value)


@pytest.mark.parametrize("rate", [-1, NAN, INF, "fast"])
def test_the_setter_of_the_rate_checks_the_value(flavour, rate):
    optimizer = flavour.lamb.LAMB(0.1)
    with pytest.raises(ValueError, match=r"number in \[0, inf\)"):
        optimizer.learning_rate = rate
    assert float(optimizer.learning_rate) == np.float32(0.1)
    optimizer.learning_rate = np.float64(0.25)
    assert float(optimizer.learning_rate) == 0.25


@pytest.mark.parametrize("kind", ["callable", "schedule"])
def test_a_callback_that_sets_a_schedule_gets_a_clear_error(flavour, kind):
    schedule = flavour.keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.01)
    rate = {"callable": lambda: 0.1, "schedule": schedule}[kind]
    keras = flavour.keras
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile(flavour.lamb.LAMB(rate), loss="mse")
    x = np.zeros((4, 2), np.float32)
    callback = keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1, min_delta=1e9)
    with (
        pytest.raises(TypeError, match="schedule or a callable as `learning_rate`|not settable"),
        run_eagerly(),
    ):
        model.fit(x, x[:, :1], epochs=4, verbose=0, callbacks=[callback])


def test_repr_shows_the_flavour_and_exact_numbers(flavour):
    prefix = {"keras3": "tf_lamb.", "tf_keras": "tf_lamb.tf_keras."}[flavour.name]
    assert repr(flavour.lamb.LAMB()) == f"{prefix}LAMB()"
    text = repr(flavour.lamb.LARS(0.1, momentum=0.95, global_clipnorm=2.0))
    assert text == f"{prefix}LARS(global_clipnorm=2.0, learning_rate=0.1, momentum=0.95)" or (
        set(text[len(prefix) + 5 : -1].split(", "))
        == {"global_clipnorm=2.0", "learning_rate=0.1", "momentum=0.95"}
    )


def test_instances_are_named_like_those_of_keras(flavour):
    first, second = flavour.lamb.LAMB(), flavour.lamb.LAMB()
    adams = [flavour.keras.optimizers.Adam() for _ in range(2)]
    assert (first.name == second.name) == (adams[0].name == adams[1].name)
    assert flavour.lamb.LAMB(name="mine").name == "mine"


# Variants.


def test_based_on_is_none_for_a_variant_with_other_settings(flavour):
    lamb, lars = flavour.lamb.LAMB, flavour.lamb.LARS
    assert lamb.variant("nvlamb").based_on == "nvlamb"
    assert lamb.variant("nvlamb", beta_1=0.8, telemetry=True).based_on == "nvlamb"
    assert lamb.variant("nvlamb", global_clipnorm=2.0).based_on is None
    assert lamb.variant("paper", bias_correction=False).based_on is None
    assert lars.variant("paper", form="mlperf").based_on is None
    assert lars.variant("paper", form="paper").based_on == "paper"


def test_apex_adapts_no_layer_without_decay(flavour):
    variables = make_variables(flavour, [3.0, 4.0], names=["kernel"])
    optimizer = flavour.lamb.LAMB.variant("apex", 0.1, weight_decay=0)
    optimizer.build(variables)
    assert not any(plan.adapted for plan in optimizer.layers)
    apply(optimizer, variables, [0.1, 0.1])  # Adam: each element moves by the rate
    np.testing.assert_allclose(variables[0].numpy(), [2.9, 3.9], rtol=1e-4)


@pytest.mark.parametrize(
    ("bounds", "ratio"), [((0.0, 1.0), 1.0), ((0.01, 10.0), 5 / 2**0.5), ((4.0, 9.0), 4.0)]
)
def test_the_trust_ratio_is_bounded(flavour, bounds, ratio):
    variables = make_variables(flavour, [3.0, 4.0], [0.0, 0.0])
    optimizer = flavour.lamb.LAMB(0.1, weight_decay=0.0, trust_ratio_bounds=bounds, telemetry=True)
    optimizer.build(variables)
    apply(optimizer, variables, [1.0, 1.0], [1.0, 1.0])
    np.testing.assert_allclose(optimizer.telemetry_rows[:, 2], [ratio, 1.0], rtol=1e-5)


def test_deepspeeds_ratio_is_that_of_the_uncorrected_update(flavour):
    """csrc/lamb/fused_lamb_cuda_kernel.cu: p -= lr·√(1-β₂ᵗ)/(1-β₁ᵗ) · clamp(‖p‖/‖u‖) · u."""
    variables = make_variables(flavour, [3.0, 4.0])
    optimizer = flavour.lamb.LAMB.variant("deepspeed", 0.01)
    x, m, v = np.array([3.0, 4.0]), np.zeros(2), np.zeros(2)
    for t in range(1, 4):
        g = np.array([0.5, -0.25]) * t
        apply(optimizer, variables, g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (np.sqrt(v) + 1e-8)
        ratio = np.clip(np.linalg.norm(x) / np.linalg.norm(u), 0.01, 10.0)
        x = x - 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * ratio * u
        np.testing.assert_allclose(variables[0].numpy(), x, rtol=1e-6)


# Compilation.


def test_check_numerics_turns_compilation_off_with_a_warning(flavour):
    variables = make_variables(flavour, [1.0, 2.0])
    plain = make_variables(flavour, [1.0, 2.0])
    apply(flavour.lamb.LAMB(0.1), plain, [1.0, 0.5])
    tf.debugging.enable_check_numerics()
    xla._warn_once.cache_clear()
    try:
        with pytest.warns(UserWarning, match="not compiled with XLA: tf.debugging"):
            optimizer = flavour.lamb.LAMB(0.1)
            apply(optimizer, variables, [1.0, 0.5])
    finally:
        tf.debugging.disable_check_numerics()
    np.testing.assert_allclose(variables[0].numpy(), plain[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", [(), ["w"]])
def test_variables_on_two_devices(flavour, rule, groups):
    with tf.device("CPU:0"):
        variables = make_variables(flavour, [1.0, 2.0])
    with tf.device("CPU:1"):
        variables += make_variables(flavour, [3.0], names=["w1"])
    optimizer = getattr(flavour.lamb, rule)(0.1, layer_groups=groups)
    xla._warn_once.cache_clear()
    warns = pytest.warns(UserWarning, match="on several devices")
    with warns if groups else contextlib.nullcontext():
        apply(optimizer, variables, [1.0, 1.0], [2.0])
    together = make_variables(flavour, [1.0, 2.0], [3.0])
    apply(getattr(flavour.lamb, rule)(0.1, layer_groups=groups), together, [1.0, 1.0], [2.0])
    for a, b in zip(values(variables), values(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_device_without_xla_turns_compilation_off_with_a_warning(flavour, monkeypatch):
    xla._warn_once.cache_clear()
    monkeypatch.setattr(xla, "_has_xla", lambda device_type: False)
    variables = make_variables(flavour, [1.0, 2.0])
    with pytest.warns(UserWarning, match="no XLA for CPU"):
        apply(flavour.lamb.LAMB(0.1), variables, [1.0, 0.5])
    assert not np.array_equal(variables[0].numpy(), [1.0, 2.0])


@pytest.mark.parametrize("rule", RULES)
def test_jit_compile_off_computes_the_same(flavour, rule):
    results = []
    for jit in (True, False):
        variables = make_variables(flavour, [1.0, 2.0])
        optimizer = getattr(flavour.lamb, rule)(0.1, jit_compile=jit)
        for _ in range(3):
            apply(optimizer, variables, [1.0, 0.5])
        results.append(variables[0].numpy())
    np.testing.assert_allclose(*results, rtol=1e-6)


# The base class.


def test_a_new_argument_of_the_base_class_is_saved_and_loaded(keras3, monkeypatch):
    import keras

    mro = keras.optimizers.Optimizer.__mro__
    base = next(c for c in mro if c.__name__ == "BaseOptimizer")
    original, config = base.__init__, base.get_config

    def init(self, *arguments, brand_new=None, **named):
        original(self, *arguments, **named)
        self.brand_new = brand_new

    init.__signature__ = inspect.signature(original).replace(
        parameters=[
            *(
                p
                for p in inspect.signature(original).parameters.values()
                if p.kind != p.VAR_KEYWORD
            ),
            inspect.Parameter("brand_new", inspect.Parameter.KEYWORD_ONLY, default=None),
        ]
    )
    monkeypatch.setattr(base, "__init__", init)
    monkeypatch.setattr(
        base, "get_config", lambda self: config(self) | {"brand_new": self.brand_new}
    )
    optimizer = keras3.lamb.LAMB(0.25, brand_new=3)
    assert optimizer.get_config()["brand_new"] == 3
    assert keras3.lamb.LAMB.from_config(optimizer.get_config()).brand_new == 3
    with pytest.raises(ValueError, match="takes no argument `brand_newer`"):
        keras3.lamb.LAMB(brand_newer=3)


def test_a_renamed_hook_is_refused(keras3, monkeypatch):
    import keras

    def apply(self, grads, trainable_variables=None):
        self._renamed_update(grads, trainable_variables)

    monkeypatch.setattr(keras.optimizers.Optimizer, "apply", apply)
    with pytest.raises(RuntimeError, match="does not call `_backend_apply_gradients`"):
        keras3.lamb.LAMB(0.1).build(make_variables(keras3, [1.0]))


def test_a_renamed_hook_of_tf_keras_is_refused(monkeypatch):
    import tf_keras

    from tf_lamb import tf_keras as ours

    base = tf_keras.optimizers.Optimizer
    monkeypatch.setattr(base, "_internal_apply_gradients", lambda self, pairs: self.renamed(pairs))
    with pytest.raises(RuntimeError, match="does not call `_distributed_apply_gradients_fn`"):
        ours.LAMB(0.1).build([tf.Variable([1.0])])


def test_arguments_are_frozen(flavour):
    optimizer = flavour.lamb.LAMB(beta_1=0.8)
    assert optimizer.beta_1 == 0.8
    with pytest.raises(AttributeError, match="fixed when the optimizer is created"):
        optimizer.hyperparameters.beta_1 = 0.5
    for name, value in {"beta_1": 0.5, "jit_compile": False}.items():
        with pytest.raises(AttributeError, match=f"Create another optimizer. Received: {name}="):
            setattr(optimizer, name, value)
    assert "KERAS_3_ONLY" in vars(layerwise)


# Telemetry is not saved.


@pytest.mark.parametrize("format", ["keras", "weights.h5"])
@pytest.mark.parametrize(("written", "read"), [(False, True), (True, False)])
def test_telemetry_may_be_switched_when_resuming(flavour, tmp_path, written, read, format):
    keras = flavour.keras
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")

    def make(telemetry):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1, name="d")])
        model.compile(flavour.lamb.LAMB(0.1, telemetry=telemetry), loss="mse")
        model.optimizer.build(model.trainable_variables)
        return model

    model, other = make(written), make(read)
    with run_eagerly():
        model.fit(x, x[:, :1], batch_size=4, epochs=1, verbose=0, shuffle=False)
    path = str(tmp_path / f"m.{format}")
    if format == "keras":
        model.save(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            config = model.optimizer.get_config() | {"telemetry": read}
            reloaded = keras.models.load_model(path)
            assert int(reloaded.optimizer.iterations.numpy()) == 4
            assert flavour.lamb.LAMB.from_config(config).telemetry is read
        return
    model.save_weights(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other.load_weights(path)
    assert int(other.optimizer.iterations.numpy()) == 4
    slots = zip(model.optimizer._plan.slots, other.optimizer._plan.slots, strict=True)
    for ours, theirs in slots:
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


# Subclasses, schedules, and updates that are not complete.


def test_a_subclass_changes_the_rule(keras3):
    class Halved(keras3.lamb.LAMB):
        def __init__(self, factor=0.5, **arguments):
            super().__init__(**arguments)
            self.factor = factor

        def step(self, g, x, u, slots, rate, plan):
            return self.factor * super().step(g, x, u, slots, rate, plan)

    moved = {}
    for name, optimizer in {
        "plain": keras3.lamb.LAMB(0.1),
        "half": Halved(learning_rate=0.1),
        "quarter": Halved(0.25, learning_rate=0.1),
        "variant": Halved.variant("paper", 0.1),
    }.items():
        (variable,) = make_variables(keras3, [3.0, 4.0])
        apply(optimizer, [variable], [1.0, 2.0])
        moved[name] = variable.numpy() - [3.0, 4.0]
        repr(optimizer)
    np.testing.assert_allclose(moved["half"], moved["plain"] / 2, rtol=1e-5)
    np.testing.assert_allclose(moved["quarter"], moved["plain"] / 4, rtol=1e-5)
    np.testing.assert_allclose(moved["variant"], moved["half"], rtol=1e-5)


def test_a_subclass_reads_its_numbers_and_is_told_of_other_attributes(keras3):
    class Capped(keras3.lamb.LAMB):
        def __init__(self, cap, **arguments):
            super().__init__(**arguments)
            self.cap = cap

        def ratio(self, x_norm, u_norm, decay_norm):
            ratio, denominator = super().ratio(x_norm, u_norm, decay_norm)
            return keras3.keras.ops.minimum(ratio, self.cap), denominator

    moved = []
    for cap in (0.25, np.float32(0.25)):
        (variable,) = make_variables(keras3, [3.0, 4.0])
        apply(Capped(cap, learning_rate=0.1), [variable], [1.0, 2.0])
        moved.append(variable.numpy())
    np.testing.assert_array_equal(*moved)
    (variable,) = make_variables(keras3, [3.0, 4.0])
    with pytest.raises(AttributeError, match="'cap' in its compiled update.* numbers, strings or"):
        apply(Capped([0.25], learning_rate=0.1), [variable], [1.0, 2.0])


def test_a_negative_rate_moves_against_the_step(flavour, monkeypatch):
    """A linear decay may go below 0 at its end; large layers became NaN."""
    from tf_lamb import xla_cpu

    monkeypatch.setattr(xla_cpu, "RECOMPUTE_ABOVE", 2)
    (variable,) = make_variables(flavour, [[1.0, 1.0], [1.0, 1.0]])
    optimizer = flavour.lamb.LAMB(lambda: tf.constant(-0.1), beta_1=0.87, weight_decay=0.0)
    apply(optimizer, [variable], np.ones((2, 2)))
    np.testing.assert_allclose(variable.numpy(), 1.1 * np.ones((2, 2)), rtol=1e-5)


def test_training_without_an_update_keeps_the_weights(keras3):
    """Keras assigns the averages to the model when `fit` ends, and there are none yet."""
    import keras

    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1, name="d")])
    model.compile(keras3.lamb.LAMB(0.1, use_ema=True, gradient_accumulation_steps=4), loss="mse")
    before = [w.numpy() for w in model.weights]
    x = np.ones((4, 2), np.float32)
    with run_eagerly():
        model.fit(x, x[:, :1], batch_size=2, verbose=0)
    for a, b in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_an_accumulated_gradient_is_applied(keras3):
    """Also if its variable has no gradient in the call that completes the update."""
    variables = make_variables(keras3, [1.0], [1.0])
    optimizer = keras3.lamb.LARS(
        1.0,
        gradient_accumulation_steps=2,
        momentum=0.0,
        weight_decay=0.0,
        exclude_from_layer_adaptation=["w"],
    )
    optimizer.build(variables)
    apply(optimizer, variables, [1.0], [2.0])
    apply(optimizer, variables, [1.0], None)
    np.testing.assert_allclose(values(variables), [[0.0], [1.0]], atol=1e-6)
    apply(optimizer, variables, [0.0], [0.0])
    apply(optimizer, variables, [0.0], [0.0])
    np.testing.assert_allclose(values(variables), [[0.0], [0.0]], atol=1e-6)


@pytest.mark.parametrize(("dtype", "size", "steps"), [("float16", 3e4, 4), ("bfloat16", 1.0, 300)])
def test_accumulated_gradients_are_summed_in_float32(keras3, dtype, size, steps):
    """The sums 1.2e5 and 300 are beyond float16, and bfloat16, in which 256 + 1 is 256."""
    variable = keras3.Variable(np.ones(3), dtype=dtype)
    optimizer = keras3.lamb.LARS(
        0.25 / size,
        gradient_accumulation_steps=steps,
        momentum=0.0,
        weight_decay=0.0,
        exclude_from_layer_adaptation=[""],
    )
    optimizer.build([variable])
    for _ in range(steps):
        optimizer.apply([tf.constant([size] * 3, dtype)], [variable])
    assert optimizer.skipped_steps == 0
    np.testing.assert_array_equal(np.float32(variable.numpy()), 0.75)


def test_float64_as_the_default_dtype(keras3):
    import keras

    keras.config.set_floatx("float64")
    try:
        for arguments in ({"bias_correction": "rate"}, {"beta_1": 0.0}, {}):
            variable = keras.Variable(np.float64([1.0, 2.0]), dtype="float64")
            keras3.lamb.LAMB(0.1, **arguments).apply([tf.constant([1.0, 0.5])], [variable])
            assert np.isfinite(variable.numpy()).all()
    finally:
        keras.config.set_floatx("float32")


def test_programs_keep_no_optimizer_alive(flavour):
    import gc
    import weakref

    class Owner:
        def rate(self):
            return 0.1

    owner = Owner()
    optimizer = flavour.lamb.LAMB(owner.rate, beta_1=0.86)
    variables = make_variables(flavour, [1.0, 2.0])
    apply(optimizer, variables, [1.0, 1.0])
    held = [weakref.ref(owner), weakref.ref(optimizer)]
    del owner, optimizer, variables
    gc.collect()
    assert [reference() for reference in held] == [None, None]
