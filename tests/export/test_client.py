"""The client: output for each kind of export, and one sentence for each kind of error."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest
import tensorflow as tf

from export import client, saved_model

OLD = pathlib.Path(__file__).parents[1] / "data/export_v0_1_0/files.zip"
TEXT = {"text": ([None], tf.string)}
QUESTION = {"question": ([None], tf.string), "context": ([None], tf.string)}
IMAGE = {"image": ([None], tf.string)}


def save(folder, function, arguments, name="serving_default"):
    """Saves a function as a SavedModel whose signature has these arguments.

    `arguments` maps a name to (shape, dtype).
    """
    module = tf.Module()
    specs = {key: tf.TensorSpec(*spec, name=key) for key, spec in arguments.items()}
    module.function = tf.function(lambda **inputs: function(**inputs))
    concrete = module.function.get_concrete_function(**specs)
    tf.saved_model.save(module, str(folder), signatures={name: concrete})
    return str(folder)


def test_masks_are_filled(tmp_path, capsys):
    def fill(text):
        is_last = tf.range(tf.size(text)) == tf.size(text) - 1
        return {
            "tokens": tf.fill([tf.size(text), 2, 2], "word"),
            "probabilities": tf.tile([[[0.75, 0.25]] * 2], [tf.size(text), 1, 1]),
            "masks": tf.where(is_last, 2, 0),
        }

    folder = save(tmp_path / "model", fill, TEXT)
    assert client.main([folder, "no mask", "[MASK] and [MASK]"]) == 0
    line = "     word 75 %, word 25 %\n"
    assert capsys.readouterr().out == f"  no mask\n  [MASK] and [MASK]\n{line}{line}"
    assert client.main([folder, "[MASK] " * 5]) == 0
    assert capsys.readouterr().out.endswith(
        f"{line}{line}     not filled: 3 [MASK], after the last word that the model can read\n"
    )


def test_a_savedmodel_of_version_0_1_0_fills_masks(tmp_path, capsys):
    """See tests/data/export_v0_1_0/make.py. The words after the first have nearly equal odds."""
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(tmp_path)
    asked, answer = (tmp_path / "answer.txt").read_text().splitlines()
    assert client.main([str(tmp_path / "export"), asked.strip()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == asked and len(lines) == 2
    assert lines[1].split(",")[0] == answer.split(",")[0] == "     ##r 3 %"


@pytest.mark.slow
def test_text_that_the_locale_cannot_encode_is_passed_to_the_client(tmp_path):
    """As at the end of a run on Chinese text under LC_ALL=C."""

    def fill(text):
        known = tf.reduce_all(text == "\u4e2d [MASK]")
        tokens = tf.where(known, "\u6587", "unknown")
        return {
            "tokens": tf.reshape(tokens, [1, 1, 1]),
            "probabilities": tf.ones([1, 1, 1]),
            "masks": tf.constant([1]),
        }

    folder = save(tmp_path / "model", fill, TEXT)
    code = (
        "import sys\nfrom export.saved_model import run_client\n"
        "assert sys.getfilesystemencoding() == 'ascii'\n"
        "run_client(sys.argv[1], '\\u4e2d [MASK]')"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=pathlib.Path(client.__file__).parents[1],
        env=environment,
        capture_output=True,
    )
    assert done.stdout == b"  \\u4e2d [MASK]\n     \\u6587 100 %\n", done.stderr.decode()


def test_arguments_that_the_locale_cannot_decode_keep_their_bytes():
    assert client.utf8("\u4e2d") == "\u4e2d".encode()
    assert client.utf8(os.fsdecode(b"caf\xe9")) == b"caf\xe9"


def test_a_client_that_fails_is_one_exception(tmp_path, monkeypatch):
    for name, script, said in (
        ("fails", "exit 3", "it ended with exit status 3"),
        ("hangs", "exec sleep 60", "it did not end within 0.3 s"),
    ):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(saved_model.sys, "executable", str(path))
        monkeypatch.setattr(saved_model, "CLIENT_SECONDS", 0.3 if name == "hangs" else 60)
        with pytest.raises(saved_model.ClientFailed, match=said):
            saved_model.run_client("model", "input")
    monkeypatch.setattr(saved_model.sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(saved_model.ClientFailed, match="could not be started: No such file"):
        saved_model.run_client("model", "input")


def test_questions_are_answered(tmp_path, capsys):
    def answer(question, context):
        return {
            "answer": tf.strings.substr(context, 0, 3),
            "start": tf.zeros_like(question, tf.int32),
            "end": 3 + tf.zeros_like(question, tf.int32),
            "score": tf.where(tf.strings.length(context) > 0, 1.5, tf.float32.min),
        }

    folder = save(tmp_path / "model", answer, QUESTION)
    assert client.main([folder, "Ada wrote it.", "Who wrote it?", "Who?"]) == 0
    expected = "     'Ada', characters 0 to 3, score 1.50\n"
    assert capsys.readouterr().out == (
        f"  Ada wrote it.\n  Who wrote it?\n{expected}  Who?\n{expected}"
    )
    assert client.main([folder, "", "Who wrote it?"]) == 0
    out = capsys.readouterr().out
    assert out == "  \n  Who wrote it?\n     no answer: the context has no words\n"
    assert client.main([folder, "A context without a question."]) == 1
    assert "Give CONTEXT QUESTION..." in capsys.readouterr().err


def test_images_are_classified(tmp_path, capsys):
    def classify(image):
        good = image == "image"
        return {
            "names": tf.tile([["cat", "dog"]], [tf.size(image), 1]),
            "probabilities": tf.tile([[0.9, 0.1]], [tf.size(image), 1]),
            "error": tf.where(good, "", "no image"),
        }

    folder = save(tmp_path / "model", classify, IMAGE)
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for path in paths:
        path.write_text("image" if path.name == "a.jpg" else "text")
    assert client.main([folder, *map(str, paths)]) == 0
    expected = f"  {paths[0]}: cat 90 %, dog 10 %\n  {paths[1]}: no image\n"
    assert capsys.readouterr().out == expected
    with tf.io.gfile.GFile("ram://client.jpg", "wb") as file:
        file.write(b"image")
    assert client.main([folder, "ram://client.jpg"]) == 0
    assert capsys.readouterr().out == "  ram://client.jpg: cat 90 %, dog 10 %\n"
    for arguments in (["foo://model", str(paths[0])], [folder, "foo://a.jpg"]):
        assert client.main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"export.client: {arguments[arguments[0] == folder]} cannot be ")
        assert "File system scheme 'foo' not implemented" in said and said.count("\n") == 1
    assert client.main([folder, str(tmp_path / "missing.jpg")]) == 1
    expected = f"export.client: {tmp_path}/missing.jpg cannot be read: No such file or directory.\n"
    assert capsys.readouterr().err == expected


def make_broken(folder):
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"\xff")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "model is not a folder."),
        (lambda folder: folder.mkdir(), "model is not a SavedModel: it has no saved_model.pb."),
        (make_broken, "model cannot be loaded: "),
        (
            lambda folder: save(folder, lambda audio: {"text": audio}, {"audio": ([2], tf.int32)}),
            "model takes audio. This client calls models that take text, question and context, or "
            "image.",
        ),
        (
            lambda folder: save(folder, lambda text: {"tokens": text}, TEXT),
            "model does not return masks, probabilities: it was not exported by train.py",
        ),
        (
            lambda folder: save(folder, lambda image: {"y": image}, {"image": ([2], tf.uint8)}),
            "model takes image as uint8: it was not exported by train.py",
        ),
        (
            lambda folder: save(folder, lambda text: {"y": text}, TEXT, "other"),
            "model has no signature 'serving_default'. Its signatures: other.",
        ),
    ],
    ids=[
        "missing",
        "empty",
        "broken",
        "other inputs",
        "other outputs",
        "other types",
        "other signature",
    ],
)
def test_a_model_that_cannot_be_called_is_reported_in_one_sentence(make, message, tmp_path, capsys):
    make(tmp_path / "model")
    assert client.main([str(tmp_path / "model"), "input"]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith(f"export.client: {tmp_path}/{message}")
    assert printed.err.count("\n") == 1


def test_without_input_the_usage_is_shown(capsys):
    assert client.main(["folder"]) == 1
    assert "EXPORT_DIR INPUT..." in capsys.readouterr().err
    assert client.main(["--help"]) == 0
    assert "EXPORT_DIR INPUT..." in capsys.readouterr().out
