"""The gradient noise scale: the batch size beyond which larger batches save few steps.

McCandlish et al., arXiv:1812.06162, appendix A.1: the expected squared norm of a gradient over B
examples is |G|^2 + tr(S)/B, so its values at two batch sizes determine |G|^2 and tr(S). The two
sizes here are that of one replica's micro-batch and that of the global batch. The noise scale,
tr(S)/|G|^2, is a number of examples.
"""

import os

import tensorflow as tf

from inputs.errors import InputError
from tasks.task import Metric
from training.monitor.progress import HISTORY, read_rows

SIGNAL = "gradient_signal"  # the estimate of |G|^2
NOISE = "gradient_noise"  # the estimate of tr(S)
COUNT = "gradient"  # steps with a finite gradient
METRICS = (
    Metric(SIGNAL, COUNT, higher_is_better=True),
    Metric(NOISE, COUNT, higher_is_better=False),
)
PARTS = "gradient_parts"  # the sum of the squared norms of a replica's micro-batch gradients


def squared_norm(gradients) -> tf.Tensor:
    """Returns the squared global norm of a list of tensors: a float32 scalar."""
    return tf.add_n([tf.reduce_sum(tf.square(tf.cast(g, tf.float32))) for g in gradients])


def noise_sums(parts_sum, gradients, replica_batch: int, replicas: int, accumulation: int):
    """Returns one replica's share of the sums and counts of `METRICS`.

    Args:
        parts_sum: float32 scalar, `PARTS`. The gradients of all micro-batches add up to that of the
            global batch.
        gradients: the gradients of the global batch, means over its examples.
        replica_batch: examples of each replica in a step.
        replicas: number of replicas.
        accumulation: micro-batches of each replica; there are at least 2 micro-batches in all.
    """
    parts = replicas * accumulation
    large = replica_batch * replicas
    small = replica_batch // accumulation
    large_norm = squared_norm(gradients) / replicas
    small_norm = parts_sum * parts  # the mean over all parts of (parts x gradient)^2
    # A step whose gradient is not finite, on any replica, is left out of the mean.
    finite = tf.math.is_finite(large_norm)
    return {
        SIGNAL: tf.where(finite, (large * large_norm - small * small_norm) / (large - small), 0.0),
        NOISE: tf.where(finite, (small_norm - large_norm) / (1 / small - 1 / large), 0.0),
    }, {COUNT: tf.where(finite, 1 / replicas, 0.0)}


def noise_scale(means: dict) -> dict:
    """Returns {"noise_scale": ...} from a loop's means; {} if there is no positive signal."""
    if SIGNAL not in means or not means[SIGNAL] > 0:  # NaN: all steps were skipped
        return {}
    return {"noise_scale": means[NOISE] / means[SIGNAL]}


def measured(model_dir: str) -> float:
    """Returns the noise scale of the second half of a run's newest phase, in its examples.

    This is the ratio of two means, which is less biased than the mean of ratios.

    Raises:
        InputError: the run did not measure it, or an estimate is not positive.
    """
    path = os.path.join(model_dir, HISTORY)
    rows = [row for row in read_rows(path) if row.get(SIGNAL) is not None]
    rows = [row for row in rows if row["phase"] == rows[-1]["phase"]]
    if not rows:
        raise InputError(
            f"{path} has no gradient noise. Give the model_dir of a run with "
            "--set measure_noise_scale=true, or a number of examples."
        )
    signal, noise = (sum(row[n] for row in rows[len(rows) // 2 :]) for n in (SIGNAL, NOISE))
    if min(signal, noise) <= 0:
        raise InputError(
            f"in {path} the gradient is lost in its noise. Measure more steps, or a larger batch."
        )
    return noise / signal
