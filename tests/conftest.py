"""Fixtures of all tests: a current folder for each, two CPU devices, two flavours of Keras."""

import gc
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import types
import uuid

import pytest

# Before anything imports TensorFlow or Keras. As in `inputs.process`, fewer collections of garbage.
gc.set_threshold(50_000, 10, 10)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# Settings and caches of Keras, matplotlib and the pre-flight are in the home folder. The tests have
# an empty one; the processes of pytest-xdist share the one that the first process makes.
HOME = os.environ.get("TF_LAMB_TESTS_HOME")
OWNS_HOME = HOME is None
if OWNS_HOME:
    HOME = tempfile.mkdtemp(prefix="tf_lamb-tests-")
    os.environ["TF_LAMB_TESTS_HOME"] = HOME
os.environ["HOME"] = HOME
for name in ("KERAS_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
    os.environ.pop(name, None)

# Shells start background jobs with SIGINT ignored, and processes inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).parents[1]
REPLICAS = ["CPU:0", "CPU:1"]


# pytest-xdist gives each process one file after the other, and these take the longest.
LONG_FILES = (
    "training/test_train.py",
    "training/test_distribution.py",
    "training/checkpoint/test_object_storage.py",
    "preflight/test_run.py",
    "inputs/text/test_text_examples.py",
    "tf_lamb/test_tpu_bytes.py",
    "tf_lamb/test_golden.py",
    "tf_lamb/test_updates.py",
    "tf_lamb/test_variants.py",
    "tf_lamb/test_corners.py",
    "tf_lamb/test_xla_cpu.py",
    "tf_lamb/test_slices.py",
    "tf_lamb/test_options.py",
    "test_imports.py",
)


def pytest_collection_modifyitems(items):
    """Runs the longest files first, so that all processes end at about the same time."""

    def place(item):
        path = item.path.relative_to(ROOT / "tests").as_posix()
        return LONG_FILES.index(path) if path in LONG_FILES else len(LONG_FILES)

    items.sort(key=place)


def pytest_unconfigure():
    """Deletes the home folder of the tests."""
    if OWNS_HOME:
        shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def session_folder(tmp_path_factory):
    """A temporary current folder for the fixtures that are shared by several tests."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("session"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    """An empty current folder, so that no test finds or leaves a file in the project."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def two_cpus(session_folder):
    """Makes two CPU devices, which TensorFlow allows only before its first operation."""
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


@pytest.fixture(scope="session")
def mirrored(two_cpus):
    """A strategy of two replicas."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(REPLICAS)


def _keras3():
    import keras

    import tf_lamb.keras3

    return types.SimpleNamespace(
        name="keras3",
        keras=keras,
        lamb=tf_lamb.keras3,
        Variable=keras.Variable,
        name_scope=keras.name_scope,
    )


def _tf_keras():
    import tensorflow as tf
    import tf_keras

    import tf_lamb.tf_keras

    return types.SimpleNamespace(
        name="tf_keras",
        keras=tf_keras,
        lamb=tf_lamb.tf_keras,
        Variable=tf.Variable,
        name_scope=tf.name_scope,
    )


FLAVOURS = {"keras3": _keras3, "tf_keras": _tf_keras}


@pytest.fixture(scope="session", params=FLAVOURS)
def flavour(request, two_cpus):
    """A flavour of Keras: its `keras`, `Variable` and `name_scope`, and our classes in `lamb`."""
    return FLAVOURS[request.param]()


@pytest.fixture(scope="session")
def keras3(two_cpus):
    """The flavour `keras3`, for what tf_keras does not have."""
    return _keras3()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """80 documents, 10 kB, with sentences that a small model can learn."""
    rng = random.Random(0)
    animals, places = ("cat", "dog", "bird", "fish"), ("mat", "log", "tree", "sea")
    verbs = ("sat on", "went to", "looked at", "slept near")
    path = tmp_path_factory.mktemp("text") / "animals.txt"
    with open(path, "w") as file:
        for document in range(80):
            for _ in range(4):
                i = rng.randrange(4)
                file.write(
                    f"The {animals[i]} number {document} {rng.choice(verbs)} the {places[i]}.\n"
                )
            file.write("\n")
    return path


@pytest.fixture
def ram():
    """A folder in TensorFlow's file system in memory, which no other test uses."""
    from inputs.storage import files

    folder = f"ram://{uuid.uuid4().hex}"
    files.make_folder(folder)
    yield folder
    files.remove_folder(folder)


@pytest.fixture(scope="session")
def in_process():
    """`program.run_train`, which runs train.py in this process."""
    sys.path.insert(0, str(ROOT))
    import program

    yield program.run_train
    sys.path.remove(str(ROOT))
