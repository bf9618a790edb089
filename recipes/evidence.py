"""Estimates settings and examples to the target for a batch size from published runs.

Between two reference points, each quantity is interpolated linearly in the logarithm of the batch
size. The paper's rule and the linear rule are here to be compared: `Evidence.leave_one_out`
predicts each point from the others by all three.
"""

import dataclasses
import math
from collections.abc import Sequence

from recipes import mlperf
from recipes.mlperf import Reference
from recipes.types import Recipe

RULES = {"sqrt": 0.5, "linear": 1.0}  # exponent of the learning rate in the batch size
# How a setting is interpolated: its value, or the value that it is made of.
LOGARITHM = (math.log, math.exp)
COMPLEMENT = (lambda beta: math.log(1 - beta), lambda x: 1 - math.exp(x))
SETTINGS = {
    "lamb": {"beta_1": COMPLEMENT, "beta_2": COMPLEMENT, "weight_decay": LOGARITHM},
    "lars": {"momentum": COMPLEMENT, "weight_decay": LOGARITHM},
}
DEVIATIONS = 2  # half the width of an interval at a reference point, in deviations of its runs


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the evidence says of a batch size.

    Attributes:
        recipe: The recipe for it.
        examples: Examples to the target.
        low, high: An interval of `examples`: at a reference point, `DEVIATIONS` standard
            deviations of its runs; between two, the largest error of `leave_one_out`.
        rate_error: The relative error of the learning rate: 0 at a reference point; between two,
            the larger error of the two in `leave_one_out`, whose interpolations include the batch.
        source: The reference points that it was made from, and what the interval is.
        exact: Whether the batch size is that of a reference point.
    """

    recipe: Recipe
    examples: float
    low: float
    high: float
    rate_error: float
    source: str
    exact: bool

    @property
    def steps(self) -> int:
        """Steps to the target, rounded up."""
        return math.ceil(self.examples / self.recipe.phases[0].global_batch_size)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """One reference point, predicted from the others.

    Attributes:
        reference: The point.
        predictions: Rule -> pair of examples and learning rate, by "evidence", "sqrt" and "linear".
            The estimate is `None` for the smallest and the largest batch size, which have no
            neighbors on both sides.
    """

    reference: Reference
    predictions: dict[str, tuple[float, float] | None]

    def errors(self, rule: str) -> tuple[float, float] | None:
        """Returns the relative errors of examples and learning rate, or `None`."""
        predicted = self.predictions[rule]
        if predicted is None:
            return None
        rate = self.reference.recipe.phases[0].peak_learning_rate
        return predicted[0] / self.reference.examples - 1, predicted[1] / rate - 1


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Reference points of one task, model, optimizer and target.

    Attributes:
        subject: What was trained, from what and to what.
        unit: What an example is called, in the plural.
        references: The points, in the order of their batch sizes.
    """

    subject: str
    unit: str
    references: tuple[Reference, ...]

    @property
    def batches(self) -> tuple[int, int]:
        """The smallest and the largest batch size."""
        return self.references[0].batch, self.references[-1].batch

    def predict(self, batch: int) -> Prediction:
        """Returns what the reference points say of a batch size.

        Raises:
            ValueError: If it is smaller or larger than that of every point.
        """
        low, high = self.batches
        if not low <= batch <= high:
            raise ValueError(
                f"global_batch_size={batch} is outside the evidence for {self.subject}, which goes "
                f"from {low:,} to {high:,}. Choose a batch size in this range, or a rule that does "
                "not ask the evidence: sqrt or linear."
            )
        for point in self.references:
            if point.batch == batch:
                spread = DEVIATIONS * point.deviation
                return Prediction(
                    point.recipe,
                    point.examples,
                    point.examples - spread,
                    point.examples + spread,
                    0.0,
                    f"reference point {batch:,} ({point.source}); interval: {DEVIATIONS} standard "
                    f"deviations of its {point.runs} runs",
                    True,
                )
        recipe, examples, pair = self._interpolate(self.references, batch)
        worst, rate_error = self.largest_error(0), self.largest_error(1, pair)
        names = " and ".join(f"{point.batch:,}" for point in pair)
        file = pair[0].source.rpartition(",")[0]
        return Prediction(
            recipe,
            examples,
            examples / (1 + worst),
            examples * (1 + worst),
            rate_error,
            f"between the reference points {names} ({file}); interval: "
            f"the largest error of a point predicted from the others, {worst:.0%}",
            False,
        )

    def largest_error(self, index: int = 0, points: Sequence[Reference] | None = None) -> float:
        """Returns the largest relative error in `leave_one_out`, of either sign.

        Args:
            index: Integer. 0 for the error of the examples, 1 for that of the learning rate.
            points: The reference points to take the errors of. `None`, or points that have no
                estimate, means all.
        """
        left_out = [row for row in self.leave_one_out() if row.predictions["evidence"]]
        chosen = [row for row in left_out if points is None or row.reference in points]
        errors = [row.errors("evidence") for row in chosen or left_out]
        return max(max(1 + e[index], 1 / (1 + e[index])) - 1 for e in errors if e)

    def leave_one_out(self) -> list[LeftOut]:
        """Returns each point, predicted from the others.

        The rules start from the nearest of the other points, and keep its number of examples.
        """
        rows = []
        for point in self.references:
            others = tuple(other for other in self.references if other is not point)
            predictions: dict[str, tuple[float, float] | None] = {"evidence": None}
            if others[0].batch < point.batch < others[-1].batch:
                recipe, examples, _ = self._interpolate(others, point.batch)
                predictions["evidence"] = examples, recipe.phases[0].peak_learning_rate
            nearest = min(others, key=lambda other: abs(math.log(other.batch / point.batch)))
            for rule in RULES:
                predictions[rule] = self.by_rule(nearest, point.batch, rule)
            rows.append(LeftOut(point, predictions))
        return rows

    @staticmethod
    def by_rule(start: Reference, batch: int, rule: str) -> tuple[float, float]:
        """Returns (examples, learning rate) by a rule, from a reference point."""
        factor = (batch / start.batch) ** RULES[rule]
        return start.examples, start.recipe.phases[0].peak_learning_rate * factor

    def fit(self) -> tuple[float, float]:
        """Fits E = E₀ (1 + B/C) to the points, by least squares of the relative errors.

        Returns:
            A tuple (E₀, C): the examples that a very small batch needs, and the critical batch
            size, at which twice as many are needed (McCandlish et al., arXiv:1812.06162).
        """
        # Minimizes Σ (a/E + b B/E - 1)².
        rows = [(1 / p.examples, p.batch / p.examples) for p in self.references]
        uu, uv, vv = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
        u, v = (sum(r[i] for r in rows) for i in (0, 1))
        determinant = uu * vv - uv * uv
        a, b = (u * vv - v * uv) / determinant, (v * uu - u * uv) / determinant
        return a, a / b

    def _interpolate(self, references, batch):
        """Returns (recipe, examples, the two points), for a batch between two of the points."""
        above = next(i for i, point in enumerate(references) if point.batch > batch)
        pair = references[above - 1], references[above]
        start, end = (math.log(point.batch) for point in pair)
        share = (math.log(batch) - start) / (end - start)

        def between(low, high, forward=float, backward=float):
            if low == high:
                return low
            return backward(forward(low) + share * (forward(high) - forward(low)))

        (first,), (second,) = (point.recipe.phases for point in pair)
        scheduled = between(
            first.steps * first.global_batch_size,
            second.steps * second.global_batch_size,
            *LOGARITHM,
        )
        steps = max(2, round(scheduled / batch))
        # A warm-up is interpolated as a share of the steps.
        warmup, warmup_from = (
            round(
                steps * between(getattr(first, n) / first.steps, getattr(second, n) / second.steps)
            )
            for n in ("warmup_steps", "warmup_from")
        )
        phase = dataclasses.replace(
            first,
            steps=steps,
            global_batch_size=batch,
            peak_learning_rate=between(
                first.peak_learning_rate, second.peak_learning_rate, *LOGARITHM
            ),
            warmup_steps=warmup,
            warmup_from=max(warmup_from, -warmup),
        )
        one, other = (point.recipe for point in pair)
        settings = {
            name: between(getattr(one, name), getattr(other, name), *kind)
            for name, kind in SETTINGS[one.optimizer].items()
        }
        name = f"{one.name.rpartition('-')[0]}-{batch}"
        source = f"between {one.name} and {other.name}, in the logarithm of the batch size"
        every = one.evaluate_every_examples
        if one.task == "bert":
            every = mlperf.bert_evaluation_examples(batch)
        recipe = dataclasses.replace(
            one,
            name=name,
            reference=source,
            expected="see the evidence",
            phases=(phase,),
            evaluate_every_examples=every,
            **settings,
        )
        examples = between(pair[0].examples, pair[1].examples, *LOGARITHM)
        return recipe, examples, pair


