"""Checks whether training can start on this machine: python -m preflight.doctor [MODEL_DIR]

Checks the Python version, the installed packages, TensorFlow with its devices and XLA, free disk
space for MODEL_DIR, and free memory. For each problem, it prints a fix. The exit status is 0 if
training can start, and 1 if not.
"""

import argparse
import collections
import configparser
import dataclasses
import glob
import importlib.machinery
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from inputs import process  # isort: split

# This file must run even if no package is installed, to say which are missing.
try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:
    Requirement = Version = None

    def canonicalize_name(name: str) -> str:
        """Returns the normalized name. Sufficient for the names that this file compares."""
        return name.lower().replace("_", "-")


from inputs.errors import InputError
from inputs.memory import GIB, MINIMUM, binding_limit, free_memory, ran_out_of_memory
from inputs.storage.files import check_writable, is_remote
from preflight import tpu_vm
from preflight.probe import IMPORTS, STAGES
from preflight.tpu_vm import ERROR, OK, WARNING

ROOT = pathlib.Path(__file__).parents[1]
# The first supported Python version, and the first that is too new. For other versions, TensorFlow
# 2.20 or a package that depends on it has no wheel.
PYTHON_VERSIONS = ((3, 10), (3, 13))

# All of these wheels install the package `tensorflow`, and overwrite each other's files.
TENSORFLOW_WHEELS = (
    "tensorflow",
    "tensorflow-cpu",
    "tensorflow-gpu",
    "tensorflow-tpu",
    "tensorflow-intel",
    "tensorflow-macos",
    "tensorflow-rocm",
    "tensorflow-aarch64",
    "tensorflow-cpu-aws",
    "intel-tensorflow",
    "tf-nightly",
    "tf-nightly-cpu",
    "tf-nightly-gpu",
    "tf-nightly-tpu",
)
CUDA_COMMAND = "pip install tensorflow[and-cuda]==2.20.*"
# These must have the tested major and minor version, because they are compiled against each other
# or use private APIs.
SAME_MINOR = (*TENSORFLOW_WHEELS, "tensorflow-text", "tf-keras", "tf-models-official")
MAX_LISTED = 5  # number of packages that a finding lists by name

# Free bytes below which there is an error, and below which there is a warning.
MIN_DISK = (1 * GIB, 20 * GIB)  # three checkpoints of BERT-Large take 12 GiB
MIN_MEMORY = (MINIMUM, 4 * GIB)  # BERT-base with its slots takes 2 GiB
OUT_OF_MEMORY = "out of memory"
MORE_MEMORY = (
    "end other programs, or raise the limit: of the container or job (memory), or of the shell "
    "(ulimit -v unlimited, ulimit -d unlimited)"
)
PROBE_SECONDS = 180  # timeout; a TPU takes about 20 s to start
# TPUs on the PCI bus, by jax/_src/hardware_utils.py: v2 and v3, v4, v5p, v5e, v6e, TPU7x. Google is
# also the vendor of Compute Engine's network interface and disks.
GOOGLE_PCI_VENDOR = "0x1ae0"
TPU_PCI_DEVICES = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")

