"""The doctor's look at the machine: devices, XLA, disk, memory."""

import dataclasses
import glob
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

from preflight.probe import STAGES

GIB = 2**30
DISK = (1 * GIB, 20 * GIB)  # below: bad, warn; three checkpoints of BERT-Large take 12
MEMORY = (1 * GIB, 4 * GIB)  # below: bad, warn; BERT-base with its moments takes 2
SECONDS = 180  # for the probe; a TPU needs some 20 to start
GOOGLE = "0x1ae0"  # the PCI vendor of TPUs


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    level: "ok", "warn" (training can start, but look at it) or "bad".
    what: what was looked at.
    said: what was found.
    cure: what to do about it, "" if nothing is to be done.
    """

    level: str
    what: str
    said: str
    cure: str = ""


def has_tpu() -> bool:
    """Whether a TPU is plugged into this machine."""
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return any(pathlib.Path(path).read_text().strip() == GOOGLE for path in vendors)


def has_nvidia_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU is loaded."""
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def run_probe(root) -> tuple[list[dict], str]:
    """What `preflight.probe` printed, and how it ended: "" if well."""
    environment = dict(os.environ)
    if not has_tpu():
        # Without a TPU libtpu would ask the network for minutes what TPU it has.
        environment.setdefault("TPU_SKIP_MDS_QUERY", "1")
    command = [sys.executable, "-m", "preflight.probe"]
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            printed, _ = process.communicate(timeout=SECONDS)
            ended = "" if process.returncode == 0 else f"it ended with {process.returncode}"
            if process.returncode < 0:
                ended = f"it died of {signal.Signals(-process.returncode).name}"
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            ended = f"it did not answer in {SECONDS} s"
    lines = [line for line in printed.decode().splitlines() if line.startswith('{"stage"')]
    return [json.loads(line) for line in lines], ended


def probe_findings(stages, ended, *, tpu_wheel: bool, cure: str) -> list[Finding]:
    """What `run_probe` returned, in words; `cure` is for packages that cannot be imported."""
    found = {stage["stage"]: stage for stage in stages}
    findings = []
    for name in STAGES[:5]:
        if "error" in found.get(name, {}):
            said = f"cannot be imported: {found[name]['error']}"
            findings.append(Finding("bad", name, said, cure))
    if "error" not in found.get("tensorflow", {"error": ""}):
        findings += _device_findings(found, tpu_wheel)
    if ended:
        stage = next((stage for stage in STAGES if stage not in found), STAGES[-1])
        findings.append(Finding("bad", "Trial run", f"{ended}, at the stage {stage!r}", cure))
    return findings


def _device_findings(found, tpu_wheel) -> list[Finding]:
    devices = found.get("devices")
    if devices is None:
        return []
    findings = [_tpu_finding(devices)] if tpu_wheel or has_tpu() else []
    if not tpu_wheel:
        findings.append(_gpu_finding(devices))
    if "XLA" in found:
        xla = found["XLA"]
        if "error" not in xla:
            findings.append(Finding("ok", "XLA", f"compiles and runs on {xla['device']}"))
        elif tpu_wheel and not devices.get("tpus"):
            said = "not tried: tensorflow-tpu compiles for TPUs alone, and none answered"
            findings.append(Finding("bad", "XLA", said, "see TPU"))
        else:
            said = f"a small function failed: {xla['error']}"
            cure = "install TensorFlow anew, and a driver that its CUDA takes (nvidia-smi shows it)"
            findings.append(Finding("bad", "XLA", said, cure))
    return findings


def _tpu_finding(devices) -> Finding:
    if devices.get("tpus"):
        return Finding("ok", "TPU", f"{devices['tpus']} cores, train with --tpu=local")
    if not has_tpu():
        cure = "run on a TPU VM, or install constraints.txt's tensorflow for GPU and CPU"
        return Finding("bad", "TPU", "none in this machine, and tensorflow-tpu needs one", cure)
    if "error" in devices:
        cure = "end the process that holds it (`sudo lsof /dev/accel* /dev/vfio/*`), try again"
        return Finding("bad", "TPU", f"it does not answer: {devices['error']}", cure)
    return Finding(
        "warn", "TPU", "there is one, but this TensorFlow cannot drive it", "make clean tpu"
    )


def _gpu_finding(devices) -> Finding:
    gpus = devices.get("gpus", [])
    if gpus:
        return Finding("ok", "GPU", ", ".join(gpus))
    if not has_nvidia_gpu():
        return Finding("ok", "GPU", "none in this machine; training runs on the CPU")
    if not devices.get("cuda_build"):
        said, cure = "there is one, but this TensorFlow has no CUDA", "pip install tensorflow"
    else:
        said = "there is one, but TensorFlow does not see it"
        cure = "pip install tensorflow[and-cuda]==2.20.*, and look whether nvidia-smi works"
    return Finding("warn", "GPU", said, cure)


def machine_findings(model_dir: str) -> list[Finding]:
    """Free space where `model_dir` is or would be, and free memory."""
    folder = pathlib.Path(model_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    make_room = "remove old runs, or take a --model_dir on another disk"
    findings = [_amount("Disk", free, DISK, f"free at {folder}", make_room)]
    if not os.access(folder, os.W_OK):
        cure = "take another --model_dir"
        findings.append(Finding("bad", "Disk", f"{folder} cannot be written", cure))
    memory = free_memory()
    if memory is not None:
        cure = "end other programs, or take a smaller model or batch"
        findings.append(_amount("Memory", memory, MEMORY, "free", cure))
    return findings


def _amount(what, amount, limits, said, cure) -> Finding:
    said = f"{amount / GIB:.1f} GiB {said}"
    if amount >= limits[1]:
        return Finding("ok", what, said)
    return Finding("bad" if amount < limits[0] else "warn", what, said, cure)


def free_memory() -> int | None:
    """Bytes that a process may still take: the machine's, or the control group's; None: unknown."""
    known = []
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                known.append(int(line.split()[1]) * 1024)
        group = pathlib.Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            known.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(known, default=None)
