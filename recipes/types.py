"""What a recipe is: frozen values, checked field by field."""

import dataclasses

# Normalisation and biases, neither decayed nor adapted in the published runs. The library has the
# same lists (tf_lamb/exclusions.py, with the sources); tests/recipes/test_recipes.py compares them.
BERT_EXCLUSIONS = (
    r"(?i)bias$|(^|/)(gamma|beta)$"
    r"|(norm|normalization|(^|[/_])([blg]n|grn|rms))[._]?\d*/(scale|weight)$"
    r"|layer_?scale|(^|/)lambda_?\d$",
)
RESNET_EXCLUSIONS = BERT_EXCLUSIONS

CHOICES = {
    "compute_dtype": ("float32", "bfloat16"),
    "on_divergence": ("stop", "rollback"),
    "on_bad_record": ("skip", "fail"),
}
# What each optimizer takes, beside weight decay, its exclusions and clipping, which all take.
OPTIMIZERS = {
    "lamb": ("variant", "beta_1", "beta_2", "epsilon", "exclude_from_layer_adaptation"),
    "lars": (
        "variant",
        "momentum",
        "trust_coefficient",
        "epsilon",
        "exclude_from_layer_adaptation",
    ),
    "adamw": ("beta_1", "beta_2", "epsilon"),
    "momentum": ("momentum",),
    "adagrad": ("epsilon",),
}


def check_least(holder, **least_of):
    """Raises `ValueError` for a field of `holder` that is set and below its least value."""
    for name, least in least_of.items():
        value = getattr(holder, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}. Received: {name}={value}.")


