"""Child processes: each error is one sentence; their progress is a bar or lines; none is left."""

import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest

import recipes
from inputs import memory
from inputs.errors import InputError
from inputs.memory import GIB
from preflight.compiler import children as children_module

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def children(tmp_path):
    return children_module.Children(children_module.ProgressLines(lambda line: None), str(tmp_path))


def test_a_missing_compiler_is_reported_with_its_size(monkeypatch):
    monkeypatch.setattr(children_module, "REQUIRED_VERSIONS", {"no-such-package": "1.0"})
    with pytest.raises(InputError, match="no-such-package 1.0; installed: none.*1.1 GB"):
        children_module.check_installed()


def test_a_crash_and_low_memory_are_reported_in_one_sentence(children, monkeypatch, tmp_path):
    (tmp_path / "crashing_child.py").write_text(
        "def run():\n raise SystemExit('the compiler gave up')"
    )
    (tmp_path / "waiting_child.py").write_text("import time\ndef run(): time.sleep(100)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match="^the task failed: the compiler gave up$"):
        children._run("crashing_child.run", "the task", {})
    (tmp_path / "polite_child.py").write_text(
        "import time\n"
        "def run():\n"
        " print('a warning')\n"
        f" print('{children_module.WAITING} process 7 on here', flush=True)\n"
        " time.sleep(1.2); print(flush=True); time.sleep(1.2)\n"
        " return {'seven': 7}"
    )
    shown = []
    monkeypatch.setattr(children._progress, "update", lambda task, seconds: shown.append(task))
    assert children._run("polite_child.run", "the task", {}) == {"seven": 7}
    assert shown[0] == shown[-1] == "the task"
    assert "the task (waiting for the pre-flight of process 7 on here)" in shown
    monkeypatch.setattr(children_module, "RESERVED_BYTES", 2**60)
    with pytest.raises(InputError, match="host's memory is not sufficient.*GiB are free"):
        children._run("waiting_child.run", "the task", {})


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.kill(os.getpid(), 9)",
        "bytearray(2**60)",
        "import os, sys; print('terminate called: std::bad_alloc', flush=True); os.abort()",
        "import os; print('LLVM ERROR: out of memory', flush=True); os.abort()",
    ],
)
def test_a_host_without_memory_is_not_a_program_that_does_not_compile(
    children, monkeypatch, tmp_path, code
):
    (tmp_path / "large_child.py").write_text(f"def run():\n {code}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match="this host's memory is not sufficient") as error:
        children._run("large_child.run", "the task", {})
    assert not isinstance(error.value, children_module.ChildFailed)
    assert "says nothing about the memory of the TPU" in str(error.value)


def test_a_host_whose_limit_is_tight_names_it(children, monkeypatch, tmp_path):
    limit = memory.Limit("ulimit -v", "address space", minimum=4 * GIB, size=3 * GIB, free=GIB)
    monkeypatch.setattr(memory, "binding_limit", lambda: limit)
    (tmp_path / "limited_child.py").write_text("import os\ndef run(): os.kill(os.getpid(), 11)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = "is not sufficient.*`ulimit -v` allows each process 3.0 GiB of address space. This says"
    with pytest.raises(InputError, match=said):
        children._run("limited_child.run", "the task", {})


def test_a_full_disk_is_not_a_program_that_does_not_compile(children, monkeypatch, tmp_path):
    (tmp_path / "writing_child.py").write_text(
        "import errno, os\ndef run():\n raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match="the disk of this host is full. Free some") as error:
        children._run("writing_child.run", "the task", {})
    assert not isinstance(error.value, children_module.ChildFailed)


@pytest.mark.parametrize(
    "raised",
    [
        "RuntimeError('JAX TPU support not installed; no topology. See a page.')",
        "ModuleNotFoundError('No module named jax')",
        "RuntimeError('INTERNAL: Failed to open /x/libtpu.so: file too short')",
    ],
)
def test_a_compiler_that_cannot_be_loaded_is_not_a_program_that_does_not_compile(
    children, monkeypatch, tmp_path, raised
):
    (tmp_path / "jax.py").write_text(f"raise {raised}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(children, "_lowered", {(0, None, 1): "unused"})
    said = (
        r"^the TPU compiler of this Python cannot be loaded \(\w+: [^()]*\); reinstall it with pip"
    )
    with pytest.raises(InputError, match=said) as error:
        children.compile(0, None, 1, "v3:2x2")
    assert not isinstance(error.value, children_module.ChildFailed)


PARENT = """
import sys, tempfile
from preflight.compiler.children import Children, ProgressLines
with tempfile.TemporaryDirectory() as folder:
    Children(ProgressLines(print), folder)._run("sleeping_child.run", "the task", {})
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_the_process_that_started_it(tmp_path, how):
    (tmp_path / "sleeping_child.py").write_text(
        "import os, time\n"
        "def run():\n"
        f" open({str(tmp_path / 'new')!r}, 'w').write(str(os.getpid()))\n"
        f" os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pid')!r})\n"
        " time.sleep(100)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen([sys.executable, "-c", PARENT], env=environment) as parent:
        while not (tmp_path / "pid").exists():
            assert parent.poll() is None
            time.sleep(0.02)
        child = psutil.Process(int((tmp_path / "pid").read_text()))
        parent.send_signal(how)
    child.wait(timeout=30)  # raises an exception if it goes on


def test_the_reason_is_the_exception_and_not_the_last_line():
    output = """Traceback (most recent call last):
  File "step.py", line 3, in train
tensorflow.python.framework.errors_impl.InvalidArgumentError: Detected unsupported operations: Foo
Stack trace for op definition:
tf2xla conversion failed. Run with TF_DUMP_GRAPH_PREFIX=/path"""
    reason = children_module._reason
    assert reason(output, 1).endswith("Detected unsupported operations: Foo")
    assert reason("a line\ninputs.errors.InputError: --set x: no.", 1) == "--set x: no."
    assert reason("", 3) == "exit status 3"
    assert reason("", -11) == "killed by SIGSEGV"
    assert reason("a line", -11) == "killed by SIGSEGV, after it printed 'a line'"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=0.0)
    fake = types.SimpleNamespace(monotonic=lambda: now.seconds)
    monkeypatch.setattr(children_module, "time", fake)
    return now


def show(stream, clock):
    """Returns the plain lines that tasks of 40 and 10 seconds write with this stream."""
    lines = []
    with children_module.show_progress(lines.append, total=2, stream=stream) as progress:
        for seconds in (0, 1, 14, 16, 20, 32, 40):
            progress.update("compiling", seconds)
        clock.seconds = 40.0
        progress.advance()
        progress.update("tracing", 0)
        clock.seconds = 50.0
        progress.advance()
    return lines


def test_progress_is_a_bar_on_a_terminal(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    assert show(terminal, clock) == []
    for shown in ("1/2", "compiling, 40 s", "about 0:00:40 left"):
        assert shown in terminal.getvalue()


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_narrow_terminal_cuts_the_task_and_no_number(monkeypatch, clock, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    with children_module.show_progress(print, total=8, stream=terminal) as progress:
        clock.seconds = 100.0
        progress.advance()
        progress.update("phase 1: compiling 64 examples per replica for v5e:16x16", 15)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    line = [line for line in shown.splitlines() if line.strip()][-1]
    assert len(line) <= columns
    assert re.fullmatch(r"[━╸╺]{5,} 1/8 0:00:00 about 0:11:40 left ph.*", line.strip())


def test_progress_is_plain_lines_in_a_file(clock):
    file = io.StringIO()
    assert show(file, clock) == [
        "compiling ...",
        "compiling ... 16 s",
        "compiling ... 32 s",
        "1 of 2 done in 40 s, about 40 s left",
        "tracing ...",
        "2 of 2 done in 50 s",
    ]
    assert not file.getvalue()


def test_the_strict_check_says_how_to_install_its_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(children_module, "TPU_INSTALLED", tmp_path / "installed")
    with pytest.raises(InputError, match="installed does not exist. Run: make preflight-tpu"):
        children_module.check_strict_installed()


@pytest.mark.skipif(
    not children_module.TPU_INSTALLED.exists(), reason="make preflight-tpu was not run"
)
def test_the_published_recipes_have_tpu_kernels(children):
    for name in ("bert-mini", "resnet50-lars-32k"):
        answer = children.check_kernels(recipes.find_recipe(name), 0)
        assert answer["operations"] > 40 and answer["error"] is None
