"""The schedules agree with their formulas in float64, and are saved with the optimizer."""

import json

import numpy as np
import pytest
from drive import FEW_LAYERS, Run, random_gradients, random_weights

W, T = 100, 1000
STEPS = [0, 1, W - 1, W, W + 1, (W + T) // 2, T - 1, T, T + 5, 10 * T]
# Arguments other than the peak 0.02, W and T.
KINDS = {
    "linear from the peak": {},
    "the paper's": {"decay_from": 0},
    "from within the warm-up": {"decay_from": 40, "power": 2.0},
    "NVIDIA's": {"power": 0.5},
    "MLPerf's": {"power": 2, "end_learning_rate": 1e-4},
    "MLPerf's, which starts within the warm-up": {"warmup_from": -40, "decay_from": 0},
    "the same, linear from the peak": {"warmup_from": -40},
    "a warm-up that is longer than training": {
        "warmup_steps": 200_100,
        "warmup_from": -200_000,
        "decay_from": 0,
    },
    "no warm-up": {"warmup_steps": 0, "end_learning_rate": 0.005},
}
PHASES = [
    {"peak_learning_rate": 0.01, "warmup_steps": 10, "total_steps": 50},
    {"peak_learning_rate": 0.002, "warmup_steps": 5, "total_steps": 20, "decay_from": 0},
    {"peak_learning_rate": 0.1, "warmup_steps": 0, "total_steps": 7, "end_learning_rate": 0.03},
]


def formula(t, peak_learning_rate, warmup_steps, total_steps, **kind):
    """The rate at step t: linear from 0 to the peak, then a power of the remaining fraction."""
    end, start = kind.get("end_learning_rate", 0.0), kind.get("decay_from")
    ahead = -kind.get("warmup_from", 0)
    start = warmup_steps - ahead if start is None else start
    if t + ahead < warmup_steps:
        return peak_learning_rate * (t + ahead) / warmup_steps
    if t >= total_steps:
        return end
    left = (total_steps - t) / (total_steps - start)
    return end + (peak_learning_rate - end) * left ** kind.get("power", 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_and_decay_follow_the_formula(flavour, kind):
    arguments = {"peak_learning_rate": 0.02, "warmup_steps": W, "total_steps": T} | KINDS[kind]
    schedule = flavour.lamb.WarmupPolynomialDecay(**arguments)
    rates = [float(schedule(t)) for t in STEPS]
    exact = [formula(t, **arguments) for t in STEPS]
    # 1 - done loses digits near the end: the error is a rounding error of 1 in float32.
    power = arguments.get("power", 1.0)
    np.testing.assert_allclose(rates, exact, rtol=1e-6, atol=0.02 * 1.2e-7 ** min(power, 1))
    at_end = STEPS.index(T)
    assert rates[at_end:] == [np.float32(arguments.get("end_learning_rate", 0.0))] * 3


def test_the_paper_drops_as_warmup_ends(flavour):
    """With `decay_from=0` the decay starts at step 0, so the rate never reaches the peak."""
    arguments = {"peak_learning_rate": 0.02, "warmup_steps": W, "total_steps": T}
    peak = flavour.lamb.WarmupPolynomialDecay(**arguments)
    paper = flavour.lamb.WarmupPolynomialDecay(decay_from=0, **arguments)
    assert float(peak(W)) == np.float32(0.02)
    np.testing.assert_allclose(float(paper(W)), 0.02 * (1 - W / T), rtol=1e-6)
    assert float(paper(W - 1)) == float(peak(W - 1)) > float(paper(W))


def test_phases_follow_one_another(flavour):
    schedule = flavour.lamb.Phases(PHASES)
    steps = range(90)
    exact = [formula(t, **PHASES[0]) for t in range(50)]
    exact += [formula(t, **PHASES[1]) for t in range(20)]
    exact += [formula(t, **PHASES[2]) for t in range(20)]
    np.testing.assert_allclose([float(schedule(t)) for t in steps], exact, rtol=1e-6, atol=1e-9)
    assert float(schedule(50)) == 0.0  # the second phase warms up again


GOYAL = {"peak_learning_rate": 3.2, "warmup_steps": 10, "total_steps": 90}
GOYAL |= {"decay_steps": [30, 60, 80]}


def test_steps_divide_the_rate(flavour):
    """Linear to the peak, a tenth of it from each of the steps on; alone and as a phase."""
    schedule = flavour.lamb.WarmupStepDecay(**GOYAL)
    exact = [
        3.2 * t / 10 if t < 10 else 3.2 * 0.1 ** ((t >= 30) + (t >= 60) + (t >= 80))
        for t in range(100)
    ]
    np.testing.assert_allclose([float(schedule(t)) for t in range(100)], exact, rtol=1e-6)
    phases = flavour.lamb.Phases([PHASES[2], GOYAL])
    np.testing.assert_allclose([float(phases(t + 7)) for t in range(100)], exact, rtol=1e-6)
    other = flavour.lamb.WarmupStepDecay(**GOYAL | {"warmup_steps": 0, "decay_factor": 0.5})
    assert [float(other(t)) for t in (0, 29, 30, 99)] == [
        np.float32(rate) for rate in (3.2, 3.2, 1.6, 0.4)
    ]


def changed(flavour, kind):
    """A schedule in which no argument has its default."""
    if kind == "Phases":
        return flavour.lamb.Phases([*PHASES, GOYAL], name="two")
    if kind == "WarmupStepDecay":
        return flavour.lamb.WarmupStepDecay(0.5, 2, 40, [5, 9], 0.25, "steps")
    return flavour.lamb.WarmupPolynomialDecay(0.5, 2, 40, 0.001, 1.5, 1, "one", warmup_from=-1)


@pytest.mark.parametrize("kind", ["WarmupPolynomialDecay", "WarmupStepDecay", "Phases"])
def test_a_schedule_is_saved_alone_and_with_its_optimizer(flavour, kind):
    schedule = changed(flavour, kind)
    schedules = flavour.keras.optimizers.schedules
    serialized = json.loads(json.dumps(schedules.serialize(schedule)))
    clone = schedules.deserialize(serialized)
    assert type(clone) is type(schedule)
    assert clone.get_config() == schedule.get_config()
    assert [float(clone(t)) for t in range(80)] == [float(schedule(t)) for t in range(80)]

    optimizer = flavour.lamb.LAMB(schedule)
    config = json.loads(json.dumps(flavour.keras.optimizers.serialize(optimizer)))
    loaded = flavour.keras.optimizers.deserialize(config)
    assert loaded._learning_rate.get_config() == schedule.get_config()
    assert loaded.get_config() == optimizer.get_config()


@pytest.mark.parametrize("kind", ["WarmupPolynomialDecay", "WarmupStepDecay", "Phases"])
def test_the_first_update_has_the_rate_of_step_0(flavour, kind):
    """Warm-up starts at a rate of 0, so the first update changes nothing, and the second does."""
    arguments = {"peak_learning_rate": 0.5, "warmup_steps": 2, "total_steps": 40}
    arguments |= {"decay_steps": [9]} if kind == "WarmupStepDecay" else {}
    arguments = {"phases": [arguments]} if kind == "Phases" else arguments
    schedule = getattr(flavour.lamb, kind)(**arguments)
    weights = random_weights(names=FEW_LAYERS)
    run = Run(flavour, lambda: flavour.lamb.LAMB(schedule), weights, names=FEW_LAYERS)
    first, second = run.history(random_gradients(1, names=FEW_LAYERS)[:2])[1:]
    assert all(np.array_equal(x, w) for x, w in zip(first, weights, strict=True))
    assert not np.array_equal(first[0], second[0])


BAD = [
    ({"peak_learning_rate": 0}, r"`peak_learning_rate` .* \(0, inf\)\. Received: .*=0\."),
    ({"peak_learning_rate": float("nan")}, r"`peak_learning_rate` .*=nan\."),
    ({"warmup_steps": -1}, r"`warmup_steps` .* \[0, 1000\)\. Received: warmup_steps=-1\."),
    ({"warmup_steps": T}, r"`warmup_steps` .* \[0, 1000\)\. Received: warmup_steps=1000\."),
    ({"total_steps": 0}, r"`total_steps` .* \(0, inf\)\. Received: total_steps=0\."),
    ({"end_learning_rate": -0.1}, r"`end_learning_rate` .* Received: end_learning_rate=-0\.1\."),
    ({"power": 0}, r"`power` .* \(0, inf\)\. Received: power=0\."),
    ({"decay_from": W + 1}, r"`decay_from` .* Received: decay_from=101\."),
    ({"warmup_from": 1}, r"`warmup_from` .* \[-100, 1\)\. Received: warmup_from=1\."),
    ({"decay_from": -1}, r"`decay_from` .* Received: decay_from=-1\."),
    ({"warmup_steps": 0.5}, r"`warmup_steps` must be an integer\. Received: warmup_steps=0\.5\."),
    ({"total_steps": 10.5}, r"`total_steps` must be an integer\. Received: total_steps=10\.5\."),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(bad) for bad, _ in BAD])
def test_a_bad_argument_is_refused(flavour, arguments, message):
    good = {"peak_learning_rate": 0.02, "warmup_steps": W, "total_steps": T}
    with pytest.raises(ValueError, match=message):
        flavour.lamb.WarmupPolynomialDecay(**good | arguments)
    with pytest.raises(ValueError, match=message):
        flavour.lamb.Phases([good, good | arguments])


BAD_STEPS = [
    ({"decay_steps": [9]}, r"`decay_steps` .* \[10, 90\)\. Received: decay_steps=9\."),
    ({"decay_steps": [90]}, r"`decay_steps` .* Received: decay_steps=90\."),
    ({"decay_steps": [30.5]}, r"`decay_steps` must be an integer\. Received: decay_steps=30\.5\."),
    ({"decay_steps": [30, 30]}, r"`decay_steps` .* \[31, 90\)\. Received: decay_steps=30\."),
    (
        {"decay_factor": 0},
        r"`decay_factor` must be a number in \(0, 1\]\. Received: decay_factor=0\.",
    ),
    ({"warmup_steps": 90}, r"`warmup_steps` .* Received: warmup_steps=90\."),
    ({"decay_steps": None}, r"`decay_steps` must be a list of integers\. Received: .*=None\."),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_STEPS, ids=[str(bad) for bad, _ in BAD_STEPS]
)
def test_a_bad_step_is_refused(flavour, arguments, message):
    with pytest.raises(ValueError, match=message):
        flavour.lamb.WarmupStepDecay(**GOYAL | arguments)


PHASE = {"peak_learning_rate": 0.02, "warmup_steps": 2, "total_steps": 10}


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"at least one dictionary.* Received: phases=\[\]\."),
        (None, r"at least one dictionary.* Received: phases=None\."),
        ([1, 2], r"at least one dictionary.* Received: phases=\[1, 2\]\."),
        (PHASE, r"at least one dictionary"),
        ([PHASE, {"peak": 1}], r"`phases\[1\]` .* `WarmupPolynomialDecay`: .*argument 'peak'"),
        ([PHASE | {"decay_steps": [5], "x": 1}], r"`phases\[0\]` .* `WarmupStepDecay`: .* 'x'"),
        ([{"total_steps": 9}], r"missing 2 .* 'peak_learning_rate' and 'warmup_steps'\."),
        (
            [PHASE | {"gradient_accumulation_steps": 2}],
            r"to `Phases` itself\. Received: phases\[0\]",
        ),
    ],
)
def test_bad_phases_are_refused(flavour, phases, message):
    with pytest.raises(ValueError, match=message):
        flavour.lamb.Phases(phases)


@pytest.mark.parametrize("kind", [np.array, iter, tuple])
def test_phases_save_any_kind_of_list(flavour, kind):
    schedule = flavour.lamb.Phases(iter([PHASE | {"decay_steps": kind([5, 6])}]))
    config = json.loads(json.dumps(flavour.keras.optimizers.schedules.serialize(schedule)))
    clone = flavour.keras.optimizers.schedules.deserialize(config)
    assert [float(clone(step)) for step in (4, 5, 6)] == [float(schedule(s)) for s in (4, 5, 6)]
    assert clone.phases == [PHASE | {"decay_steps": [5, 6]}]
