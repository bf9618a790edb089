"""The distribution strategy of a run: a TPU, several machines, GPUs, or the CPU."""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from inputs.errors import InputError, first_line
from inputs.storage.files import temporary_folder
from training import cluster

# Of absl::LogSeverityAtLeast.
ERROR = 2
FATAL = 3


def silence_tensorflow(level: int = ERROR) -> None:
    """Suppresses TensorFlow's C++ log lines below a level, such as "I0000 ... Compiled cluster".

    TF_CPP_MIN_LOG_LEVEL does not affect those that Abseil writes before `absl::InitializeLog`, and
    TensorFlow 2.20 has no Python function for this, so Abseil's C++ function is called by its
    symbol. In a TensorFlow version without that symbol the log lines remain.

    Args:
        level: `ERROR` or `FATAL`.
    """
    folder = os.path.dirname(tf.__file__)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(os.path.join(folder, "libtensorflow_framework.so.2"))
        set_level = library._ZN4absl12lts_2025012714SetMinLogLevelENS0_18LogSeverityAtLeastE
        set_level.argtypes = [ctypes.c_int]
        set_level.restype = None
        set_level(level)


def connect(tpu: str) -> tf.distribute.Strategy:
    """Returns the strategy for `--tpu`. Call it before the first TensorFlow operation.

    Args:
        tpu: a TPU's name or address, "local" for the TPU of this virtual machine, or "" for the
            cluster in the environment variable TF_CONFIG (MultiWorkerMirroredStrategy over the
            GPUs, else the CPUs, of its workers), else the machine's GPUs (MirroredStrategy), else
            its CPU.

    Raises:
        InputError: there is no such TPU, this TensorFlow does not support TPUs, TF_CONFIG does not
            describe a cluster, or its workers could not connect.
    """
    if tpu:
        return _connect_tpu(tpu)
    config = cluster.read_cluster()
    if config and len(config.workers) > 1:
        return _connect_workers(len(config.workers))
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    return tf.distribute.OneDeviceStrategy("/cpu:0")


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that logs and exports; True if there is only one."""
    return strategy.extended.should_checkpoint


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether several processes train together, as TF_CONFIG describes."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def line_prefix(strategy: tf.distribute.Strategy) -> str:
    """How lines about this process begin, such as "worker 1: "; "" if it is the only one."""
    if not is_multi_worker(strategy):
        return ""
    resolver = strategy.cluster_resolver
    return f"{resolver.task_type} {resolver.task_id}: "


def drives_other_hosts(strategy: tf.distribute.Strategy) -> bool:
    """Whether one process, this one, drives devices of other processes, as of a TPU pod slice."""
    if is_multi_worker(strategy):
        return False
    devices = map(tf.DeviceSpec.from_string, strategy.extended.worker_devices)
    return any(device.job not in (None, "localhost") for device in devices)


def compiles_step(strategy: tf.distribute.Strategy, recipe) -> bool:
    """Returns `jit_compile` for `ReplicaStep`; False on a TPU, which compiles the whole step."""
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return False
    return recipe.compiles(on_cpu="CPU" in strategy.extended.worker_devices[0])


@contextlib.contextmanager
def worker_folder(strategy: tf.distribute.Strategy, model_dir: str):
    """Yields the folder for this process's files: `model_dir` in the chief, else a temporary one.

    Workers other than the chief need a folder because saving is a collective operation.
    """
    if is_chief(strategy):
        yield model_dir
    else:
        with temporary_folder("worker-") as folder:
            yield folder


def with_infinite_cardinality(input_fn):
    """Returns `input_fn` with datasets of infinite cardinality.

    Otherwise the strategy checks before each step whether all workers have another batch, and
    makes batch shapes dynamic.
    """
    infinite = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    return lambda context: input_fn(context).apply(infinite)


def check_workers_agree(strategy: tf.distribute.Strategy, **facts) -> None:
    """Raises `InputError` in all workers unless `facts`, compared as text, are equal in all.

    Workers with different settings would wait for each other forever, or train different models.
    """
    if not is_multi_worker(strategy):
        return
    texts = [str(fact) for fact in facts.values()]
    digest = tf.strings.to_hash_bucket_strong([texts], 2**62, [1, 2])
    digests = _of_all_workers(strategy, digest.numpy())
    differing = [name for name, column in zip(facts, digests.T, strict=True) if len({*column}) > 1]
    if differing:
        raise InputError(
            f"TF_CONFIG: the workers differ in {', '.join(differing)}. Give all the same command, "
            "and a --model_dir that all of them share."
        )


def max_over_workers(strategy: tf.distribute.Strategy, value):
    """The largest of the values of all workers, each of which must call this at the same point.

    Workers see the files of a run at different times, where listings are out of date or a shared
    disk has a cache. What they decide by files, they decide together.

    Args:
        strategy: a `tf.distribute.Strategy`.
        value: int, bool or float.

    Returns:
        The value with the type of `value`.
    """
    if not is_multi_worker(strategy):
        return value
    own = np.array([[value]], np.float64 if isinstance(value, float) else np.int64)
    return type(value)(_of_all_workers(strategy, own).max())


def check_together(strategy: tf.distribute.Strategy, check_data: Callable[[], object]) -> None:
    """Checks the data in all workers, which must call this at the same point.

    Args:
        strategy: a `tf.distribute.Strategy`.
        check_data: `check_data` or `end_data` of a `tasks.task.Task`.

    Raises:
        InputError: in one of the workers, more records are damaged than may be skipped.
    """
    error = None
    try:
        check_data()
    except InputError as own:
        error = own
    if max_over_workers(strategy, error is not None):
        raise error or InputError(
            "--data_dir: another worker has found more damaged records than may be skipped; its "
            "log names them."
        )


def _of_all_workers(strategy, own):
    """The rows of all replicas of all workers, [R, K], for this worker's [1, K] of eight bytes."""
    with strategy.scope():
        rows = _gather(strategy)(own.view(np.int64)).numpy()
    return rows.view(own.dtype)


