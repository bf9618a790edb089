"""Each script of examples/ at a small size, in an empty folder."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tensorflow as tf

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOT_PUBLIC = ("recipes", "inputs", "models", "tasks", "training", "export", "preflight", "train")
WEIGHTS = {"dropout": 0.1, "initializer_stddev": 0.2}  # random ones, and large


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Returns a function that imports a script by name; the script runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # The scripts set some of these; what they were is restored after the test.
    for name in ("KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ[name])

    def load(name):
        spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def run_script(name, *arguments, folder, path=ROOT):
    """Runs a script as a user does; returns (standard output, standard error).

    `path` is searched first for modules.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "XLA_FLAGS")}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_every_script_has_a_test_and_says_how_to_run_it_and_imports_the_library_alone():
    tested = pathlib.Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert re.search(rf'(example|run_script)\(\s*"{path.stem}"', tested), path.name
        text = path.read_text(encoding="utf-8")
        assert f"python examples/{path.name}" in text, path.name
        assert not re.search(rf"(?m)^\s*(from|import) ({'|'.join(NOT_PUBLIC)})\b", text), path.name
        assert text.startswith('"""') and "\nIt prints " in text, path.name


def test_every_script_describes_itself_and_refuses_other_arguments(tmp_path):
    run = """import argparse, sys, types
class Anything(types.ModuleType):
    def __getattr__(self, name): return self
    def __call__(self, *arguments, **named): return self
    __or__ = __ror__ = __getitem__ = __call__
for name in sys.argv[3:]: sys.modules[name] = Anything(name)
path, sys.argv = sys.argv[1], sys.argv[1:3]
import runpy; runpy.run_path(path, run_name="__main__")"""
    frameworks = ("tensorflow", "tensorflow_text", "keras", "keras_hub", "tf_keras", "official")
    frameworks += ("official.nlp", "official.nlp.modeling", "tf_lamb", "tf_lamb.tf_keras")
    for path in EXAMPLES.glob("*.py"):
        for flag, status in (("--help", 0), ("--wrong", 2)):
            command = [sys.executable, "-c", run, path, flag, *frameworks]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == status, done.stderr
            assert f"usage: {path.name}" in done.stdout + done.stderr
        assert not [*tmp_path.iterdir()]


def test_masked_lm(example, capsys):
    pytest.importorskip("keras_hub", reason="KerasHub is not installed (extra `examples`)")
    example("masked_lm").main(epochs=1, steps_per_epoch=3)
    printed = capsys.readouterr().out
    assert re.search(r"accuracy: \d.* loss: \d", printed)
    assert re.search(r"the old fish swims in the \[MASK\] \.  ->  \S+\n", printed)


@pytest.mark.slow
def test_resnet50_lars(example, capsys):
    example("resnet50_lars").main(epochs=1, steps_per_epoch=2)
    printed = capsys.readouterr().out
    assert "ScaledSchedule(learning_rate=1.0, warmup_steps=0, total_steps=2)" in printed
    assert re.search(r"conv1_conv/kernel +\(7, 7, 3, 64\) +yes +yes", printed)
    assert re.search(r"conv1_bn/gamma +\(64,\) +- +-", printed)
    assert re.search(r"accuracy: \d.* loss: \d", printed)


