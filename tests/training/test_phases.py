"""A run through two phases: schedule, slots and their step, and wherever it is interrupted."""

import json
import signal

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from inputs.errors import InputError
from recipes import find_recipe, resized
from recipes.types import Phase, Recipe
from tf_lamb import tf_keras as ours
from training import optimizers
from training.checkpoint import compatibility
from training.checkpoint.signals import Interrupted, StopRequest
from training.checkpoint.state import RunSchedule, RunState
from training.run import Run
from training.step import ReplicaStep

FIRST = Phase(steps=6, global_batch_size=8, peak_learning_rate=0.05, warmup_steps=2)
SECOND = Phase(steps=6, global_batch_size=4, peak_learning_rate=0.02, warmup_steps=3)
BORDER, END = FIRST.steps, FIRST.steps + SECOND.steps
SKIPPED = 2  # LAMB skips the update of this batch, which has an infinity


def make_recipe(optimizer, reset):
    phases = (FIRST, Phase(**vars(SECOND) | {"reset_slots": reset}))
    return Recipe(
        name="two", reference="-", expected="-", task="-", model="-", phases=phases,
        optimizer=optimizer, exclude_from_weight_decay=("bias",), weight_decay=0.1,
    )  # fmt: skip


class Task:
    """Least squares on batches that follow from (phase, step), as every task's do."""

    best_metric = "value_loss"

    def __init__(self, recipe):
        self.recipe = recipe

    def batch(self, number, step):
        size = self.recipe.phases[number].global_batch_size
        seed = tf.stack([tf.constant(number, tf.int64), step])
        x = tf.random.stateless_uniform([size, 5], seed)
        bad = (number == 0) & (step == SKIPPED) & (self.recipe.optimizer == "lamb")
        return {"x": tf.where(bad, np.inf, x), "y": tf.reduce_sum(x, 1, keepdims=True) ** 2}

    def train_batches(self, number, first_step):
        numbers = tf.data.Dataset.range(first_step, np.iinfo(np.int64).max)
        return self.shared(numbers.map(lambda step: self.batch(number, step)))

    def evaluation_batches(self, number):
        return self.shared(tf.data.Dataset.from_tensors(self.batch(1, tf.constant(99, tf.int64))))

    @staticmethod
    def shared(batches):
        """Each replica's share in turn."""
        size = batches.element_spec["x"].shape[0]
        return lambda context: batches.unbatch().batch(size // context.num_replicas_in_sync, True)

    @staticmethod
    def sums(model, batch, training):
        return {"value_loss": tf.reduce_sum((model(batch["x"]) - batch["y"]) ** 2)}

    @staticmethod
    def counts(batch):
        return {"value": tf.cast(tf.shape(batch["x"])[0], tf.float32)}


def make_model():
    tf_keras.utils.set_random_seed(1)
    return tf_keras.Sequential(
        [tf_keras.layers.Input([5]), tf_keras.layers.Dense(4, "gelu"), tf_keras.layers.Dense(1)]
    )


class StopAt(StopRequest):
    """As if a signal had come during the loop that ends at this step."""

    def __init__(self, state, step):
        super().__init__()
        self._state, self._step = state, step

    def __call__(self, output=None):
        if int(self._state.step.numpy()) == self._step:
            raise Interrupted(signal.SIGINT)


def train(strategy, recipe, folder, stop_at=None):
    """Starts the run in `folder` or goes on with it; (weights, updates since the last reset)."""
    folder.mkdir(exist_ok=True)
    task = Task(recipe)
    with strategy.scope():
        state = RunState()
        schedule = RunSchedule(optimizers.make_schedule(recipe), state)
        optimizer = optimizers.make_optimizer(recipe, schedule)
        model = make_model()
        optimizers.build(optimizer, recipe, model.trainable_variables)
    step = ReplicaStep(
        model, optimizer, task.sums, task.counts, seed=1, accumulation=1, jit_compile=True
    )
    Run(
        task, recipe, step, state, strategy, settings="", model_dir=str(folder),
        folder=str(folder), steps_per_loop=3, stop=StopAt(state, stop_at), log=lambda line: None,
    ).train()  # fmt: skip
    return [v.numpy() for v in model.trainable_variables], int(optimizer.iterations.numpy())


def plainly(recipe):
    """The same by an optimizer in a plain loop, and a new one where the slots are reset."""
    task, model = Task(recipe), make_model()
    variables = model.trainable_variables

    def make():
        optimizer = optimizers.make_optimizer(recipe, 1.0)
        optimizers.build(optimizer, recipe, variables)
        return optimizer

    optimizer = make()
    for number, phase in enumerate(recipe.phases):
        if phase.reset_slots:
            optimizer = make()
        schedule = ours.WarmupPolynomialDecay(**phase.schedule())
        for step in range(phase.steps):
            batch = task.batch(number, tf.constant(step, tf.int64))
            with tf.GradientTape() as tape:
                sums, counts = task.sums(model, batch, True), task.counts(batch)
                loss = sums["value_loss"] / counts["value"]
            optimizer.learning_rate = float(schedule(step))
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return [v.numpy() for v in variables]


@pytest.mark.parametrize(
    ("optimizer", "reset"),
    [("lamb", False), ("lamb", True), ("adamw", True), ("adagrad", True)],
)
def test_phases_with_interruptions_at_the_border_and_inside(optimizer, reset, tmp_path):
    """As without interruptions to the last bit, and as a plain loop with a new optimizer."""
    recipe = make_recipe(optimizer, reset)
    where = tf.distribute.OneDeviceStrategy("/cpu:0")
    whole, updates = train(where, recipe, tmp_path / "whole")
    skipped = optimizer == "lamb" and not reset
    assert updates == (SECOND.steps if reset else END - skipped)
    for expected, found in zip(plainly(recipe), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # At the border before the second phase has begun, then as it begins; then within it.
    for stop_at in (BORDER, BORDER, BORDER + 3):
        with pytest.raises(Interrupted):
            train(where, recipe, tmp_path / "stopped", stop_at)
    again, updates_again = train(where, recipe, tmp_path / "stopped")
    assert updates_again == updates
    for expected, found in zip(whole, again, strict=True):
        np.testing.assert_array_equal(found, expected)
    lines = (tmp_path / "stopped/history.jsonl").read_text().splitlines()
    rates = {row["step"]: row["learning_rate"] for row in map(json.loads, lines)}
    phases = optimizers.make_schedule(recipe)
    assert rates == {step: float(phases(step - 1)) for step in (3, 6, 9, 12)}


def test_slots_are_reset_on_every_replica(mirrored, tmp_path):
    recipe = make_recipe("lamb", reset=True)
    weights, updates = train(mirrored, recipe, tmp_path / "run")
    assert updates == SECOND.steps
    for expected, found in zip(plainly(recipe), weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    kept = plainly(make_recipe("lamb", reset=False))
    assert max(abs(a - b).max() for a, b in zip(weights, kept, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("step", "steps", "refused"),
    [
        (1_900, 2_200, False),
        (1_900, 4_400, True),  # back into the first phase
        (1_800, 4_400, False),  # at the end of the first, which grows
        (1_000, 1_000, True),  # into the second without its beginning
        (818, 1_000, False),
    ],
)
def test_a_run_made_longer_stays_in_its_phase(tmp_path, step, steps, refused):
    recipe = find_recipe("bert-mini")
    compatibility.claim(str(tmp_path), recipe, seed=1)
    (tmp_path / f"ckpt-{step}.index").touch()
    changed = resized(recipe, steps=steps)
    if refused:
        with pytest.raises(InputError, match=r"1800 and 400 steps; .* would be in another phase"):
            compatibility.check(str(tmp_path), changed, seed=1)
    else:
        compatibility.check(str(tmp_path), changed, seed=1)