STYLES = {OK: "green", WARNING: "yellow", ERROR: "bold red"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: `OK`, `WARNING` (training can start) or `ERROR` (it cannot).
        check: what was checked.
        message: what was found.
        fix: what to do about it; "" if nothing.
    """

    level: str
    check: str
    message: str
    fix: str = ""


# Packages


def find_packages() -> dict[str, list[tuple[str, str]]]:
    """Returns the (version, folder) of each copy of each installed package, by normalized name.

    Python imports the first copy: the one whose folder is first in `sys.path`. Of several copies in
    one folder, the metadata do not say whose files are there; they are in alphabetical order.
    """
    copies = collections.defaultdict(list)
    seen = set()
    for folder in sys.path:
        real = os.path.realpath(folder or os.curdir)
        if real in seen:
            continue
        seen.add(real)
        here = [
            (canonicalize_name(found.metadata["Name"]), found.version)
            for found in importlib.metadata.distributions(path=[folder])
            if found.metadata["Name"]
        ]
        for name, version in sorted(here):  # the file system's order is arbitrary
            copies[name].append((version, real))
    return copies


def check_copies(copies: dict[str, list[tuple[str, str]]]) -> list[Finding]:
    """Warns of packages of which several versions are installed.

    Args:
        copies: from `find_packages`.
    """
    listed = []
    mixed = []  # names of packages with several versions in the folder that Python imports
    for name, found in sorted(copies.items()):
        if len({version for version, _ in found}) == 1:
            continue
        first = found[0][1]
        versions = list(dict.fromkeys(version for version, folder in found if folder == first))
        hidden = ", ".join(f"{version} in {folder}" for version, folder in found if folder != first)
        text = f"{name} {' and '.join(versions)} in {first}"
        if len(versions) > 1:
            mixed.append(name)
            text += ", whose files may be of either"
        listed.append(f"{text}, which hides {hidden}" if hidden else text)
    if not listed:
        return []
    more = f" and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
    message = f"several copies: {'; '.join(listed[:MAX_LISTED])}{more}"
    fix = "remove the copies that you do not want"
    if mixed:
        fix += (
            "; where one folder has several, repeat `pip uninstall -y "
            f"{' '.join(mixed[:MAX_LISTED])}` until none is left, and install again"
        )
    return [Finding(WARNING, "Packages", message, fix)]


def find_hidden(names) -> dict[str, str]:
    """Returns the packages in whose place Python imports a file of another folder.

    Args:
        names: names of distributions; those that are not installed are left out.

    Returns:
        Module -> path of the file or folder that Python takes for it.
    """
    hidden = {}
    for name in names:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        folder = os.path.realpath(str(distribution.locate_file("")))
        for module in _top_modules(distribution.files or []):
            # Unlike `importlib.util.find_spec`, this ignores what has been imported already.
            spec = importlib.machinery.PathFinder.find_spec(module)
            if spec and spec.origin:
                path = pathlib.Path(spec.origin)
                path = path.parent if spec.submodule_search_locations else path
                if os.path.realpath(path.parent) != folder:
                    hidden[module] = str(path)
    return hidden


def _top_modules(files) -> set[str]:
    """Returns the names under which the files of a distribution are imported."""
    single = [file for file in files if len(file.parts) == 1 and file.suffix in (".py", ".so")]
    packages = [file for file in files if file.parts[1:] == ("__init__.py",)]
    return {file.name.partition(".")[0] for file in single} | {file.parts[0] for file in packages}


def check_hidden(hidden: dict[str, str]) -> list[Finding]:
    """Warns of files that hide installed packages.

    Args:
        hidden: from `find_hidden`.
    """
    return [
        Finding(WARNING, "Packages", f"{path} hides the installed package {module}", rename([path]))
        for module, path in sorted(hidden.items())
    ]


def rename(paths) -> str:
    """Returns the fix for files that hide installed packages."""
    entries = os.getenv("PYTHONPATH", "").split(os.pathsep)
    searched = {os.path.realpath(entry) for entry in entries if entry}
    folders = {os.path.realpath(os.path.dirname(path)) for path in paths}
    unset = ", or unset PYTHONPATH" if folders & searched else ""
    return f"rename {', '.join(paths)}{unset}"


def read_pins(path) -> dict[str, str]:
    """Returns the version of each `name==version` in a constraints file, by normalized name."""
    pins = {}
    for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line:
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            pins[canonicalize_name(requirement.name)] = pin.version
    return pins


def needed_packages() -> list[str]:
    """Returns the normalized names of the packages that training needs, from setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["options"]["install_requires"] + config["options.extras_require"]["train"]
    requirements = [Requirement(line) for line in lines.splitlines() if line.strip()]
    return [
        canonicalize_name(requirement.name)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    ]


def check_python(version) -> Finding:
    """Checks the interpreter's version, given as in `sys.version_info`."""
    text = ".".join(map(str, version[:3]))
    first, end = (".".join(map(str, bound)) for bound in PYTHON_VERSIONS)
    if PYTHON_VERSIONS[0] <= tuple(version[:2]) < PYTHON_VERSIONS[1]:
        return Finding(OK, "Python", text)
    message = f"{text} is not supported by TensorFlow 2.20 or a package that needs it"
    return Finding(ERROR, "Python", message, f"create the environment with Python >={first},<{end}")


def install_command(installed) -> str:
    """Returns the command that installs the tested versions.

    Args:
        installed: names of the installed packages.
    """
    if "tensorflow-tpu" in installed:
        return "pip install --no-deps --force-reinstall -r constraints-tpu.txt"
    others = [name for name in TENSORFLOW_WHEELS[1:] if name in installed]
    return f"{_uninstall(others)}pip install -c constraints.txt -e .[train]; on a TPU VM: make tpu"


def _uninstall(wheels) -> str:
    """Returns the start of a fix that installs another TensorFlow than these wheels."""
    return f"pip uninstall -y {' '.join(wheels)}, then " if wheels else ""


def check_wheels(installed: dict[str, str]) -> Finding:
    """Checks that exactly one TensorFlow wheel is installed.

    Args:
        installed: name -> version.
    """
    wheels = [name for name in TENSORFLOW_WHEELS if name in installed]
    listed = ", ".join(f"{name} {installed[name]}" for name in wheels)
    if not wheels:
        return Finding(ERROR, "TensorFlow", "is not installed", install_command(installed))
    if len(wheels) == 1:
        return Finding(OK, "TensorFlow", listed)
    message = f"several wheels overwrite each other's files: {listed}"
    fix = _uninstall(wheels) + install_command({"tensorflow-tpu"} & installed.keys())
    return Finding(ERROR, "TensorFlow", message, fix)


def check_versions(installed, pins, needed) -> list[Finding]:
    """Compares the installed versions with the tested ones.

    Args:
        installed: name -> version.
        pins: name -> tested version.
        needed: names of packages that must be installed.
    """
    fix = install_command(installed)
    findings = []
    missing = [name for name in needed if name not in installed and name != "tensorflow"]
    if missing:
        message = f"not installed: {', '.join(missing)}"
        findings.append(Finding(ERROR, "Packages", message, fix))
    different = {name for name in pins if name in installed and installed[name] != pins[name]}
    strict = {*SAME_MINOR, "libtpu"}
    for name in sorted(different & strict):
        message = f"{installed[name]}; tested with {pins[name]}"
        same_minor = Version(installed[name]).release[:2] == Version(pins[name]).release[:2]
        level = WARNING if same_minor and name != "libtpu" else ERROR
        findings.append(Finding(level, name, message, fix))
    others = sorted(different - strict)
    if others:
        listed = [f"{name} {installed[name]} ({pins[name]})" for name in others[:MAX_LISTED]]
        more = f" and {len(others) - MAX_LISTED} more" if len(others) > MAX_LISTED else ""
        message = (
            f"{len(others)} differ from the tested versions (in brackets): "
            f"{', '.join(listed)}{more}"
        )
        findings.append(Finding(WARNING, "Packages", message, fix))
    return findings or [Finding(OK, "Packages", "the tested versions")]


def check_packages(installed: dict[str, str]) -> list[Finding]:
    """Compares the installed packages with setup.cfg and the constraints.

    Args:
        installed: name -> version.
    """
    if Requirement is None:
        message = "the package `packaging` is not installed: versions were not compared"
        return [Finding(ERROR, "Packages", message, install_command(installed))]
    return check_versions(installed, tested_versions(installed), needed_packages())


def tested_versions(installed: dict[str, str]) -> dict[str, str]:
    """Returns the tested version of each package, by normalized name.

    Args:
        installed: name -> version.
    """
    tpu = "tensorflow-tpu" in installed
    return read_pins(ROOT / ("constraints-tpu.txt" if tpu else "constraints.txt"))


def check_backend() -> list[Finding]:
    """Mentions the Keras backend that the user set, if it is another one than TensorFlow."""
    if process.ASKED_BACKEND in ("", "tensorflow"):
        return []
    message = f"KERAS_BACKEND={process.ASKED_BACKEND} is ignored: train.py runs on TensorFlow"
    return [Finding(OK, "Keras", message)]


# TensorFlow and its devices


def has_tpu() -> bool:
    """Returns whether a TPU is attached to this machine."""
    for path in map(pathlib.Path, glob.glob("/sys/bus/pci/devices/*/vendor")):
        if path.read_text().strip() == GOOGLE_PCI_VENDOR:
            if path.with_name("device").read_text().strip() in TPU_PCI_DEVICES:
                return True
    return False


def has_nvidia_gpu() -> bool:
    """Returns whether the driver of an NVIDIA GPU is loaded."""
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def run_probe(root) -> tuple[list[dict], str]:
    """Runs `preflight.probe` in a child process, because it may crash or hang.

    Args:
        root: folder that contains the package `preflight`.

    Returns:
        A tuple: the list of stages that the process printed, and how it failed ("" if it did not).
    """
    environment = dict(os.environ)
    if not has_tpu():
        # Without a TPU, libtpu would query a metadata server for minutes.
        environment.setdefault("TPU_SKIP_MDS_QUERY", "1")
    command = [sys.executable, "-m", "preflight.probe"]
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        try:
            printed, errors = child.communicate(timeout=PROBE_SECONDS)
            failure = process.describe_exit(child.returncode) if child.returncode else ""
            if ran_out_of_memory(errors.decode(errors="replace"), child.returncode):
                failure = f"{OUT_OF_MEMORY} ({failure})"
        except subprocess.TimeoutExpired:
            child.kill()
            printed, _ = child.communicate()
            failure = f"no answer within {PROBE_SECONDS} s"
    lines = [line for line in printed.decode().splitlines() if line.startswith('{"stage"')]
    return [json.loads(line) for line in lines], failure


def check_probe(stages, failure, *, wheels: list[str], fix: str) -> list[Finding]:
    """Turns the results of `run_probe` into findings.

    Args:
        stages: list of dicts, as printed by `preflight.probe`.
        failure: how the probe failed, or "".
        wheels: the installed ones of `TENSORFLOW_WHEELS`.
        fix: the fix for packages that cannot be imported.
    """
    found = {stage["stage"]: stage for stage in stages}
    findings = []
    for name in IMPORTS:
        # The program cannot be imported either if a package that it needs cannot.
        if "error" in found.get(name, {}) and not (name == "train" and findings):
            message = f"cannot be imported: {found[name]['error']}"
            findings.append(Finding(ERROR, name, message, _fix(found[name]["error"], fix)))
    if "error" not in found.get("tensorflow", {"error": ""}):
        findings += _check_devices(found, wheels, fix)
    if failure:
        stage = next((stage for stage in STAGES if stage not in found), STAGES[-1])
        message = f"{failure}, in stage {stage!r}"
        fix = MORE_MEMORY if OUT_OF_MEMORY in failure else _fix(failure, fix)
        findings.append(Finding(ERROR, "Trial run", message, fix))
    return findings


def _fix(error: str, otherwise: str) -> str:
    """Returns the fix of what failed in the trial run.

    If a limit of this process is tight, what fails for lack of memory has many messages.
    """
    limit = binding_limit()
    lacks_memory = (limit and limit.is_tight) or ran_out_of_memory(error, 1)
    return MORE_MEMORY if lacks_memory else otherwise


def _check_devices(found, wheels, fix) -> list[Finding]:
    devices = found.get("devices")
    if devices is None:
        return []
    if tpu_vm.runtime_holds_chips():
        message = "driven by the TPU runtime of each host; train with --tpu=$TPU_NAME"
        return [Finding(OK, "TPU", message)]
    tpu_wheel = "tensorflow-tpu" in wheels
    findings = [_check_tpu(devices, tpu_wheel, fix)] if tpu_wheel or has_tpu() else []
    if not tpu_wheel:
        findings.append(_check_gpu(devices, wheels))
    if "XLA" in found:
        findings.append(_check_xla(found["XLA"], devices, tpu_wheel))
    return findings


def _check_xla(xla, devices, tpu_wheel) -> Finding:
    if "error" not in xla:
        return Finding(OK, "XLA", f"compiles and runs on {xla['device']}")
    if tpu_wheel and not devices.get("tpus"):
        message = "not checked: tensorflow-tpu compiles only for TPUs, and found none"
        return Finding(ERROR, "XLA", message, "fix the problem with the TPU first")
    fix = "reinstall TensorFlow, and a driver that supports its CUDA version (see nvidia-smi)"
    message = f"a small function failed: {xla['error']}"
    return Finding(ERROR, "XLA", message, _fix(xla["error"], fix))


def _check_tpu(devices, tpu_wheel, fix) -> Finding:
    if devices.get("tpus"):
        return Finding(OK, "TPU", f"{devices['tpus']} devices; train with --tpu=local")
    if not has_tpu():
        message = "this machine has none, and tensorflow-tpu needs one"
        stock = _uninstall(["tensorflow-tpu"]) + "pip install -c constraints.txt -e .[train]"
        fix = f"use a TPU VM; for GPU and CPU: {stock}"
        return Finding(ERROR, "TPU", message, fix)
    if "error" in devices:
        fix = "end the process that uses it (`sudo lsof /dev/accel* /dev/vfio/*`) and try again"
        message = f"cannot be initialized: {devices['error']}"
        return Finding(ERROR, "TPU", message, _fix(devices["error"], fix))
    message = "attached, but this TensorFlow does not support it"
    fix = fix if tpu_wheel else "make tpu, and train with .venv-tpu/bin/python"
    return Finding(WARNING, "TPU", message, fix)


def _check_gpu(devices, wheels) -> Finding:
    gpus = devices.get("gpus", [])
    if gpus:
        return Finding(OK, "GPU", ", ".join(gpus))
    if not has_nvidia_gpu():
        return Finding(OK, "GPU", "none in this machine; training runs on the CPU")
    if not devices.get("cuda_build"):
        message = "present, but this TensorFlow is built without CUDA"
        return Finding(WARNING, "GPU", message, f"{_uninstall(wheels)}{CUDA_COMMAND}")
    others = [name for name in wheels if name != "tensorflow"]
    fix = f"{_uninstall(others)}{CUDA_COMMAND}, and check that nvidia-smi works"
    return Finding(WARNING, "GPU", "present, but TensorFlow does not find it", fix)


def check_tpu_vm(model_dir: str | None) -> list[Finding]:
    """Checks the settings of a TPU VM; none on other machines."""
    return [Finding(level, "TPU VM", *rest) for level, *rest in tpu_vm.check(model_dir)]


# Disk and memory


def check_machine(model_dir: str) -> list[Finding]:
    """Checks free memory, and free disk space for `model_dir`, which need not exist.

    Of a `model_dir` on object storage it checks whether it can be written, and the space in the
    system's temporary folder, where an export is written first.
    """
    findings = []
    if is_remote(model_dir):
        findings.append(_check_storage(model_dir))
        model_dir = tempfile.gettempdir()
    folder = pathlib.Path(model_dir).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():  # a file, or a link to nothing
        message = f"{folder} is not a folder"
        findings.append(Finding(ERROR, "Disk", message, "use another --model_dir"))
    else:
        free = shutil.disk_usage(folder).free
        fix = "remove old runs, or use a --model_dir on another disk"
        findings.append(_check_amount("Disk", free, MIN_DISK, f"free at {folder}", fix))
        if not os.access(folder, os.W_OK):
            message = f"{folder} is not writable"
            findings.append(Finding(ERROR, "Disk", message, "use another --model_dir"))
    memory = free_memory()
    if memory is not None:
        fix = f"{MORE_MEMORY}, or use a smaller model or batch"
        findings.append(_check_amount("Memory", memory, MIN_MEMORY, "free", fix))
    limit = binding_limit()
    if limit:
        # XLA of a larger model reserves several times what a small one takes.
        limits = (limit.minimum, 4 * limit.minimum)
        text = f"of {limit.kind} left, by the limit of this shell ({limit.command})"
        findings.append(
            _check_amount("Memory", limit.free, limits, text, f"{limit.command} unlimited")
        )
    return findings


def _check_storage(model_dir: str) -> Finding:
    try:
        check_writable(model_dir, "model_dir")
    except ImportError:
        return Finding(ERROR, "Storage", f"{model_dir} needs TensorFlow", "install TensorFlow")
    except InputError as error:
        return Finding(ERROR, "Storage", str(error), "use another --model_dir")
    return Finding(OK, "Storage", f"{model_dir} can be written")


def _check_amount(check, amount, limits, text, fix) -> Finding:
    error_below, warning_below = limits
    message = f"{amount / GIB:.1f} GiB {text}"
    if amount >= warning_below:
        return Finding(OK, check, message)
    return Finding(ERROR if amount < error_below else WARNING, check, message, fix)


# The command


def check_all(model_dir: str | None) -> list[Finding]:
    """Runs all checks and returns their findings.

    Args:
        model_dir: the run's folder; None for the current folder, if it is not known yet.
    """
    copies = find_packages()
    installed = {name: found[0][0] for name, found in copies.items()}
    findings = [check_python(sys.version_info), check_wheels(installed)]
    findings += check_copies(copies) + check_packages(installed) + check_backend()
    hidden = find_hidden(tested_versions(installed)) if Requirement else {}
    findings += check_hidden(hidden)
    wheels = [name for name in TENSORFLOW_WHEELS if name in installed]
    if wheels:
        findings += check_probe(
            *run_probe(ROOT),
            wheels=wheels,
            fix=rename(sorted(hidden.values())) if hidden else install_command(installed),
        )
    return findings + check_tpu_vm(model_dir) + check_machine(model_dir or os.curdir)


def show(findings: list[Finding], stream) -> None:
    """Prints the findings: as a table on a terminal, else one line per finding and per fix."""
    if stream.isatty() and _show_table(findings, stream):
        return
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        print(f"{finding.level:7}  {finding.check:{width}}  {finding.message}", file=stream)
        if finding.fix:
            print(f"{'':9}{'':{width}}  fix: {finding.fix}", file=stream)


def _show_table(findings, stream) -> bool:
    """Prints a table and returns True; False without a usable `rich`."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except Exception:  # it is missing, or another file hides it: whatever that one raises
        return False

    table = Table("")
    for header in ("check", "found", "fix"):
        # The default cuts a path that is longer than its column.
        table.add_column(header, overflow="fold")
    for finding in findings:
        level = Text(finding.level, STYLES[finding.level])
        # As `Text`, so that rich does not read ".[train]" as a style.
        table.add_row(level, *map(Text, (finding.check, finding.message, finding.fix)))
    Console(file=stream).print(table)
    return True


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: the command's arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python -m preflight.doctor",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model_dir",
        metavar="MODEL_DIR",
        nargs="?",
        help="the folder of the run, for the free disk space; by default the current folder",
    )
    findings = check_all(parser.parse_args(arguments).model_dir)
    show(findings, sys.stdout)
    errors = sum(finding.level == ERROR for finding in findings)
    if errors:
        print(f"Training cannot start: {errors} error{'s' if errors > 1 else ''}.")
        return 1
    print("Training can start.")
    return 0


if __name__ == "__main__":
    process.run(main, sys.argv[1:])
