"""Learning-rate schedules of the large-batch recipes, as functions of the step.

The classes are made for one Keras flavour in `tf_lamb.keras3` and for the other in
`tf_lamb.tf_keras`; here stands what both share.
"""

from keras import ops

from tf_lamb.arguments import as_number, check_interval


def _updates(step, gradient_accumulation_steps):
    """The number of updates before call number `step`: a float32 scalar."""
    if gradient_accumulation_steps:
        step = ops.floor_divide(step, gradient_accumulation_steps)
    return ops.cast(step, "float32")


def _check_accumulation(steps):
    return None if steps is None else check_interval("gradient_accumulation_steps", steps, 1)


def warmup_polynomial_decay(
    step,
    *,
    peak_learning_rate,
    warmup_steps,
    total_steps,
    end_learning_rate,
    power,
    decay_from,
    warmup_from,
):
    """η(t) of `WarmupPolynomialDecayRule`; `step` is a scalar, the result a float32 scalar."""
    step = ops.cast(step, "float32")
    done = ops.clip((step - decay_from) / (total_steps - decay_from), 0.0, 1.0)
    decayed = (peak_learning_rate - end_learning_rate) * (1.0 - done) ** power + end_learning_rate
    if warmup_steps == 0:
        return decayed
    warm = step - warmup_from
    return ops.where(warm < warmup_steps, peak_learning_rate * (warm / warmup_steps), decayed)


