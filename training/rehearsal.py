"""Rehearses a pod: each host is a process of this machine that reads the real data.

A pod slice is driven by one process, the coordinator, which sends each host the graph of the
host's data set. So does `rehearse`: each of N TensorFlow servers gets the same data set as on a
pod, all make the batches of some steps at the same time, and one runs a few steps
of the training program. Only what needs a TPU is left out.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras

from inputs.errors import InputError
from inputs.order import with_one_graph
from inputs.process import signals_as_interrupt
from inputs.storage.files import atomic_write, check_file_writable, temporary_folder
from training import input_graph
from training.host import JOB
from training.monitor.progress import HISTORY, read_rows
from training.run import Run
from training.strategy import FATAL, silence_tensorflow, with_infinite_cardinality

ROOT = pathlib.Path(__file__).parents[1]
MAX_HOSTS = 64  # each is a process
REPLICAS = 8  # at most, of a host: those of a TPU v3
STEPS = 20  # for which batches are made, and trained on
MAX_TRAINING_BATCH = 64  # examples of a training step: one host's CPU stands for a TPU
MAX_SENT_BYTES = 10**6  # by the coordinator, per step
LOCAL = "/job:localhost/replica:0/task:0/device:CPU:0"
STOP_SECONDS = 10.0
# Of `struct tcp_info` in linux/tcp.h: the bytes that the peer has acknowledged.
ACKED_OFFSET = 120


class Hosts:
    """Servers on loopback, to which this process is connected. A context manager.

    Enter it before the first TensorFlow operation of the process.

    Args:
        count: the number of servers.

    Attributes:
        devices: the name of each one's CPU device.

    Raises:
        InputError: a server does not start.
    """

    def __init__(self, count: int):
        self._count = count
        self.devices = [f"/job:{JOB}/replica:0/task:{i}/device:CPU:0" for i in range(count)]

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._processes = [stack.enter_context(self._server(i)) for i in range(self._count)]
            addresses = [process.stdout.readline().strip() for process in self._processes]
            self.check(addresses)
            tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec({JOB: addresses}))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        # TensorFlow logs as errors that it cannot reach the servers to free what they hold.
        silence_tensorflow(FATAL)
        self._stack.close()

    @contextlib.contextmanager
    def _server(self, index):
        process = subprocess.Popen(
            [sys.executable, "-m", "training.host", str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd="/",  # a host does not have the folder of this process
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "CUDA_VISIBLE_DEVICES": "-1",
            },
            start_new_session=True,  # Ctrl-C is for this process, which then ends them
        )
        try:
            yield process
        finally:
            process.stdin.close()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def check(self, started=None) -> None:
        """Raises `InputError` if a server has ended.

        Args:
            started: what each has printed; "" if it has ended.
        """
        for index, process in enumerate(self._processes):
            if process.poll() is not None or (started and not started[index]):
                self._errors.seek(0)
                lines = self._errors.read().decode(errors="replace").strip().splitlines()
                raise InputError(
                    f"--rehearse: the process of host {index} has ended "
                    f"({lines[-1] if lines else f'status {process.wait()}'})."
                )

    def measure(self) -> list[dict[str, int]]:
        """The bytes read and the memory of each server; see `measure`."""
        return [measure(process.pid) for process in self._processes]


def measure(pid: int | str) -> dict[str, int]:
    """What Linux says about a process.

    Returns:
        `read_bytes`, by read calls, from whichever file; `memory_bytes`, without what the kernel
        caches of files; `peak_bytes`, with mapped files, since the process began.
    """
    counts = dict(
        line.split(": ") for line in pathlib.Path(f"/proc/{pid}/io").read_text().splitlines()
    )
    status = dict(
        line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    sizes = {key: int(status[key].split()[0]) * 1024 for key in ("RssAnon", "VmHWM")}
    return {
        "read_bytes": int(counts["rchar"]),
        "memory_bytes": sizes["RssAnon"],
        "peak_bytes": sizes["VmHWM"],
    }


def sent_bytes() -> int:
    """The bytes that the peers of this process's TCP connections have acknowledged."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed, no socket, or not connected
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                connection.getpeername()
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(info) >= ACKED_OFFSET + 8:
                    total += struct.unpack_from("<Q", info, ACKED_OFFSET)[0]
    return total


