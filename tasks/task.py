"""The interface of a task, used by the training loop, the pre-flight and train.py."""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from inputs.damage import Damage
from inputs.order import Order


@dataclasses.dataclass(frozen=True)
class Metric:
    """A mean over examples or tokens, accumulated as a sum and a count.

    Sums and counts are added over batches, steps and replicas before the division.

    name: name in logs, and key of the sum in the result of `Task.sums`.
    count: key of the divisor in the result of `Task.counts`.
    higher_is_better: whether a higher value is better.
    is_loss: whether it is a term of the training loss, which is the sum of all such metrics.
    """

    name: str
    count: str
    higher_is_better: bool
    is_loss: bool = False


def loss_metric(name: str, count: str) -> Metric:
    """Returns a metric that is a term of the training loss."""
    return Metric(name, count, higher_is_better=False, is_loss=True)


def means(metrics, sums: dict, counts: dict) -> dict:
    """Returns the value of each metric by name: its sum divided by its count.

    Args:
        metrics: iterable of `Metric`s.
        sums: float32 scalars by `Metric.name`.
        counts: float32 scalars by `Metric.count`.
    """
    return {metric.name: sums[metric.name] / counts[metric.count] for metric in metrics}


def loss_terms(metrics, values: dict) -> list:
    """Returns the values of the metrics that are terms of the training loss."""
    return [values[metric.name] for metric in metrics if metric.is_loss]


class Task(abc.ABC):
    """Data, model, losses, metrics and export of one kind of training.

    A subclass is constructed as

        Subclass(recipe, data_dir=..., vocab=..., resume_dir=..., seed=..., synthetic=..., log=...,
                 cache_dir=..., shared_dir=..., reports=...)

    with the recipe, the values of the flags with these names, the folder of the run to resume
    (`resume_dir`; None for a new run), a function that takes lines of progress (`log`), a folder
    that all hosts can read and write (`shared_dir`; "" if the host is this process), and the
    `inputs.damage.Reports` of damaged records (`reports`; None for those of one process that logs
    all lines). It raises `inputs.errors.InputError` if the data cannot be used.

    recipe: the recipe of the run.
    example_unit: what an example is called in reports, in the plural ("sequences").
    metrics: the metrics that `sums` and `counts` compute, including the terms of the loss.
    best_metric: the metric that decides which checkpoint is kept as the best.
    data: where the examples come from, for reports.
    amount: how many examples there are, for reports.
    facts: name -> hash of the data that a checkpoint depends on, such as the vocabulary.
    training_examples: number of training examples, where an epoch has a fixed number of them.
    """

    recipe: object
    example_unit: str
    metrics: tuple[Metric, ...]
    best_metric: Metric
    data: str
    amount: str
    facts: dict[str, str]
    training_examples: int | None = None

    @abc.abstractmethod
    def build_model(self):
        """Returns a new tf_keras model with initial weights. Called in the strategy's scope."""

    def initial_slots(self, variables):
        """Returns the state from which the optimizer starts, or None for zeros.

        Args:
            variables: the model's trainable variables. Called once, after `build_model`.

        Returns:
            A tuple `(step, slots)`: the number of updates so far, and for each slot of the
            optimizer a list of arrays, one for each variable. Or None.
        """
        del variables
        return None

    @abc.abstractmethod
    def sums(self, model, batch, training: bool) -> dict[str, tf.Tensor]:
        """Returns the sums of all metrics over a batch: float32 scalars by `Metric.name`.

        Args:
            model: from `build_model`.
            batch: dictionary of tensors of static shape, an element of the task's datasets.
            training: True in training (dropout, batch statistics), False in evaluation.
        """

    def parts(self, batch) -> list:
        """Splits a training batch into batches for `sums`, of which the gradients are added.

        Args:
            batch: as for `sums`, or several batches of different shapes in one dictionary, of which
                all tensors have the same first dimension.
        """
        return [batch]

    @abc.abstractmethod
    def counts(self, batch) -> dict[str, tf.Tensor]:
        """Returns the divisors of all metrics for a batch: float32 scalars by `Metric.count`."""

    @abc.abstractmethod
    def train_batches(self, phase_index: int, first_step: int) -> Callable:
        """Returns `(tf.distribute.InputContext or None) -> tf.data.Dataset`, an infinite dataset.

        Each element is one replica's share of a global batch. The global batch of step `s`
        depends only on the seed, the phase and `s`.

        Args:
            phase_index: index of the recipe's phase, from 0.
            first_step: the step of the first batch, counted from 0 at the start of the phase.
        """

    @abc.abstractmethod
    def evaluation_batches(self, phase_index: int) -> Callable:
        """Returns `(tf.distribute.InputContext or None) -> tf.data.Dataset` of one evaluation."""

    def order(self, phase_index: int) -> Order | None:
        """The order of the training examples of a phase; None if they have none.

        Args:
            phase_index: index of the recipe's phase, from 0.
        """
        del phase_index
        return None

    def files_read(self, phase_index: int, context, steps: int) -> set[str]:
        """The files from which a host reads the examples of the first steps of a phase.

        Args:
            phase_index: index of the recipe's phase, from 0.
            context: `tf.distribute.InputContext` of the host.
            steps: the number of steps.
        """
        del phase_index, context, steps
        return set()

    def damage(self) -> Sequence[Damage]:
        """The damaged records of each data set that was read so far."""
        return ()

    def check_data(self) -> None:
        """Reports the damaged records that hosts have found since the last call.

        Raises:
            InputError: they are more than the recipe allows.
        """
        for damage in self.damage():
            damage.collect()

    def end_data(self) -> None:
        """Reports the number of all damaged records, once no data is read any more.

        Raises:
            InputError: they are more than the recipe allows.
        """
        for damage in self.damage():
            damage.end()

    def write_files(self, model_dir: str) -> None:
        """Writes the files that a resumed run needs besides the checkpoints."""
        del model_dir

    def final_metrics(self, model, strategy, output_dir: str | None) -> dict[str, float]:
        """Returns metrics that are computed once, after training. All processes call it.

        Args:
            model: the trained model.
            strategy: the run's `tf.distribute.Strategy`.
            output_dir: a folder for files with details, or None in a process that writes nothing.
        """
        del model, strategy, output_dir
        return {}

    @abc.abstractmethod
    def describe(self, results: dict[str, float]) -> str:
        """Returns one line about the quality of the trained model, for the report.

        Args:
            results: the means of the last evaluation, and `final_metrics`.
        """

    @abc.abstractmethod
    def export(
        self, model, export_dir: str, results: dict[str, float], steps: int | None = None
    ) -> None:
        """Writes the SavedModel and its model card to `export_dir`.

        Args:
            model: the trained model.
            export_dir: a folder.
            results: metric name -> value, on held-out data.
            steps: number of steps that were trained; None for all of the recipe's.
        """

    @abc.abstractmethod
    def demonstrate(self, export_dir: str) -> None:
        """Runs the SavedModel in a separate client process, and prints example outputs."""
