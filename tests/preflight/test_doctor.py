"""The doctor: each trouble is a finding with a cure, and the exit status follows from them."""

import io
import pathlib
import subprocess
import sys

import pytest

from preflight import doctor, doctor_machine
from preflight.doctor_machine import Finding

ROOT = pathlib.Path(__file__).parents[2]
TPU_ALONE = {"tensorflow-tpu": "2.20.0", "libtpu": "0.0.21"}


def levels(findings):
    return [(finding.level, finding.what) for finding in findings]


def test_python_versions():
    assert doctor.python_finding((3, 11, 7)).level == "ok"
    for version in ((3, 9, 1), (3, 13, 0)):
        finding = doctor.python_finding(version)
        assert finding.level == "bad" and "from 3.10 to below 3.13" in finding.cure


def test_two_wheels_are_named_with_the_way_out():
    installed = {"tensorflow": "2.20.0", "tensorflow-tpu": "2.20.0", "numpy": "2.4.6"}
    (finding,) = doctor.wheel_findings(installed)
    assert finding.level == "bad" and "tensorflow 2.20.0, tensorflow-tpu 2.20.0" in finding.said
    assert finding.cure.startswith("pip uninstall -y tensorflow tensorflow-tpu, then pip install")
    assert levels(doctor.wheel_findings({"tf-nightly": "2.21.0"})) == [("ok", "TensorFlow")]
    assert levels(doctor.wheel_findings({})) == [("bad", "TensorFlow")]


def test_versions_are_compared_with_the_tested_set():
    pins = {"tensorflow": "2.20.0", "tf-keras": "2.20.1", "libtpu": "0.0.21", "rich": "15.0.0"}
    needed = ["tensorflow", "tf-keras", "rich"]
    assert levels(doctor.version_findings(pins, pins, needed)) == [("ok", "Packages")]
    other = {"tensorflow": "2.20.3", "tf-keras": "2.19.0", "libtpu": "0.0.22", "rich": "14.0"}
    assert levels(doctor.version_findings(other, pins, needed)) == [
        ("bad", "libtpu"),
        ("warn", "tensorflow"),
        ("bad", "tf-keras"),
        ("warn", "Packages"),
    ]
    served = {"tensorflow-tpu": "2.20.0", "tf-keras": "2.20.1"}
    (missing,) = doctor.version_findings(served, pins, needed)
    assert (missing.level, missing.said) == ("bad", "not installed: rich")


def stages(**changed):
    found = {name: {"stage": name} for name in doctor_machine.STAGES}
    found["devices"] |= {"cuda_build": True, "gpus": [], "tpus": 0}
    found["XLA"]["device"] = "CPU:0"
    return [found[name] | changed.get(name, {}) for name in found]


@pytest.mark.parametrize(
    ("tpu_wheel", "tpu", "gpu", "changed", "expected"),
    [
        (False, False, False, {}, [("ok", "GPU"), ("ok", "XLA")]),
        (False, False, True, {}, [("warn", "GPU"), ("ok", "XLA")]),
        (False, True, False, {}, [("warn", "TPU"), ("ok", "GPU"), ("ok", "XLA")]),
        (
            False,
            False,
            True,
            {"devices": {"gpus": ["NVIDIA H200"]}},
            [("ok", "GPU"), ("ok", "XLA")],
        ),
        (True, True, False, {"devices": {"tpus": 8}}, [("ok", "TPU"), ("ok", "XLA")]),
        (True, True, False, {"devices": {"error": "in use"}}, [("bad", "TPU"), ("ok", "XLA")]),
        (True, False, False, {"XLA": {"error": "no"}}, [("bad", "TPU"), ("bad", "XLA")]),
        (
            False,
            False,
            False,
            {"tensorflow_text": {"error": "undefined symbol"}, "XLA": {"error": "no"}},
            [("bad", "tensorflow_text"), ("ok", "GPU"), ("bad", "XLA")],
        ),
    ],
)
def test_devices(monkeypatch, tpu_wheel, tpu, gpu, changed, expected):
    monkeypatch.setattr(doctor_machine, "has_tpu", lambda: tpu)
    monkeypatch.setattr(doctor_machine, "has_nvidia_gpu", lambda: gpu)
    findings = doctor_machine.probe_findings(stages(**changed), "", tpu_wheel=tpu_wheel, cure="it")
    assert levels(findings) == expected
    assert all(finding.cure for finding in findings if finding.level != "ok")


def test_a_crash_is_a_finding_that_names_where():
    done = stages()[:5]
    findings = doctor_machine.probe_findings(done, "it died of SIGSEGV", tpu_wheel=False, cure="c")
    assert levels(findings) == [("bad", "Trial run")]
    assert findings[0].said == "it died of SIGSEGV, at the stage 'devices'"


def test_the_probe_dies_apart(tmp_path):
    """A TensorFlow that kills the process that imports it."""
    package = tmp_path / "preflight"
    package.mkdir()
    (package / "probe.py").write_text(
        'import os, signal\nprint(\'{"stage": "tensorflow"}\', flush=True)\n'
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    assert doctor_machine.run_probe(tmp_path) == (
        [{"stage": "tensorflow"}],
        "it died of SIGSEGV",
    )


def test_little_room_and_a_folder_that_is_not_there(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5 * doctor_machine.GIB})
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(doctor_machine, "free_memory", lambda: doctor_machine.GIB // 2)
    disk, memory = doctor_machine.machine_findings(str(tmp_path / "not" / "yet"))
    assert disk.level == "warn" and disk.said == f"5.0 GiB free at {tmp_path}"
    assert memory.level == "bad" and memory.cure


def test_this_environment_can_train(monkeypatch, capsys):
    """All of it, the probe too, in its own process."""
    monkeypatch.setattr(doctor, "version_findings", lambda *arguments: [])  # pins may have moved on
    monkeypatch.setattr(doctor_machine, "MEMORY", (0, 0))
    monkeypatch.setattr(doctor_machine, "DISK", (0, 0))
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "XLA" in printed and printed.endswith("Training can start.\n")


def test_without_tensorflow_there_is_a_cure_and_no_traceback():
    """An interpreter that sees no installed package at all."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "preflight.doctor"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stderr
    assert "bad   TensorFlow  is not installed" in done.stdout
    assert "cure: pip install -c constraints.txt" in done.stdout


def test_a_terminal_gets_a_table(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    doctor.show([Finding("bad", "Disk", "0.1 GiB free", "pip install -e .[train]")], stream)
    assert "┃" in stream.getvalue() and ".[train]" in stream.getvalue()


def test_the_tpu_set_is_the_tested_set_with_another_tensorflow():
    stock = doctor.read_pins(ROOT / "constraints.txt")
    tpu = doctor.read_pins(ROOT / "constraints-tpu.txt")
    assert {
        name: version for name, version in tpu.items() if stock.get(name) != version
    } == TPU_ALONE
    assert "tensorflow" not in tpu and set(doctor.needed_packages()) - {"tensorflow"} <= set(tpu)
