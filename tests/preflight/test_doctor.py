"""The doctor: each problem is a finding with a fix; the exit status follows from the findings."""

import dataclasses
import io
import os
import pathlib
import subprocess
import sys

import pytest

from inputs.memory import GIB, Limit
from preflight import doctor
from preflight.doctor import Finding

ROOT = pathlib.Path(__file__).parents[2]
STOCK = ["tensorflow"]
TPU_ONLY = {"tensorflow-tpu": "2.20.0", "libtpu": "0.0.21"}


def limit_with_free(free):
    return Limit("ulimit -v", "address space", minimum=4 * GIB, size=20 * GIB, free=free)


def levels(findings):
    return [(finding.level, finding.check) for finding in findings]


def test_python_versions():
    assert doctor.check_python((3, 11, 7)).level == "ok"
    for version in ((3, 9, 1), (3, 13, 0)):
        finding = doctor.check_python(version)
        assert finding.level == "error" and "Python >=3.10,<3.13" in finding.fix


def test_two_wheels_are_listed_with_a_fix():
    installed = {"tensorflow": "2.20.0", "tensorflow-tpu": "2.20.0", "numpy": "2.4.6"}
    finding = doctor.check_wheels(installed)
    assert finding.level == "error"
    assert "tensorflow 2.20.0, tensorflow-tpu 2.20.0" in finding.message
    assert finding.fix.startswith("pip uninstall -y tensorflow tensorflow-tpu, then pip install")
    assert levels([doctor.check_wheels({"tf-nightly": "2.21.0"})]) == [("ok", "TensorFlow")]
    assert levels([doctor.check_wheels({})]) == [("error", "TensorFlow")]


def test_versions_are_compared_with_the_tested_ones():
    pins = {"tensorflow": "2.20.0", "tf-keras": "2.20.1", "libtpu": "0.0.21", "rich": "15.0.0"}
    needed = ["tensorflow", "tf-keras", "rich"]
    assert levels(doctor.check_versions(pins, pins, needed)) == [("ok", "Packages")]
    other = {"tensorflow": "2.20.3", "tf-keras": "2.19.0", "libtpu": "0.0.22", "rich": "14.0"}
    assert levels(doctor.check_versions(other, pins, needed)) == [
        ("error", "libtpu"),
        ("warning", "tensorflow"),
        ("error", "tf-keras"),
        ("warning", "Packages"),
    ]
    without_rich = {"tensorflow-tpu": "2.20.0", "tf-keras": "2.20.1"}
    (missing,) = doctor.check_versions(without_rich, pins, needed)
    assert (missing.level, missing.message) == ("error", "not installed: rich")


def stages(**changed):
    found = {name: {"stage": name} for name in doctor.STAGES}
    found["devices"] |= {"cuda_build": True, "gpus": [], "tpus": 0}
    found["XLA"]["device"] = "CPU:0"
    return [found[name] | changed.get(name, {}) for name in found]


@pytest.mark.parametrize(
    ("tpu_wheel", "tpu", "gpu", "changed", "expected"),
    [
        (False, False, False, {}, [("ok", "GPU"), ("ok", "XLA")]),
        (False, False, True, {}, [("warning", "GPU"), ("ok", "XLA")]),
        (False, True, False, {}, [("warning", "TPU"), ("ok", "GPU"), ("ok", "XLA")]),
        (
            False,
            False,
            True,
            {"devices": {"gpus": ["NVIDIA H200"]}},
            [("ok", "GPU"), ("ok", "XLA")],
        ),
        (True, True, False, {"devices": {"tpus": 8}}, [("ok", "TPU"), ("ok", "XLA")]),
        (True, True, False, {"devices": {"error": "in use"}}, [("error", "TPU"), ("ok", "XLA")]),
        (True, False, False, {"XLA": {"error": "no"}}, [("error", "TPU"), ("error", "XLA")]),
        (
            False,
            False,
            False,
            {"tensorflow_text": {"error": "undefined symbol"}, "XLA": {"error": "no"}},
            [("error", "tensorflow_text"), ("ok", "GPU"), ("error", "XLA")],
        ),
    ],
)
def test_devices(monkeypatch, tpu_wheel, tpu, gpu, changed, expected):
    monkeypatch.setattr(doctor, "has_tpu", lambda: tpu)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: gpu)
    wheels = ["tensorflow-tpu"] if tpu_wheel else STOCK
    findings = doctor.check_probe(stages(**changed), "", wheels=wheels, fix="fix")
    assert levels(findings) == expected
    assert all(finding.fix for finding in findings if finding.level != "ok")


