"""Commands run on TensorFlow whatever Keras is set to, and print in every locale."""

import ast
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from inputs import process
from inputs.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
# `preflight` and `training.rehearsal` start these in their own environment. The client is a
# file that people copy, so it does the same without `inputs.process`.
CHILDREN = {"probe.py", "child.py", "host.py"}
COMMANDS = [
    path
    for path in sorted(
        [*ROOT.glob("train.py"), *ROOT.glob("[ipt][nr]*/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    )
    if 'if __name__ == "__main__":' in path.read_text() and path.name not in CHILDREN
]


def test_all_commands_are_found():
    names = [str(path.relative_to(ROOT)) for path in COMMANDS]
    assert [name for name in names if not name.startswith("benchmarks/")] == [
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
    assert "process.run(main" in main or "process.call(" in main


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
    process.prepare_output()  # not a stream with an encoding


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--data_dir=gs:/b/x"],
            "--data_dir: gs:/b/x has one slash after its scheme. Write gs://b/x.",
        ),
        (
            ["--output", "file:/a"],
            "--output: file:/a has one slash after its scheme. Write file:///a.",
        ),
        (["s3:/b"], "an argument: s3:/b has one slash after its scheme. Write s3://b."),
        (
            ["--set=init_from=file://a/b"],
            "init_from: file://a/b has two slashes after file:. Write",
        ),
    ],
)
def test_a_path_with_too_few_slashes_is_not_taken_for_one_on_the_disk(
    monkeypatch, capsys, arguments, said
):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        process.run(pytest.fail)
    assert end.value.code == 1 and f": {said}" in capsys.readouterr().err.replace("--set=", "")


def test_ctrl_c_is_one_line(capsys):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        process.run(interrupt)
    assert end.value.code == 130
    said = capsys.readouterr().err
    assert said.endswith(": stopped.\n") and said.count("\n") == 1


def run_command(source, **streams):
    """Runs a program that begins as the commands do."""
    source = f"from inputs import process\n{source}"
    streams = {"stderr": subprocess.PIPE} | streams
    return subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, text=True, **streams)


@pytest.mark.parametrize(
    "interrupted",
    [
        "raise_signal(SIGINT)",
        # As extension modules do.
        "try:\n    raise_signal(SIGINT)\nexcept BaseException as e:\n    raise ImportError from e",
        # As callbacks do.
        "class A:\n    def __del__(self): raise_signal(SIGINT)\nA()\nprint('goes on')",
    ],
)
def test_ctrl_c_during_imports_is_one_line(interrupted):
    child = run_command(f"from signal import *\n{interrupted}", stdout=subprocess.PIPE)
    assert child.communicate() == ("", "-c: stopped.\n")
    assert child.returncode == 130


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise MemoryError", "MemoryError"),
        ("bytearray(2**60)", "MemoryError"),
        (
            "raise ImportError('libx.so: failed to map segment from shared object')",
            "ImportError: libx.so: failed to map segment from shared object",
        ),
        (
            "try: raise MemoryError\nexcept MemoryError as e: raise ImportError('x') from e",
            "ImportError: x",
        ),
        ("def main(): raise MemoryError\nprocess.run(main)", "MemoryError"),
    ],
)
def test_a_lack_of_memory_is_one_line(source, reason):
    child = run_command(source)
    said = child.communicate()[1]
    assert said.startswith(f"-c: out of memory ({reason}). ") and said.count("\n") == 1
    assert child.returncode == 1


def limited(source):
    """The source of a command whose address space is limited to less than TensorFlow needs."""
    return f"import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**31, -1))\n{source}"


def test_a_lack_of_memory_names_the_limit():
    child = run_command(limited("raise SystemError('error return without exception set')"))
    assert child.communicate()[1] == (
        "-c: out of memory (SystemError: error return without exception set). `ulimit -v` allows "
        "each process 2.0 GiB of address space. End other programs, or raise the limit of the "
        "shell, container or job.\n"
    )