@functools.cache
def _gather(strategy):
    # One signature, and always the same scope, so that it is traced once.
    return tf.function(
        lambda own: strategy.gather(strategy.run(tf.identity, args=(own,)), axis=0),
        input_signature=[tf.TensorSpec([1, None], tf.int64)],
        autograph=False,
    )


def is_lost_worker(error: tf.errors.OpError) -> bool:
    """Whether `error` is of a collective operation that failed because another worker ended."""
    if not isinstance(error, tf.errors.UnavailableError) and "Collective ops" not in str(error):
        return False
    config = cluster.read_cluster()
    return config is not None and len(config.workers) > 1


def _connect_workers(workers: int) -> tf.distribute.Strategy:
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError) as error:
        raise InputError(
            f"TF_CONFIG: the {workers} workers could not connect ({first_line(error)}). Start "
            "the same command on all of them, and check that each one's address is reachable and "
            "its port free."
        ) from None


def _connect_tpu(tpu: str) -> tf.distribute.Strategy:
    addresses = cluster.tpu_addresses(tpu)
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            # Without the scheme an address would be looked up as a name.
            ",".join(f"grpc://{host}:{port}" for host, port in addresses) or tpu
        )
    except Exception as error:  # of the look-up in Google Cloud: network, credentials, HTTP, JSON
        raise InputError(
            f"--tpu={tpu}: this name cannot be looked up ({first_line(error)}). A TPU's name is "
            "known in its own Google Cloud project only; elsewhere give its address, "
            "grpc://HOST:PORT, or leave --tpu out to train on GPU or CPU."
        ) from None
    try:
        if tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        topology = tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise InputError(_tpu_message(tpu, error)) from None
    check_topology(topology, tpu)
    return tf.distribute.TPUStrategy(resolver)


def check_topology(topology: tf.tpu.experimental.Topology, tpu: str) -> None:
    """Raises `InputError` if cores of the TPU's mesh are missing."""
    missing = len(topology.missing_devices)
    cores = int(np.prod(topology.mesh_shape))
    if missing:
        shape = "x".join(map(str, topology.mesh_shape))
        raise InputError(
            f"--tpu={tpu}: {missing} of the {cores} cores of the {shape} mesh did not answer. "
            "Start the TPU again."
        )


def _tpu_message(tpu: str, error: Exception) -> str:
    if "ConfigureDistributedTPU" in str(error):
        return (
            f"--tpu={tpu}: this TensorFlow has no TPU support, or no TPU is attached. On a TPU VM "
            "install tensorflow-tpu; elsewhere leave --tpu out to train on GPU or CPU."
        )
    return (
        f"--tpu={tpu}: no TPU answered ({first_line(error)}). Check its name with "
        "`gcloud compute tpus tpu-vm list`, or leave --tpu out to train on GPU or CPU."
    )


def check_batch(strategy: tf.distribute.Strategy, global_batch_size: int, accumulation: int):
    """Raises `InputError` unless the batch is divisible by the replicas and micro-batches."""
    replicas = strategy.num_replicas_in_sync
    if global_batch_size < 1 or global_batch_size % replicas:
        lower = max(1, global_batch_size // replicas) * replicas
        raise InputError(
            f"--global_batch_size={global_batch_size} is not divisible by the {replicas} replicas "
            f"of this run. Use {lower} or another multiple of {replicas}."
        )
    share = global_batch_size // replicas
    if share % accumulation:
        raise InputError(
            f"--set accumulation={accumulation} does not divide a replica's batch of {share} "
            f"(--global_batch_size={global_batch_size} on {replicas} replicas). Use a divisor of "
            f"{share}."
        )