def test_custom_loop(example, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `telemetry`)")
    example("custom_loop").main(steps=20)
    printed = capsys.readouterr().out
    assert re.search(r"step 20  loss \d+\.\d+\n", printed)
    lines = (tmp_path / "logs/trust_ratios.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]
    assert (tmp_path / "logs/trust_ratios.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tf_keras_tfmodels(example, capsys):
    pytest.importorskip("official", reason="tf-models-official is not installed (extra `train`)")
    example("tf_keras_tfmodels").main(epochs=1, steps_per_epoch=2)
    printed = capsys.readouterr().out
    assert re.search(r"loss: \d.* accuracy: \d", printed)
    assert "LAMB adapts 17 of 41 variables." in printed


@pytest.mark.slow
def test_jax_data_parallel(tmp_path):
    """In a process of its own: Keras's backend and the virtual devices are chosen at import."""
    pytest.importorskip("jax", reason="JAX is not installed (extra `examples`)")
    printed, errors = run_script("jax_data_parallel", folder=tmp_path)
    assert "4 devices: cpu:0, cpu:1, cpu:2, cpu:3\n" in printed
    assert "The weights are on 4 devices.\n" in printed
    losses = [float(loss) for loss in re.findall(r"loss: (\d+\.\d+)", printed)]
    assert losses[-1] < 0.5 * losses[0]
    assert errors == ""


@pytest.fixture(scope="module")
def pretrained_export(tmp_path_factory):
    """The folder of an exported BERT with random weights."""
    from export.bert import pretrained_export
    from export.saved_model import write_export
    from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS
    from models import bert

    vocabulary = [*SPECIAL_TOKENS, *"abcdefgh", "the", "of", "array"]
    model = bert.build_pretrainer(bert.SIZES["tiny"], len(vocabulary), 16, **WEIGHTS)
    folder = str(tmp_path_factory.mktemp("pretrained") / "export")
    write_export(pretrained_export(model, vocabulary, 16, lower_case=True), "A card.\n", folder)
    return folder


@pytest.mark.slow
def test_savedmodel_client_fills_masks_with_tensorflow_alone(pretrained_export, tmp_path):
    """In a process where importing anything of the project's, or tf_keras, is an error."""
    for name in ("tf_lamb", "tf_keras", "official", "inputs", "models", "export", "training"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not allowed here')")
    text = "the [MASK] of the [MASK]"
    printed, errors = run_script(
        "savedmodel_client", pretrained_export, text, "the array", folder=tmp_path, path=tmp_path
    )
    first, *fillings, last = printed.splitlines()
    assert (first, last) == (text, "the array")
    assert len(fillings) == 2
    for filling in fillings:
        assert re.fullmatch(r"  (\S+ \d+ %, ){4}\S+ \d+ %", filling)
    assert errors == ""


def test_savedmodel_client_answers_questions(example, tmp_path, capsys):
    from export.saved_model import write_export
    from export.squad import answering_export
    from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS
    from models import bert, squad
    from recipes.squad import SQUAD_MINI

    vocabulary = [*SPECIAL_TOKENS, "ada", "wrote", "it", "in", "who"]
    length = SQUAD_MINI.sequence_length
    model = squad.build_span_labeler(
        bert.SIZES["tiny"], len(vocabulary), length, types=2, **WEIGHTS
    )
    export = answering_export(model, vocabulary, SQUAD_MINI, lower_case=True)
    write_export(export, "A card.\n", str(tmp_path / "m"))
    example("savedmodel_client").main("m", "Ada wrote it.", "Who wrote it?", "In it?")
    answer = r"  '(.*)', characters (\d+) to (\d+)"
    found = re.findall(rf"Who wrote it\?\n{answer}\nIn it\?\n{answer}\n", capsys.readouterr().out)
    ((first, start, end, *_),) = found
    assert first and "Ada wrote it."[int(start) : int(end)] == first


def test_savedmodel_client_classifies_images(example, tmp_path, capsys):
    from export.resnet import classifier_export
    from export.saved_model import write_export
    from models import resnet

    model = resnet.build_classifier(
        resnet.SIZES["cifar-resnet-10"],
        32,
        2,
        normalization="cifar10",
        batch_norm_momentum=0.9,
    )
    classes = [("n1", "cat"), ("n2", "dog")]
    write_export(classifier_export(model, classes, 32, 1.0), "A card.\n", str(tmp_path / "m"))
    pixels = tf.cast(tf.reshape(tf.range(32 * 32 * 3) % 256, [32, 32, 3]), tf.uint8)
    tf.io.write_file("image.png", tf.io.encode_png(pixels))
    tf.io.write_file("notes.txt", "no image")
    example("savedmodel_client").main("m", "image.png", "notes.txt")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "image.png" and lines[2] == "notes.txt"
    assert re.fullmatch(r"  (cat|dog) \d+ %, (cat|dog) \d+ %", lines[1])
    assert lines[3].startswith("  no JPEG, PNG, BMP or GIF")


def test_savedmodel_client_names_what_is_wrong(example):
    main = example("savedmodel_client").main
    with pytest.raises(SystemExit, match="nothing holds no SavedModel"):
        main("nothing", "the [MASK]")
    specs = {"audio": "audio", "image": "image"}
    for name, argument in specs.items():
        module = tf.Module()
        module.call = tf.function(lambda **inputs: inputs)
        spec = tf.TensorSpec([None], tf.string, name=argument)
        tf.saved_model.save(module, name, module.call.get_concrete_function(**{argument: spec}))
    with pytest.raises(SystemExit, match="audio is no export of train.py: it takes audio"):
        main("audio", "the [MASK]")
    with pytest.raises(SystemExit, match="missing.jpg; No such file"):
        main("image", "missing.jpg")
