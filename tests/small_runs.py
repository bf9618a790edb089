"""A small `Run` for tests of the loop: one's own model, losses and batches, and a recipe."""

import dataclasses

import tensorflow as tf

from recipes.types import Phase, Recipe
from tasks.task import Task, loss_metric
from training.run import Run


class SmallTask(Task):
    """A task with one loss and without files. A test passes its parts or overrides methods.

    Args:
        recipe: the run's recipe.
        model: `() -> tf_keras model`.
        sums: `(model, batch, training) -> scalar`, the summed loss.
        batches: a `tf.data.Dataset` of one replica's batches.
    """

    example_unit = "examples"
    metrics = (loss_metric("small_loss", "small"),)
    best_metric = metrics[0]
    data = amount = "numbers"
    facts = {}

    def __init__(self, recipe, model=None, sums=None, batches=None):
        self.recipe = recipe
        self._model = model
        self._sums = sums
        self._batches = batches

    def build_model(self):
        return self._model()

    def sums(self, model, batch, training):
        return {"small_loss": self._sums(model, batch, training)}

    def counts(self, batch):
        size = next(iter(batch.values())).shape[:1]
        return {"small": tf.constant(size.num_elements(), tf.float32)}

    def train_batches(self, phase_index, first_step):
        return lambda context: self._batches.repeat()

    def evaluation_batches(self, phase_index):
        return lambda context: self._batches.take(1)

    def describe(self, results):
        return str(results)

    def export(self, model, export_dir, results):
        raise AssertionError("Run.fit does not export")

    def demonstrate(self, export_dir):
        raise AssertionError("Run.fit does not call a SavedModel")


def small_recipe(*phases, **fields):
    """A recipe of these phases (default: one of 1,000 steps) with other fields changed."""
    phases = phases or (
        Phase(steps=1_000, global_batch_size=2, peak_learning_rate=0.1, warmup_steps=0),
    )
    recipe = Recipe(name="small", reference="-", expected="-", task="-", model="-", phases=phases)
    return dataclasses.replace(recipe, **fields)


def begin(run: Run) -> Run:
    """Starts the first phase, so that `run.train(steps)` can be called without `run.fit`."""
    run._stop = lambda: None
    run._start_data(0, 0)
    return run


def small_run(task, where, folder, **arguments) -> Run:
    """A run of the task in a folder."""
    settings = {"model_dir": str(folder), "seed": 1, "steps_per_loop": 3}
    return Run(task, task.recipe, where, **settings | arguments)