@pytest.mark.parametrize(
    ("device", "found"), [("0x0027", True), ("0x006f", True), ("0x0042", False), ("0x001f", False)]
)
def test_a_tpu_is_told_from_other_devices_of_google(monkeypatch, tmp_path, device, found):
    for name, text in (("vendor", "0x1ae0\n"), ("device", f"{device}\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(doctor.glob, "glob", lambda pattern: [str(tmp_path / "vendor")])
    assert doctor.has_tpu() == found


def test_a_tpu_that_stock_tensorflow_cannot_use_costs_no_environment(monkeypatch):
    monkeypatch.setattr(doctor, "has_tpu", lambda: True)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: False)
    for wheels, fix in (
        (STOCK, "make tpu, and train with .venv-tpu/bin/python"),
        (["tensorflow-tpu"], "fix"),
    ):
        tpu, *_ = doctor.check_probe(stages(), "", wheels=wheels, fix="fix")
        assert (tpu.check, tpu.level, tpu.fix) == ("TPU", "warning", fix)


def test_chips_that_the_runtime_drives_are_not_tried(monkeypatch):
    monkeypatch.setattr(doctor, "has_tpu", lambda: True)
    monkeypatch.setattr(doctor.tpu_vm, "runtime_holds_chips", lambda: True)
    found = stages(XLA={"error": "InvalidArgumentError: no device"})
    (finding,) = doctor.check_probe(found, "", wheels=["tensorflow-tpu"], fix="fix")
    assert (finding.level, finding.check) == ("ok", "TPU")
    assert finding.message.startswith("driven by the TPU runtime")


@pytest.mark.parametrize("cuda_build", [False, True])
def test_no_fix_installs_a_second_wheel(monkeypatch, cuda_build):
    monkeypatch.setattr(doctor, "has_tpu", lambda: False)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: True)
    found = stages(devices={"cuda_build": cuda_build})
    gpu, *_ = doctor.check_probe(found, "", wheels=["tensorflow-cpu"], fix="fix")
    start = "pip uninstall -y tensorflow-cpu, then pip install "
    assert gpu.fix.startswith(f"{start}tensorflow[and-cuda]==2.20.*")
    (missing,) = doctor.check_versions({"tensorflow-cpu": "2.20.0"}, {}, ["rich"])
    assert missing.fix.startswith(f"{start}-c constraints.txt")
    tpu, *_ = doctor.check_probe(stages(), "", wheels=["tensorflow-tpu"], fix="fix")
    assert "pip uninstall -y tensorflow-tpu, then pip install -c constraints.txt" in tpu.fix
    (gpu, _) = doctor.check_probe(found, "", wheels=STOCK, fix="fix")
    assert gpu.fix.startswith("pip uninstall -y tensorflow, then ") != cuda_build


def test_a_crash_is_a_finding_that_names_the_stage():
    findings = doctor.check_probe(
        stages()[: doctor.STAGES.index("devices")], "killed by SIGSEGV", wheels=STOCK, fix="fix"
    )
    assert levels(findings) == [("error", "Trial run")]
    assert findings[0].message == "killed by SIGSEGV, in stage 'devices'"


