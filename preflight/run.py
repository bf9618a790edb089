"""What a recipe needs on a TPU pod, before the pod is rented: python train.py --preflight=v3:32x32

Each phase's step is lowered, and compiled by the real TPU compiler for each topology, in
processes of their own. No TPU is needed, and nothing here is imported in training.
"""

import dataclasses
import json
import os
import tempfile

from inputs.errors import InputError
from preflight import estimate as model
from preflight.children import (
    ChildFailed,
    Children,
    check_installed,
    check_strict_installed,
)
from preflight.topology import Topology, parse_topologies

GIB, PICTURE = 2**30, ".png"
START = 32  # examples of a replica that the search for the largest batch begins with at most


@dataclasses.dataclass(frozen=True)
class Finding:
    """One phase on one topology: what the compiler says, and what is modelled from it.

    replica_batch_size, accumulation: examples of one replica and step, in how many micro-batches.
    largest: largest micro-batch that was found to fit; None if nobody looked.
    program: `preflight_compile.figures` of the step, with its `error` if there is one; FLOPs,
        bytes and seconds are those of all its micro-batches.
    memory: bytes by what they are for.
    time: None if the program does not compile.
    operations: kinds of operation that TensorFlow's own TPU kernels were asked for; None if nobody
        asked.
    """

    phase: int
    steps: int
    global_batch_size: int
    topology: Topology
    error: str | None
    replica_batch_size: int
    accumulation: int | None
    largest: int | None
    parameters: int
    program: dict
    update: dict
    memory: dict
    time: model.StepTime | None
    operations: int | None = None

    @property
    def minutes(self) -> float | None:
        """Of the whole phase."""
        return self.time and self.steps * self.time.step / 60

    @property
    def utilisation(self) -> float:
        """The program's FLOPs over what the chips could do in the time of a step."""
        return self.time.compute / self.time.step

    def row(self) -> dict:
        """As the JSON has it."""
        found = self.time is not None
        return {
            "phase": self.phase,
            "topology": self.topology.name,
            "cores": self.topology.replicas,
            "compiles": self.error is None,
            "error": self.error,
            "replica_batch_size": self.replica_batch_size,
            "accumulation": self.accumulation,
            "hbm_bytes": self.program.get("hbm_bytes"),
            "hbm_limit_bytes": self.topology.generation.hbm_bytes,
            "flops": self.program.get("flops"),
            "bytes_accessed": self.program.get("bytes_accessed"),
            "compiler_seconds": self.time.compiler if found else None,
            "update_bytes_per_parameter": self.update.get("bytes_accessed", 0) / self.parameters
            if found
            else None,
            "all_reduce_bytes": self.program.get("all_reduce_bytes"),
            "all_reduce_seconds": self.time.all_reduce if found else None,
            "step_seconds": self.time.step if found else None,
            "phase_minutes": self.minutes,
        }


def replica_batch_size(
    recipe, phase, topology: Topology, flag="--preflight", cure="--global_batch_size"
) -> int:
    """Examples of each replica and step; `InputError`, by the flags' names, unless they divide."""
    size, rest = divmod(phase.global_batch_size, topology.replicas)
    if rest or not size or size % recipe.accumulation:
        whole = topology.replicas * recipe.accumulation
        raise InputError(
            f"{flag}={topology.name}: the batch of {phase.global_batch_size} does not divide "
            f"by {topology.replicas} replicas of {recipe.accumulation} micro-batch(es). Take "
            f"{cure}={max(1, phase.global_batch_size // whole) * whole}."
        )
    return size


class _DoesNotCompile(Exception):
    """For another reason than memory; the message says which."""


