"""Commands run on TensorFlow whatever Keras is set to, and print in every locale."""

import ast
import io
import os
import pathlib
import subprocess
import sys

import pytest

from inputs import process

ROOT = pathlib.Path(__file__).parents[2]
# `preflight` and `training.rehearsal` start these in their own environment. The client is a
# file that people copy, so it does the same without `inputs.process`.
CHILDREN = {"probe.py", "child.py", "host.py"}
COMMANDS = [
    path
    for path in sorted([*ROOT.glob("train.py"), *ROOT.glob("[ipt][nr]*/**/*.py")])
    if 'if __name__ == "__main__":' in path.read_text() and path.name not in CHILDREN
]


def test_all_commands_are_found():
    assert [str(path.relative_to(ROOT)) for path in COMMANDS] == [
        *("inputs/images/index.py", "inputs/images/prepare.py", "inputs/text/prepare.py"),
        *("preflight/doctor.py", "preflight/document.py", "preflight/generations.py"),
        *("preflight/plan.py", "train.py", "training/branch.py", "training/monitor/plot.py"),
    ]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_command_sets_its_environment_before_other_imports(path):
    text = path.read_text()
    imports = [n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    others = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
    assert others[0] == "inputs" and "from inputs import process  # isort: split" in text
    main = text[text.index('if __name__ == "__main__":') :]
    assert "process.run(main" in main or "process.escape_output()" in main


@pytest.mark.slow
@pytest.mark.parametrize("module", ["inputs.text.prepare", "export.client"])
def test_a_backend_that_is_not_installed_does_not_matter(module, tmp_path):
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras/keras.json").write_text('{"backend": "nowhere"}')
    code = (
        f"import {module}, sys, tensorflow_text, keras\n"
        "print(keras.backend.backend(), sys.modules['tensorflow_text'].__name__)"
    )
    environment = os.environ | {"KERAS_BACKEND": "nowhere", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "tensorflow tensorflow_text\n", done.stderr


def test_a_backend_that_was_asked_for_is_mentioned(in_process, capfd, monkeypatch):
    monkeypatch.setattr(process, "ASKED_BACKEND", "jax")
    assert in_process(["--steps=0"]) == 1
    assert "KERAS_BACKEND=jax is ignored: train.py runs on TensorFlow" in capfd.readouterr().err
    for usual in ("", "tensorflow"):
        monkeypatch.setattr(process, "ASKED_BACKEND", usual)
        assert in_process(["--steps=0"]) == 1
        assert "KERAS_BACKEND" not in capfd.readouterr().err


def test_a_flag_without_a_value_is_refused(capfd):
    from inputs.images import prepare as images
    from inputs.text import prepare as text

    for main, arguments, empty in (
        (text.main, ["--input=a.txt", "--vocab=v.txt", "--output="], "--output"),
        (text.main, ["--input= ", "--vocab=v.txt", "--output=o"], "--input"),
        (images.main, ["--source=", "--output=o"], "--source"),
        (images.main, ["--source=s", "--output="], "--output"),
    ):
        assert main(arguments) == 1
        said = capfd.readouterr().err
        assert f"{empty} is empty, perhaps because a shell variable is not set." in said
        assert said.endswith(f"Give a value, or leave out {empty}.\n")


def test_what_the_output_cannot_encode_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit) as end:
        process.run(lambda text: print(text, flush=True) or 3, "中 é \udce4")
    assert end.value.code == 3 and written.getvalue() == b"\\u4e2d \\xe9 \\udce4\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    process.escape_output()  # not a stream with an encoding


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([""], "an argument"),
        (["--batch=8", " "], "an argument"),
        (["--output="], "--output"),
        (["--data_dir= "], "--data_dir"),
        (["--output", ""], "--output"),
    ],
)
def test_an_empty_argument_is_not_taken_for_the_default(monkeypatch, capsys, arguments, name):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        process.run(pytest.fail)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1
    assert f": {name} is empty, perhaps because a shell variable is not set. Give" in said


def test_ctrl_c_is_one_line(capsys):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        process.run(interrupt)
    assert end.value.code == 130
    said = capsys.readouterr().err
    assert said.endswith(": stopped.\n") and said.count("\n") == 1
