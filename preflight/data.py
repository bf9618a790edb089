"""Checks the data of a recipe for a pod: whether each host could read its share, and how fast."""

import dataclasses
import time

import tensorflow as tf

from inputs.errors import InputError
from inputs.order import EXAMPLES_PER_LANE, LANES, Order, number_of_lanes, share_of
from preflight.compiler.topology import Topology
from preflight.example_data import write_example_data
from tasks import TASKS
from tasks.squad import POSITIONS, RANDOM
from training import input_graph
from training.strategy import with_infinite_cardinality

MEASURED_SECONDS = 10.0  # of wall time, for each data set


@dataclasses.dataclass(frozen=True)
class DataResult:
    """The data sets of one host, of training and evaluation.

    Attributes:
        hosts: the number of hosts of the slice.
        graph: the `input_graph.InputGraph`; None if the hosts cannot share the data.
        problems: a sentence for each reason why a host could not make its batches.
        examples_per_core: that this machine makes per second of processor time, at the least,
            because the first batches take longer; None if none were made.
        is_example: whether the graph is that of example data, see `examine_example`.
    """

    hosts: int
    graph: input_graph.InputGraph | None
    problems: tuple[str, ...]
    examples_per_core: float | None
    is_example: bool = False


def examine_example(recipe, topologies, folder: str) -> list[DataResult]:
    """Examines the input graphs of a recipe without its data.

    The operations of the graphs are those for prepared text, questions, or images. Constants that
    grow with the data, such as the names of its files, are smaller than those of real data. Whether
    the hosts can share the data is decided for a large data set.

    Args:
        recipe: a checked recipe.
        topologies: the slices.
        folder: an existing folder, for the example data.

    Returns:
        For each phase, one result for each topology.

    Raises:
        InputError: the example data cannot be written.
    """
    changes = {"init_from": "", "init_slots": False, "target": None}  # weights are not read
    if recipe.task == "squad":
        length = min(recipe.sequence_length, POSITIONS)  # a checkpoint could have more positions
        changes |= {"init_from": RANDOM, "sequence_length": length}
    changes = {name: value for name, value in changes.items() if hasattr(recipe, name)}
    task = TASKS[recipe.task](
        dataclasses.replace(recipe, **changes),
        **write_example_data(recipe, folder),
        resume_dir=None,
        seed=0,
        synthetic=False,
        log=lambda line: None,
        cache_dir=folder,
        shared_dir=folder,
    )
    results = []
    for phase_index, phase in enumerate(recipe.phases):
        context = tf.distribute.InputContext(1, 0, topologies[0].replicas)
        graph = input_graph.examine_phase(task, phase_index, context, folder)
        for topology in topologies:
            hosts = topology.replicas // topology.replicas_per_host
            # A single host is the machine that training runs on.
            problems = ()
            if hosts > 1:
                problems = (*graph.problems, *_lane_problems(recipe, phase, topology))
            results.append(DataResult(hosts, graph, problems, None, is_example=True))
    return results


def _lane_problems(recipe, phase, topology):
    """Why the hosts of a slice could not share a large data set: at most one sentence."""
    batch = phase.global_batch_size
    examples = LANES * EXAMPLES_PER_LANE
    order = Order(examples, batch, recipe.lanes or number_of_lanes(batch, examples), 1, 1, None)
    hosts = topology.replicas // topology.replicas_per_host
    try:
        share_of(order, tf.distribute.InputContext(hosts, 0, topology.replicas))
    except InputError as error:
        return [str(error)]
    return []


def examine_data(task, phase_index: int, topology: Topology, shared_dir: str) -> DataResult:
    """Examines the data sets of the first host of a slice, and makes some training batches.

    Args:
        task: a `tasks.task.Task` with real data.
        phase_index: from 0.
        topology: the slice.
        shared_dir: the `shared_dir` of the task.
    """
    hosts = topology.replicas // topology.replicas_per_host
    context = tf.distribute.InputContext(hosts, 0, topology.replicas)
    input_fn = task.train_batches(phase_index, 0)
    try:
        graph = input_graph.examine_phase(
            task, phase_index, context, shared_dir if hosts > 1 else ""
        )
    except InputError as error:
        return DataResult(hosts, None, (str(error),), None)
    # A single host is the machine that training runs on.
    problems = graph.problems if hosts > 1 else ()
    if problems:
        return DataResult(hosts, graph, problems, None)
    rate = _examples_per_core(input_fn, context)
    try:
        task.check_data()  # what was damaged in these batches
    except InputError as error:
        return DataResult(hosts, graph, (str(error),), rate)
    return DataResult(hosts, graph, (), rate)


def _examples_per_core(input_fn, context) -> float:
    """Examples per second of processor time.

    The first batch is part of it: the data set mixes the examples of a window, and with the first
    batch makes all of a window.
    """
    batches = iter(with_infinite_cardinality(input_fn)(context))
    examples = 0
    begin = time.perf_counter()
    spent = time.process_time()
    while not examples or time.perf_counter() - begin < MEASURED_SECONDS:
        examples += int(tf.nest.flatten(next(batches))[0].shape[0])
    return examples / (time.process_time() - spent)