def replicas_per_host(recipe, hosts: int) -> int:
    """The number of replicas that each host stands for.

    Raises:
        InputError: the hosts cannot share a batch of the recipe equally.
    """
    for phase in recipe.phases:
        batch = phase.global_batch_size
        if batch % hosts:
            fits = [n for n in range(1, hosts) if batch % n == 0]
            raise InputError(
                f"--rehearse={hosts}: {hosts} hosts cannot share a batch of {batch:,} equally. Use "
                f"--rehearse={fits[-1]}, or a --global_batch_size that is a multiple of {hosts}."
            )
    return max(
        replicas
        for replicas in range(1, REPLICAS + 1)
        if all(phase.global_batch_size % (hosts * replicas) == 0 for phase in recipe.phases)
    )


class Batches:
    """The batches of a host, as fingerprints.

    Args:
        input_fn: `(context) -> tf.data.Dataset`, of infinite cardinality.
        context: `tf.distribute.InputContext` of the host.
        device: name of its CPU device.
        like: the `Batches` of another host, whose graph of fingerprints serves this one, too.
    """

    def __init__(self, input_fn, context, device, like=None):
        self.device = device
        self._replicas = context.num_replicas_in_sync // context.num_input_pipelines
        # Each host apart, so that its rate can be measured.
        with tf.device(device):
            self._iterator = iter(input_fn(context))
        self.names = sorted(self._iterator.element_spec)
        self._fingerprints = like._fingerprints if like else _traced(self._iterator.element_spec)

    def read(self, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Makes the batches of the next steps; only fingerprints leave the host.

        Returns:
            The fingerprint of each example, [steps, examples of the host] int64; that of each
            tensor of each replica, [steps, replicas, tensors]; and the seconds that it took.
        """
        begin = time.perf_counter()
        with tf.device(self.device):
            found = self._fingerprints(self._iterator, tf.constant(steps * self._replicas))
        examples, tensors = (values.numpy() for values in found)
        seconds = time.perf_counter() - begin
        return (
            examples.reshape(steps, self._replicas * examples.shape[1]),
            tensors.reshape(steps, self._replicas, tensors.shape[1]),
            seconds,
        )


def _traced(element_spec):
    """A function of an iterator and a number of batches, traced once: not again for each device.

    It returns fingerprints of their examples, [count, B], and of their tensors, [count, K].
    """

    def fingerprints(iterator, count):
        def batch(i, examples, tensors):
            example, tensor = _batch_fingerprints(next(iterator))
            return i + 1, examples.write(i, example), tensors.write(i, tensor)

        arrays = [tf.TensorArray(tf.int64, count) for _ in range(2)]
        _, examples, tensors = tf.while_loop(lambda i, *_: i < count, batch, (0, *arrays))
        return examples.stack(), tensors.stack()

    signature = [tf.data.IteratorSpec(element_spec), tf.TensorSpec([], tf.int32)]
    function = tf.function(fingerprints, input_signature=signature, autograph=False)
    return function.get_concrete_function()


def _batch_fingerprints(batch):
    """[B] int64 of the examples, and [K] of the tensors, by name."""
    each = [_fingerprint(batch[name]) for name in sorted(batch)]
    return _fingerprint(tf.stack(each, 1)), _fingerprint(tf.stack(each))


def _fingerprint(values):
    """[N] int64 of [N, ...] values."""
    return tf.bitcast(tf.raw_ops.Fingerprint(data=values, method="farmhash64"), tf.int64)


@dataclasses.dataclass(frozen=True)
class PhaseReport:
    """The batches of a phase.

    A host's figures are a dictionary: `examples_per_second` after the first step; `first_seconds`,
    how long that one took; `read_bytes`, with what was read ahead; `files`, from which the examples
    are; `memory_bytes` and `peak_bytes`, see `measure`; and `grown_bytes`, by how much the memory
    grew.

    Attributes:
        phase_index: from 0.
        batch: examples per step.
        replicas: of each host.
        steps: that were made, the first one included.
        graph: the `input_graph.InputGraph`.
        hosts: each host's figures.
        alone: those of one host that makes all of the same batches.
        set_up_bytes: sent by the coordinator up to the end of the first step, mostly graphs.
        sent_bytes: sent by the coordinator per step after that.
        coordinator_read_bytes: read by the coordinator while the hosts made the batches.
        equal: whether all hosts made the batches that the one made.
        evaluation_batches: the number of batches of the evaluation that were compared, too; 0 if
            the hosts made other ones than the one.
        problems: sentences.
    """

    phase_index: int
    batch: int
    replicas: int
    steps: int
    graph: input_graph.InputGraph
    hosts: list[dict]
    alone: dict
    set_up_bytes: int
    sent_bytes: float
    coordinator_read_bytes: int
    equal: bool
    evaluation_batches: int
    problems: tuple[str, ...]


def rehearse_phase(
    task, phase_index: int, hosts: Hosts, replicas: int, shared_dir: str
) -> PhaseReport:
    """Lets all hosts make the first batches of a phase, and compares them with those of one host.

    First those of training, which are measured, then those of its evaluations.

    Args:
        task: a `tasks.task.Task`.
        phase_index: from 0.
        hosts: entered.
        replicas: of each host.
        shared_dir: the `shared_dir` of the task.

    Raises:
        InputError: the data cannot be shared by the hosts, or is damaged.
    """
    phase = task.recipe.phases[phase_index]
    count = len(hosts.devices)
    steps = max(2, min(STEPS, phase.steps))  # the first one is measured apart
    input_fn = with_infinite_cardinality(task.train_batches(phase_index, 0))
    contexts = [tf.distribute.InputContext(count, i, count * replicas) for i in range(count)]
    graph = input_graph.examine_phase(task, phase_index, contexts[0], shared_dir)
    problems = list(graph.problems)
    if problems:  # it would fail with an error that is harder to understand
        return PhaseReport(
            phase_index,
            phase.global_batch_size,
            replicas,
            steps=0,
            graph=graph,
            hosts=[],
            alone={},
            set_up_bytes=0,
            sent_bytes=0.0,
            coordinator_read_bytes=0,
            equal=False,
            evaluation_batches=0,
            problems=tuple(problems),
        )
    sent = sent_bytes()
    own = measure("self")["read_bytes"]
    before = hosts.measure()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        shared = with_one_graph(input_fn)
        made = []
        for context, device in zip(contexts, hosts.devices, strict=True):
            made.append(Batches(shared, context, device, like=made[0] if made else None))
        first = list(pool.map(lambda batches: batches.read(1), made))
        set_up, sent = sent_bytes() - sent, sent_bytes()
        rest = list(pool.map(lambda batches: batches.read(steps - 1), made))
    per_step = (sent_bytes() - sent) / max(1, steps - 1)
    coordinator_read = measure("self")["read_bytes"] - own
    after = hosts.measure()
    names = made[0].names
    del made  # the hosts stop reading ahead

    def figures(first, rest, before, after, context):
        examples = rest[0].size
        return {
            "examples_per_second": examples / rest[2] if examples else None,
            "first_seconds": first[2],
            "read_bytes": after["read_bytes"] - before["read_bytes"],
            "files": len(task.files_read(phase_index, context, steps)),
            "memory_bytes": after["memory_bytes"],
            "grown_bytes": after["memory_bytes"] - before["memory_bytes"],
            "peak_bytes": after["peak_bytes"],
        }

    one = tf.distribute.InputContext(1, 0, count * replicas)
    before_one = measure("self")
    alone = Batches(input_fn, one, LOCAL)
    expected = alone.read(1), alone.read(steps - 1)
    after_one = measure("self")
    del alone
    differences = compare(
        [np.concatenate([a[0], b[0]]) for a, b in zip(first, rest, strict=True)],
        [np.concatenate([a[1], b[1]]) for a, b in zip(first, rest, strict=True)],
        np.concatenate([expected[0][0], expected[1][0]]),
        np.concatenate([expected[0][1], expected[1][1]]),
        names,
    )
    evaluated, evaluation_problems = compare_evaluations(
        task.evaluation_batches(phase_index), hosts, contexts, one
    )
    problems += [*differences, *evaluation_problems]
    if per_step > MAX_SENT_BYTES:
        problems.append(
            f"The coordinator sent {per_step:,.0f} bytes per step to the hosts; at most "
            f"{MAX_SENT_BYTES:,} are allowed, as it feeds all hosts of a pod."
        )
    return PhaseReport(
        phase_index=phase_index,
        batch=phase.global_batch_size,
        replicas=replicas,
        steps=steps,
        graph=graph,
        hosts=list(map(figures, first, rest, before, after, contexts)),
        alone=figures(*expected, before_one, after_one, one),
        set_up_bytes=set_up,
        sent_bytes=per_step,
        coordinator_read_bytes=coordinator_read,
        equal=not differences,
        evaluation_batches=evaluated,
        problems=tuple(problems),
    )


def compare_evaluations(input_fn, hosts: Hosts, contexts, one) -> tuple[int, list[str]]:
    """Lets all hosts make the batches of an evaluation, and compares them with those of one host.

    Args:
        input_fn: `(context) -> tf.data.Dataset`, which ends.
        hosts: entered.
        contexts: `tf.distribute.InputContext` of each host.
        one: that of a single host with the same number of replicas.

    Returns:
        The number of global batches, `STEPS` at most, or 0 if they differ; and a sentence if they
        do.
    """

    def fingerprints(context):
        replicas = context.num_replicas_in_sync // context.num_input_pipelines
        batches = input_fn(context).take(STEPS * replicas).map(_batch_fingerprints)
        return batches.batch(STEPS * replicas)  # one element

    def read(context, device):
        with tf.device(device):
            return [values.numpy() for values in shared(context).get_single_element()]

    shared = with_one_graph(fingerprints)
    with concurrent.futures.ThreadPoolExecutor(len(contexts)) as pool:
        made = list(pool.map(read, contexts, hosts.devices))
    expected = read(one, LOCAL)
    counts = [len(examples) for examples, _ in made]
    if {*counts} != {len(expected[0]) / len(contexts)}:
        return 0, [
            f"In evaluations: the hosts make {', '.join(map(str, counts))} batches for their "
            f"replicas, and a single host makes {len(expected[0])}; a host that ends before the "
            "others stops all of them."
        ]
    steps = len(expected[0]) // one.num_replicas_in_sync
    replicas = one.num_replicas_in_sync // len(contexts)

    def by_step(examples, tensors, replicas):
        return examples.reshape(steps, -1), tensors.reshape(steps, replicas, -1)

    own = [by_step(*found, replicas) for found in made]
    names = sorted(input_fn(one).element_spec)
    differences = compare(
        *zip(*own, strict=True), *by_step(*expected, one.num_replicas_in_sync), names
    )
    return (0 if differences else steps), [f"In evaluations: {said}" for said in differences]


def compare(examples, tensors, expected, expected_tensors, names) -> list[str]:
    """Compares what all hosts made with what one host made.

    Args:
        examples: of each host, [steps, examples of the host] fingerprints.
        tensors: of each host, [steps, replicas, tensors].
        expected: [steps, examples] of one host.
        expected_tensors: [steps, replicas, tensors].
        names: of the tensors.

    Returns:
        A sentence about the first difference; [] if there is none.
    """
    own = examples[0].shape[1]
    found = np.concatenate(examples, 1)
    found_tensors = np.concatenate(tensors, 1)
    differing = np.argwhere(found != expected)
    if not len(differing):
        return []
    step, place = differing[0]
    replica = place // (own // tensors[0].shape[1])
    which = found_tensors[step, replica] != expected_tensors[step, replica]
    fields = ", ".join(name for name, differs in zip(names, which, strict=True) if differs)
    return [
        f"The hosts do not make the batches that one host makes: {len(differing):,} of "
        f"{found.size:,} examples differ; the first is example {place:,} of step {step:,}, on host "
        f"{place // own}, in {fields}."
    ]


def train_on_host(task, hosts: Hosts, *, model_dir: str, seed: int, log) -> dict:
    """Runs some steps of the first phase, an evaluation and a checkpoint on host 0.

    Args:
        task: a `tasks.task.Task`.
        hosts: entered.
        model_dir: a temporary folder.
        seed: see `Run`.
        log: takes lines of progress.

    Returns:
        `losses`, a list; `batch`, the examples per step; `sent_bytes`, by the coordinator per step,
        with the graphs and the checkpoint.
    """
    recipe = shortened(task.recipe)
    task = copy.copy(task)
    task.recipe = recipe
    tf_keras.utils.set_random_seed(seed)
    sent = sent_bytes()
    run = Run(
        task,
        recipe,
        tf.distribute.OneDeviceStrategy(hosts.devices[0]),
        model_dir=model_dir,
        seed=seed,
        steps_per_loop=1,  # so that each loss is known
        log=log,
    )
    with _ends_of_data_ignored():
        run.fit()
    return {
        "losses": [row["loss"] for row in read_rows(os.path.join(model_dir, HISTORY))],
        "batch": recipe.phases[0].global_batch_size,
        "sent_bytes": (sent_bytes() - sent) / recipe.steps,
    }


@contextlib.contextmanager
def _ends_of_data_ignored():
    """Hides a traceback about the end of the evaluation's data.

    A data set's end on another host is an error that TensorFlow 2.20 raises a second time, in
    `Executor.__del__`, where Python can only print it.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        if not isinstance(unraisable.exc_value, tf.errors.OutOfRangeError):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def shortened(recipe):
    """The recipe with `STEPS` steps of a batch that the CPU of one host can compute."""
    phase = recipe.phases[0]
    batch = min(phase.global_batch_size, MAX_TRAINING_BATCH)
    if batch != phase.global_batch_size:
        recipe = dataclasses.replace(recipe, accumulation=1, measure_noise_scale=False, lanes=None)
    phase = dataclasses.replace(
        phase.stretched(min(STEPS, phase.steps), 1.0), global_batch_size=batch
    )
    return dataclasses.replace(
        recipe,
        phases=(phase,),
        evaluation_examples=batch,
        evaluate_every_steps=None,
        profile=None,
    )


def run(make_task: Callable, recipe, count: int, *, seed: int, json_path: str, log) -> int:
    """Runs the command `train.py --rehearse`.

    Args:
        make_task: `(shared_dir) -> tasks.task.Task`; called after the hosts are connected.
        recipe: a checked recipe.
        count: the number of hosts.
        seed: the run's seed.
        json_path: file for the figures as JSON, or "".
        log: takes lines of progress.

    Returns:
        The exit status: 1 if there is a problem, else 0.

    Raises:
        InputError: the hosts cannot share the batch, a host does not start, or the data cannot be
            read.
    """
    if not 1 <= count <= MAX_HOSTS:
        raise InputError(f"--rehearse must lie in [1, {MAX_HOSTS}]. Received: --rehearse={count}.")
    if json_path:
        check_file_writable(json_path, f"--rehearse_json={json_path}")
    replicas = replicas_per_host(recipe, count)
    log(f"Starting {count} hosts as processes of this machine")
    with signals_as_interrupt(), temporary_folder("rehearsal-") as folder, Hosts(count) as hosts:
        try:
            task = make_task(folder)
            reports = []
            for phase_index in range(len(recipe.phases)):
                log(f"Phase {phase_index + 1}: {count} hosts make batches")
                reports.append(rehearse_phase(task, phase_index, hosts, replicas, folder))
            training = None
            if not any(report.problems for report in reports):
                log("Training on host 0")
                training = train_on_host(task, hosts, model_dir=folder, seed=seed, log=log)
            task.check_data()
        except tf.errors.OpError:
            hosts.check()  # names the host that has ended
            raise
        text = describe(task, reports, training)
    problems = [problem for report in reports for problem in report.problems]
    if training and not np.isfinite(np.array(training["losses"], float)).all():
        problems.append("The training step on host 0 gave a loss that is not finite.")
    try:
        print(text, flush=True)
    finally:  # also if standard output cannot be written
        if json_path:
            content = {
                "recipe": recipe.name,
                "hosts": count,
                "phases": [_json(report) for report in reports],
                "training": training,
                "problems": problems,
            }
            _write(json_path, content)
    for problem in problems:
        log(f"train.py: {problem}")
    return int(bool(problems))


def _write(json_path: str, content: dict) -> None:
    try:
        with atomic_write(json_path) as file:
            file.write(json.dumps(content, indent=1))
    except OSError as error:
        raise InputError(
            f"--rehearse_json={json_path} cannot be written ({error.strerror})."
        ) from None


def _json(report):
    fields = dataclasses.asdict(report)
    graph = report.graph
    fields["graph"] = {
        "operations": sorted(graph.operations),
        "largest_constant": graph.largest_constant,
        "paths": sorted(graph.paths),
    }
    return fields


def describe(task, reports: list[PhaseReport], training: dict | None) -> str:
    """Formats the report."""
    lines = []
    for report in reports:
        graph = report.graph
        count = len(report.hosts)
        lines += [
            f"Phase {report.phase_index + 1}    {report.batch:,} {task.example_unit} per step, "
            f"{report.replicas} replicas per host; {report.steps} steps of batches were made",
            f"Graph      {len(graph.operations)} kinds of operations; largest tensor "
            f"{graph.largest_constant:,} bytes; {len(graph.paths):,} paths",
        ]
        if graph.mounted:
            lines.append(f"Mounts     every host must have {', '.join(graph.mounted)}")
        if not count:
            continue
        lines.append(
            f"           {task.example_unit + '/s':>13} {'first step s':>13} {'read MB':>9} "
            f"{'files':>6} {'memory MB':>10} {'grown MB':>9} {'peak MB':>8}"
        )
        rows = [*((f"Host {i}", host) for i, host in enumerate(report.hosts))]
        for name, figures in [*rows, ("One alone", report.alone)]:
            rate = figures["examples_per_second"]
            lines.append(
                f"{name:10} {'-' if rate is None else f'{rate:,.0f}':>13} "
                f"{figures['first_seconds']:>13.2f} {figures['read_bytes'] / 1e6:>9.2f} "
                f"{figures['files']:>6,} {figures['memory_bytes'] / 1e6:>10,.0f} "
                f"{figures['grown_bytes'] / 1e6:>9,.0f} {figures['peak_bytes'] / 1e6:>8,.0f}"
            )
        same = "equal" if report.equal else "differ from"
        lines += [
            f"Batches    the {report.steps} global batches of {count} hosts {same} those of one",
            *(
                [f"Evaluation global batches compared: {evaluated}, all equal"]
                if (evaluated := report.evaluation_batches)
                else []
            ),
            f"Coordinator sent {report.sent_bytes:,.0f} bytes per step, and "
            f"{report.set_up_bytes / 1e6:.2f} MB up to the first one; read "
            f"{report.coordinator_read_bytes / 1e6:.2f} MB",
        ]
    if training:
        losses = training["losses"]
        lines.append(
            f"Training   {len(losses)} steps of {training['batch']} {task.example_unit} on host 0, "
            f"evaluated and saved; loss {losses[0]:.4f} to {losses[-1]:.4f}; the coordinator sent "
            f"{training['sent_bytes'] / 1e6:.2f} MB per step, with graphs and checkpoint"
        )
    return "\n".join(lines)