class WarmupPolynomialDecayRule:
    """Linear warm-up from 0, then polynomial decay.

        η(t) = η₀ (t-S)/W                                     for t < S + W
        η(t) = (η₀ - η₁) (1 - (t-D)/(T-D))^p + η₁             for S + W <= t <= T, and η₁ after T

    Args:
        peak_learning_rate: η₀, a float > 0.
        warmup_steps: W, an int in [0, T).
        total_steps: T, an int, warm-up included.
        end_learning_rate: η₁, a float >= 0.
        power: p, a float > 0; 1 is the LAMB paper's, 0.5 NVIDIA's, 2 MLPerf's for ResNet-50.
        decay_from: D, the step the decay counts from, an int in [0, S + W]. `None` means S + W:
            the decay starts at the peak. 0 is the formula of arXiv:1904.00962 and of BERT's own
            code, η₀(1 - t/T), where the rate drops from η₀ to η₀(1 - W/T) as warm-up ends.
        warmup_from: S, the step the warm-up counts from, an int in [-W, 0]: below 0 the first
            step is that far into it (MLPerf's start_warmup_step).
        gradient_accumulation_steps: int >= 1, as in the Keras 3 optimizer that takes the schedule,
            or None for 1. Keras counts calls of the optimizer, of which so many make an update;
            with this argument all counts above are of updates: `warmup_steps=100` are 100
            updates.

    Raises:
        ValueError: an argument outside its range.

    References:
        You et al., arXiv:1904.00962v5, section 4; Goyal et al., arXiv:1706.02677, section 2.2.

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
        total_steps = check_interval("total_steps", total_steps, 0, open_low=True)
        warmup_steps = check_interval("warmup_steps", warmup_steps, 0, total_steps)
        end_learning_rate = check_interval("end_learning_rate", end_learning_rate, 0)
        power = check_interval("power", power, 0, open_low=True)
        warmup_from = check_interval("warmup_from", warmup_from, -warmup_steps, 1)
        if decay_from is not None:
            decay_from = check_interval("decay_from", decay_from, 0, warmup_steps + warmup_from + 1)
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
        """The learning rate at `step`, an integer scalar counted from 0: a float32 scalar."""
        warmup_end = self.warmup_steps + self.warmup_from
        return warmup_polynomial_decay(
            _updates(step, self.gradient_accumulation_steps),
            peak_learning_rate=self.peak_learning_rate,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            end_learning_rate=self.end_learning_rate,
            power=self.power,
            decay_from=warmup_end if self.decay_from is None else self.decay_from,
            warmup_from=self.warmup_from,
        )

    def get_config(self):
        """The constructor's arguments."""
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
    """Linear warm-up from 0, then the peak, times a factor more from each of some steps on.

        η(t) = η₀ t/W                                         for t < W
        η(t) = η₀ fᵏ, k the number of steps D <= t            from then on

    Goyal et al., arXiv:1706.02677, train ResNet-50 with W = 5 epochs, f = 0.1 and D after 30, 60
    and 80 of 90 epochs.

    Args:
        peak_learning_rate: η₀, a float > 0.
        warmup_steps: W, an int in [0, T).
        total_steps: T, an int, warm-up included.
        decay_steps: the D, increasing ints in [W, T).
        decay_factor: f, a float in (0, 1].
        gradient_accumulation_steps: as in `WarmupPolynomialDecay`.

    Raises:
        ValueError: an argument outside its range.
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
        total_steps = check_interval("total_steps", total_steps, 0, open_low=True)
        warmup_steps = check_interval("warmup_steps", warmup_steps, 0, total_steps)
        least, decays = warmup_steps, []
        for step in decay_steps:  # perhaps an iterator: read once
            decays.append(check_interval("decay_steps", step, least, total_steps))
            least = decays[-1] + 1
        factor = as_number(decay_factor)
        if factor is None or not 0 < factor <= 1:
            raise ValueError(
                f"`decay_factor` must lie in (0, 1]. Received: decay_factor={decay_factor}."
            )
        self.peak_learning_rate = peak_learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay_steps = decays
        self.decay_factor = factor
        self.gradient_accumulation_steps = _check_accumulation(gradient_accumulation_steps)
        self.name = name

    def __call__(self, step):
        """The learning rate at `step`, an integer scalar counted from 0: a float32 scalar."""
        step = _updates(step, self.gradient_accumulation_steps)
        rate = ops.convert_to_tensor(self.peak_learning_rate, dtype="float32")
        for number, start in enumerate(self.decay_steps, start=1):
            lower = self.peak_learning_rate * self.decay_factor**number
            rate = ops.where(step < start, rate, lower)
        if self.warmup_steps == 0:
            return rate
        warm = self.peak_learning_rate * (step / self.warmup_steps)
        return ops.where(step < self.warmup_steps, warm, rate)

    def get_config(self):
        """The constructor's arguments."""
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
    """One schedule after another, each counting its own steps from 0.

    BERT is pre-trained in two phases (arXiv:1904.00962, section 4.1); the second warms up again
    from 0, because a smaller batch at the first one's rate can diverge.

    Args:
        phases: list of dictionaries, the arguments of one `WarmupPolynomialDecay` each, or, with
            `decay_steps` among them, of one `WarmupStepDecay`. A phase lasts its `total_steps`;
            after the last one, its end rate holds.
        gradient_accumulation_steps: as in `WarmupPolynomialDecay`, for all phases.

    Raises:
        ValueError: no phases, or an argument of one outside its range.
    """

    _schedule: type
    _step_schedule: type

    def __init__(self, phases, name=None, *, gradient_accumulation_steps=None):
        self.phases = [dict(phase) for phase in phases]
        if not self.phases:
            raise ValueError(f"`phases` must hold at least one phase. Received: phases={phases!r}.")
        self.gradient_accumulation_steps = _check_accumulation(gradient_accumulation_steps)
        self.name = name
        self._schedules = [
            (self._step_schedule if "decay_steps" in phase else self._schedule)(**phase)
            for phase in self.phases
        ]

    def __call__(self, step):
        """The learning rate at `step`, an integer scalar counted from 0: a float32 scalar."""
        step = _updates(step, self.gradient_accumulation_steps)
        ends = [schedule.total_steps for schedule in self._schedules]
        starts = [sum(ends[:i]) for i in range(len(ends))]
        rate = self._schedules[0](step)
        for start, schedule in zip(starts[1:], self._schedules[1:], strict=True):
            rate = ops.where(step < start, rate, schedule(step - start))
        return rate

    def get_config(self):
        """The constructor's arguments."""
        return {
            "phases": self.phases,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "name": self.name,
        }
