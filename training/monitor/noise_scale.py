"""The gradient noise scale: up to which batch size more examples a step pay.

McCandlish et al., arXiv:1812.06162, appendix A.1: the squared norm of a gradient over B examples is
|G|^2 + tr(S)/B on average, so two batch sizes give both unknowns: here what one replica sees at a
time, and the whole global batch. The noise scale, tr(S)/|G|^2, is a number of examples.
"""

import os

import tensorflow as tf

from inputs.errors import InputError
from training.monitor.history import HISTORY, read_rows

# Estimates of |G|^2 and tr(S), means over the steps of a loop.
SIGNAL, NOISE = "gradient_signal", "gradient_noise"
PARTS = "gradient_parts"  # of a replica: squared norms of its micro-batches' gradients, summed


def squared_norm(gradients) -> tf.Tensor:
    """float32 scalar, of a list of tensors."""
    return tf.add_n([tf.reduce_sum(tf.square(tf.cast(g, tf.float32))) for g in gradients])


def noise_sums(own_parts, gradients, replica_batch: int, replicas: int, accumulation: int):
    """One replica's shares of the two estimates and of their count, as sums and counts.

    Args:
        own_parts: float32 scalar, as `PARTS`; each micro-batch's gradient is its share of the
            global batch's.
        gradients: of the global batch, the mean over its examples.
        replica_batch: examples of each replica and step.
        replicas, accumulation: how many there are; together at least 2 micro-batches.
    """
    parts = replicas * accumulation
    large, small = replica_batch * replicas, replica_batch // accumulation
    of_large = squared_norm(gradients) / replicas
    of_small = own_parts * parts  # (parts x gradient)^2, its mean over all parts
    # A step whose gradient is not finite, on any replica, tells nothing, and spoils no other's.
    finite = tf.math.is_finite(of_large)
    return {
        SIGNAL: tf.where(finite, (large * of_large - small * of_small) / (large - small), 0.0),
        NOISE: tf.where(finite, (of_small - of_large) / (1 / small - 1 / large), 0.0),
    }, {NOISE.split("_")[0]: tf.where(finite, 1 / replicas, 0.0)}


def noise_scale(means: dict) -> dict:
    """`noise_scale` from a loop's means; nothing where it was not measured or is lost in noise."""
    if SIGNAL not in means or not means[SIGNAL] > 0:  # or NaN: all steps were skipped
        return {}
    return {"noise_scale": means[NOISE] / means[SIGNAL]}


def measured(model_dir: str) -> float:
    """The noise scale of the second half of a run's newest phase, in examples of that phase.

    It is the ratio of two means, which is less biased than a mean of ratios.

    Raises:
        InputError: the run did not measure it, or not long enough.
    """
    path = os.path.join(model_dir, HISTORY)
    rows = [row for row in read_rows(path) if row.get(SIGNAL) is not None]
    rows = [row for row in rows if row["phase"] == rows[-1]["phase"]]
    if not rows:
        raise InputError(
            f"--noise_scale: {path} has no gradient noise. Give the model_dir of a run with "
            "--set measure_noise_scale=true, or a number of examples."
        )
    signal, noise = (sum(row[n] for row in rows[len(rows) // 2 :]) for n in (SIGNAL, NOISE))
    if min(signal, noise) <= 0:
        raise InputError(
            f"--noise_scale: in {path} the gradient is lost in its noise. Measure more steps, or a "
            "larger batch."
        )
    return noise / signal