def test_a_crash_of_tensorflow_ends_only_the_probe(tmp_path):
    """With a TensorFlow that kills the process that imports it."""
    package = tmp_path / "preflight"
    package.mkdir()
    (package / "__init__.py").touch()  # so that PYTHONPATH cannot name another one
    (package / "probe.py").write_text(
        'import os, signal\nprint(\'{"stage": "tensorflow"}\', flush=True)\n'
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    assert doctor.run_probe(tmp_path) == (
        [{"stage": "tensorflow"}],
        "killed by SIGSEGV",
    )


def test_what_only_the_program_imports_is_imported(tmp_path):
    """With a package that TensorFlow's model garden imports below its top-level package."""
    (tmp_path / "cv2.py").write_text("raise ModuleNotFoundError(\"No module named 'cv2'\")")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "from preflight import doctor; print(*doctor.run_probe('.'))"]
    printed = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert "{'stage': 'official'}" in printed and "{'stage': 'orbit'}" in printed
    assert "{'stage': 'train', 'error': \"ModuleNotFoundError: No module named 'cv2'\"}" in printed


def test_a_missing_package_is_one_error(monkeypatch):
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: False)
    broken = {"error": "ModuleNotFoundError: No module named 'cv2'"}
    (program, *_) = doctor.check_probe(stages(train=broken), "", wheels=STOCK, fix="fix")
    assert program == Finding("error", "train", f"cannot be imported: {broken['error']}", "fix")
    found = stages(orbit=broken, train=broken)
    errors = [
        finding
        for finding in doctor.check_probe(found, "", wheels=STOCK, fix="fix")
        if finding.level == "error"
    ]
    assert levels(errors) == [("error", "orbit")]


def install_metadata(folder, version):
    path = folder / f"some_package-{version}.dist-info"
    path.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: Some.Package\nVersion: {version}\n"
    (path / "METADATA").write_text(text)


def test_of_two_copies_in_one_folder_neither_is_said_to_be_imported(tmp_path, monkeypatch):
    for folder, version in (("first", "2.0"), ("first", "1.0"), ("second", "3.0")):
        install_metadata(tmp_path / folder, version)
    paths = [str(tmp_path / folder) for folder in ("first", "second")]
    monkeypatch.setattr(sys, "path", paths[:1])
    copies = doctor.find_packages()
    assert copies == {"some-package": [("1.0", paths[0]), ("2.0", paths[0])]}
    (finding,) = doctor.check_copies(copies)
    both = f"some-package 1.0 and 2.0 in {paths[0]}, whose files may be of either"
    assert finding.message == f"several copies: {both}"
    assert "repeat `pip uninstall -y some-package` until none is left" in finding.fix
    monkeypatch.setattr(sys, "path", paths)
    (finding,) = doctor.check_copies(doctor.find_packages())
    assert finding.message == f"several copies: {both}, which hides 3.0 in {paths[1]}"


def test_of_two_copies_of_a_package_the_one_that_python_takes_is_read(tmp_path, monkeypatch):
    for folder, version in (("first", "1.0"), ("second", "2.0"), ("third", "2.0")):
        install_metadata(tmp_path / folder, version)
    paths = [str(tmp_path / folder) for folder in ("first", "second", "second", "third")]
    monkeypatch.setattr(sys, "path", paths)
    copies = doctor.find_packages()
    assert [version for version, _ in copies["some-package"]] == ["1.0", "2.0", "2.0"]
    (finding,) = doctor.check_copies(copies)
    assert finding.level == "warning" and finding.fix == "remove the copies that you do not want"
    assert f"some-package 1.0 in {paths[0]}, which hides 2.0 in {paths[1]}" in finding.message
    monkeypatch.setattr(sys, "path", paths[1:])
    assert doctor.check_copies(doctor.find_packages()) == []  # two copies of one version