def test_an_interrupt_under_a_tight_limit_may_not_be_by_ctrl_c():
    child = run_command(limited("raise KeyboardInterrupt"))
    said = child.communicate()[1]
    assert said.startswith("-c: stopped. If that was not by Ctrl-C, there was not enough memory: ")
    assert "`ulimit -v` allows" in said and child.returncode == 130


@pytest.mark.parametrize(
    "source", ["raise ImportError('no module')", "e = KeyError(1); raise e from e"]
)
def test_other_errors_keep_their_traceback(source):
    child = run_command(source)
    assert "Traceback" in child.communicate()[1] and child.returncode == 1


@pytest.mark.parametrize(
    "main",
    ["print('x' * 100_000)", "print('x')", "sys.exit(print('x'))"],  # the last one as --help
)
def test_output_that_cannot_be_written_is_one_line(main):
    source = f"""import sys
def main():
    try:
        return {main}
    except OSError:
        sys.exit("taken for another file")
process.run(main)"""
    with open("/dev/full", "w") as full:
        child = run_command(source, stdout=full)
    reason = "standard output cannot be written (No space left on device).\n"
    assert child.communicate()[1] == f"-c: {reason}" and child.returncode == 1
    child = run_command(source, preexec_fn=lambda: os.close(1))
    said = "-c: standard output is closed. Redirect it to a file, or to /dev/null.\n"
    assert child.communicate()[1] == said and child.returncode == 1


def test_a_pipe_that_is_closed_is_one_line():
    source = "process.run(lambda: [print(i, flush=True) for i in range(10**9)])"
    child = run_command(source, stdout=subprocess.PIPE)
    assert child.stdout.readline() == "0\n"
    child.stdout.close()
    with child:
        said = child.stderr.read()
    assert said == "-c: standard output cannot be written (Broken pipe).\n"
    assert child.returncode == 1


def test_bad_input_is_one_line(capsys):
    def refuse():
        raise InputError("--flag=1 is too small.")

    with pytest.raises(SystemExit) as end:
        process.run(refuse)
    assert end.value.code == 1 and capsys.readouterr().err.endswith(": --flag=1 is too small.\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_temporary_files(signum):
    source = """import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
def main(folder):
    with process.signals_as_interrupt():
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            print("cleaning", flush=True)
            time.sleep(0.5)
            print("cleaned up")
process.run(main, "")"""
    child = run_command(source, stdout=subprocess.PIPE)
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signum)
    assert child.stdout.readline() == "cleaning\n"
    if signum == signal.SIGHUP:  # a closed terminal sends two
        child.send_signal(signum)
    assert child.communicate() == ("cleaned up\n", "-c: stopped.\n") and child.returncode == 130


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_callback_ignores_is_repeated(signum):
    """As in a callback of the garbage collector, of which JAX has one."""
    source = f"""import gc, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background
def main():
    with process.signals_as_interrupt():
        begun = []
        def callback(phase, info):
            if not begun:
                begun.append(True)
                signal.raise_signal({int(signum)})
                time.sleep(0)
        gc.callbacks.append(callback)
        try:
            gc.collect()
            time.sleep(60)
        finally:
            print("cleaned up", begun)
process.run(main)"""
    child = run_command(source, stdout=subprocess.PIPE)
    assert child.communicate() == ("cleaned up [True]\n", "-c: stopped.\n")
    assert child.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["train.py", "--preflight=v3-8"], ["-m", "export.client", "folder", "text"]]
)
def test_ctrl_c_while_a_command_starts(command):
    child = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    time.sleep(1)  # Python itself has started; TensorFlow has not
    child.send_signal(signal.SIGINT)
    name = {"-m": "export.client"}.get(command[0], command[0])
    assert child.communicate()[1] == f"{name}: stopped.\n" and child.returncode == 130


@pytest.mark.slow
def test_help_of_train_is_no_error():
    for flag in ("--help", "--helpfull"):
        done = subprocess.run(
            [sys.executable, "train.py", flag], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "--recipe" in done.stdout and not done.stderr
