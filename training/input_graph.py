"""Checks the graph of a data set: whether any host of a pod can run it by itself."""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Iterator

import tensorflow as tf
from tensorflow.python.framework import kernels  # no public function lists kernels (2.20)

from inputs.damage import SCRATCH

MAX_CONSTANT_BYTES = 4 * 2**20  # of one tensor in the graph
PYTHON_OPERATIONS = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}
HOST_DEVICES = {"CPU", "DEFAULT"}
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
ONE_PROCESS = "ram://"


@dataclasses.dataclass(frozen=True)
class InputGraph:
    """What the graph of a data set consists of.

    Attributes:
        operations: the kinds of operations.
        largest_constant: bytes of the largest tensor in it, or captured by it.
        paths: the files and folders named in it.
        problems: a sentence for each reason why a host could not run it.
    """

    operations: frozenset[str]
    largest_constant: int
    paths: frozenset[str]
    problems: tuple[str, ...]

    @property
    def mounted(self) -> list[str]:
        """The folders without a scheme, which all hosts must have mounted at the same place."""
        local = {os.path.dirname(path) for path in self.paths if not SCHEME.match(path)}
        return sorted(folder for folder in local if os.path.dirname(folder) not in local)


def examine_phase(task, phase_index: int, context, shared_dir: str = "") -> InputGraph:
    """Examines the data sets of a phase, of training and evaluation, as one; see `examine`.

    Args:
        task: a `tasks.task.Task`.
        phase_index: from 0.
        context, shared_dir: as in `examine`.
    """
    training = examine(task.train_batches(phase_index, 0), context, shared_dir)
    evaluation = examine(task.evaluation_batches(phase_index), context, shared_dir)
    only = [problem for problem in evaluation.problems if problem not in training.problems]
    return InputGraph(
        training.operations | evaluation.operations,
        max(training.largest_constant, evaluation.largest_constant),
        training.paths | evaluation.paths,
        (*training.problems, *(f"In evaluations: {problem}" for problem in only)),
    )


def examine(
    input_fn: Callable, context: tf.distribute.InputContext, shared_dir: str = ""
) -> InputGraph:
    """Traces a data set and examines its graph, without running it.

    Args:
        input_fn: `(context) -> tf.data.Dataset`, such as from `Task.train_batches`.
        context: of any host.
        shared_dir: a folder that is known to be shared by all hosts; paths in it are left out.

    Raises:
        InputError: the hosts cannot share the data.
    """
    traced = tf.function(lambda: input_fn(context)._variant_tensor, autograph=False)
    concrete = traced.get_concrete_function()
    definition = concrete.graph.as_graph_def()
    functions = {function.signature.name for function in definition.library.function}
    nodes = [*definition.node]
    for function in definition.library.function:
        nodes += function.node_def
    operations = frozenset(node.op for node in nodes) - functions
    problems = [*_operation_problems(operations)]
    sizes = [0]
    paths = set()
    for node in nodes:
        if node.op == "Const":
            value = node.attr["value"].tensor
            sizes.append(value.ByteSize())
            paths |= set(_paths(value.string_val))
    for tensor in concrete.captured_inputs:
        if tensor.dtype in (tf.resource, tf.variant):
            problems.append(
                "The data set uses a table, variable or data set that was made outside of it, in "
                "the coordinator. Make it within the input function."
            )
            continue
        sizes.append(tf.make_tensor_proto(tensor).ByteSize())
        if tensor.dtype == tf.string:
            paths |= set(_paths(tensor.numpy().ravel().tolist()))
    if shared_dir:
        paths = {path for path in paths if not path.startswith(os.path.join(shared_dir, ""))}
    if max(sizes) > MAX_CONSTANT_BYTES:
        problems.append(
            f"The graph of the data set holds a tensor of {max(sizes) / 2**20:.1f} MiB, which is "
            f"copied to every host; at most {MAX_CONSTANT_BYTES / 2**20:.0f} MiB are allowed. Read "
            "it from a file instead."
        )
    problems += _path_problems(paths)
    return InputGraph(operations, max(sizes), frozenset(paths), tuple(problems))


def _operation_problems(operations) -> Iterator[str]:
    for name in sorted(operations & PYTHON_OPERATIONS):
        yield (
            f"The data set calls a Python function ({name}), which only the coordinator could run "
            "for all hosts. Use TensorFlow operations."
        )
    for name in sorted(operations - PYTHON_OPERATIONS):
        found = kernels.get_registered_kernels_for_op(name).kernel
        if not any(kernel.device_type in HOST_DEVICES for kernel in found):
            yield f"The data set's operation {name} has no kernel for the CPU of a host."


def _paths(values) -> Iterator[str]:
    """Yields what looks like a path among the strings of a graph."""
    for value in values:
        text = value.decode(errors="surrogateescape").removeprefix("file://")
        if "\n" in text or "\0" in text or "/" not in text.strip("/"):
            continue
        if SCHEME.match(text) or text.startswith("/") or os.path.exists(text):
            yield text


def _path_problems(paths) -> Iterator[str]:
    """Yields a sentence for each folder and reason, which may concern thousands of files."""
    found = collections.defaultdict(list)
    for path in sorted(paths):
        if path.startswith(ONE_PROCESS):
            reason = "in the memory of one process only; other hosts cannot open it."
        elif not SCHEME.match(path) and not os.path.isabs(path):
            reason = (
                "relative to the folder of this process, which other hosts do not have. Give the "
                "path from / on, or one with a scheme, such as gs://."
            )
        elif any(path.startswith(folder) for folder in SCRATCH):
            reason = "in a temporary folder of this machine; other hosts cannot open it."
        else:
            continue
        found[os.path.dirname(path), reason].append(path)
    for (folder, reason), files in found.items():
        if len(files) == 1:
            yield f"{files[0]} is {reason}"
        else:
            yield f"{folder}, where {len(files):,} of the files are, is {reason}"
