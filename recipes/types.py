"""The dataclasses `Recipe` and `Phase`, and the checks of their fields."""

import dataclasses
import itertools
import math

# Normalization and biases, which the published runs neither decay nor adapt. tf_lamb/layers.py has
# the same lists, with their sources. tests/recipes/test_recipes.py compares them.
BERT_EXCLUSIONS = (
    r"(?i)bias$|(^|/)(gamma|beta)$"
    r"|(norm|normalization|(^|[/_])([blg]n|grn|rms))[._]?\d*/(scale|weight)$"
    r"|layer_?scale|(^|/)lambda_?\d$",
)
RESNET_EXCLUSIONS = BERT_EXCLUSIONS

CHOICES = {
    "remat": ("off", "layer"),
    "compute_dtype": ("float32", "bfloat16"),
    "sum_dtype": ("float32", "bfloat16"),
    "on_divergence": ("stop", "rollback"),
    "on_bad_record": ("skip", "fail"),
}
# The settings of each optimizer, besides weight decay, its exclusions and clipping, which all have.
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


def check_numbers(recipe):
    """Raises `ValueError` for a field of a recipe or phase that no run can use, whatever it means.

    Steps and sizes are 32-bit integers in some of the operations that count them.
    """
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} must be finite. Received: {field.name}={value}.")
        if isinstance(value, int) and not abs(value) < 2**31:
            raise ValueError(f"{field.name} must be below 2**31. Received: {field.name}={value}.")


def check_minimums(recipe, **minimums):
    """Raises `ValueError` for a field of a recipe or phase that is below its minimum.

    Fields that are `None` are not checked.
    """
    for name, minimum in minimums.items():
        value = getattr(recipe, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}. Received: {name}={value}.")


