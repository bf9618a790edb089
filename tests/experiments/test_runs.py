"""Runs of small Keras models, the run files and the page."""

import dataclasses
import gzip
import json
import math
import os
import pathlib
import shlex
import signal
import struct
import subprocess
import sys
import time
from unittest import mock

import keras
import numpy as np
import pytest
from scipy import stats

from experiments import ROOT, children, datasets, keras_run, networks, page, runner
from experiments.__main__ import main
from experiments.grid import Cell, Group, Table
from experiments.page import compare, write_page
from experiments.runner import Places, load_runs, metrics, run_cell, run_table, state
from experiments.summary import write_summary
from experiments.tables import TABLES
from inputs.errors import InputError
from inputs.storage.files import locked

IMAGES = 96


@pytest.fixture(autouse=True)
def same_environment():
    """A run in this process sets variables that later tests must not see."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder with MNIST's files, of random images that their labels can be read from."""
    folder = tmp_path_factory.mktemp("mnist")
    generator = np.random.default_rng(0)
    for name in ("train", "t10k"):
        labels = generator.integers(0, 10, IMAGES, dtype=np.uint8)
        images = generator.integers(0, 50, (IMAGES, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 3] = 255
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            with gzip.open(folder / f"{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(_idx(content))
    return str(folder)


def _idx(content):
    magic = 0x800 + content.ndim
    return struct.pack(f">{1 + content.ndim}I", magic, *content.shape) + content.tobytes()


def _damage(folder, name):
    """Replaces one file of MNIST, or two, by damaged ones; returns what is said of it."""
    images, labels = (folder / f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    pixels = _idx(np.zeros((4, 28, 28), np.uint8))
    numbers = _idx(np.arange(4, dtype=np.uint8))
    images.write_bytes(pixels)
    labels.write_bytes(numbers)
    if name == "truncated images":
        images.write_bytes(pixels[:-100])
        return f"{images} has 3,052 bytes, and by its header it should have 3,152"
    if name == "truncated labels":
        labels.write_bytes(numbers[:-1])
        return f"{labels} has 11 bytes, and by its header it should have 12"
    if name == "swapped":
        images.write_bytes(numbers)
        return f"{images} is no IDX file of images of 28x28 pixels"
    if name == "no header":
        labels.write_bytes(b"")
        return f"{labels} is no IDX file of labels"
    if name == "labels of another set":
        labels.write_bytes(_idx(np.arange(3, dtype=np.uint8)))
        return f"{images} has 4 images, and {labels} has 3 labels"
    if name == "label":
        labels.write_bytes(_idx(np.array([1, 2, 3, 10], np.uint8)))
        return f"{labels} has the label 10, which is outside the labels 0 to 9"
    labels.unlink()
    packed = bytearray(gzip.compress(numbers * 100))
    packed[14] ^= 255
    labels.with_suffix(".gz").write_bytes(packed)
    return f"{labels}.gz cannot be read"


@pytest.mark.parametrize(
    "name",
    [
        *("truncated images", "truncated labels", "swapped", "no header"),
        *("labels of another set", "label", "damaged gzip"),
    ],
)
def test_a_damaged_file_of_mnist_is_named(name, tmp_path):
    said = _damage(tmp_path, name)
    with pytest.raises(InputError) as error:
        datasets.load("mnist", str(tmp_path), "train")
    assert str(error.value).startswith(f"--data_dir: {said}")


def test_too_few_images_for_the_warm_up_are_refused(mnist, tmp_path):
    with pytest.raises(InputError, match=f"--data_dir: {mnist} has 96 images for training"):
        keras_run.run(_cell(warmup_steps=24), mnist, str(tmp_path))


def test_a_missing_file_of_cifar_10_is_one_of_data_dir(tmp_path):
    with pytest.raises(InputError, match=f"--data_dir: {tmp_path} lacks the file"):
        datasets.load("cifar10", str(tmp_path), "train")


def test_cifar_10_is_read_in_order_with_mean_0_and_deviation_1(tmp_path):
    generator = np.random.default_rng(0)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    rows = {}
    for name in names:
        labels = generator.integers(0, 10, (4, 1), dtype=np.uint8)
        pixels = generator.integers(0, 256, (4, 3 * 32 * 32), dtype=np.uint8)
        rows[name] = labels, pixels
        (tmp_path / name).write_bytes(np.concatenate([labels, pixels], axis=1).tobytes())
    images, labels = datasets.load("cifar10", str(tmp_path), "train")
    assert (images.shape, images.dtype) == ((20, 32, 32, 3), np.float32)
    np.testing.assert_array_equal(labels, np.concatenate([rows[n][0][:, 0] for n in names[:5]]))
    expected = rows[names[4]][1][3].reshape(3, 32, 32).transpose(1, 2, 0).astype(np.float64)
    expected = (expected - datasets.CIFAR_MEAN) / datasets.CIFAR_STDDEV
    np.testing.assert_allclose(images[19], expected, atol=1e-5)
    assert len(datasets.load("cifar10", str(tmp_path), "validation")[0]) == 4


def _cell(**settings):
    return Cell(
        Group(
            "toy",
            {
                **{"data": "mnist", "model": "lenet5", "optimizer": "lamb", "batch": 32},
                **{"epochs": 8, "warmup_steps": 2, "power": 1.0, "weight_decay": 0.01},
                **settings,
            },
        ),
        0.02,
        1,
    )


@pytest.mark.slow
def test_a_run_learns_and_repeats_itself(mnist, tmp_path):
    first = keras_run.run(_cell(), mnist, str(tmp_path))
    assert first["result"]["accuracy"] > 0.5
    assert first["curve"]["step"] == [3 * epoch for epoch in range(1, 9)]
    assert (tmp_path / "trust_ratios.jsonl").exists()
    again = keras_run.run(_cell(), mnist, str(tmp_path / "again"))
    assert again["curve"]["loss"][0] == pytest.approx(first["curve"]["loss"][0], abs=1e-4)


@pytest.mark.parametrize("optimizer", ["lars", "momentum", "nesterov", "adagrad", "adam", "adamw"])
def test_every_optimizer_is_the_one_that_its_name_says(optimizer):
    settings = {"optimizer": optimizer, "weight_decay": 0.01}
    made = keras_run.make_optimizer(settings, 0.1)
    expected = {"momentum": "sgd", "nesterov": "sgd"}.get(optimizer, optimizer)
    assert type(made).__name__.lower() == expected
    assert getattr(made, "nesterov", False) == (optimizer == "nesterov")
    if expected != "lars":
        kernel, bias = (keras.Variable(np.ones(2), name=name) for name in ("kernel", "bias"))
        made.build([kernel, bias])
        made.apply([np.zeros(2, np.float32)] * 2)
        assert np.all(np.array(bias) == 1) and np.all(np.array(kernel) < 1)  # decay, by name


def curve_from_fixed_weights(settings, data_dir, records):
    """The curve of a run whose initial weights do not depend on the backend."""

    def with_fixed_weights(settings, seed, make=keras_run.make_model):
        model = make(settings, seed)
        generator = np.random.default_rng(0)
        model.set_weights([generator.normal(0, 0.1, w.shape) for w in model.get_weights()])
        return model

    with mock.patch.object(keras_run, "make_model", with_fixed_weights):
        return keras_run.run(Cell(Group("toy", settings), 0.02, 1), data_dir, records)["curve"]


@pytest.mark.slow
def test_jax_and_tensorflow_train_alike_from_the_same_weights(mnist, tmp_path):
    """The cells of `mnist-backends` differ in their initial weights; here these are equal, too."""
    settings = dict(_cell(epochs=2).group.settings)
    script = (
        "import json, sys; from tests.experiments import test_runs as here; "
        "print(json.dumps(here.curve_from_fixed_weights(*json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([settings, mnist, str(tmp_path / "jax")])],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    curves = [json.loads(done.stdout.splitlines()[-1])]
    curves.append(curve_from_fixed_weights(settings, mnist, str(tmp_path / "tensorflow")))
    np.testing.assert_allclose(curves[0]["loss"], curves[1]["loss"], rtol=2e-3)
    np.testing.assert_allclose(curves[0]["test_loss"], curves[1]["test_loss"], rtol=2e-3)
    groups = TABLES["mnist-backends"].groups
    assert [group.settings["backend"] for group in groups] == ["tensorflow", "jax"]
    one, other = ({**group.settings, "backend": ""} for group in groups)
    assert one == other and groups[0].rates == groups[1].rates == (0.01,)


@pytest.mark.slow
def test_a_run_on_jax_and_its_page_need_no_tensorflow(mnist, tmp_path):
    program = f"""
import sys
sys.modules["tensorflow"] = None  # as if it were not installed
import dataclasses
from experiments import __main__ as command
from experiments.grid import Table
group = command.TABLES["mnist-batches"].group("lamb-1024")
settings = dict(group.settings) | {{"batch": 32, "epochs": 2, "warmup_steps": 2}}
group = dataclasses.replace(group, settings=settings)
table = Table("toy", "Toy", "keras", "accuracy", (group,), heat_maps=("lamb-1024",),
    one_core=False)
command.TABLES["toy"] = table
for rate in group.rates:
    command.main(["toy", "--data_dir={mnist}", "--runs={tmp_path}/runs",
        "--output={tmp_path}/out",
        f"--cell=lamb-1024-rate{{rate:g}}-seed1"])
sys.exit(command.main(["toy", "--runs={tmp_path}/runs", "--output={tmp_path}/out",
    "--page={tmp_path}/page.md", "--limit=0"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lamb 1024" in (tmp_path / "page.md").read_text(encoding="utf-8")
    run = json.loads((tmp_path / "out" / "lamb-1024-rate0.01-seed1.json").read_text())
    assert run["versions"].keys() >= {"keras", "jax"}
    assert "cores" in run["machine"]
    assert os.listdir(tmp_path / "runs" / "compiled")  # the next run finds what this one compiled


def test_every_image_is_seen_once_in_an_epoch_whatever_the_batch():
    images = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)
    labels = np.arange(10, dtype=np.int32)
    for batch in (2, 3, 5, 7, 10):
        steps = 30 // batch
        batches = datasets.Batches(images, labels, batch, (0, steps), seed=1)
        seen = np.concatenate([batches[i][1] for i in range(len(batches))])
        for epoch in range(len(seen) // 10):
            assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
        later = datasets.Batches(images, labels, batch, (1, steps), seed=1)
        np.testing.assert_array_equal(later[0][1], batches[1][1])


def test_crops_are_parts_of_the_image_and_half_of_them_are_mirrored():
    images = np.arange(32 * 32, dtype=np.float32).reshape(1, 32, 32, 1).repeat(200, axis=0)
    labels = np.zeros(200, np.int32)
    cropped, _ = datasets.Batches(images, labels, 200, (0, 1), seed=1, crop=True)[0]
    padded = np.pad(images[0, :, :, 0], 4, mode="reflect")
    windows = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    mirrored = 0
    for image in cropped[:, :, :, 0]:
        plain = any(np.array_equal(image, window) for window in windows)
        turned = any(np.array_equal(image[:, ::-1], window) for window in windows)
        assert plain or turned
        mirrored += turned and not plain
    assert 60 < mirrored < 140


@pytest.mark.slow
def test_davidnet_at_full_width_is_the_published_one_and_trains():
    model = networks.davidnet()
    trainable = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    assert trainable == 6_573_120
    settings = {**TABLES["cifar10"].group("lamb-512").settings}
    optimizer = keras_run.make_optimizer(settings, 0.005)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=False)
    generator = np.random.default_rng(0)
    images = generator.normal(size=(4, 32, 32, 3)).astype(np.float32)
    losses = [model.train_on_batch(images, np.arange(4)) for _ in range(3)]
    assert np.isfinite(losses).all()


def test_a_table_runs_resumes_and_writes_its_page(mnist, tmp_path, monkeypatch, capsys):
    settings = dict(_cell(epochs=2).group.settings)
    table = Table(
        "toy",
        "Toy table",
        "keras",
        "accuracy",
        (
            Group("lamb-32", settings, (0.01, 0.02), seeds=(1, 2)),
            Group("lamb-untuned-64", {**settings, "batch": 64}, rate_from=("lamb-32", 2**0.5)),
        ),
        pairs=(("lamb-32", "lamb-untuned-64"),),
        published={"lamb-32": 0.99},
        x="batch",
        text="About the table.",
    )
    monkeypatch.setitem(TABLES, "toy", table)
    flags = [f"--data_dir={mnist}", f"--runs={tmp_path}/runs", f"--output={tmp_path}/toy"]
    flags += [f"--page={tmp_path}/toy.md"]
    cell = Cell(table.groups[0], 0.01, 1)
    assert main(["toy", *flags[:3], f"--cell={cell.name}"]) == 0  # as a child of the runner
    for group, rate, seed in ((0, 0.02, 1), (0, 0.005, 1), (0, 0.01, 2), (1, 0.014, 1)):
        cell = Cell(table.groups[group], rate, seed)
        run = {**_run_file(table, cell, accuracy=0.001 * seed), "images": [IMAGES, IMAGES]}
        (tmp_path / "toy" / f"{cell.name}.json").write_text(json.dumps(run))
    runs = load_runs(table, str(tmp_path / "toy"))
    assert {"settings", "seed", "versions", "curve", "result", "commit"} <= set(
        next(iter(runs.values()))
    )
    assert main(["toy", *flags, "--limit=0"]) == 0
    page = (tmp_path / "toy.md").read_text()
    assert "# Toy table" in page and "| lamb 32 |" in page and "0.9900" in page
    assert f"| images | {IMAGES} for training, {IMAGES} for the test: not the published" in page
    assert "\n\n*Test accuracy over batch: mean and range (lowest to highest)" in page
    assert (tmp_path / "toy" / "curves.png").exists() and (tmp_path / "toy" / "sweep.png").exists()
    capsys.readouterr()
    assert main(["toy", flags[2], "--list"]) == 0
    assert f"{len(runs)} done" in capsys.readouterr().out
    for limit in (0, 1, 2):
        assert main(["mnist", f"--output={tmp_path}/none", "--list", f"--limit={limit}"]) == 0
        listed = capsys.readouterr().out
        assert listed.count("to do ") == limit and f" {limit} to do, at least 0 more" in listed


@pytest.mark.slow
def test_a_child_runs_one_cell_and_a_failure_is_named(tmp_path):
    command = [sys.executable, "-m", "experiments", "mnist", f"--data_dir={tmp_path}/none"]
    command += [f"--runs={tmp_path}/runs", f"--output={tmp_path}/out", "--limit=1", "--jobs=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "failed: lamb-rate0.0001-seed1: exit status 1: experiments: --data_dir: " in done.stderr
    log = tmp_path / "runs" / "mnist" / "lamb-rate0.0001-seed1" / "log.txt"
    assert f"(see {log})" in done.stderr and "cannot be read" in log.read_text()


def _run_file(table, cell, **result):
    return {
        "table": table.name,
        "cell": cell.name,
        "settings": dict(cell.group.settings),
        "rate": cell.rate,
        "seed": cell.seed,
        "date": "2026-01-01",
        "commit": "abc",
        "machine": "m",
        "versions": {"keras": "3"},
        "seconds": 1.0,
        "processor_seconds": 1.0,
        "curve": {
            "step": [1, 2],
            "loss": [2.0, 1.0],
            "test_accuracy": [result["accuracy"] / 2, result["accuracy"]],
        },
        "result": {"diverged": False, **result},
    }


def test_a_diverged_run_is_minus_infinity_and_shown_as_such(tmp_path):
    table = dataclasses.replace(
        TABLES["mnist"], groups=TABLES["mnist"].groups[:2], pairs=(), published={}
    )
    group = table.groups[0]
    for rate, accuracy in zip(group.rates, (0.5, 0.9, 0.6, 0.1), strict=True):
        cell = Cell(group, rate, 1)
        run = _run_file(table, cell, accuracy=accuracy, diverged=rate == 0.1)
        (tmp_path / f"{cell.name}.json").write_text(json.dumps(run))
    assert metrics(table, load_runs(table, str(tmp_path)))["lamb-rate0.1-seed1"] == -math.inf
    places = Places("", str(tmp_path / "runs"), str(tmp_path))
    write_page(table, state(table, str(tmp_path)), str(tmp_path / "page.md"), places)
    page = (tmp_path / "page.md").read_text()
    assert "0.001: 0.9000" in page and "0.1: diverged" in page
    assert "4 runs done; at least 12 still to be run" in page


def test_a_run_file_of_other_settings_is_refused(tmp_path):
    table = TABLES["mnist"]
    cell = Cell(table.groups[0], 0.01, 1)
    run = _run_file(table, cell, accuracy=0.5)
    run["settings"]["epochs"] = 3
    (tmp_path / f"{cell.name}.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match="epochs: 3, now 30"):
        load_runs(table, str(tmp_path))


WRONG_RUNS = {
    "no object": (lambda run: [], "does not hold a run"),
    "null": (lambda run: None, "does not hold a run"),
    "empty": (lambda run: {}, "holds another run than its name says: table is None"),
    "table": (lambda run: {**run, "table": "mnist-author"}, "table is 'mnist-author'"),
    "cell": (lambda run: {**run, "cell": "lamb-rate0.01-seed2"}, "cell is 'lamb-rate0.01-seed2'"),
    "rate": (lambda run: {**run, "rate": 0.001}, "rate is 0.001"),
    "seed": (lambda run: {**run, "seed": 2}, "seed is 2"),
    "settings": (lambda run: {**run, "settings": []}, "settings is not an object"),
    "time": (lambda run: {**run, "processor_seconds": None}, "processor_seconds is not a number"),
    "result": (lambda run: {**run, "result": 0.5}, "result is not an object"),
    "diverged": (lambda run: {**run, "result": {"accuracy": 0.5}}, "diverged is neither true nor"),
    "no metric": (lambda run: {**run, "result": {"diverged": False}}, "accuracy is None"),
    "text": (
        lambda run: {**run, "result": {"diverged": False, "accuracy": "x"}},
        "accuracy is 'x'",
    ),
    "nan": (
        lambda run: {**run, "result": {"diverged": False, "accuracy": math.nan}},
        "accuracy is nan",
    ),
    "above 1": (
        lambda run: {**run, "result": {"diverged": False, "accuracy": 5.0}},
        "accuracy is 5.0",
    ),
    "true": (lambda run: {**run, "seed": True}, "seed is True"),
    "no time": (lambda run: {**run, "processor_seconds": -5}, "not a number, 0 or above"),
    "version": (lambda run: {**run, "versions": {"keras": {}}}, "a version is not a text"),
    "images": (lambda run: {**run, "images": [60_000]}, "images is [60000], not two numbers"),
    "twin": (lambda run: {**run, "same_as": "lamb"}, "the same as 'lamb', which is no cell"),
    "no twin": (
        lambda run: {**run, "same_as": "momentum-rate0.01-seed1"},
        "the same as 'momentum-rate0.01-seed1', which has other settings",
    ),
    "curve": (lambda run: {**run, "curve": {"step": [1, 2]}}, "its curve is damaged"),
    **{
        f"curve of {name} {values}": (
            lambda run, name=name, values=values: {**run, "curve": {**run["curve"], name: values}},
            "its curve is damaged",
        )
        for name, values in (
            ("step", ["1", "2"]),
            ("step", [1, None]),
            ("loss", [2.0, "1"]),
            ("test_accuracy", "ab"),
            ("test_accuracy", [0.5]),
        )
    },
    "no curve": (
        lambda run: {**run, "curve": {name: [] for name in run["curve"]}},
        "its curve is damaged",
    ),
}


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_a_run_file_that_is_not_the_complete_run_of_its_name_is_refused(name, tmp_path):
    change, said = WRONG_RUNS[name]
    table = TABLES["mnist"]
    cell = Cell(table.groups[0], 0.01, 1)
    path = tmp_path / f"{cell.name}.json"
    path.write_text(json.dumps(change(_run_file(table, cell, accuracy=0.5))))
    with pytest.raises(InputError) as error:
        load_runs(table, str(tmp_path))
    assert str(error.value).startswith(f"--output: {path} ") and said in str(error.value)
    assert "Delete the file to repeat the run" in str(error.value)
    places = Places("", str(tmp_path / "runs"), str(tmp_path))
    with pytest.raises(InputError, match="Delete the file"):
        run_cell(table, cell, places)


def test_runs_on_different_numbers_of_images_are_refused(tmp_path):
    """Files without the numbers are from before 2026-11-27, of the complete data."""
    table = TABLES["mnist"]
    for rate, images in ((0.001, None), (0.01, [60_000, 10_000]), (0.1, [12_500, 300])):
        assert rate < 0.1 or len(load_runs(table, str(tmp_path))) == 2
        cell = Cell(table.groups[0], rate, 1)
        run = _run_file(table, cell, accuracy=0.5) | ({"images": images} if images else {})
        (tmp_path / f"{cell.name}.json").write_text(json.dumps(run))
    with pytest.raises(InputError) as error:
        load_runs(table, str(tmp_path))
    said = "lamb-rate0.1-seed1 on 12,500 images, tested on 300"
    assert said in str(error.value) and "on 60,000 images, tested on 10,000" in str(error.value)


def test_a_run_file_with_another_spelling_of_its_rate_is_refused(tmp_path):
    table = TABLES["mnist"]
    run = _run_file(table, Cell(table.groups[0], 0.01, 1), accuracy=0.5)
    path = tmp_path / "lamb-rate0.0100-seed1.json"
    path.write_text(json.dumps({**run, "cell": path.stem}))
    with pytest.raises(InputError, match="is named otherwise than the run that it holds"):
        load_runs(table, str(tmp_path))


def test_a_damaged_run_file_of_a_twin_is_not_copied(tmp_path):
    table = TABLES["mnist-batches"]
    twin = Cell(table.group("lamb-untuned-16384"), 0.04, 1)
    (tmp_path / f"{twin.name}.json").write_text("{}")
    places = Places("", str(tmp_path / "runs"), str(tmp_path))
    with pytest.raises(InputError, match=f"{twin.name}.json holds another run"):
        run_cell(table, Cell(table.group("lamb-16384"), 0.04, 1), places)


def test_a_run_of_another_group_with_the_same_settings_is_copied(tmp_path, monkeypatch):
    table = TABLES["mnist-batches"]
    twin = Cell(table.group("lamb-untuned-16384"), 0.04, 1)
    run = _run_file(table, twin, accuracy=0.98)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{twin.name}.json").write_text(json.dumps(run))
    places = Places("", str(tmp_path / "runs"), str(tmp_path / "out"))

    def refuse(*_):
        raise AssertionError("the run is repeated")

    monkeypatch.setattr(keras_run, "run", refuse)
    copied = run_cell(table, Cell(table.group("lamb-16384"), 0.04, 1), places)
    assert copied["result"] == run["result"] and copied["same_as"] == twin.name
    assert copied["processor_seconds"] == 0
    loaded = load_runs(table, places.output)
    assert loaded["lamb-16384-rate0.04-seed1"] == copied
    with pytest.raises(AssertionError, match="repeated"):  # another seed
        run_cell(table, Cell(table.group("lamb-16384"), 0.04, 2), places)
    with pytest.raises(AssertionError, match="repeated"):  # other settings
        run_cell(table, Cell(table.group("lamb-4096"), 0.04, 1), places)
    # The copy took no time, so it says nothing about the time of others.
    assert state(table, places.output).seconds_left(1) == pytest.approx(
        len(state(table, places.output).todo) + state(table, places.output).later
    )


def test_the_difference_is_tested_with_welch_s_test():
    one, other = [0.9, 0.91, 0.92, 0.93], [0.9, 0.905]
    difference, p = compare(one, other)
    assert difference == pytest.approx(0.0125)
    # Welch: t = 0.0125 / sqrt(s1²/4 + s2²/2), s1² = 1/6000, s2² = 1.25e-5; ν by Satterthwaite.
    a, b = (1 / 6000) / 4, 1.25e-5 / 2
    freedom = (a + b) ** 2 / (a**2 / 3 + b**2 / 1)
    expected = 2 * stats.t.sf(0.0125 / math.sqrt(a + b), freedom)
    assert p == pytest.approx(expected, rel=1e-6)
    assert compare([0.9], other) is None and compare(one, [0.9, -math.inf]) is None
    assert compare([0.5, 0.5], [0.4, 0.4]) == (pytest.approx(0.1), 0.0)


def _finished(group, best, values, folder):
    """Writes the run files of a group whose best rate is the second of its rates."""
    table = TABLES["mnist-batches"]
    for rate in group.rates or (best,):
        for seed, value in zip(group.seeds, values, strict=True):
            if rate == best or seed == group.seeds[0]:
                cell = Cell(group, rate, seed)
                run = _run_file(table, cell, accuracy=value if rate == best else 0.5)
                (folder / f"{cell.name}.json").write_text(json.dumps(run))


def test_differences_are_corrected_and_a_group_is_not_compared_with_itself(tmp_path):
    table = TABLES["mnist-batches"]
    table = dataclasses.replace(
        table, pairs=(*table.pairs, ("lamb-untuned-4096", "lamb-4096"), ("lamb-4096", "lars-4096"))
    )
    for name, best, values in (
        ("lamb-1024", 0.01, (0.990, 0.991, 0.992)),
        ("adamw-1024", 0.003, (0.980, 0.981, 0.982)),
        ("lamb-4096", 0.02, (0.989, 0.990, 0.991)),
        ("lamb-untuned-4096", 0.02, (0.9891, 0.990, 0.991)),
        ("lars-4096", 20.0, (0.981, 0.984, 0.990)),
    ):
        _finished(table.group(name), best, values, tmp_path)
    found = page.differences(table, state(table, str(tmp_path)))
    names = [(one.first, one.second) for one in found]
    assert len(names) == len({*names})  # a pair that is listed twice is tested once
    assert ("lamb-untuned-4096", "lamb-1024") in names
    assert ("lamb-untuned-4096", "lamb-4096") not in names  # the same settings and rate
    smallest, *_, largest = sorted(found, key=lambda one: one.p)
    assert smallest.corrected == pytest.approx(len(found) * smallest.p)
    assert largest.corrected == pytest.approx(largest.p) or largest.corrected <= 1
    assert all(one.p <= one.corrected <= 1 for one in found)
    order = [one.corrected for one in sorted(found, key=lambda one: one.p)]
    assert order == sorted(order)


def test_a_run_that_another_group_is_running_is_not_begun():
    table = TABLES["mnist-batches"]
    group, untuned = table.group("lamb-16384"), table.group("lamb-untuned-16384")
    running = [Cell(group, 0.04, 2)]
    assert runner._is_taken(Cell(untuned, 0.04, 2), running)
    assert not runner._is_taken(Cell(untuned, 0.04, 3), running)
    assert not runner._is_taken(Cell(untuned, 0.05, 2), running)


def test_the_summary_says_who_wins_who_ties_and_what_was_not_run(tmp_path):
    table = TABLES["mnist"]
    accuracies = {
        "lamb": (0.99, 0.991, 0.992, 0.993, 0.994),
        "adamw": (0.99, 0.9911, 0.992, 0.993, 0.9941),
        "adam": (0.97, 0.971, 0.972, 0.973, 0.974),
    }
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, values in accuracies.items():
        group = table.group(name)
        cells = [Cell(group, rate, 1) for rate in group.rates]
        cells += [Cell(group, 0.01, seed) for seed in group.seeds[1:]]
        for cell in cells:
            found = values[cell.seed - 1] if cell.rate == 0.01 else 0.5
            run = _run_file(table, cell, accuracy=found)
            (folder / f"{cell.name}.json").write_text(json.dumps(run))
    cell = Cell(table.group("momentum"), 0.1, 1)
    run = _run_file(table, cell, accuracy=0.9876)
    (folder / f"{cell.name}.json").write_text(json.dumps(run))
    (tmp_path / "mnist.md").write_text("the page that is linked")
    write_summary([table, TABLES["mnist-batches"]], str(tmp_path), str(tmp_path / "summary.md"))
    page = (tmp_path / "summary.md").read_text().splitlines()
    (tie,) = [line for line in page if "lamb: " in line and "adamw: " in line]
    (win,) = [line for line in page if "lamb: " in line and "adam: " in line]
    assert tie.endswith("ties |") and win.endswith("+0.0200 | < 0.001 | < 0.001 | wins |")
    assert any("| momentum | 0.1, seed 1: 0.9876 |" in line for line in page)
    (left,) = [line for line in page if line.startswith("- [MNIST and LeNet")]
    assert "of adagrad, momentum (`mnist`)" in left
    assert "- MNIST, from batch 256 to the whole set: no run yet; at least 137 are" in "\n".join(
        page
    )


def test_the_published_summary_is_that_of_the_published_runs(tmp_path):
    """After new run files: `python -m experiments TABLE --limit=0`."""
    results = ROOT / "docs/results"
    write_summary(TABLES.values(), str(results), str(tmp_path / "summary.md"))
    assert (tmp_path / "summary.md").read_text() == (results / "summary.md").read_text()


def test_the_page_of_the_command_counts_the_runs(tmp_path):
    page = (ROOT / "docs/commands/experiments.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    counts = {row[0].strip("`"): int(row[2]) for row in rows}
    empty = {name: state(table, str(tmp_path)) for name, table in TABLES.items()}
    assert counts == {name: len(now.todo) + now.later for name, now in empty.items()}


def test_a_sweep_names_the_runs_that_diverged(tmp_path, monkeypatch):
    table = TABLES["mnist-batches"]
    done = [group for group in table.groups if group.name in ("lamb-1024", "lars-1024")]
    seeds = {"lamb-1024": [0.99, -math.inf, 0.98], "lars-1024": [-math.inf] * 3}
    drawn = []
    monkeypatch.setattr(page.pyplot, "close", drawn.append)
    page._draw_sweep(table, done, seeds, str(tmp_path / "sweep.png"), "1 − test accuracy")
    (axes,) = drawn[0].axes
    labels = axes.get_legend_handles_labels()[1]
    assert [text.get_text() for text in axes.texts] == []
    assert "lamb at 1,024: 1 of 3 seeds diverged" in labels
    assert "lars at 1,024: 3 of 3 seeds diverged" in labels and "lars" not in labels


def test_a_sweep_marks_a_single_seed(tmp_path, monkeypatch):
    table = TABLES["mnist-batches"]
    done = [group for group in table.groups if group.name in ("lamb-1024", "lamb-4096")]
    drawn = []
    monkeypatch.setattr(page.pyplot, "close", drawn.append)
    seeds = {"lamb-1024": [0.99, 0.98, 0.98], "lamb-4096": [0.97]}
    page._draw_sweep(table, done, seeds, str(tmp_path / "sweep.png"), "1 − test accuracy")
    (text,) = drawn[0].axes[0].texts
    assert text.get_text() == "1 seed" and text.xy == pytest.approx((4_096, 0.03), rel=0.05)


def test_a_page_of_runs_elsewhere_is_written_beside_them(tmp_path, capsys, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    (results / "mnist.md").write_text("the published page")
    monkeypatch.setattr("experiments.__main__.RESULTS", str(results))
    table = TABLES["mnist"]
    cell = Cell(table.groups[0], 0.01, 1)
    output = tmp_path / "elsewhere"
    output.mkdir()
    (output / f"{cell.name}.json").write_text(json.dumps(_run_file(table, cell, accuracy=0.5)))
    assert main(["mnist", "--limit=0", f"--output={output}/", f"--runs={tmp_path}/runs"]) == 0
    assert (results / "mnist.md").read_text() == "the published page"
    assert f"{output}.md: 1 run done" in capsys.readouterr().out
    assert "0.01: 0.5000" in (tmp_path / "elsewhere.md").read_text()


def test_the_page_of_a_table_without_runs_is_what_the_command_writes(tmp_path):
    """After a change of the table: `python -m experiments TABLE --limit=0`."""
    results = ROOT / "docs/results"
    compared = []
    for name, table in TABLES.items():
        published = results / f"{name}.md"
        now = state(table, str(results / name))
        if published.exists() and not now.runs:
            places = Places("", str(tmp_path / "runs"), str(tmp_path / "output"))
            write_page(table, now, str(tmp_path / "page.md"), places)
            assert (tmp_path / "page.md").read_text() == published.read_text(), name
            compared.append(name)
    assert compared


def test_pictures_are_linked_from_a_page_in_another_folder(tmp_path):
    table = dataclasses.replace(TABLES["mnist"], groups=TABLES["mnist"].groups[:1], pairs=())
    output = tmp_path / "far" / "output"
    output.mkdir(parents=True)
    for rate, accuracy in zip(table.groups[0].rates, (0.5, 0.6, 0.9, 0.7), strict=True):
        cell = Cell(table.groups[0], rate, 1)
        run = _run_file(table, cell, accuracy=accuracy)
        (output / f"{cell.name}.json").write_text(json.dumps(run))
    for seed in (2, 3, 4, 5):
        cell = Cell(table.groups[0], 0.01, seed)
        run = _run_file(table, cell, accuracy=0.9)
        (output / f"{cell.name}.json").write_text(json.dumps(run))
    places = Places("", str(tmp_path / "runs"), str(output))
    write_page(table, state(table, str(output)), str(tmp_path / "page.md"), places)
    assert "](far/output/curves.png)" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--output={0}/file", "--output: {0}/file is not a folder"),
        ("--output=/proc/x", "--output: /proc/x cannot be written"),
        ("--output=gs://bucket/x", "--output: gs://bucket/x is not on the disk"),
        ("--runs={0}/file", "--runs: {0}/file is not a folder"),
        ("--page={0}/none/p.md", "--page: there is no folder {0}/none"),
        ("--page={0}", "--page: {0} is a folder"),
        ("--page={0}/file", "--page: {0}/file is no Markdown file"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_before_the_first_run(
    flag, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(runner, "_start", lambda *_: pytest.fail("a run begins"))
    (tmp_path / "file").write_text("")
    given = flag.format(tmp_path)
    flags = [f"--runs={tmp_path}/runs", f"--output={tmp_path}/output", given, "--data_dir=d"]
    assert main(["mnist", *flags]) == 1
    assert f"experiments: {said.format(tmp_path)}" in capsys.readouterr().err


def test_a_list_and_a_summary_check_their_places(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["mnist", "--list", f"--output={tmp_path}/file"]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert main(["summary", f"--page={tmp_path}/none/x.md"]) == 1
    assert f"--page: there is no folder {tmp_path}/none" in capsys.readouterr().err


def _children(monkeypatch, tmp_path, commands):
    """Lets the runner start shell commands instead of runs: rate -> command."""

    def start(table, cell, places):
        folder = pathlib.Path(places.folder(table, cell))
        folder.mkdir(parents=True, exist_ok=True)
        return children.Child(["sh", "-c", commands[cell.rate]], str(folder / "log.txt"))

    monkeypatch.setattr(runner, "_start", start)
    output = tmp_path / "output"
    output.mkdir()
    return Places("data", str(tmp_path / "runs"), str(output))


def _copy_command(table, cell, places, tmp_path):
    run = tmp_path / f"{cell.name}.json"
    run.write_text(json.dumps(_run_file(table, cell, accuracy=0.5)))
    return shlex.join(["cp", str(run), places.output])


def test_a_run_of_another_command_is_passed_over(tmp_path, monkeypatch):
    table = TABLES["mnist"]
    group = table.group("lamb")
    commands = {0.0001: f"exit {runner.IN_USE}"}
    places = _children(monkeypatch, tmp_path, commands)
    for rate in group.rates[1:]:
        commands[rate] = _copy_command(table, Cell(group, rate, 1), places, tmp_path)
    said = []
    now = run_table(table, places, 1, 3, ("lamb",), said.append)
    assert [cell.name for cell in now.todo] == ["lamb-rate0.0001-seed1"] and len(now.runs) == 3
    assert [line for line in said if "rate0.0001-seed1 is passed over: another process" in line]


def test_a_run_in_use_ends_with_its_own_status(tmp_path, capsys):
    folder = tmp_path / "runs" / "mnist" / "lamb-rate0.01-seed1"
    folder.mkdir(parents=True)
    flags = [f"--runs={tmp_path}/runs", f"--output={tmp_path}/output", "--data_dir=d"]
    with locked(str(folder), "--runs"):
        status = main(["mnist", "--cell=lamb-rate0.01-seed1", *flags])
    assert status == runner.IN_USE
    assert f"{folder} is in use by process {os.getpid()}" in capsys.readouterr().err


def test_a_failed_run_is_named_with_its_last_line_and_its_log(tmp_path, monkeypatch):
    table = TABLES["mnist-backends"]
    commands = {0.01: "echo first; echo the reason >&2; exit 4"}
    places = _children(monkeypatch, tmp_path, commands)
    log = pathlib.Path(places.runs, table.name, "tensorflow-rate0.01-seed1", "log.txt")
    log.parent.mkdir(parents=True)
    log.write_text("of an earlier start\n")
    with pytest.raises(RuntimeError) as error:
        run_table(table, places, 1, 1, ("tensorflow",), lambda line: None)
    name = "tensorflow-rate0.01-seed1"
    assert str(error.value) == f"failed: {name}: exit status 4: the reason (see {log})"
    commands[0.01] = "kill -9 $$"
    with pytest.raises(RuntimeError, match=rf"{name}: killed by SIGKILL \(see {log}\)"):
        run_table(table, places, 1, 1, ("tensorflow",), lambda line: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_with_the_command(number, tmp_path):
    program = f"""
import sys
from experiments import __main__ as command, children, runner
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
def start(*_):
    child = children.Child(sleep)
    print(child.process.pid, flush=True)
    return child
runner._start = start
sys.exit(command.main(["mnist", "--data_dir=d", "--jobs=1", "--runs={tmp_path}/runs",
    "--output={tmp_path}/output"]))
"""
    done = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child = int(done.stdout.readline())
    done.stdout.readline()  # the child begins
    done.send_signal(number)
    _, said = done.communicate(timeout=30)
    assert said == "experiments: stopped. The same command resumes.\n"
    assert done.returncode == 130
    assert not os.path.exists(f"/proc/{child}")


def test_a_child_that_does_not_end_is_killed():
    child = children.Child(
        ["sh", "-c", "trap '' TERM; echo ready; while true; do sleep 0.1; done"], os.devnull
    )
    time.sleep(0.2)  # the trap is set
    children.end([child], seconds=0.3)
    assert child.process.returncode == -signal.SIGKILL


def test_data_on_object_storage_keep_their_path(tmp_path, monkeypatch):
    table = TABLES["imagenet"]
    started = []
    monkeypatch.setattr(children, "Child", lambda command, *_, **__: started.append(command))
    places = Places("gs://bucket/imagenet", str(tmp_path / "runs"), str(tmp_path / "output"))
    runner._start(table, Cell(table.groups[0], table.groups[0].rates[0], 1), places)
    assert "--data_dir=gs://bucket/imagenet" in started[0]
