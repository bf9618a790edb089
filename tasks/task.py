"""The interface of a task: what the training loop, the pre-flight and train.py may ask of one."""

import abc
import dataclasses
from collections.abc import Callable

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Metric:
    """A mean over examples or tokens, accumulated as a sum and a count.

    Sums and counts of batches, steps and replicas are added up before they are divided.

    name: as it appears in logs; the key of its sum in what `Task.sums` returns.
    count: the key of its divisor in what `Task.counts` returns.
    higher_is_better: its direction.
    is_loss: whether it is a term of the training loss, which is the sum of all such metrics.
    """

    name: str
    count: str
    higher_is_better: bool
    is_loss: bool = False


def loss_metric(name: str, count: str) -> Metric:
    """A term of the training loss."""
    return Metric(name, count, higher_is_better=False, is_loss=True)


def means(metrics, sums: dict, counts: dict) -> dict:
    """The value of each metric: its sum divided by its count.

    Args:
        metrics: iterable of `Metric`s.
        sums: float32 scalars by `Metric.name`.
        counts: float32 scalars by `Metric.count`.
    """
    return {metric.name: sums[metric.name] / counts[metric.count] for metric in metrics}


def loss_terms(metrics, values: dict) -> list:
    """The values of the metrics whose sum is the training loss."""
    return [values[metric.name] for metric in metrics if metric.is_loss]


class Task(abc.ABC):
    """Data, model, losses, metrics and export of one kind of training.

    A subclass is constructed as

        Subclass(recipe, data_dir=..., vocab=..., resume_dir=..., seed=..., synthetic=..., log=...)

    with the recipe, the values of the flags of the same names, the folder of the run that is
    resumed (None for a new run), and a function that takes lines of progress. It raises
    `inputs.errors.InputError` if the data cannot be used.

    recipe: the recipe, with every field.
    example_unit: what an example is called in reports, in the plural ("sequences").
    metrics: what `sums` and `counts` measure; the terms of the training loss are among them.
    best_metric: the metric that decides which checkpoint is kept as the best.
    data: where the examples come from, for reports.
    amount: how many examples there are, for reports.
    facts: what a checkpoint depends on besides the recipe and the seed: name -> hash.
    """

    recipe: object
    example_unit: str
    metrics: tuple[Metric, ...]
    best_metric: Metric
    data: str
    amount: str
    facts: dict[str, str]

    @abc.abstractmethod
    def build_model(self):
        """Returns a new tf_keras model with its initial weights, made in the strategy's scope."""

    @abc.abstractmethod
    def sums(self, model, batch, training: bool) -> dict[str, tf.Tensor]:
        """The sums of all metrics over a batch: float32 scalars by `Metric.name`.

        Args:
            model: from `build_model`.
            batch: dictionary of tensors of static shape, an element of the datasets below.
            training: True in training (dropout, batch statistics), False in evaluation.
        """

    @abc.abstractmethod
    def counts(self, batch) -> dict[str, tf.Tensor]:
        """The divisors of all metrics for a batch: float32 scalars by `Metric.count`."""

    @abc.abstractmethod
    def train_batches(self, phase_index: int, first_step: int) -> Callable:
        """`(tf.distribute.InputContext or None) -> tf.data.Dataset` without end.

        Each element is one replica's share of a global batch. The content of step `s` is a
        function of (seed, phase, s) alone.

        Args:
            phase_index: index of the recipe's phase, from 0.
            first_step: the step of the phase, from 0, that the first batch belongs to.
        """

    @abc.abstractmethod
    def evaluation_batches(self, phase_index: int) -> Callable:
        """`(tf.distribute.InputContext or None) -> tf.data.Dataset` of one evaluation."""

    def write_files(self, model_dir: str) -> None:
        """Writes what a later start of the same run needs besides the checkpoints."""
        del model_dir

    def final_metrics(self, model, strategy, output_dir: str | None) -> dict[str, float]:
        """What is measured once, after training; every process calls it.

        Args:
            model: the trained model.
            strategy: the run's `tf.distribute.Strategy`.
            output_dir: a folder for files with details, or None in a process that writes nothing.
        """
        del model, strategy, output_dir
        return {}

    @abc.abstractmethod
    def describe(self, results: dict[str, float]) -> str:
        """One line about the quality of the trained model, for the report.

        Args:
            results: the last evaluation's means and `final_metrics`.
        """

    @abc.abstractmethod
    def export(self, model, export_dir: str, results: dict[str, float]) -> None:
        """Writes the SavedModel and its model card to `export_dir`."""

    @abc.abstractmethod
    def demonstrate(self, export_dir: str) -> None:
        """Prints what the SavedModel answers, asked by a client in a process of its own."""
