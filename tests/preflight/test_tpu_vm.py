"""The doctor's checks on a TPU VM, with a made-up metadata server."""

import socket

import pytest

from preflight import doctor, tpu_vm

ONE_HOST = {
    "attributes/accelerator-type": "v3-8",
    "attributes/worker-network-endpoints": "unknown:unknown:127.0.0.1",
    "zone": "projects/1/zones/europe-west4-a",
    "service-accounts/default/scopes": "https://www.googleapis.com/auth/cloud-platform\n",
    "service-accounts/default/token": '{"access_token": "secret"}',
}
SLICE = ONE_HOST | {
    "attributes/accelerator-type": "v3-32",
    "attributes/worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.1",
    "attributes/agent-worker-number": "0",
}


@pytest.fixture
def check(monkeypatch):
    """A function from metadata, `model_dir` and environment to the findings."""
    for name in ("TPU_NAME", "TPU_LOAD_LIBRARY"):
        monkeypatch.delenv(name, raising=False)

    def run(metadata, model_dir="runs/a", location="europe-west4", **environment):
        monkeypatch.setattr(tpu_vm, "read_metadata", lambda path: metadata.get(path, ""))
        monkeypatch.setattr(tpu_vm, "bucket_location", lambda bucket, token: location.upper())
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return tpu_vm.check(model_dir)

    return run


@pytest.fixture
def runtime(monkeypatch):
    """A TPU runtime that answers on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(tpu_vm, "RUNTIME_PORT", server.getsockname()[1])
        yield


def test_elsewhere_nothing_is_checked():
    assert tpu_vm.check("runs/a") == []


def test_one_host_and_a_bucket_in_its_region(check):
    findings = check(ONE_HOST, "gs://mine/runs")
    assert [level for level, *_ in findings] == ["ok", "ok"]
    assert findings[0][1] == "v3-8, worker 0 of 1"
    assert findings[1][1] == "gs://mine is in europe-west4, as the TPU"


def test_a_slice_that_is_set_up(check, runtime):
    findings = check(SLICE, "gs://mine/runs", TPU_NAME="mine", TPU_LOAD_LIBRARY="0")
    assert [level for level, *_ in findings] == ["ok", "ok"]
    assert findings[0][1] == "v3-32, worker 0 of 2"
    assert tpu_vm.runtime_holds_chips()
    # `make tpu` does not know the folder of the run.
    _, (level, message, fix) = check(SLICE, None)
    assert level == "warning" and "was not checked" in message and "gs://" in fix


def test_a_slice_without_its_settings(check, monkeypatch):
    monkeypatch.setattr(tpu_vm, "RUNTIME_PORT", 1)
    worker = {"attributes/agent-worker-number": "1"}
    (_, *errors) = check(SLICE | worker)
    assert [level for level, *_ in errors] == ["error"] * 5
    fixes = "\n".join(fix for _, _, fix in errors)
    for text in ("--worker=0", "export TPU_NAME", "TPU_LOAD_LIBRARY=0", "-pod", "gs://"):
        assert text in fixes


@pytest.mark.parametrize(
    ("metadata", "location", "environment", "level", "message"),
    [
        ({}, "us", {}, "warning", "gs://mine is in us, and the TPU in europe-west4"),
        (
            {"service-accounts/default/scopes": "https://x/auth/devstorage.read_only"},
            "",
            {},
            "error",
            "the service account may not write to buckets",
        ),
        ({"service-accounts/default/token": ""}, "", {}, "error", "gs://mine cannot be looked up"),
        ({}, "europe-west4", {"TPU_LOAD_LIBRARY": "0"}, "error", "hides the TPU of this machine"),
    ],
)
def test_one_thing_is_wrong(check, metadata, location, environment, level, message):
    findings = check(ONE_HOST | metadata, "gs://mine/runs", location, **environment)
    assert not tpu_vm.runtime_holds_chips()
    (wrong,) = [finding for finding in findings if finding[0] != "ok"]
    assert wrong[0] == level and message in wrong[1] and wrong[2]


def test_the_doctor_shows_them(monkeypatch):
    wrong = ("error", "TPU_NAME is not set", "export TPU_NAME=...")
    monkeypatch.setattr(tpu_vm, "check", lambda model_dir: [wrong])
    (finding,) = doctor.check_tpu_vm("runs/a")
    assert finding == doctor.Finding(doctor.ERROR, "TPU VM", *wrong[1:])
