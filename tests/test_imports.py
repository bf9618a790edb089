"""Imports run one way, and `import tf_lamb` needs only Keras and its backend."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

import tf_lamb

ROOT = pathlib.Path(__file__).parents[1]
TESTS = ROOT / "tests"

OURS = {
    *("tf_lamb", "recipes", "inputs", "models", "tasks", "export", "training", "preflight"),
    *("experiments", "benchmarks", "tests", "train"),
}
# Which of our packages each package may import, apart from itself. train.py may import all.
PACKAGES = {
    "tf_lamb": set(),
    "recipes": set(),
    "inputs": set(),
    "models": set(),
    "tasks": {"recipes", "inputs", "models", "export"},
    "export": {"inputs", "models"},
    "training": {"tf_lamb", "recipes", "inputs", "tasks"},
    "preflight": {"recipes", "inputs", "models", "tasks", "training"},
    "experiments": {"tf_lamb", "inputs"},
}
# Which others each module of tf_lamb may import.
MODULES = {
    "__init__": {"batch_scaling", "keras3", "layers", "migration", "telemetry"},
    "norms": set(),
    "arguments": set(),
    "layers": set(),
    "learning_rate": {"arguments"},
    "schedules": {"arguments"},
    "batch_scaling": {"arguments"},
    "layerwise": {"norms", "arguments", "layers", "learning_rate"},
    "lamb": {"arguments", "layerwise", "norms"},
    "lars": {"arguments", "layerwise", "norms"},
    "xla_cpu": {"norms"},
    "xla": {"layerwise", "norms", "xla_cpu"},
    "keras3": {"lamb", "lars", "layerwise", "learning_rate", "schedules", "xla"},
    "tf_keras": {"lamb", "lars", "layerwise", "learning_rate", "schedules", "telemetry", "xla"},
    "telemetry": {"arguments", "layers", "layerwise"},
    "migration": {"arguments", "layers", "layerwise"},
}
# Which others each module of recipes may import; apart from them, only the standard library.
RECIPE_MODULES = {
    "__init__": {
        *("types", "bert", "growing", "mlperf", "resnet", "squad", "overrides", "scaling"),
    },
    "types": set(),
    "bert": {"types"},
    "evidence": {"types", "mlperf"},
    "growing": {"types"},
    "mlperf": {"types", "bert", "resnet"},
    "resnet": {"types"},
    "squad": {"types"},
    "overrides": {"types"},
    "scaling": {"types", "evidence"},
}
# Only these modules may import TensorFlow or Keras 2: keras3 if TensorFlow is the backend, the last
# two inside the functions that need it.
TENSORFLOW = {
    "xla": {"tensorflow"},
    "xla_cpu": {"tensorflow"},
    "tf_keras": {"tensorflow", "tf_keras"},
    "keras3": {"tensorflow"},
    "telemetry": {"tensorflow"},
    "migration": {"tensorflow"},
}


def imported(path):
    """Dotted names that a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_imported_finds_every_form_of_import(tmp_path):
    text = "import a.b as c\ndef f():\n    from d import e, g\n    from h.i import j\n"
    (tmp_path / "module.py").write_text(text)
    assert imported(tmp_path / "module.py") == ["a.b", "d.e", "d.g", "h.i.j"]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_packages_run_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        names = imported(path)
        found = {name.split(".")[0] for name in names} & OURS
        assert found <= PACKAGES[package] | {package}, path
        if package == "training":  # of `tasks` the interface only
            tasks = [name for name in names if name.split(".")[0] == "tasks"]
            assert all(name.startswith("tasks.task.") for name in tasks), path


@pytest.mark.parametrize("path", sorted((ROOT / "tf_lamb").glob("*.py")), ids=lambda p: p.stem)
def test_within_the_library_imports_run_one_way(path):
    names = [name.split(".") for name in imported(path)]
    ours = {parts[1] for parts in names if parts[0] == "tf_lamb"}
    assert path.stem in MODULES, "a new module: add what it may import above"
    assert ours <= MODULES[path.stem]
    heavy = {"tensorflow", "tf_keras", "jax", "torch", "official", "orbit", "absl"}
    assert {parts[0] for parts in names} & heavy <= TENSORFLOW.get(path.stem, set())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.stem)
def test_recipes_import_one_way_and_only_the_standard_library(path):
    names = [name.split(".") for name in imported(path)]
    assert path.stem in RECIPE_MODULES, "a new module: add what it may import above"
    assert {parts[1] for parts in names if parts[0] == "recipes"} <= RECIPE_MODULES[path.stem]
    assert {parts[0] for parts in names} <= sys.stdlib_module_names | {"recipes"}


def test_the_oracle_imports_only_numpy():
    assert imported(TESTS / "oracle.py") == ["numpy"]


def run_python(code, backend):
    """The output of a new interpreter."""
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",  # for sharded_jax.py
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def new_interpreter():
    """Two lines that a new interpreter prints: what `import tf_lamb` imports, and the error of
    `import tf_lamb.tf_keras` with the JAX backend."""
    heavy = {"tf_keras", "official", "tensorflow_models", "orbit"}
    code = (
        f"import sys, tf_lamb; print(*{heavy} & set(sys.modules), tf_lamb.__version__)\n"
        "import keras\n"
        "keras.backend.backend = lambda: 'jax'\n"  # JAX itself need not be installed
        "try:\n    import tf_lamb.tf_keras\n"
        "except RuntimeError as error:\n    print(error)"
    )
    return run_python(code, "tensorflow").splitlines()


def test_importing_the_library_is_light(new_interpreter):
    assert new_interpreter[0].split() == [tf_lamb.__version__]


def test_tf_keras_needs_the_tensorflow_backend(new_interpreter):
    assert "Set the environment variable KERAS_BACKEND=tensorflow" in new_interpreter[1]
    assert "Received: KERAS_BACKEND=jax." in new_interpreter[1]


@pytest.mark.slow
def test_tensorflow_agrees_with_the_oracle(two_cpus, capsys):
    import other_backend

    other_backend.main()
    assert capsys.readouterr().out.strip() == "agrees on tensorflow"


@pytest.mark.parametrize(
    ("backend", "scripts"),
    [("jax", ["other_backend", "sharded_jax"]), ("torch", ["other_backend"])],
)
def test_another_backend_agrees_with_the_oracle(backend, scripts):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    # One interpreter for both scripts: the traceback names the one that fails.
    code = "".join(f"import {script}; {script}.main()\n" for script in scripts)
    assert run_python(code, backend).splitlines() == [f"agrees on {backend}"] * len(scripts)
