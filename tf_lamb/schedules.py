"""Learning-rate schedules for large-batch training, as functions of the step.

These classes do not depend on the version of Keras. `tf_lamb.keras3` and `tf_lamb.tf_keras` combine
them with the `LearningRateSchedule` of Keras 3 and of tf_keras.
"""

import math
from collections.abc import Iterable, Mapping

from keras import ops

from tf_lamb.arguments import as_number, check_interval


def _to_updates(step, gradient_accumulation_steps):
    """Converts a number of calls of the optimizer to a number of updates, a float32 scalar."""
    if gradient_accumulation_steps:
        step = ops.floor_divide(step, gradient_accumulation_steps)
    return ops.cast(step, "float32")


def _check_accumulation(steps):
    """Checks the argument `gradient_accumulation_steps`, and returns it."""
    if steps is None:
        return None
    return check_interval("gradient_accumulation_steps", steps, 1, whole=True)


class WarmupPolynomialDecayRule:
    """Linear warm-up from 0, then polynomial decay.

        η(t) = η₀ (t-S)/W                                     for t < S + W
        η(t) = (η₀ - η₁) (1 - (t-D)/(T-D))^p + η₁             for S + W <= t <= T
        η(t) = η₁                                             for t > T

    Args:
        peak_learning_rate: Float > 0. The rate η₀ at the end of warm-up.
        warmup_steps: Integer in [0, T - S). The number of warm-up steps W.
        total_steps: Integer. The number of steps T, including warm-up.
        end_learning_rate: Float >= 0. The rate η₁ from step T on.
        power: Float > 0. The exponent p of the decay. The LAMB paper uses 1, NVIDIA 0.5, and
            MLPerf's ResNet-50 2.
        decay_from: Integer in [0, S + W]. The step D from which the decay is counted. With `None`
            it is S + W, so that the decay starts at the peak. With 0 (and p = 1, η₁ = 0) the rate
            after warm-up is η₀(1 - t/T), as in arXiv:1904.00962 and in the BERT authors' program.
            It drops from η₀ to η₀(1 - W/T) at the end of warm-up.
        warmup_from: Integer in [-W, 0]. The step S from which the warm-up is counted. If it is
            negative, training starts in the middle of the warm-up (`start_warmup_step` of MLPerf).
        gradient_accumulation_steps: Integer >= 1 or `None`. The argument of the same name of the
            Keras 3 optimizer. Keras calls a schedule with the number of micro-batches. If this
            argument is set, all steps above count updates: `warmup_steps=100` means 100 updates.

    Raises:
        ValueError: If an argument is out of range.

    References:
        - [You et al., 2020](https://arxiv.org/abs/1904.00962), section 4
        - [Goyal et al., 2017](https://arxiv.org/abs/1706.02677), section 2.2

    Example:

    >>> schedule = tf_lamb.WarmupPolynomialDecay(0.01, warmup_steps=100, total_steps=1000)
    >>> [round(float(schedule(step)), 5) for step in (0, 50, 100, 550, 1000)]
    [0.0, 0.005, 0.01, 0.005, 0.0]

    """

    def __init__(
        self,
        peak_learning_rate,
        warmup_steps,
        total_steps,
        end_learning_rate=0.0,
        power=1.0,
        decay_from=None,
        name=None,
        *,
        warmup_from=0,
        gradient_accumulation_steps=None,
    ):
        peak_learning_rate = check_interval(
            "peak_learning_rate", peak_learning_rate, 0, open_low=True
        )
        total_steps = check_interval("total_steps", total_steps, 0, open_low=True, whole=True)
        ahead = as_number(warmup_from)
        last = total_steps - ahead if ahead is not None and -math.inf < ahead < 0 else total_steps
        warmup_steps = check_interval("warmup_steps", warmup_steps, 0, last, whole=True)
        warmup_from = check_interval("warmup_from", warmup_from, -warmup_steps, 1, whole=True)
        end_learning_rate = check_interval("end_learning_rate", end_learning_rate, 0)
        power = check_interval("power", power, 0, open_low=True)
        if decay_from is not None:
            end = warmup_steps + warmup_from + 1
            decay_from = check_interval("decay_from", decay_from, 0, end, whole=True)
        self.peak_learning_rate = peak_learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.end_learning_rate = end_learning_rate
        self.power = power
        self.decay_from = decay_from
        self.warmup_from = warmup_from
        self.gradient_accumulation_steps = _check_accumulation(gradient_accumulation_steps)
        self.name = name

    def __call__(self, step):
        """Returns the learning rate, a float32 scalar, at `step`, an integer scalar from 0."""
        step = _to_updates(step, self.gradient_accumulation_steps)
        decay_from = self.decay_from
        if decay_from is None:
            decay_from = self.warmup_from + self.warmup_steps
        progress = ops.clip((step - decay_from) / (self.total_steps - decay_from), 0.0, 1.0)
        height = self.peak_learning_rate - self.end_learning_rate
        decayed = height * (1.0 - progress) ** self.power + self.end_learning_rate
        if self.warmup_steps == 0:
            return decayed
        warmup_step = step - self.warmup_from
        return ops.where(
            warmup_step < self.warmup_steps,
            self.peak_learning_rate * (warmup_step / self.warmup_steps),
            decayed,
        )

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "peak_learning_rate": self.peak_learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "end_learning_rate": self.end_learning_rate,
            "power": self.power,
            "decay_from": self.decay_from,
            "warmup_from": self.warmup_from,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "name": self.name,
        }