class Examiner:
    """Compiles what is asked for.

    Args:
        recipe: a checked recipe.
        topologies: all that will be asked for.
        children: runs the lowering and the compiler.
        search: whether to look for the largest batch where the recipe's own fits.
    """

    def __init__(self, recipe, topologies, children: Children, search: bool):
        self._recipe, self._children, self._search = recipe, children, search
        self._topologies, self._largest = topologies, {}
        self._compiled = {}

    def examine(self, number: int, topology: Topology) -> Finding:
        """Phase `number`, from 0, on a topology."""
        phase = self._recipe.phases[number]
        whole = replica_batch_size(self._recipe, phase, topology)
        found = Finding(
            number + 1, phase.steps, phase.global_batch_size, topology, None, whole, None, None, 0,
            {}, {}, {}, None,
        )  # fmt: skip
        try:
            return self._examined(number, topology, found)
        except (ChildFailed, _DoesNotCompile) as error:
            return dataclasses.replace(found, error=str(error))

    def _examined(self, number, topology, found):
        phase, least = self._recipe.phases[number], self._recipe.accumulation
        whole = found.replica_batch_size
        self._children.lower(self._recipe, number, self._foreseen(phase, least))
        update, facts = self._step(number, topology, None, 1), self._children.facts
        largest, parts = None, least
        if self._search or whole // least > START:
            start = min(whole // least, START)
            largest = self._largest_batch(number, topology, start, update)
            parts = model.needed_accumulation(whole, largest, least)
        while True:
            found = dataclasses.replace(
                found, accumulation=parts, largest=largest, parameters=facts["parameters"],
                update=update,
            )  # fmt: skip
            if parts is None:
                return dataclasses.replace(found, error="no micro-batch fits: not even one example")
            program = self._step(number, topology, whole // parts, 1)
            accumulated = self._step(number, topology, whole, parts) if parts > 1 else program
            # The sums over the micro-batches take room of their own.
            if largest is None or parts == 1 or not {"error", "hbm_bytes"} <= accumulated.keys():
                break
            parts = model.needed_accumulation(whole, largest, parts + 1)
        error = accumulated.get("error") or program.get("error") or update.get("error")
        found = dataclasses.replace(found, program=accumulated, error=error)
        if error:
            return found
        return dataclasses.replace(
            found,
            program=accumulated | model.whole_step(topology, program, update, parts),
            memory=_split(facts, accumulated, update),
            time=model.step_time(topology, program, update, parts),
        )

    def _foreseen(self, phase, least):
        """Programs that will be needed whatever the search finds: lowered in one process."""
        sizes = {replica_batch_size(self._recipe, phase, topology) for topology in self._topologies}
        sizes = sorted({min(size // least, START) for size in sizes})
        return [(None, 1), *((size, 1) for size in sizes)]

    def _step(self, number, topology, batch, parts):
        """Figures of a program, on the largest topology of a kind: the others differ in none."""
        self._children.lower(self._recipe, number, [(batch, parts)])
        of_kind = [t for t in self._topologies if t.generation == topology.generation]
        name = max(of_kind, key=lambda t: t.replicas).name
        key = batch, parts, name, None if batch is None else number
        if key not in self._compiled:
            self._compiled[key] = self._children.compile(number, batch, parts, name)
        return self._compiled[key]

    def _largest_batch(self, number, topology, start, update):
        """On this kind of TPU; searched once."""
        key = number, topology.generation.name
        if key not in self._largest:
            limit = topology.generation.hbm_bytes

            def needed(batch):
                program = self._step(number, topology, batch, 1)
                if "error" in program and "hbm_bytes" not in program:
                    raise _DoesNotCompile(program["error"])
                size = program["hbm_bytes"]
                # The compiler has the last word: it recomputes what does not fit.
                return max(size, limit + 1) if "error" in program else min(size, limit)

            most = self._recipe.phases[number].global_batch_size
            fixed = update.get("argument_bytes", 0)
            self._largest[key] = model.largest_batch(needed, start, fixed, limit, most)
        return self._largest[key]


def _split(facts, program, update):
    """Bytes of one replica, by what they are for."""
    state = facts["weight_bytes"] + facts["slot_bytes"]
    return {
        "parameters": facts["weight_bytes"],
        "slots": facts["slot_bytes"],
        "batch and tiles": max(0, program["argument_bytes"] - state),
        # One heap, whose parts take each other's place: the compiler says no more of it.
        "activations, gradients and temporaries": program["temporary_bytes"],
        "program": program["code_bytes"],
    }


def run(
    recipe, names: str, *, json_path: str, log, search: bool = True, strict: bool = False
) -> int:
    """The command; returns the exit status: 1 if something does not compile.

    Args:
        recipe: a checked recipe.
        names: of topologies, comma-separated.
        json_path: where the rows go as JSON, and beside it the picture; "" for neither.
        log: takes lines of progress.
        search: as for `Examiner`.
        strict: whether TensorFlow's own TPU kernels are asked, too.
    """
    # Matplotlib and the report are for this command alone.
    from preflight import picture as preflight_picture
    from preflight import report

    topologies = sorted(parse_topologies(names), key=lambda t: (t.generation.name, t.chips))
    check_installed()
    if json_path:
        _check_json_path(json_path)
    if strict:
        check_strict_installed()
    for topology in topologies:
        for phase in recipe.phases:
            replica_batch_size(recipe, phase, topology)
    findings = findings_of(recipe, topologies, log=log, search=search, strict=strict)
    print(report.in_words(recipe, findings))
    if json_path:
        _write(json_path, json.dumps([finding.row() for finding in findings], indent=1))
        picture = os.path.splitext(json_path)[0] + PICTURE
        try:
            preflight_picture.draw(recipe, findings, picture)
        except OSError as error:
            raise InputError(f"{picture} cannot be written ({error.strerror}).") from None
        print(f"\nWritten    {json_path}, {picture}")
    return int(any(finding.error for finding in findings))


def findings_of(recipe, topologies, *, log, search, strict=False) -> list[Finding]:
    """Each phase on each topology."""
    with tempfile.TemporaryDirectory() as folder:
        children = Children(log, folder)
        examiner, findings = Examiner(recipe, topologies, children, search), []
        for number in range(len(recipe.phases)):
            of_phase = [examiner.examine(number, topology) for topology in topologies]
            if strict:
                parts = max(f.accumulation or recipe.accumulation for f in of_phase)
                asked = children.ask_kernels(
                    dataclasses.replace(recipe, accumulation=parts), number
                )
                of_phase = [
                    dataclasses.replace(
                        finding,
                        operations=asked["operations"],
                        error=finding.error or asked["error"],
                    )
                    for finding in of_phase
                ]
            findings += of_phase
        return findings


def _check_json_path(path: str) -> None:
    """Compiling takes long: whether its results can be kept is asked before."""
    if path.endswith(PICTURE):
        raise InputError(f"--preflight_json={path}: the picture has that name. End it in .json.")
    _write(path, "", keep=False)


def _write(path: str, text: str, keep: bool = True) -> None:
    try:
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{path}.new", path) if keep else os.remove(f"{path}.new")
    except OSError as error:
        raise InputError(f"--preflight_json={path} cannot be written ({error.strerror}).") from None
