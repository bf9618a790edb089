"""Files of version 0.1.0 load, to the bit, and training goes on from them as it did then.

What the files are stands in tests/data/v0_1_0/make.py.
"""

import importlib.util
import json
import pathlib
import sys
import zipfile

import numpy as np
import pytest
import tensorflow as tf

DATA = pathlib.Path(__file__).parent / "data" / "v0_1_0"
BOTH = ("lamb", "lamb_telemetry", "lars", "lars_telemetry")
CASES = [("keras3", case) for case in (*BOTH, "lamb_ema", "lamb_accumulation")]
CASES += [("tf_keras", case) for case in BOTH]
# Batch normalization takes it away: its gradients are rounding alone, of which LAMB makes steps.
HIDDEN_BIAS = 1  # in `model.weights`
# They are no state: where Keras saves an optimizer as a list of numbers, they are not loaded.
OBSERVATIONS = ("skipped_steps", "telemetry")


@pytest.fixture(scope="module")
def make():
    """The module that wrote the files."""
    spec = importlib.util.spec_from_file_location("make_v0_1_0", DATA / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v0_1_0")
    with zipfile.ZipFile(DATA / "files.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "expected.npz") as arrays:
        return dict(arrays)


def assert_goes_on(make, model, expected, prefix):
    """The state is what was saved, and two batches lead where they led then."""
    kept = {
        key.removeprefix(prefix): value
        for key, value in expected.items()
        if key.startswith(prefix) and "/after/" not in key
    }
    found = make.state(model)
    for key in kept.keys() - {"config", *OBSERVATIONS}:
        assert np.asarray(found[key]).tobytes() == kept[key].tobytes(), key
    assert found.keys() == kept.keys()
    then, now = json.loads(str(kept["config"])), json.loads(str(found["config"]))
    assert {name: now[name] for name in then} == then
    make.train(model, make.AFTER, expected["x"], expected["y"])
    end = make.state(model)
    assert end["iterations"] == expected[f"{prefix}after/iterations"]
    for i, weight in enumerate(model.weights):
        if i == HIDDEN_BIAS:
            continue
        after = expected[f"{prefix}after/weights/{i}"]
        # Another version's program, and perhaps another processor, rounds otherwise.
        np.testing.assert_allclose(weight.numpy(), after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("flavour", "case"), CASES, indirect=["flavour"])
def test_a_saved_model(make, files, expected, flavour, case):
    model = flavour.keras.models.load_model(files / flavour.name / f"{case}.keras")
    assert_goes_on(make, model, expected, f"{flavour.name}/{case}/")


@pytest.mark.parametrize(
    ("flavour", "case"), [case for case in CASES if case[0] == "keras3"], indirect=["flavour"]
)
def test_weights_with_the_optimizer(make, files, expected, flavour, case):
    model = make.make_model(flavour.name, case, seed=1)
    model.optimizer.build(model.trainable_weights)
    model.load_weights(files / flavour.name / f"{case}.weights.h5")
    assert_goes_on(make, model, expected, f"{flavour.name}/{case}/")


@pytest.mark.parametrize(
    ("flavour", "case", "format"),
    [("keras3", "lamb", "checkpoint")]
    + [
        (*case, format)
        for case in CASES
        if case[0] == "tf_keras"
        for format in ("checkpoint", "weights")
    ],
    indirect=["flavour"],
)
def test_a_checkpoint(make, files, expected, flavour, case, format):
    model = make.make_model(flavour.name, case, seed=1)
    model.optimizer.build(model.trainable_weights)
    path = str(files / flavour.name / f"{case}.{format}")
    if format == "weights":
        model.load_weights(path)
    else:
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        checkpoint.read(path).assert_existing_objects_matched()
    assert model.optimizer.skipped_steps == expected[f"{flavour.name}/{case}/skipped_steps"]
    assert_goes_on(make, model, expected, f"{flavour.name}/{case}/")


@pytest.mark.parametrize("case", BOTH)
@pytest.mark.parametrize("flavour", ["tf_keras"], indirect=True)
def test_hdf5(make, files, expected, flavour, case):
    custom = {"WarmupPolynomialDecay": flavour.lamb.WarmupPolynomialDecay}
    path = files / flavour.name / f"{case}.h5"
    model = flavour.keras.models.load_model(path, custom_objects=custom)
    assert_goes_on(make, model, expected, f"{flavour.name}/{case}/")


@pytest.mark.parametrize("flavour", ["tf_keras"], indirect=True)
def test_a_savedmodel(make, files, expected, flavour):
    path = files / flavour.name / "lamb.saved_model"
    model = flavour.keras.models.load_model(path)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(str(path / "variables" / "variables"))
    assert_goes_on(make, model, expected, "tf_keras/lamb/")


def test_every_config(flavour):
    configs = json.loads((DATA / "config.json").read_text(encoding="utf-8"))[flavour.name]
    for name, config in configs.items():
        optimizer = getattr(flavour.lamb, name.split("_")[0]).from_config(config)
        now = optimizer.get_config()
        assert {key: now[key] for key in config} == config, name
