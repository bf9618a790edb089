"""The image task from shards to SavedModel: training, evaluation and serving agree."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from pictures import damage, encoded, prepare, prepared, smooth

import recipes
from export.resnet import NO_IMAGE, ImageClassifier, classifier_export
from export.saved_model import write_export
from inputs import order
from inputs.damage import FOLDER
from inputs.errors import InputError
from inputs.images import examples
from inputs.storage import files
from models import resnet
from tasks.resnet import ImageClassification
from training import strategy
from training.run import Run

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data/imagenet/samples.tar"
CLASSES = [(f"n{i}", f"name {i}") for i in range(7)]


def classifier(image_size, classes, seed=0):
    """A classifier with random weights and statistics, so that predictions differ by image."""
    model = resnet.build_classifier(
        resnet.Size(10, width=8),
        image_size,
        classes,
        normalization="imagenet",
        batch_norm_momentum=0.9,
    )
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "dense/kernel" in variable.name or "gamma" in variable.name:
            variable.assign(rng.normal(1, 0.5, variable.shape))
        elif "variance" in variable.name:
            variable.assign(rng.uniform(0.5, 2, variable.shape))
    return model


def answers_apart(tmp_path, export_dir, files, pixels):
    """Runs the SavedModel in a process that imports only TensorFlow; returns its outputs."""
    flat = [np.frombuffer(file, np.uint8) for file in files]
    ends = np.cumsum([len(f) for f in flat])
    np.savez(tmp_path / "given.npz", files=np.concatenate(flat), ends=ends, pixels=pixels)
    script = ROOT / "tests/clean_classify.py"
    done = subprocess.run(
        [sys.executable, script, export_dir, tmp_path / "given.npz", tmp_path / "answer.npz"],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "alone\n"  # no module of this project was imported
    with np.load(tmp_path / "answer.npz") as answer:
        return dict(answer)


@pytest.mark.slow
def test_serving_agrees_with_evaluation_on_the_imagenet_samples(tmp_path):
    """The same five classes and the same probabilities to 1e-3, for all 220 at 224."""
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    assert prepare("--source", SHARED, "--output", tmp_path / "data") == 0
    data = examples.Images(str(tmp_path / "data/train"), 224, seed=1)
    model = classifier(224, 1000)
    classes = data.manifest["classes"]
    made = classifier_export(model, classes, 224, data.centre_share)
    write_export(made, "card", str(tmp_path / "export"))
    evaluated, shown = [], []
    for batch in data.evaluation_batches(55, 1000):
        shown.append(tf.cast(batch["image"], tf.float32).numpy())
        evaluated.append(tf.nn.softmax(model(shown[-1], training=False)).numpy())
    files = [file for file, _ in data.files(data.num_examples)]
    found = answers_apart(tmp_path, tmp_path / "export", files, shown[0])
    expected = np.concatenate(evaluated)
    assert len(files) == len(expected) == 220
    best = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    assert found["wnids"].tolist() == [[classes[i][0] for i in row] for row in best]
    assert found["names"][0].tolist() == [classes[i][1] for i in best[0]]
    probabilities = np.take_along_axis(expected, best, axis=1)
    np.testing.assert_allclose(found["probabilities"], probabilities, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found["pixel_probabilities"], probabilities[:55], rtol=0, atol=1e-3)
    assert set(found["error"]) == {""}
    assert len({tuple(row) for row in best}) > 20  # predictions differ between images


def test_a_damaged_image_gets_an_error_and_affects_no_other_image():
    module = ImageClassifier(classifier(64, 7), CLASSES, 64, 0.875)
    good = [encoded(smooth(80, 90, seed=i)) for i in range(2)]
    files = [good[0], b"", good[1][:200], good[1], b"no image", encoded(smooth(70, 70), "PNG")]
    answer = {
        key: value.numpy() for key, value in module.classify_files(tf.constant(files)).items()
    }
    wrong = [False, True, True, False, True, False]
    assert [error.decode() for error in answer["error"]] == [NO_IMAGE if w else "" for w in wrong]
    assert (answer["probabilities"][wrong] == 0).all() and (answer["names"][wrong] == b"").all()
    alone = module.classify_files(tf.constant(good[1:]))
    np.testing.assert_allclose(answer["probabilities"][3], alone["probabilities"][0], rtol=1e-5)
    assert answer["names"][3].tolist() == alone["names"].numpy()[0].tolist()
    none = module.classify_files(tf.constant([b"bad", b""]))
    assert none["error"].numpy().tolist() == [NO_IMAGE.encode()] * 2
    assert module.classify_files(tf.constant([], tf.string))["names"].shape == (0, 5)


@pytest.mark.slow
def test_train_py_learns_three_classes_and_reports_it(tmp_path):
    """From shards to report: held-out metrics, best checkpoint, predictions of the SavedModel."""
    data = prepared(tmp_path, size=(40, 40))
    settings = ("model=cifar-resnet-10", "image_size=32", "label_smoothing=0", "augmentation=none")
    settings += ("warmup_steps=2", "evaluate_every_steps=10", "peak_learning_rate=0.05")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "train.py",
            "--recipe=cifar10-momentum-128",
            f"--data_dir={data}",
            f"--model_dir={tmp_path}/run",
            "--global_batch_size=12",
            "--steps=20",
            "--steps_per_loop=10",
            *(f"--set={setting}" for setting in settings),
        ],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 images of 3 classes to train on, 12 held out" in done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["image_top5"] == 1.0 and results["image_top1"] > 0.9
    assert f"top-1 accuracy {results['image_top1']:.4f}" in done.stdout
    assert "0 cat: cat" in done.stdout
    best = json.loads((tmp_path / "run/best/metrics.json").read_text())
    assert best["image_top1"] >= results["image_top1"]


@pytest.mark.slow
def test_a_flipped_byte_in_a_shard_stops_the_run_with_a_message(in_process, capfd, tmp_path):
    data = prepared(tmp_path, size=(40, 40))
    shard, offset = damage(data / "train", 5)
    arguments = [
        "--recipe=cifar10-momentum-128",
        f"--data_dir={data}",
        f"--model_dir={tmp_path}/run",
        "--global_batch_size=12",
        "--steps=2",
        "--set=image_size=32",
        "--set=model=cifar-resnet-10",
    ]
    assert in_process([*arguments, "--set=on_bad_record=fail"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert f"train.py: --data_dir: {shard}, byte {offset}: damaged" in said[-1]
    assert "on_bad_record=skip" in said[-1]
    assert in_process(arguments) == 1
    assert "1 of 12 records are damaged, more than the share of 0.001" in capfd.readouterr().err


@pytest.mark.slow
def test_a_pods_run_goes_on_once_its_data_is_repaired(
    in_process, capfd, tmp_path, ram, monkeypatch
):
    monkeypatch.setattr(strategy, "drives_other_hosts", lambda where: True)
    data = prepared(tmp_path, size=(40, 40))
    arguments = [
        "--recipe=cifar10-momentum-128",
        f"--data_dir={data}",
        f"--model_dir={ram}/run",
        "--global_batch_size=12",
        "--steps=2",
        "--set=image_size=32",
        "--set=model=cifar-resnet-10",
    ]
    whole = (data / "train/train-00000.tfrecord").read_bytes()
    shard, offset = damage(data / "train", 5)
    assert in_process(arguments) == 1
    said = capfd.readouterr().err
    assert f"Skipped: {shard}, byte {offset}: damaged or missing." in said
    assert "1 of 12 records are damaged, more than the share of 0.001" in said
    assert files.is_folder(f"{ram}/run/{FOLDER}")
    shard.write_bytes(whole)
    assert in_process(arguments) == 0
    assert "amaged" not in capfd.readouterr().err and not files.is_folder(f"{ram}/run/{FOLDER}")


def task(tmp_path, data_dir="", recipe=None, **changes):
    recipe = recipe or recipes.find_recipe("resnet50-lamb-512")
    recipe = recipes.override(recipe, [f"{k}={v}" for k, v in changes.items()])
    return ImageClassification(
        recipe,
        data_dir=str(data_dir),
        vocab="",
        resume_dir=None,
        seed=1,
        synthetic=False,
        log=lambda line: None,
    )


def test_a_run_that_was_begun_with_other_lanes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "EXAMPLES_PER_LANE", 2)
    recipe = recipes.resized(
        recipes.find_recipe("resnet50-lamb-512"), steps=2, global_batch_size=40
    )
    begun = dataclasses.asdict(recipe) | {"format": 3}
    (tmp_path / "recipe.json").write_text(json.dumps(begun))
    (tmp_path / "ckpt-1.index").touch()
    images = task(tmp_path, prepared(tmp_path), recipe=recipe)
    assert images.order(0).lanes == 4
    with pytest.raises(InputError, match="in 5 lanes. With the 4 of now.*Give --set lanes=5 to"):
        Run(
            images,
            recipe,
            tf.distribute.get_strategy(),
            model_dir=str(tmp_path),
            seed=1,
            steps_per_loop=1,
        )
    assert json.loads((tmp_path / "recipe.json").read_text())["format"] == 3


def test_unusable_data_and_settings_are_refused(tmp_path):
    with pytest.raises(InputError, match="--data_dir: give the folder"):
        task(tmp_path)
    with pytest.raises(InputError, match="model=resnet-51: no such size"):
        task(tmp_path, model="resnet-51")
    data = prepared(tmp_path / "a")
    assert task(tmp_path, data).facts == task(tmp_path, data).facts
    other = prepared(tmp_path / "b", names=("cat", "cow", "owl"))
    (data / "validation").rename(tmp_path / "old")
    (other / "validation").rename(data / "validation")
    with pytest.raises(InputError, match="label 1 is dog in the first and cow in the second"):
        task(tmp_path, data)
