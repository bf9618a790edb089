"""Where a run computes: TPU, the machine's GPUs, or its CPU."""

import tensorflow as tf

from inputs.errors import InputError


def connect(tpu: str) -> tf.distribute.Strategy:
    """The strategy for `--tpu`.

    Args:
        tpu: a TPU's name or address, "local" for the TPU of this virtual machine, or "" for the
            machine's GPUs (MirroredStrategy over all of them), else its CPU.

    Raises:
        InputError: there is no such TPU, or this TensorFlow cannot drive one.
    """
    if not tpu:
        if tf.config.list_physical_devices("GPU"):
            return tf.distribute.MirroredStrategy()
        return tf.distribute.OneDeviceStrategy("/cpu:0")
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu)
        if tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise InputError(_tpu_message(tpu, error)) from None
    return tf.distribute.TPUStrategy(resolver)


def _tpu_message(tpu: str, error: Exception) -> str:
    if "ConfigureDistributedTPU" in str(error):
        return (
            f"--tpu={tpu}: this TensorFlow has no TPU support, or no TPU is attached. On a TPU VM "
            "install tensorflow-tpu; elsewhere leave --tpu out to train on GPU or CPU."
        )
    reason = str(error).strip().splitlines()[0]
    return (
        f"--tpu={tpu}: no TPU answered ({reason}). Check its name with "
        "`gcloud compute tpus tpu-vm list`, or leave --tpu out to train on GPU or CPU."
    )


def check_batch(strategy: tf.distribute.Strategy, global_batch_size: int) -> None:
    """Raises `InputError` unless every replica gets the same share of the batch."""
    replicas = strategy.num_replicas_in_sync
    if global_batch_size < 1 or global_batch_size % replicas:
        lower = max(1, global_batch_size // replicas) * replicas
        raise InputError(
            f"--global_batch_size={global_batch_size} does not divide by the {replicas} replicas "
            f"of this run. Take {lower} or another multiple of {replicas}."
        )
