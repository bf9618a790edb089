"""Estimates what a recipe needs on a TPU pod: python train.py --preflight=v3:32x32

Child processes lower the training step of each phase, and compile it with the TPU compiler for each
topology. No TPU is needed. Training imports nothing from this package.
"""

import contextlib
import dataclasses
import fractions
import json
import math
import os
from collections.abc import Callable

import tensorflow as tf

from inputs.errors import InputError
from inputs.process import INTERRUPTED, signals_as_interrupt
from inputs.storage.files import (
    atomic_write,
    check_file_writable,
    temporary_folder,
)
from preflight import estimate, report
from preflight.compiler.children import (
    CACHE,
    ChildFailed,
    Children,
    check_installed,
    check_strict_installed,
    show_progress,
)
from preflight.compiler.topology import Topology, parse_topologies
from preflight.data import DataResult, examine_data, examine_example

GIB = 2**30
PICTURE_SUFFIX = ".png"
MAX_START = 32  # most examples per replica with which the search for the largest batch starts


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """One phase on one topology: the compiler's figures and the estimates made from them.

    Attributes:
        phase: the number of the phase, from 1.
        steps: number of steps of the phase.
        global_batch_size: examples per step over all replicas.
        topology: the slice.
        replica_batch_size: examples per replica and step.
        error: why the step does not compile, or which TPU kernels are missing; None if neither.
        accumulation: micro-batches per step; None if not even a single example fits in memory.
        largest: examples of the largest micro-batch that was tried and fits in memory; None if
            there was no search, or if it found none before it ended with `search_error`.
        search_error: why the search for the largest batch ended early; None if it did not. The step
            itself may still compile.
        parameters: number of trainable parameters.
        program: `preflight.compiler.compile.figures` of the step; FLOPs, bytes and seconds cover
            all its micro-batches. Contains `error` if the step does not compile, and the memory for
            one example alone if not even that fits.
        update: `preflight.compiler.compile.figures` of the update alone.
        memory: purpose -> bytes per replica.
        time: estimates for a step; None if it does not compile.
        num_operations: number of kinds of operations checked for TPU kernels; None if there was no
            check.
        data: what is known of the hosts' data; None before it is checked.
    """

    phase: int
    steps: int
    global_batch_size: int
    topology: Topology
    replica_batch_size: int
    error: str | None = None
    accumulation: int | None = None
    largest: int | None = None
    search_error: str | None = None
    parameters: int = 0
    program: dict = dataclasses.field(default_factory=dict)
    update: dict = dataclasses.field(default_factory=dict)
    memory: dict = dataclasses.field(default_factory=dict)
    time: estimate.StepTime | None = None
    num_operations: int | None = None
    data: DataResult | None = None

    @property
    def examples_per_host(self) -> float | None:
        """Examples per second that each host must make; None if the step does not compile."""
        return self.time and (
            self.replica_batch_size * self.topology.replicas_per_host / self.time.step
        )

    @property
    def minutes(self) -> float | None:
        """The estimated time of the whole phase; None if the step does not compile."""
        return self.time and self.steps * self.time.step / 60

    @property
    def utilization(self) -> float:
        """The FLOP/s of the step as a fraction of the chips' peak."""
        return self.time.compute / self.time.step

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all weights, which are float32, as the weights are."""
        return 4 * self.parameters

    @property
    def floats_per_parameter(self) -> float:
        """Floats that the update moves per parameter, from and to HBM."""
        return self.update["main_bytes"] / 4 / self.parameters

    @property
    def compiler_floats_per_parameter(self) -> float:
        """The same by the compiler, which from v4 on also counts on-chip memory."""
        return self.update["bytes_accessed"] / 4 / self.parameters

    def to_json(self) -> dict:
        """Returns the result as `--preflight_json` writes it.

        `bytes_accessed` and the entries with `compiler` in their names are the compiler's figures.
        From v4 on they contain on-chip memory. `seconds_by` says whether `work_seconds` is the
        compiler's time or that of the model. With `data_is_example`, `data_problems` are those of
        the input graph and of sharing the data, and `examples_per_core` is null.
        """
        time = self.time
        return {
            "phase": self.phase,
            "topology": self.topology.name,
            "replicas": self.topology.replicas,
            "compiles": self.error is None,
            "error": self.error,
            "replica_batch_size": self.replica_batch_size,
            "accumulation": self.accumulation,
            "search_error": self.search_error,
            "hbm_bytes": self.program.get("hbm_bytes"),
            "hbm_limit_bytes": self.topology.chip.hbm_bytes,
            "flops": self.program.get("flops"),
            "main_memory_bytes": self.program.get("main_bytes"),
            "bytes_accessed": self.program.get("bytes_accessed"),
            "update_bytes_per_parameter": time and 4 * self.floats_per_parameter,
            "compiler_update_bytes_per_parameter": time and 4 * self.compiler_floats_per_parameter,
            "seconds_by": time and time.source,
            "work_seconds": time and time.work,
            "compiler_seconds": time and time.compiler,
            "all_reduce_bytes": self.program.get("all_reduce_bytes"),
            "all_reduce_seconds": time and time.all_reduce,
            "step_seconds": time and time.step,
            "phase_minutes": self.minutes,
            "examples_per_host": self.examples_per_host,
            "examples_per_core": self.data and self.data.examples_per_core,
            "data_is_example": self.data and self.data.is_example,
            "data_problems": self.data and list(self.data.problems),
        }


def replica_batch_size(
    recipe, phase, topology: Topology, flag="--preflight", batch_flag="--global_batch_size"
) -> int:
    """Returns the number of examples per replica and step.

    Args:
        recipe: a checked recipe.
        phase: one of its phases.
        topology: the slice.
        flag: the flag that gives the topology, for the error message.
        batch_flag: the flag that sets the batch size, for the error message.

    Raises:
        InputError: the batch does not divide evenly; the message suggests one that does.
    """
    size, rest = divmod(phase.global_batch_size, topology.replicas)
    if rest or not size or size % recipe.accumulation:
        first = recipe.phases[0].global_batch_size
        where = f" of phase {recipe.phases.index(phase) + 1}" if len(recipe.phases) > 1 else ""
        # `batch_flag` sets the first phase's batch, and the others in proportion.
        shares = [
            fractions.Fraction(other.global_batch_size, first).limit_denominator(64)
            for other in recipe.phases
        ]
        unit = topology.replicas * recipe.accumulation
        unit *= math.lcm(*(share.denominator for share in shares))
        raise InputError(
            f"{flag}={topology.name}: the batch of {phase.global_batch_size}{where} does not "
            f"divide by {topology.replicas} replicas of {recipe.accumulation} micro-batch(es). Try "
            f"{batch_flag}={max(1, first // unit) * unit}."
        )
    return size


class _SearchError(Exception):
    """A batch that the search tries does not compile, for a reason other than memory."""


class PhaseExaminer:
    """Compiles the programs of a recipe. Each one is compiled once.

    Args:
        recipe: a checked recipe.
        topologies: all topologies that will be examined.
        children: lowers and compiles the programs.
        search: whether to search for the largest batch even if that of the recipe may fit.
    """

    def __init__(self, recipe, topologies, children: Children, search: bool):
        self._recipe = recipe
        self._topologies = topologies
        self._children = children
        self._search = search
        self._largest = {}
        self._compiled = {}

    def examine(self, phase_index: int, topology: Topology) -> PhaseResult:
        """Returns the result for a phase on a topology.

        Args:
            phase_index: the phase, from 0.
            topology: one of the topologies given to the constructor.
        """
        phase = self._recipe.phases[phase_index]
        result = PhaseResult(
            phase=phase_index + 1,
            steps=phase.steps,
            global_batch_size=phase.global_batch_size,
            topology=topology,
            replica_batch_size=replica_batch_size(self._recipe, phase, topology),
        )
        try:
            return self._examine(phase_index, topology, result)
        except ChildFailed as error:
            return dataclasses.replace(result, error=str(error))

    def _examine(self, phase_index, topology, result):
        phase = self._recipe.phases[phase_index]
        recipe_accumulation = self._recipe.accumulation
        batch = result.replica_batch_size
        self._children.lower(self._recipe, phase_index, self._first_programs(phase))
        update = self._figures(phase_index, topology, None, 1)
        facts = self._children.facts
        largest = search_error = None
        accumulation = recipe_accumulation
        micro_batch = batch // recipe_accumulation
        if self._search or micro_batch > MAX_START:
            largest, search_error = self._largest_batch(phase_index, topology, micro_batch, update)
            if not search_error:  # else the recipe's own batch may fit, although no one tried it
                accumulation = estimate.needed_accumulation(batch, largest, recipe_accumulation)
        while True:
            result = dataclasses.replace(
                result,
                accumulation=accumulation,
                largest=largest,
                search_error=search_error,
                parameters=facts["parameters"],
                update=update,
            )
            if accumulation is None:
                error = "not even a single example fits in memory"
                if largest and batch > 1:  # the last step that was tried has one in a micro-batch
                    error += " beside the accumulated gradients"
                else:
                    step = self._figures(phase_index, topology, 1, 1, quick=True)
                return dataclasses.replace(
                    result, program={"hbm_bytes": step.get("hbm_bytes")}, error=error
                )
            program = self._figures(phase_index, topology, batch // accumulation, 1)
            step = program
            if accumulation > 1:
                step = self._figures(phase_index, topology, batch, accumulation)
            # The accumulated gradients need memory, too, and the search compiles less carefully. If
            # the step does not fit, try smaller micro-batches.
            if largest is None or not {"error", "hbm_bytes"} <= step.keys():
                break
            accumulation = estimate.needed_accumulation(batch, largest, accumulation + 1)
        error = step.get("error") or program.get("error") or update.get("error")
        if error == search_error:
            search_error = None
        result = dataclasses.replace(result, program=step, error=error, search_error=search_error)
        if error:
            return result
        costs = (topology, program, update, accumulation, result.gradient_bytes)
        return dataclasses.replace(
            result,
            program=step | estimate.whole_step(*costs),
            memory=_memory_by_purpose(facts, step, update),
            time=estimate.step_time(*costs),
        )

    def _first_programs(self, phase):
        """Returns the programs that every search needs, so that one process lowers all of them."""
        sizes = {replica_batch_size(self._recipe, phase, topology) for topology in self._topologies}
        sizes = sorted({min(size // self._recipe.accumulation, MAX_START) for size in sizes})
        return [(None, 1), *((size, 1) for size in sizes)]

    def _figures(self, phase_index, topology, batch, accumulation, quick=False):
        """Returns the figures of a program, compiled for this topology.

        The update alone, which does not communicate, is compiled for the first topology with the
        same chips. With `quick`, the figures are those of the program without the optimizations
        that take long, if it has not been compiled with them.
        """
        self._children.lower(self._recipe, phase_index, [(batch, accumulation)])
        if batch is None:
            topology = next(t for t in self._topologies if t.chip == topology.chip)
        name = topology.name
        # The update is the same in all phases.
        key = (batch, accumulation, name, None if batch is None else phase_index)
        if quick and key not in self._compiled:
            key = (*key, quick)
        if key not in self._compiled:
            self._compiled[key] = self._children.compile(
                phase_index, batch, accumulation, name, quick=quick
            )
        return self._compiled[key]

    def _largest_batch(self, phase_index, topology, micro_batch, update):
        """Returns the largest batch that fits on these chips, and why the search ended early.

        It is searched for once. The search starts with the recipe's batch, if that is small.

        Returns:
            A tuple (`largest`, `search_error`), as in `PhaseResult`.
        """
        key = (phase_index, topology.chip.name)
        if key not in self._largest:
            limit = topology.chip.hbm_bytes
            fitting = []

            def memory_needed(batch):
                # Only the memory counts here. The step that is estimated is compiled in full.
                quick = batch != micro_batch
                try:
                    program = self._figures(phase_index, topology, batch, 1, quick=quick)
                except ChildFailed as error:
                    raise _SearchError(error) from None
                if "error" in program and "hbm_bytes" not in program:
                    raise _SearchError(program["error"])
                size = program["hbm_bytes"]
                # The compiler decides what fits, because it may recompute activations to save
                # memory.
                if "error" in program:
                    return max(size, limit + 1)
                fitting.append(batch)
                return min(size, limit)

            try:
                largest = estimate.largest_batch(
                    memory_needed,
                    min(micro_batch, MAX_START),
                    fixed_bytes=update.get("argument_bytes", 0),
                    limit_bytes=limit,
                    max_examples=self._recipe.phases[phase_index].global_batch_size,
                    wanted=micro_batch,
                )
                self._largest[key] = largest, None
            except _SearchError as error:
                self._largest[key] = max(fitting, default=None), str(error)
        return self._largest[key]


def _memory_by_purpose(facts, program, update):
    """Returns the bytes of one replica, by purpose."""
    state = facts["weight_bytes"] + facts["slot_bytes"]
    return {
        "parameters": facts["weight_bytes"],
        "slots": facts["slot_bytes"],
        "batch and padding": max(0, program["argument_bytes"] - state),
        # One number, because these buffers share memory in one heap.
        "activations, gradients and temporaries": program["temporary_bytes"],
        "program": program["code_bytes"],
    }


def run(
    recipe,
    names: str,
    *,
    json_path: str,
    log,
    search: bool = True,
    strict: bool = False,
    make_task: Callable | None = None,
) -> int:
    """Runs the command `train.py --preflight`.

    Args:
        recipe: a checked recipe.
        names: topologies, separated by commas.
        json_path: file for the results as JSON; a picture is written beside it. "" for neither.
        log: function that takes a line of progress.
        search: as for `PhaseExaminer`.
        strict: whether to check TensorFlow's TPU kernels, too.
        make_task: `(shared_dir) -> tasks.task.Task` with the data to check; None checks the input
            graph with example data.

    Returns:
        The exit status: 1 if a phase does not compile, has no kernels on a topology, or has an
        input graph or data that the hosts could not use; 130 after Ctrl-C; else 0.

    Raises:
        InputError: a topology is unknown, the batch does not divide by its replicas, the compiler
            is not installed, a file or the example data cannot be written, the host's memory is not
            sufficient, or the data cannot be read.
    """
    topologies = sorted(parse_topologies(names), key=lambda t: (t.chip.name, t.chips))
    check_installed()
    if json_path:
        _check_json_path(json_path)
    if strict:
        check_strict_installed()
    for topology in topologies:
        for phase in recipe.phases:
            replica_batch_size(recipe, phase, topology)
    try:
        checked = _check_data(make_task, recipe, topologies, log)
        with show_progress(log, total=len(recipe.phases) * len(topologies)) as progress:
            results = examine(recipe, topologies, progress=progress, search=search, strict=strict)
        results = [
            dataclasses.replace(result, data=one)
            for result, one in zip(results, checked, strict=True)
        ]
        try:
            print(report.describe(recipe, results), flush=True)
        finally:  # also if standard output cannot be written
            if json_path:
                picture_path = _write_results(json_path, recipe, results)
        if json_path:
            print(f"\nWritten    {json_path}, {picture_path}")
    except KeyboardInterrupt:
        log(
            f"--preflight: stopped. Nothing is written except what has been compiled, in {CACHE}; "
            "the same command goes on from there."
        )
        return INTERRUPTED
    return int(any(result.error or (result.data and result.data.problems) for result in results))


def _check_data(make_task, recipe, topologies, log) -> list[DataResult]:
    """For each phase, one result for each topology."""
    log("Checking the data of a host" if make_task else "Checking the input graph")
    with contextlib.suppress(RuntimeError):  # TensorFlow has been used before
        tf.config.set_visible_devices([], "GPU")  # another program may be training on it
    several = any(t.replicas > t.replicas_per_host for t in topologies)
    with signals_as_interrupt(), temporary_folder("preflight-data-") as folder:
        if not make_task:
            return examine_example(recipe, topologies, folder)
        shared_dir = folder if several else ""
        task = make_task(shared_dir)
        return [
            examine_data(task, phase_index, topology, shared_dir)
            for phase_index in range(len(recipe.phases))
            for topology in topologies
        ]


def examine(recipe, topologies, *, progress, search, strict=False) -> list[PhaseResult]:
    """Examines each phase on each topology.

    Args:
        recipe: a checked recipe.
        topologies: list of `Topology`.
        progress: from `preflight.compiler.children.show_progress`; advanced once per result.
        search: as for `PhaseExaminer`.
        strict: whether to check TensorFlow's TPU kernels, too.

    Returns:
        A list of `PhaseResult`: for each phase, one for each topology.
    """
    with signals_as_interrupt(), temporary_folder("preflight-") as folder:
        children = Children(progress, folder)
        examiner = PhaseExaminer(recipe, topologies, children, search)
        results = []
        for phase_index in range(len(recipe.phases)):
            phase_results = []
            for topology in topologies:
                phase_results.append(examiner.examine(phase_index, topology))
                progress.advance()
            if strict:
                phase_results = _add_kernel_check(recipe, phase_index, phase_results, children)
            results += phase_results
        return results


def _add_kernel_check(recipe, phase_index, results, children):
    """Returns the results of a phase with `num_operations`, and `error` if a kernel is missing."""
    accumulation = max(r.accumulation or recipe.accumulation for r in results)
    try:
        answer = children.check_kernels(
            dataclasses.replace(recipe, accumulation=accumulation), phase_index
        )
    except ChildFailed as error:  # what has been compiled is still reported
        answer = {"operations": None, "error": str(error)}
    return [
        dataclasses.replace(
            result, num_operations=answer["operations"], error=result.error or answer["error"]
        )
        for result in results
    ]


def _check_json_path(path: str) -> None:
    """Raises `InputError` if the results cannot be written. Called before the long compilation."""
    if path.lower().endswith(PICTURE_SUFFIX):
        raise InputError(
            f"--preflight_json={path}: this is the name of the picture. Use a name that ends in "
            ".json."
        )
    for written in (path, os.path.splitext(path)[0] + PICTURE_SUFFIX):
        check_file_writable(written, f"--preflight_json={path}")


def _write_results(json_path: str, recipe, results) -> str:
    """Writes the results as JSON and as a picture; returns the picture's path."""
    _write(json_path, json.dumps([result.to_json() for result in results], indent=1))
    picture_path = os.path.splitext(json_path)[0] + PICTURE_SUFFIX
    try:
        from preflight import picture  # Matplotlib takes a second to import

        picture.draw(recipe, results, picture_path)
    except OSError as error:
        raise InputError(f"{picture_path} cannot be written ({error.strerror}).") from None
    return picture_path


def _write(path: str, text: str) -> None:
    with _report_write_errors(path), atomic_write(path) as file:
        file.write(text)


@contextlib.contextmanager
def _report_write_errors(path: str):
    """Turns an `OSError` into an `InputError` that names the flag."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--preflight_json={path} cannot be written ({error.strerror}).") from None
