"""Scales the learning rate, the warm-up and the number of steps to another batch size."""

import math
import numbers
from typing import NamedTuple

from tf_lamb.arguments import check_choice, check_interval

RULES = ("sqrt", "linear")


class ScaledSchedule(NamedTuple):
    """The result of `scale_batch`.

    Attributes:
        learning_rate: Float. The peak learning rate.
        warmup_steps: Integer. The number of warm-up steps.
        total_steps: Integer. The number of steps, including warm-up.
    """

    learning_rate: float
    warmup_steps: int
    total_steps: int


def scale_batch(
    batch_size_from: int,
    batch_size_to: int,
    *,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    rule: str = "sqrt",
) -> ScaledSchedule:
    """Scales a learning-rate schedule from one batch size to another.

    Training sees the same number of examples at both batch sizes. With
    `k = batch_size_to / batch_size_from`:

    | `rule` | learning rate | warm-up | total |
    |---|---|---|---|
    | `"sqrt"` | times `sqrt(k)` | same number of steps | steps divided by `k` |
    | `"linear"` | times `k` | steps divided by `k` | steps divided by `k` |

    `"sqrt"` is the rule of the LAMB paper, which uses it from batch size 512 to 32,768 without
    further tuning. `"linear"` is the rule of Goyal et al. for SGD with momentum.

    Args:
        batch_size_from: Integer. The global batch size (examples per step over all replicas) for
            which the schedule is known.
        batch_size_to: Integer. The global batch size to train with.
        learning_rate: Float. The peak learning rate at `batch_size_from`. If the schedule ends
            above 0, scale its end by the same factor.
        warmup_steps: Integer, less than `total_steps`. The number of warm-up steps at
            `batch_size_from`.
        total_steps: Integer. The number of steps at `batch_size_from`, including warm-up.
        rule: String, `"sqrt"` or `"linear"`.

    Returns:
        A `ScaledSchedule`, a named tuple `(learning_rate, warmup_steps, total_steps)`. Steps are
        rounded to the nearest integer.

    Raises:
        ValueError: If an argument is out of range, or if `batch_size_to` is so large that no steps
            remain after warm-up.

    Example:

    BERT-Large in the LAMB paper, from batch size 512 to 32,768:

    >>> import tf_lamb
    >>> scaled = tf_lamb.scale_batch(
    ...     512, 32_768, learning_rate=6.25e-4, warmup_steps=3_125, total_steps=1_000_000
    ... )
    >>> scaled
    ScaledSchedule(learning_rate=0.005, warmup_steps=3125, total_steps=15625)
    >>> schedule = tf_lamb.WarmupPolynomialDecay(
    ...     peak_learning_rate=scaled.learning_rate,
    ...     warmup_steps=scaled.warmup_steps,
    ...     total_steps=scaled.total_steps,
    ... )

    References:
        - [You et al., 2020](https://arxiv.org/abs/1904.00962), Tables 5 and 6 (`"sqrt"`)
        - [Goyal et al., 2017](https://arxiv.org/abs/1706.02677), section 2 (`"linear"`)
    """
    check_choice("rule", rule, RULES)
    check_interval("learning_rate", learning_rate, 0, open_low=True)
    batch_size_from = _as_int("batch_size_from", batch_size_from, 1)
    batch_size_to = _as_int("batch_size_to", batch_size_to, 1)
    total_steps = _as_int("total_steps", total_steps, 1)
    warmup_steps = _as_int("warmup_steps", warmup_steps, 0)
    check_interval("warmup_steps", warmup_steps, 0, total_steps)
    try:
        k = batch_size_to / batch_size_from
        rate_factor, warmup_factor = (math.sqrt(k), 1.0) if rule == "sqrt" else (k, 1 / k)
    except (OverflowError, ZeroDivisionError):  # beyond the range of a float
        rate_factor = warmup_factor = math.inf
    scaled_rate = float(learning_rate * rate_factor)
    if not 0 < scaled_rate < math.inf:
        raise ValueError(
            "The scaled learning rate is beyond the range of a float. Received: "
            f"learning_rate={learning_rate!r}, batch_size_from={batch_size_from}, "
            f"batch_size_to={batch_size_to}."
        )
    warmup = round(warmup_steps * warmup_factor)
    # total_steps / k, rounded to the nearest integer; a half is rounded up.
    steps = (2 * total_steps * batch_size_from + batch_size_to) // (2 * batch_size_to)
    if steps <= warmup:
        raise ValueError(
            f"`batch_size_to` leaves {steps} steps in total, and warm-up takes {warmup}. "
            f"Received: batch_size_to={batch_size_to}. Use a smaller batch size or a shorter "
            "warm-up."
        )
    return ScaledSchedule(scaled_rate, warmup, steps)


def _as_int(name: str, value, low: int) -> int:
    """Converts a Python or NumPy integer to a Python integer, which cannot overflow.

    Raises:
        ValueError: If the value is not an integer, or less than `low`.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"`{name}` must be an integer >= {low}. Received: {name}={value!r}.")
    return int(value)