def profile_window(profile: str) -> tuple[int, int]:
    """(first, last) of "first:last": the steps after `first` up to `last`.

    Raises:
        ValueError: these are not two steps in order.
    """
    ends = profile.split(":")
    if len(ends) == 2 and all(end.isdecimal() for end in ends) and int(ends[0]) < int(ends[1]):
        return int(ends[0]), int(ends[1])
    raise ValueError(
        'profile must be "first:last", two steps of which the first is the smaller, such as '
        f"100:110. Received: profile={profile}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training at one batch size and schedule.

    The rate is `WarmupPolynomialDecay(peak_learning_rate, warmup_steps, steps, ...)`, or with
    `decay_steps` a `WarmupStepDecay`; it counts this phase's updates from 0. What a phase begins
    with are the weights, slots and step of the one before it; with `reset_slots` the slots are
    zero again, and so is the step that bias correction counts.
    """

    steps: int
    global_batch_size: int
    peak_learning_rate: float
    warmup_steps: int
    end_learning_rate: float = 0.0
    power: float = 1.0
    decay_from: int | None = None  # step the decay counts from; None: the end of warm-up
    warmup_from: int = 0  # step the warm-up counts from; below 0 it has begun before
    decay_steps: tuple[int, ...] = ()  # where the rate falls, in place of all above
    decay_factor: float = 0.1
    reset_slots: bool = False
    examples: int | None = None  # before `steps` was rounded; None: steps x global_batch_size

    def schedule(self) -> dict:
        """The arguments of this phase's schedule, as `Phases` takes them."""
        common = {
            "peak_learning_rate": self.peak_learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.steps,
        }
        if self.decay_steps:
            return common | {
                "decay_steps": list(self.decay_steps),
                "decay_factor": self.decay_factor,
            }
        return common | {
            "end_learning_rate": self.end_learning_rate,
            "power": self.power,
            "decay_from": self.decay_from,
            "warmup_from": self.warmup_from,
        }

    def stretched(self, steps: int, warmup_factor: float) -> "Phase":
        """This phase over another number of steps, its warm-up longer by a factor."""
        warmup = min(round(self.warmup_steps * warmup_factor), steps - 1)
        warmup_from = max(round(self.warmup_from * warmup_factor), -warmup)
        decay_from = self.decay_from and round(self.decay_from * warmup_factor)
        return dataclasses.replace(
            self,
            steps=steps,
            warmup_steps=warmup,
            warmup_from=warmup_from,
            decay_from=decay_from and min(decay_from, warmup + warmup_from),
            decay_steps=tuple(round(step * steps / self.steps) for step in self.decay_steps),
            examples=None,
        )

    def check(self, recipe: "Recipe") -> None:
        """Raises `ValueError` for a field outside its range, with the field and its value."""
        del recipe
        check_least(self, steps=1, global_batch_size=1)
        smooth = ("end_learning_rate", "power", "decay_from", "warmup_from")
        idle = [name for name in smooth if getattr(self, name) != getattr(Phase, name)]
        if self.decay_steps and idle:
            raise ValueError(
                f"decay_steps leaves no use for {idle[0]}. Received: "
                f"{idle[0]}={getattr(self, idle[0])}. Set decay_steps= (none) too, or take it out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes, apart from its data."""

    name: str
    reference: str
    expected: str
    phases: tuple[Phase, ...]
    task: str  # in tasks.TASKS
    model: str  # a size that the task knows
    compute_dtype: str = "float32"
    accumulation: int = 1  # micro-batches that a replica sums before each update
    # Whether forward and backward become one XLA program. None: but for CPUs without accumulation,
    # where TensorFlow's own kernels are the faster ones. A TPU compiles the step, whatever is set.
    jit_compile: bool | None = None
    optimizer: str = "lamb"  # in OPTIMIZERS
    variant: str = ""  # of LAMB or LARS, a published form by name; "" for the class's own
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    momentum: float = 0.9
    # None in these three: as the class or its variant has it.
    trust_coefficient: float | None = None
    global_clipnorm: float | None = None
    exclude_from_layer_adaptation: tuple[str, ...] | None = None
    exclude_from_weight_decay: tuple[str, ...] = ()
    evaluation_examples: int = 10_000  # held-out examples that an evaluation reads at most
    save_every_steps: int = 1_000
    evaluate_every_steps: int | None = None  # None: at the end alone
    keep_checkpoints: int = 3  # the newest; the best stays beside them
    skip_nonfinite: bool = True  # a gradient that is not finite skips the update
    max_skipped_in_row: int = 10
    max_loss: float | None = None  # a step's loss above it ends the run
    on_divergence: str = "stop"  # or "rollback", to the newest checkpoint, at a lower rate
    rollback_rate_factor: float = 0.5
    max_rollbacks: int = 3
    max_bad_record_share: float = 0.001  # damaged records that are passed over
    on_bad_record: str = "skip"  # or "fail"
    measure_noise_scale: bool = False  # up to which batch size more examples a step pay
    telemetry: bool = False  # whether trust ratios and weights are kept for TensorBoard
    profile: str | None = None  # "100:110": a profiler trace of the steps after 100 up to 110

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def compiles(self, on_cpu: bool) -> bool:
        """Whether forward and backward become one XLA program."""
        if self.jit_compile is None:
            # Without XLA, a loop over micro-batches would need TensorFlow's graph optimizer off
            # (see training/step.py), and what a CPU wins without XLA is less than that.
            return not on_cpu or self.accumulation > 1
        return self.jit_compile

    def check(self) -> None:
        """Raises `ValueError` for a field outside its range, with the field and its value.

        What the optimizer and its schedule are given, they check themselves.
        """
        check_least(self, evaluation_examples=1, save_every_steps=1, evaluate_every_steps=1)
        check_least(self, keep_checkpoints=1, max_skipped_in_row=0, max_rollbacks=0)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}. Received: {name}={value}."
                )
        if not 0 <= self.max_bad_record_share < 1:
            raise ValueError(
                "max_bad_record_share must lie in [0, 1). Received: "
                f"max_bad_record_share={self.max_bad_record_share}."
            )
        if not 0 < self.rollback_rate_factor < 1:
            raise ValueError(
                "rollback_rate_factor must lie in (0, 1). Received: "
                f"rollback_rate_factor={self.rollback_rate_factor}."
            )
        if self.max_loss is not None and not self.max_loss > 0:
            raise ValueError(f"max_loss must be positive. Received: max_loss={self.max_loss}.")
        self._check_optimizer()
        if self.profile is not None:
            if profile_window(self.profile)[1] > self.steps:
                raise ValueError(
                    f"profile must end within the {self.steps} steps of the run. "
                    f"Received: profile={self.profile}."
                )
        for phase in self.phases:
            phase.check(self)
            if self.accumulation < 1 or phase.global_batch_size % self.accumulation:
                raise ValueError(
                    "accumulation must divide each replica's batch. Received: accumulation="
                    f"{self.accumulation}, global_batch_size={phase.global_batch_size}."
                )

    def _check_optimizer(self):
        """A setting that the optimizer does not have is refused, rather than not looked at."""
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}. "
                f"Received: optimizer={self.optimizer}."
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        known = {name for names in OPTIMIZERS.values() for name in names}
        others = sorted(known.difference(OPTIMIZERS[self.optimizer]))
        idle = [name for name in others if getattr(self, name) != defaults[name]]
        if idle:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in idle)
            cures = ", ".join(
                f"{name}={str(defaults[name]).replace('None', 'none')}" for name in idle
            )
            raise ValueError(
                f"optimizer={self.optimizer} does not take {', '.join(idle)}. Received: {given}. "
                f"Set {cures} too, or choose another optimizer."
            )
