"""The program reaches files through `inputs.storage.files`, so that they may be on object storage.

`open` and the functions of `os` take gs://bucket/a for a path below the current folder.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = [
    ROOT / "train.py",
    *(p for name in ("inputs", "tasks", "training", "export") for p in (ROOT / name).rglob("*.py")),
]
CALLS = {
    *("open", "os.open", "os.link", "os.listdir", "os.makedirs", "os.mkdir", "os.remove"),
    *("os.rename", "os.replace", "os.scandir", "os.stat", "os.truncate", "os.unlink", "os.walk"),
    *("os.path.abspath", "os.path.exists", "os.path.getmtime", "os.path.getsize"),
    *("os.path.isdir", "os.path.isfile", "os.path.normpath", "os.path.realpath"),
    *("glob.glob", "pathlib.Path", "shutil.copyfile", "shutil.rmtree", "np.load", "np.memmap"),
    *("tf.io.gfile.GFile", "tf.io.gfile.exists", "tf.io.gfile.isdir", "tf.io.gfile.listdir"),
    *("tf.io.gfile.makedirs", "tf.io.gfile.stat", "tf.io.gfile.glob", "tf.io.read_file"),
}
# The files that may call some of them, and what for.
ALLOWED = {
    "inputs/storage/files.py": "this is the way",
    "inputs/storage/remote.py": "local files that are uploaded",
    "inputs/storage/lease.py": "/proc",
    "inputs/memory.py": "/proc and /sys",
    "inputs/process.py": "/dev/null",
    "inputs/images/cifar.py": "np.load of a file that was read",
    "inputs/text/files.py": "globs on a disk",
    "inputs/text/tokenization/installed_text.py": "the text of Python's packages",
    "export/client.py": "users copy it; it reads both kinds of paths itself",
    "export/saved_model.py": "the local folder that is exported, and this program's own",
    "export/weights.py": "the local folder that is exported",
    "tasks/resnet.py": "a temporary folder",
    "train.py": "the temporary folder of a dry run; local paths without a link or ..",
    "training/branch.py": "the log of a process, on a disk; its own program",
    "training/checkpoint/interruption.py": "/dev/null and /dev/fd",
    "training/checkpoint/stores.py": "`DiskStore`",
    "training/cluster.py": "/dev/null",
    "training/input_graph.py": "whether a text is a path of this machine",
    "training/monitor/progress.py": "rows that are appended on a disk; a terminal",
    "training/monitor/terminal.py": "a temporary file",
    "training/rehearsal.py": "/proc; its own program",
}


def local_calls(source):
    """The calls of CALLS in a source text, sorted."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return sorted(CALLS & {ast.unparse(function) for function in calls})


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_reached_in_one_way(path):
    found = local_calls(path.read_text())
    name = str(path.relative_to(ROOT))
    if name in ALLOWED:
        assert found, f"{name} calls none any more: remove it from ALLOWED"
    else:
        assert not found, f"{name} calls {found}: use the functions of inputs.storage.files"


def test_a_call_is_found():
    assert local_calls("with open(a) as b: os.path.exists(b)") == ["open", "os.path.exists"]
    assert local_calls("open_bytes(a); files.exists(b); os.path.join(a, b)") == []