BERT = Evidence(
    "BERT-Large with LAMB at length 512, from MLPerf's checkpoint to masked-token accuracy 0.720",
    "sequences",
    mlperf.BERT_REFERENCES,
)
RESNET = Evidence(
    "ResNet-50 with LARS, to ImageNet top-1 0.759", "images", mlperf.RESNET_REFERENCES
)
EVIDENCE = (BERT, RESNET)


def kind_of(recipe: Recipe) -> tuple:
    """Returns what runs must have in common to be compared, besides their batch size.

    These are the task, the model, the optimizer, the target and the sequence length of each phase.
    """
    lengths = tuple(getattr(phase, "sequence_length", None) for phase in recipe.phases)
    return recipe.task, recipe.model, recipe.optimizer, recipe.target, lengths


def find_evidence(recipe: Recipe) -> Evidence | None:
    """Returns the evidence on this recipe's task, model, optimizer and target, or `None`."""
    return next((e for e in EVIDENCE if kind_of(e.references[0].recipe) == kind_of(recipe)), None)


def scale_by_evidence(recipe: Recipe, batch: int) -> Recipe:
    """Returns the recipe with the settings that the evidence has for a batch size.

    Learning rate, warm-up, steps, moments and weight decay are replaced; what the evidence says
    nothing of, such as checkpoints and exclusions, is kept.

    Raises:
        ValueError: If there is no evidence for such a recipe, or for the batch size.
    """
    evidence = find_evidence(recipe)
    if evidence is None:
        known = "; ".join(e.subject for e in EVIDENCE)
        raise ValueError(
            f"there is no evidence for {recipe.name}. It exists for: {known}. Use the rule sqrt or "
            "linear."
        )
    found = evidence.predict(batch).recipe
    names = ("evaluate_every_examples", *SETTINGS[found.optimizer])
    changed = {name: getattr(found, name) for name in names} | {"evaluate_every_steps": None}
    save = max(1, round(recipe.save_every_steps * recipe.phases[0].global_batch_size / batch))
    return dataclasses.replace(recipe, phases=found.phases, save_every_steps=save, **changed)