def profile_window(profile: str) -> tuple[int, int]:
    """Parses the field `profile`, "first:last".

    Returns:
        A tuple `(first, last)` of integers. The steps after `first` up to `last` are profiled.

    Raises:
        ValueError: If `profile` is not two increasing steps.
    """
    ends = profile.split(":")
    if len(ends) == 2 and all(end.isdecimal() for end in ends) and int(ends[0]) < int(ends[1]):
        return int(ends[0]), int(ends[1])
    raise ValueError(
        'profile must be "first:last", two increasing steps, for example 100:110. '
        f"Received: profile={profile}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of training with its own batch size and learning-rate schedule.

    The learning rate is `WarmupPolynomialDecay(peak_learning_rate, warmup_steps, steps, ...)`, or
    `WarmupStepDecay` if `decay_steps` is set. It counts the updates of this phase from 0. A phase
    continues with the weights, slots and optimizer step of the phase before it. With `reset_slots`,
    the slots and the step of the bias correction start from 0 again.
    """

    steps: int  # optimizer steps of this phase
    global_batch_size: int  # examples per step, over all replicas
    peak_learning_rate: float  # at the end of warm-up
    warmup_steps: int  # steps of linear warm-up
    end_learning_rate: float = 0.0  # at the last step of the phase
    power: float = 1.0  # of the polynomial decay; 1 is linear
    decay_from: int | None = None  # step from which the decay is counted; None: end of warm-up
    warmup_from: int = 0  # step from which the warm-up is counted, 0 or negative
    decay_steps: tuple[int, ...] = ()  # steps at which the rate falls, instead of the above
    decay_factor: float = 0.1  # factor of the learning rate at each of `decay_steps`
    reset_slots: bool = False  # start with zero moments, and count the bias correction from 0
    examples: int | None = None  # exact number of examples; None: steps x global_batch_size

    def schedule(self) -> dict:
        """Returns the arguments of this phase's schedule, an element of `phases` of `Phases`."""
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
        """Returns this phase with `steps` steps, and its warm-up multiplied by `warmup_factor`."""
        warmup_from = round(self.warmup_from * warmup_factor)
        warmup = min(round(self.warmup_steps * warmup_factor), steps - 1 - warmup_from)
        warmup_from = max(warmup_from, -warmup)
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
        """Checks the fields.

        Args:
            recipe: The `Recipe` of this phase.

        Raises:
            ValueError: If a field is out of range.
        """
        check_numbers(self)
        check_minimums(self, steps=1, global_batch_size=1)
        edges = [self.warmup_steps - 1, *self.decay_steps, self.steps]
        if self.decay_steps and any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError(
                f"the {len(self.decay_steps)} drops of the learning rate must come in different "
                f"steps, after the warm-up and before the end. Received: {self.steps} steps, "
                f"warmup_steps={self.warmup_steps}, decay_steps={list(self.decay_steps)}. Give "
                "more steps, or set decay_steps."
            )
        polynomial = ("end_learning_rate", "power", "decay_from", "warmup_from")
        unused = [name for name in polynomial if getattr(self, name) != getattr(Phase, name)]
        if self.decay_steps and unused:
            name = unused[0]
            raise ValueError(
                f"{name} has no effect with decay_steps. Received: {name}={getattr(self, name)}. "
                f"Set decay_steps= (an empty list) too, or leave out {name}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run except its data.

    A field that is added later needs a default, the value that all earlier runs had: a run that is
    resumed had that value (training/checkpoint/compatibility.py).
    """

    name: str  # what `--recipe` selects
    reference: str  # source of the constants
    expected: str  # published result, or why there is none
    phases: tuple[Phase, ...]  # in the order of training
    task: str  # a key of tasks.TASKS
    model: str  # a size that the task defines
    compute_dtype: str = "float32"  # or "bfloat16"; weights and slots stay float32
    sum_dtype: str = "float32"  # or "bfloat16": of gradients while they are summed over replicas
    accumulation: int = 1  # micro-batches per update
    # Whether to compile the forward and backward pass with XLA. None: yes, except on CPUs without
    # accumulation, where TensorFlow's kernels are faster. A TPU always compiles the step.
    jit_compile: bool | None = None
    optimizer: str = "lamb"  # a key of OPTIMIZERS
    variant: str = ""  # a variant of LAMB or LARS; "": the defaults of the class
    beta_1: float = 0.9  # decay of the first moment
    beta_2: float = 0.999  # decay of the second moment
    epsilon: float = 1e-6  # added to the denominator of the update
    weight_decay: float = 0.01  # of LAMB and LARS: inside the trust ratio
    # Coefficient of the L2 term ½‖x‖² of the loss, over the weights that weight decay applies to.
    l2_regularization: float = 0.0
    momentum: float = 0.9  # of LARS and SGD
    trust_coefficient: float | None = None  # κ of LARS; None: that of the class or variant
    # Maximum norm of all gradients together; None: that of the class or variant.
    global_clipnorm: float | None = None
    clip_each_replica: bool = False  # clip each replica's gradient, before the sum over replicas
    # Patterns of variable paths; None: those of the class or variant.
    exclude_from_layer_adaptation: tuple[str, ...] | None = None
    exclude_from_weight_decay: tuple[str, ...] = ()  # patterns of variable paths
    evaluation_examples: int = 10_000  # maximum of held-out examples in an evaluation
    save_every_steps: int = 1_000  # steps between two checkpoints
    evaluate_every_steps: int | None = None  # None: only at the end
    evaluate_every_examples: int | None = None  # instead: at the first step after each multiple
    target: float | None = None  # of the task's best metric: the run stops when it is reached
    keep_checkpoints: int = 3  # newest checkpoints to keep; the best is kept as well
    skip_nonfinite: bool = True  # skip the update if a gradient is not finite
    max_skipped_in_row: int = 10  # more skipped updates in a row count as divergence
    max_loss: float | None = None  # a step with a larger loss counts as divergence
    on_divergence: str = "stop"  # or "rollback": newest checkpoint and a lower rate
    rollback_rate_factor: float = 0.5  # factor of the learning rate after a rollback
    max_rollbacks: int = 3  # the run stops at the next divergence
    # Parts of the data that hosts can read independently; None: the largest divisor of the batch up
    # to 256 that hosts can share. The order of the examples depends on it, not on the number of
    # hosts.
    lanes: int | None = None
    max_bad_record_share: float = 0.001  # maximum share of damaged records
    on_bad_record: str = "skip"  # or "fail"
    measure_noise_scale: bool = False  # estimate the critical batch size
    telemetry: bool = False  # record trust ratios and weights for TensorBoard
    profile: str | None = None  # "100:110": profile the steps after 100 up to 110

    @property
    def steps(self) -> int:
        """Total number of optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def describe_steps(self, steps: int | None, unit: str) -> str:
        """Returns the first `steps` steps (None: all) and their batch sizes as text.

        Such as "1,800 steps of 64 and 400 of 32 sequences", with `unit` "sequences".
        """
        left = self.steps if steps is None else steps
        parts = []
        for phase in self.phases:
            done = min(left, phase.steps)
            left -= done
            if done or not parts:
                word = "" if parts else f" step{'' if done == 1 else 's'}"
                parts.append(f"{done:,}{word} of {phase.global_batch_size:,}")
        return f"{' and '.join(parts)} {unit}"

    def examples_at(self, step: int) -> int:
        """Returns the number of examples of the first `step` steps of the run."""
        examples = 0
        for phase in self.phases:
            steps = min(step, phase.steps)
            examples += steps * phase.global_batch_size
            step -= steps
        return examples

    def evaluation_steps(self, first: int, last: int) -> list[int]:
        """Returns the steps in (first, last] after which the run is evaluated, in order.

        These are the last step of each phase, and the steps that `evaluate_every_steps` or
        `evaluate_every_examples` ask for: the latter, each step that reaches or passes a multiple
        of that many examples, counted from the start of the run.
        """
        last = min(last, self.steps)
        steps = set(itertools.accumulate(phase.steps for phase in self.phases))
        if self.evaluate_every_steps:
            every = self.evaluate_every_steps
            steps.update(range(every, last + 1, every))
        if self.evaluate_every_examples:
            every = self.evaluate_every_examples
            start = 0  # the phase's first step
            before = 0  # examples of earlier phases
            for phase in self.phases:
                batch = phase.global_batch_size
                end = before + phase.steps * phase.global_batch_size
                multiples = range(before // every + 1, end // every + 1)
                if every <= batch:
                    steps.update(range(start + 1, start + phase.steps + 1))
                else:  # the quotient is rounded up
                    steps.update(start - (before - n * every) // batch for n in multiples)
                start += phase.steps
                before = end
        return sorted(step for step in steps if first < step <= last)

    def compiles(self, on_cpu: bool) -> bool:
        """Returns whether to compile the forward and backward pass with XLA.

        Args:
            on_cpu: Boolean. Whether the run uses CPUs.
        """
        if self.jit_compile is None:
            # Without XLA, a loop over micro-batches needs TensorFlow's graph optimizer to be off
            # (see training/step.py), which costs a CPU more than it gains without XLA.
            return not on_cpu or self.accumulation > 1
        return self.jit_compile

    def check(self) -> None:
        """Checks the fields, except those that the optimizer and its schedule check themselves.

        Raises:
            ValueError: If a field is out of range. The message has the field and its value.
        """
        check_numbers(self)
        check_minimums(self, evaluation_examples=1, save_every_steps=1, evaluate_every_steps=1)
        check_minimums(self, keep_checkpoints=1, max_skipped_in_row=0, max_rollbacks=0)
        check_minimums(self, evaluate_every_examples=1, l2_regularization=0, target=0)
        if self.evaluate_every_steps and self.evaluate_every_examples:
            raise ValueError(
                "evaluate_every_steps and evaluate_every_examples exclude each other. Received: "
                f"evaluate_every_steps={self.evaluate_every_steps}, evaluate_every_examples="
                f"{self.evaluate_every_examples}. Set one of them to none."
            )
        if self.clip_each_replica and self.measure_noise_scale:
            raise ValueError(
                "measure_noise_scale needs gradients that are not clipped before the sum. Set "
                "clip_each_replica=false, or measure_noise_scale=false."
            )
        if self.clip_each_replica and self.global_clipnorm is None:
            raise ValueError(
                "clip_each_replica needs the norm to clip to. Set global_clipnorm=1 too, or "
                "clip_each_replica=false."
            )
        for name, choices in CHOICES.items():
            value = getattr(self, name, choices[0])  # a field of some recipes only
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
        if self.profile is not None and profile_window(self.profile)[1] > self.steps:
            raise ValueError(
                f"profile must end within the {self.steps} steps of the run. "
                f"Received: profile={self.profile}."
            )
        check_minimums(self, lanes=1)
        for phase in self.phases:
            phase.check(self)
            if self.lanes is not None and phase.global_batch_size % self.lanes:
                raise ValueError(
                    f"lanes must divide the global batch. Received: lanes={self.lanes}, "
                    f"global_batch_size={phase.global_batch_size}."
                )
            if self.accumulation < 1 or phase.global_batch_size % self.accumulation:
                raise ValueError(
                    "accumulation must divide each replica's batch. Received: accumulation="
                    f"{self.accumulation}, global_batch_size={phase.global_batch_size}."
                )

    def _check_optimizer(self):
        """Raises `ValueError` if a field is set that the optimizer does not have."""
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}. "
                f"Received: optimizer={self.optimizer}."
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        known = {name for names in OPTIMIZERS.values() for name in names}
        others = sorted(known.difference(OPTIMIZERS[self.optimizer]))
        unused = [name for name in others if getattr(self, name) != defaults[name]]
        if unused:
            received = ", ".join(f"{name}={getattr(self, name)}" for name in unused)
            assignments = ", ".join(
                f"{name}={str(defaults[name]).replace('None', 'none')}" for name in unused
            )
            raise ValueError(
                f"optimizer={self.optimizer} does not take {', '.join(unused)}. "
                f"Received: {received}. Set {assignments} too, or choose another optimizer."
            )
