"""The client: output for each kind of export, and one sentence for each kind of error."""

import pytest
import tensorflow as tf

from export import client

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


def test_questions_are_answered(tmp_path, capsys):
    def answer(question, context):
        return {
            "answer": tf.strings.substr(context, 0, 3),
            "start": tf.zeros_like(question, tf.int32),
            "end": 3 + tf.zeros_like(question, tf.int32),
            "score": tf.fill([tf.size(question)], 1.5),
        }

    folder = save(tmp_path / "model", answer, QUESTION)
    assert client.main([folder, "Ada wrote it.", "Who wrote it?", "Who?"]) == 0
    expected = "     'Ada', characters 0 to 3, score 1.50\n"
    assert capsys.readouterr().out == (
        f"  Ada wrote it.\n  Who wrote it?\n{expected}  Who?\n{expected}"
    )
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
            lambda folder: save(folder, lambda text: {"y": text}, TEXT, "other"),
            "model has no signature 'serving_default'. Its signatures: other.",
        ),
    ],
    ids=["missing", "empty", "broken", "other inputs", "other signature"],
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
