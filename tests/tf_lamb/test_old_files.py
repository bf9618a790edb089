"""Files of version 0.1.0 load with the same numbers and arguments, and training resumes exactly."""

import importlib.util
import json
import pathlib
import warnings
import zipfile

import numpy as np
import pytest
from drive import run_eagerly

FOLDER = pathlib.Path(__file__).parents[1] / "data" / "v0_1_0"
spec = importlib.util.spec_from_file_location("make_v0_1_0", FOLDER / "make.py")
# (flavour, case) of `make.CASES`, which is not imported while tests are collected.
BOTH = ["lamb", "lamb_telemetry", "lars", "lars_telemetry"]
CASES = [("keras3", case) for case in [*BOTH, "lamb_ema", "lamb_accumulation"]]
CASES += [("tf_keras", case) for case in BOTH]


@pytest.fixture(scope="module")
def make(two_cpus):
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v0_1_0")
    with zipfile.ZipFile(FOLDER / "files.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


# The gradient of the bias before the batch norm is only rounding errors, and LAMB scales it up like
# any other. The moving mean follows that bias, and nothing else depends on it.
NOISE = ("weights/1", "weights/4")


def check(make, model, expected, prefix):
    """Compares the state and two more steps. Counters and telemetry are not saved."""
    for key, value in make.state(model).items():
        if key not in ("config", "skipped_steps", "telemetry"):
            np.testing.assert_array_equal(value, expected[prefix + key], err_msg=prefix + key)
    with run_eagerly():  # compiling would take longer than the two steps
        make.train(model, make.AFTER, expected["x"], expected["y"])
    for key, value in make.state(model).items():
        if key == "iterations" or (key.startswith("weights/") and key not in NOISE):
            np.testing.assert_allclose(
                value, expected[f"{prefix}after/{key}"], rtol=2e-5, atol=2e-6, err_msg=key
            )


def check_arguments(optimizer, saved):
    """Asserts that saved arguments are unchanged; new ones may have been added."""
    now = json.loads(json.dumps(optimizer.get_config()))
    for key, value in saved.items():
        if key == "learning_rate" and isinstance(value, dict):
            held = now[key]["config"]
            assert {k: held[k] for k in value["config"]} == value["config"]
        else:
            assert now[key] == value, key


@pytest.fixture(autouse=True)
def no_warning_of_skipped_state():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Skipping variable loading")
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("flavour", "case"), CASES)
def test_a_whole_model_loads(make, files, expected, flavour, case):
    kit = make.FLAVOURS[flavour][0]
    model = kit.models.load_model(files / flavour / f"{case}.keras")
    saved = json.loads(str(expected[f"{flavour}/{case}/config"]))
    check_arguments(model.optimizer, saved)
    check(make, model, expected, f"{flavour}/{case}/")


@pytest.mark.parametrize("case", BOTH)
def test_hdf5_loads_without_custom_objects(make, files, expected, case):
    model = make.tf_keras.models.load_model(files / "tf_keras" / f"{case}.h5")
    check(make, model, expected, f"tf_keras/{case}/")


def test_a_saved_model_loads_without_custom_objects(make, files, expected):
    path = files / "tf_keras" / "lamb.saved_model"
    model = make.tf_keras.models.load_model(path)
    # tf_keras saves the optimizer, but neither builds nor restores it here.
    model.optimizer.build(model.trainable_variables)
    model.load_weights(str(path / "variables" / "variables"))
    check(make, model, expected, "tf_keras/lamb/")


@pytest.mark.slow
@pytest.mark.parametrize("telemetry", [False, True])
@pytest.mark.parametrize(("flavour", "case"), CASES)
def test_weights_load_with_telemetry_and_without(make, files, expected, flavour, case, telemetry):
    make_it, arguments = make.CASES[flavour][case]
    cases = {"other": (make_it, arguments | {"telemetry": telemetry})}
    make.CASES[flavour]["other"] = cases["other"]
    model = make.make_model(flavour, "other", seed=1)
    model.optimizer.build(model.trainable_variables)
    name = {"keras3": f"{case}.weights.h5", "tf_keras": f"{case}.weights"}[flavour]
    status = model.load_weights(str(files / flavour / name))
    if status is not None:
        status.expect_partial()
    check(make, model, expected, f"{flavour}/{case}/")


@pytest.mark.parametrize(
    ("flavour", "case"), [("keras3", "lamb"), *(("tf_keras", case) for case in BOTH)]
)
def test_checkpoints_load(make, files, expected, flavour, case):
    model = make.make_model(flavour, case, seed=1)
    model.optimizer.build(model.trainable_variables)
    checkpoint = make.tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    status = checkpoint.read(str(files / flavour / f"{case}.checkpoint"))
    status.assert_existing_objects_matched()
    check(make, model, expected, f"{flavour}/{case}/")


@pytest.mark.parametrize("flavour", ["keras3", "tf_keras"])
def test_saved_arguments_load(make, flavour):
    saved = json.loads((FOLDER / "config.json").read_text())[flavour]
    lamb = make.FLAVOURS[flavour][1]
    for name, config in saved.items():
        check_arguments(getattr(lamb, name.split("_")[0]).from_config(dict(config)), config)