class WarmupStepDecayRule:
    """Linear warm-up from 0, then a piecewise constant rate.

        η(t) = η₀ t/W                                         for t < W
        η(t) = η₀ fᵏ                                          for t >= W

    where k is the number of elements of `decay_steps` that are <= t.

    Args:
        peak_learning_rate: Float > 0. The rate η₀ at the end of warm-up.
        warmup_steps: Integer in [0, T). The number of warm-up steps W.
        total_steps: Integer. The number of steps T, including warm-up.
        decay_steps: List of increasing integers in [W, T). The steps at which the rate is
            multiplied by f.
        decay_factor: Float in (0, 1]. The factor f.
        gradient_accumulation_steps: As in `WarmupPolynomialDecay`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        - [Goyal et al., 2017](https://arxiv.org/abs/1706.02677): ResNet-50 with a warm-up of 5
          epochs and a factor of 0.1 after 30, 60 and 80 of 90 epochs
    """

    def __init__(
        self,
        peak_learning_rate,
        warmup_steps,
        total_steps,
        decay_steps,
        decay_factor=0.1,
        name=None,
        *,
        gradient_accumulation_steps=None,
    ):
        peak_learning_rate = check_interval(
            "peak_learning_rate", peak_learning_rate, 0, open_low=True
        )
        total_steps = check_interval("total_steps", total_steps, 0, open_low=True, whole=True)
        warmup_steps = check_interval("warmup_steps", warmup_steps, 0, total_steps, whole=True)
        if not isinstance(decay_steps, Iterable):
            raise ValueError(
                f"`decay_steps` must be a list of integers. Received: decay_steps={decay_steps!r}."
            )
        decay_steps = list(decay_steps)
        earliest = warmup_steps
        for i, step in enumerate(decay_steps):
            decay_steps[i] = check_interval("decay_steps", step, earliest, total_steps, whole=True)
            earliest = decay_steps[i] + 1
        decay_factor = check_interval(
            "decay_factor", decay_factor, 0, 1, open_low=True, open_high=False
        )
        self.peak_learning_rate = peak_learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay_steps = decay_steps
        self.decay_factor = decay_factor
        self.gradient_accumulation_steps = _check_accumulation(gradient_accumulation_steps)
        self.name = name

    def __call__(self, step):
        """Returns the learning rate, a float32 scalar, at `step`, an integer scalar from 0."""
        step = _to_updates(step, self.gradient_accumulation_steps)
        rate = ops.convert_to_tensor(self.peak_learning_rate, dtype="float32")
        for k, start in enumerate(self.decay_steps, start=1):
            lower = self.peak_learning_rate * self.decay_factor**k
            rate = ops.where(step < start, rate, lower)
        if self.warmup_steps == 0:
            return rate
        warm = self.peak_learning_rate * (step / self.warmup_steps)
        return ops.where(step < self.warmup_steps, warm, rate)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "peak_learning_rate": self.peak_learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "decay_steps": self.decay_steps,
            "decay_factor": self.decay_factor,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "name": self.name,
        }


class PhasesRule:
    """A sequence of schedules, each of which counts its own steps from 0.

    BERT is pre-trained in two phases (arXiv:1904.00962, section 4.1). The second phase, with longer
    sequences, warms up again from 0, because training would be unstable otherwise.

    Args:
        phases: List of dictionaries with the arguments of a `WarmupPolynomialDecay`, or, if
            `decay_steps` is one of them, of a `WarmupStepDecay`, except
            `gradient_accumulation_steps`. A phase lasts `total_steps` steps. After the last phase,
            the rate stays at that phase's final value.
        gradient_accumulation_steps: As in `WarmupPolynomialDecay`, for all phases.

    Raises:
        ValueError: If there are no phases, or an argument of a phase is unknown, missing or out of
            range.
    """

    _schedule: type
    _step_schedule: type

    def __init__(self, phases, name=None, *, gradient_accumulation_steps=None):
        given = list(phases) if isinstance(phases, Iterable) else []
        if not given or not all(isinstance(phase, Mapping) for phase in given):
            raise ValueError(
                "`phases` must be a list of at least one dictionary, with the arguments of a "
                f"schedule. Received: phases={phases!r}."
            )
        self.gradient_accumulation_steps = _check_accumulation(gradient_accumulation_steps)
        self.name = name
        self._schedules = [self._create(i, phase) for i, phase in enumerate(given)]
        # The checked values, because a NumPy array or an iterator cannot be saved.
        self.phases = [
            {argument: getattr(schedule, argument) for argument in phase}
            for schedule, phase in zip(self._schedules, given, strict=True)
        ]

    def _create(self, index, phase):
        """Creates the schedule of a phase."""
        kind = self._step_schedule if "decay_steps" in phase else self._schedule
        if phase.get("gradient_accumulation_steps") is not None:
            raise ValueError(
                "A phase counts updates, so pass `gradient_accumulation_steps` to `Phases` itself. "
                f"Received: phases[{index}]={phase!r}."
            )
        try:
            return kind(**phase)
        except TypeError as error:  # Python's, for an unknown or a missing argument.
            reason = str(error).rpartition("__init__() ")[2]
            raise ValueError(
                f"`phases[{index}]` must hold the arguments of a `{kind.__name__}`: {reason}. "
                f"Received: phases[{index}]={phase!r}."
            ) from None

    def __call__(self, step):
        """Returns the learning rate, a float32 scalar, at `step`, an integer scalar from 0."""
        step = _to_updates(step, self.gradient_accumulation_steps)
        ends = [schedule.total_steps for schedule in self._schedules]
        starts = [sum(ends[:i]) for i in range(len(ends))]
        rate = self._schedules[0](step)
        for start, schedule in zip(starts[1:], self._schedules[1:], strict=True):
            rate = ops.where(step < start, rate, schedule(step - start))
        return rate

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "phases": self.phases,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "name": self.name,
        }