def test_a_file_that_hides_an_installed_package_is_named(tmp_path, monkeypatch):
    assert doctor.find_hidden(["rich", "tf-models-official", "no-such-package"]) == {}
    (tmp_path / "orbit.py").touch()
    (tmp_path / "official").mkdir()
    (tmp_path / "official/__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    hidden = doctor.find_hidden(["rich", "tf-models-official"])
    assert hidden == {"orbit": f"{tmp_path}/orbit.py", "official": f"{tmp_path}/official"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    _, finding = doctor.check_hidden(hidden)
    assert finding.level == "warning"
    assert finding.message == f"{tmp_path}/orbit.py hides the installed package orbit"
    assert finding.fix == f"rename {tmp_path}/orbit.py"
    monkeypatch.setenv("PYTHONPATH", f"/elsewhere:{tmp_path}")
    _, finding = doctor.check_hidden(hidden)
    assert finding.fix == f"rename {tmp_path}/orbit.py, or unset PYTHONPATH"


def test_what_a_hidden_package_breaks_is_not_reinstalled(monkeypatch):
    monkeypatch.setattr(doctor, "binding_limit", lambda: None)
    monkeypatch.setattr(doctor, "find_hidden", lambda names: {"orbit": "/mine/orbit.py"})
    broken = stages(orbit={"error": "RuntimeError: mine"})
    monkeypatch.setattr(doctor, "run_probe", lambda root: (broken, ""))
    (error,) = [finding for finding in doctor.check_all(".") if finding.check == "orbit"]
    assert (error.level, error.fix) == ("error", "rename /mine/orbit.py")


def test_a_backend_that_is_ignored_is_mentioned(monkeypatch):
    for asked, said in (("jax", True), ("nonsense", True), ("tensorflow", False), ("", False)):
        monkeypatch.setattr(doctor.process, "ASKED_BACKEND", asked)
        findings = doctor.check_backend()
        assert levels(findings) == [("ok", "Keras")] * said
        assert not said or f"KERAS_BACKEND={asked} is ignored" in findings[0].message


@pytest.mark.parametrize("failure", ["out of memory (killed by SIGABRT)", ""])
def test_what_fails_for_lack_of_memory_is_not_reinstalled(monkeypatch, failure):
    monkeypatch.setattr(doctor, "has_tpu", lambda: False)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: False)
    broken = {"error": "ImportError: libx.so: failed to map segment from shared object"}
    changed = {"tensorflow_text": broken, "XLA": {"error": "MemoryError: "}}
    found = stages(**changed)[: doctor.STAGES.index("devices") if failure else None]
    findings = doctor.check_probe(found, failure, wheels=STOCK, fix="pip install")
    errors = [finding for finding in findings if finding.level == "error"]
    assert len(errors) == 2 and all("ulimit -v unlimited" in error.fix for error in errors)
    assert not any("pip install" in error.fix for error in errors)


def test_a_probe_without_memory_is_recognized(tmp_path):
    package = tmp_path / "preflight"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "probe.py").write_text(
        "import os, sys\nsys.stderr.write('what():  std::bad_alloc')\nsys.stderr.flush()\n"
        "os.abort()\n"
    )
    assert doctor.run_probe(tmp_path) == ([], "out of memory (killed by SIGABRT)")


def test_what_crashes_under_a_tight_limit_is_not_reinstalled(monkeypatch):
    monkeypatch.setattr(doctor, "has_tpu", lambda: True)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: False)
    tight = dataclasses.replace(limit_with_free(GIB), size=3 * GIB)
    monkeypatch.setattr(doctor, "binding_limit", lambda: tight)
    changed = {name: {"error": "ValueError: no"} for name in ("orbit", "devices", "XLA")}
    for failure in ("killed by SIGSEGV", "no answer within 180 s"):
        findings = doctor.check_probe(stages(**changed), failure, wheels=STOCK, fix="pip")
        errors = [finding for finding in findings if finding.level == "error"]
        assert levels(errors) == [("error", c) for c in ("orbit", "TPU", "XLA", "Trial run")]
        assert all(error.fix == doctor.MORE_MEMORY for error in errors)
    monkeypatch.setattr(doctor, "binding_limit", lambda: limit_with_free(8 * GIB))
    findings = doctor.check_probe([], "killed by SIGSEGV", wheels=STOCK, fix="pip install")
    assert [finding.fix for finding in findings] == ["pip install"]


@pytest.mark.parametrize(
    ("free", "level"), [(3, "error"), (5, "warning"), (15, "warning"), (17, "ok")]
)
def test_a_limit_of_this_process_is_checked(monkeypatch, tmp_path, free, level):
    monkeypatch.setattr(doctor, "binding_limit", lambda: limit_with_free(free * GIB))
    (finding,) = [f for f in doctor.check_machine(str(tmp_path)) if "address space" in f.message]
    fix = "" if level == "ok" else "ulimit -v unlimited"
    assert (finding.level, finding.fix) == (level, fix)
    text = f"{free}.0 GiB of address space left, by the limit of this shell (ulimit -v)"
    assert finding.message == text


