"""Says whether training can start on this machine: python -m preflight.doctor [MODEL_DIR]

Each finding comes with its cure. The exit status is 0 if training can start, 1 if not.
"""

import configparser
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys

from preflight.doctor_machine import Finding, machine_findings, probe_findings, run_probe

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = ((3, 10), (3, 13))  # from, up to: setup.cfg's python_requires

# All of these install the package `tensorflow`, over one another's files.
WHEELS = (
    *("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-tpu", "tensorflow-intel"),
    *("tensorflow-macos", "tensorflow-rocm", "tensorflow-aarch64", "tensorflow-cpu-aws"),
    *("intel-tensorflow", "tf-nightly", "tf-nightly-cpu", "tf-nightly-gpu", "tf-nightly-tpu"),
)
# These go together by major and minor version: compiled code, or private parts of one another.
FAMILY = (*WHEELS, "tensorflow-text", "tf-keras", "tf-models-official")
MOST_NAMED = 5


def plain(name: str) -> str:
    """A package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path) -> dict[str, str]:
    """name -> version of a constraints file."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {plain(name): version.strip() for name, version in pairs}


def needed_packages() -> list[str]:
    """What the training program imports, by setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["options"]["install_requires"] + config["options.extras_require"]["train"]
    return [plain(re.match(r"[\w.-]+", line)[0]) for line in lines.split("\n") if line.strip()]


def python_finding(version) -> Finding:
    """About the interpreter; `version` as `sys.version_info`."""
    said = ".".join(map(str, version[:3]))
    first, end = (".".join(map(str, bound)) for bound in PYTHON)
    if PYTHON[0] <= tuple(version[:2]) < PYTHON[1]:
        return Finding("ok", "Python", said)
    cure = f"make the environment with a Python from {first} to below {end}"
    return Finding("bad", "Python", f"{said}, which TensorFlow 2.20 or a peer does not have", cure)


def wheel_findings(installed: dict[str, str]) -> list[Finding]:
    """About the TensorFlow wheels among the installed packages (name -> version)."""
    wheels = [name for name in WHEELS if name in installed]
    said = ", ".join(f"{name} {installed[name]}" for name in wheels)
    if not wheels:
        return [Finding("bad", "TensorFlow", "is not installed", install_line(installed))]
    if len(wheels) == 1:
        return [Finding("ok", "TensorFlow", said)]
    cure = f"pip uninstall -y {' '.join(wheels)}, then {install_line(installed)}"
    return [Finding("bad", "TensorFlow", f"wheels over one another's files: {said}", cure)]


def install_line(installed: dict[str, str]) -> str:
    """The command that installs the tested set."""
    if "tensorflow-tpu" in installed:
        return "pip install --no-deps --force-reinstall -r constraints-tpu.txt"
    return "pip install -c constraints.txt -e .[train]; on a TPU VM: make tpu"


def version_findings(installed, pins, needed) -> list[Finding]:
    """Compares what is installed with what was tested, both name -> version."""
    cure = install_line(installed)
    missing = [name for name in needed if name not in installed and name != "tensorflow"]
    said = f"not installed: {', '.join(missing)}"
    found = [Finding("bad", "Packages", said, cure)] if missing else []
    other = {name for name in pins if name in installed and installed[name] != pins[name]}
    for name in sorted(other & {*FAMILY, "libtpu"}):
        said = f"{installed[name]} where {pins[name]} was tested"
        same_minor = installed[name].split(".")[:2] == pins[name].split(".")[:2]
        level = "warn" if same_minor and name != "libtpu" else "bad"
        found.append(Finding(level, name, said, cure))
    rest = sorted(other - {*FAMILY, "libtpu"})
    if rest:
        named = [f"{name} {installed[name]} ({pins[name]})" for name in rest[:MOST_NAMED]]
        more = f" and {len(rest) - MOST_NAMED} more" if len(rest) > MOST_NAMED else ""
        said = f"{len(rest)} not as tested: {', '.join(named)}{more}"
        found.append(Finding("warn", "Packages", said, cure))
    if not found:
        found.append(Finding("ok", "Packages", "the versions that were tested"))
    return found


def examine(model_dir: str) -> list[Finding]:
    """All findings about this machine and this environment."""
    installed = {
        plain(found.metadata["Name"]): found.version
        for found in importlib.metadata.distributions()
        if found.metadata["Name"]
    }
    tpu = "tensorflow-tpu" in installed
    pins = read_pins(ROOT / ("constraints-tpu.txt" if tpu else "constraints.txt"))
    findings = [python_finding(sys.version_info), *wheel_findings(installed)]
    findings += version_findings(installed, pins, needed_packages())
    if set(WHEELS) & set(installed):
        findings += probe_findings(*run_probe(ROOT), tpu_wheel=tpu, cure=install_line(installed))
    return findings + machine_findings(model_dir)


def show(findings: list[Finding], stream) -> None:
    """A table on a terminal, else a line for each finding and one for its cure."""
    if stream.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        styles = {"ok": "green", "warn": "yellow", "bad": "bold red"}
        table = Table("", "what", "found", "cure")
        for finding in findings:
            level = Text(finding.level, styles[finding.level])
            # As Text: a cure's ".[train]" would be read as a style.
            table.add_row(level, *map(Text, (finding.what, finding.said, finding.cure)))
        Console(file=stream).print(table)
        return
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.level:4}  {finding.what:{width}}  {finding.said}", file=stream)
        if finding.cure:
            print(f"{'':6}{'':{width}}  cure: {finding.cure}", file=stream)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 1
    findings = examine(arguments[0] if arguments else os.curdir)
    show(findings, sys.stdout)
    bad = sum(finding.level == "bad" for finding in findings)
    print(f"Training cannot start: {bad} bad." if bad else "Training can start.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
