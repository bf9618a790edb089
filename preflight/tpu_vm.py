"""Checks what can be checked from inside a TPU VM: see docs/guides/tpu.md.

Uses the standard library only, as `preflight.doctor` does. Not run on a TPU VM yet. The attributes
of the metadata server are those that JAX reads (jax/_src/clusters/cloud_tpu_cluster.py).
"""

import json
import os
import pathlib
import socket
import urllib.error
import urllib.parse
import urllib.request

# Levels of a finding.
OK = "ok"
WARNING = "warning"
ERROR = "error"
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"
BUCKETS = "https://storage.googleapis.com/storage/v1/b/"
RUNTIME_PORT = 8470  # of the TensorFlow server on each host of a slice of several
ANSWER_SECONDS = 3
WRITING_SCOPES = ("cloud-platform", "devstorage.read_write", "devstorage.full_control")


def read_metadata(path: str) -> str:
    """Returns a value of the metadata server; "" on a machine without one, or without the value."""
    try:
        if PRODUCT.read_text(encoding="utf-8").strip() != "Google Compute Engine":
            return ""
        request = urllib.request.Request(METADATA + path, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def answers(host: str) -> bool:
    """Returns whether the TPU runtime of a host can be reached."""
    try:
        with socket.create_connection((host, RUNTIME_PORT), timeout=ANSWER_SECONDS):
            return True
    except OSError:
        return False


def bucket_location(bucket: str, token: str) -> str:
    """Returns the location of a bucket, such as "US-CENTRAL2" or "EU".

    Args:
        bucket: its name.
        token: an access token of the service account.

    Raises:
        OSError: it cannot be looked up.
    """
    url = f"{BUCKETS}{urllib.parse.quote(bucket)}?fields=location"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        return json.load(answer)["location"]


def find_hosts() -> list[str]:
    """Returns the addresses of the hosts of this TPU VM's slice; [] on other machines."""
    # "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"
    endpoints = read_metadata("attributes/worker-network-endpoints")
    return [endpoint.split(":")[-1] for endpoint in endpoints.split(",") if endpoint]


def runtime_holds_chips() -> bool:
    """Returns whether this process leaves the chips of this host to the TPU runtime.

    On a slice of several hosts, `_check_slice` demands this setting. TensorFlow then finds no TPU
    of its own.
    """
    return os.environ.get("TPU_LOAD_LIBRARY") == "0" and len(find_hosts()) > 1


def check(model_dir: str | None) -> list[tuple[str, str, str]]:
    """Checks the settings of a TPU VM.

    Args:
        model_dir: the run's folder, local or in a bucket (gs://...); None if it is not known.

    Returns:
        Tuples (level, message, fix), as in `preflight.doctor.Finding`; none if this machine is not
        a TPU VM.
    """
    kind = read_metadata("attributes/accelerator-type")
    if not kind:
        return []
    hosts = find_hosts()
    worker = read_metadata("attributes/agent-worker-number") or "0"
    findings = [(OK, f"{kind}, worker {worker} of {max(len(hosts), 1)}", "")]
    if len(hosts) > 1:
        findings += _check_slice(hosts, worker, model_dir)
    elif os.environ.get("TPU_LOAD_LIBRARY") == "0":
        message = "TPU_LOAD_LIBRARY=0 hides the TPU of this machine"
        findings.append((ERROR, message, "unset TPU_LOAD_LIBRARY"))
    if model_dir and model_dir.startswith("gs://"):
        findings += _check_bucket(model_dir)
    return findings


def _check_slice(hosts, worker, model_dir):
    """Yields what is wrong on a slice of several hosts, which one of them coordinates."""
    if worker != "0":
        fix = "run train.py there alone: gcloud compute tpus tpu-vm ssh $TPU_NAME --worker=0"
        yield ERROR, "worker 0 drives all hosts, and this is another one", fix
    if not os.environ.get("TPU_NAME"):
        yield ERROR, "TPU_NAME is not set", "export TPU_NAME=...; train with --tpu=$TPU_NAME"
    if os.environ.get("TPU_LOAD_LIBRARY") != "0":
        message = "train.py would open this host's chips, which the TPU runtime holds"
        yield ERROR, message, "export TPU_LOAD_LIBRARY=0"
    silent = [host for host in hosts if not answers(host)]
    if silent:
        message = f"no TPU runtime answers on port {RUNTIME_PORT} of {', '.join(silent)}"
        fix = "create the TPU with a runtime version of TensorFlow that has -pod in its name"
        yield ERROR, message, fix
    if model_dir is None:
        message = "whether the other hosts can write to the folder of the run was not checked"
        yield WARNING, message, "python -m preflight.doctor gs://BUCKET/FOLDER"
    elif not model_dir.startswith("gs://"):
        message = f"the other hosts cannot write to {model_dir}"
        yield ERROR, message, "use a --model_dir and a --data_dir in a bucket, gs://..."


def _check_bucket(model_dir):
    """Yields what is wrong with the rights of this machine, or with the place of the bucket."""
    scopes = read_metadata("service-accounts/default/scopes").split()
    if not any(scope.endswith(WRITING_SCOPES) for scope in scopes):
        fix = "create the TPU with --scopes=https://www.googleapis.com/auth/cloud-platform"
        yield ERROR, "the service account may not write to buckets", fix
        return
    bucket = model_dir.removeprefix("gs://").partition("/")[0]
    region = read_metadata("zone").rpartition("/")[2].rpartition("-")[0]
    try:
        token = json.loads(read_metadata("service-accounts/default/token"))["access_token"]
        location = bucket_location(bucket, token).lower()
    except (OSError, ValueError, KeyError) as error:
        fix = f"gcloud storage buckets describe gs://{bucket}; give the service account its rights"
        yield ERROR, f"gs://{bucket} cannot be looked up ({error})", fix
        return
    if location == region:
        yield OK, f"gs://{bucket} is in {region}, as the TPU", ""
    else:
        fix = f"use a bucket in {region}: traffic between regions is slow and is charged"
        yield WARNING, f"gs://{bucket} is in {location}, and the TPU in {region}", fix