def test_help_is_a_usage_text(capsys):
    with pytest.raises(SystemExit) as end:
        doctor.main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m preflight.doctor [-h] [MODEL_DIR]")
    for wrong in (["--wrong"], ["one", "two"]):
        with pytest.raises(SystemExit) as end:
            doctor.main(wrong)
        assert end.value.code == 2


def test_little_disk_space_and_memory(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5 * GIB})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(doctor, "free_memory", lambda: GIB // 2)
    monkeypatch.setattr(doctor, "binding_limit", lambda: None)
    disk, memory = doctor.check_machine(str(tmp_path / "not" / "yet"))
    assert disk.level == "warning" and disk.message == f"5.0 GiB free at {tmp_path}"
    assert memory.level == "error" and memory.fix


def test_a_model_dir_that_is_not_a_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        for model_dir in (tmp_path / name, tmp_path / name / "run"):
            (disk,) = [f for f in doctor.check_machine(str(model_dir)) if f.check == "Disk"]
            assert disk.level == "error" and disk.fix == "use another --model_dir"
            assert disk.message == f"{tmp_path / name} is not a folder"


def test_a_model_dir_on_object_storage_is_written_to():
    storage, disk, *_ = doctor.check_machine("ram://doctor/run")
    assert storage.level == "ok" and storage.message == "ram://doctor/run can be written"
    assert disk.check == "Disk"
    storage, *_ = doctor.check_machine("foo://doctor/run")
    assert storage.level == "error" and "no file system for foo://" in storage.message


def test_this_environment_can_train(monkeypatch, capsys):
    """Runs all checks, with the probe in a child process."""
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")  # as `inputs.process` has set it
    monkeypatch.setattr(doctor, "check_versions", lambda *arguments: [])  # versions may be newer
    monkeypatch.setattr(doctor, "MIN_MEMORY", (0, 0))
    monkeypatch.setattr(doctor, "MIN_DISK", (0, 0))
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "XLA" in printed and printed.endswith("Training can start.\n")


def test_without_any_package_there_is_a_fix_and_no_traceback():
    """With an interpreter that finds no installed packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "preflight.doctor"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stderr
    assert "error    TensorFlow  is not installed" in done.stdout
    assert "error    Packages    the package `packaging` is not installed" in done.stdout
    assert "fix: pip install -c constraints.txt" in done.stdout
    assert "Training cannot start: " in done.stdout


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_findings_are_a_table_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    doctor.show([Finding("error", "Disk", "0.1 GiB free", "pip install -e .[train]")], stream)
    assert "┃" in stream.getvalue() and ".[train]" in stream.getvalue()


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_table_cuts_nothing(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    message = "/mnt/" + "a-long-name-of-a-folder/" * 3
    finding = Finding(
        "error", "tensorflow_text", message, "pip install --no-deps -r constraints.txt"
    )
    doctor.show([finding], stream)
    rows = [line.split("│")[1:5] for line in stream.getvalue().splitlines() if "│" in line]
    shown = ["".join(cells).replace(" ", "") for cells in zip(*rows, strict=True)]
    assert shown[1:] == [text.replace(" ", "") for text in dataclasses.astuple(finding)[1:]]


def test_without_a_usable_rich_the_findings_are_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = Terminal()
    doctor.show([Finding("ok", "Disk", "9.9 GiB free")], stream)
    assert stream.getvalue() == "ok       Disk  9.9 GiB free\n"


def test_the_tpu_constraints_differ_only_in_tensorflow():
    stock = doctor.read_pins(ROOT / "constraints.txt")
    tpu = doctor.read_pins(ROOT / "constraints-tpu.txt")
    assert {
        name: version for name, version in tpu.items() if stock.get(name) != version
    } == TPU_ONLY
    assert "tensorflow" not in tpu and set(doctor.needed_packages()) - {"tensorflow"} <= set(tpu)
