"""The wheel contains only the library, and its metadata lists the requirements."""

import configparser
import pathlib
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).parents[1]


def test_the_wheel_contains_only_tf_lamb(tmp_path):
    # Building from a copy leaves no build folder in the project.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("tf_lamb", "recipes", "inputs", "models", "tasks", "training", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, str(source), "-w", str(tmp_path)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        described = archive.read(metadata).decode()
    assert modules == {f"tf_lamb/{path.name}" for path in (ROOT / "tf_lamb").glob("*.py")}
    needs = [line for line in described.splitlines() if line.startswith("Requires-Dist")]
    base = sorted(
        line.split(": ")[1].split("<")[0].split(">")[0] for line in needs if ";" not in line
    )
    assert base == ["keras", "numpy"]


def test_each_extra_is_pinned_in_the_constraints():
    """`make` installs the versions that were tested."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for extra in ("train", "test", "docs", "release"):
        for requirement in extras[extra].split("\n"):
            name = requirement.split("==")[0].strip().lower()
            assert not name or name in pinned, f"{name} of the extra {extra}"
