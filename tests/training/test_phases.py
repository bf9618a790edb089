"""Runs with two phases: schedule, reset of slots, and interruptions."""

import signal

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_runs import SmallTask, small_recipe, small_run

from inputs.errors import InputError
from recipes import find_recipe, resized
from recipes.types import Phase
from tf_lamb import tf_keras as ours
from training import optimizers
from training.checkpoint import compatibility
from training.checkpoint.interruption import Interrupted, StopRequest
from training.monitor.progress import read_rows

FIRST = Phase(steps=6, global_batch_size=8, peak_learning_rate=0.05, warmup_steps=2)
SECOND = Phase(steps=6, global_batch_size=4, peak_learning_rate=0.02, warmup_steps=3)
BORDER, END = FIRST.steps, FIRST.steps + SECOND.steps
SKIPPED = 2  # LAMB skips the update of this batch, which has an infinity


def make_recipe(optimizer, reset):
    phases = (FIRST, Phase(**vars(SECOND) | {"reset_slots": reset}))
    return small_recipe(
        *phases,
        optimizer=optimizer,
        exclude_from_weight_decay=("bias",),
        weight_decay=0.1,
        jit_compile=True,
    )


class LeastSquares(SmallTask):
    """Least squares. As in every task, a batch is a function of (phase, step)."""

    def build_model(self):
        return make_model()

    def batch(self, phase_index, step):
        size = self.recipe.phases[phase_index].global_batch_size
        seed = tf.stack([tf.constant(phase_index, tf.int64), step])
        x = tf.random.stateless_uniform([size, 5], seed)
        bad = (phase_index == 0) & (step == SKIPPED) & (self.recipe.optimizer == "lamb")
        return {"x": tf.where(bad, np.inf, x), "y": tf.reduce_sum(x, 1, keepdims=True) ** 2}

    def train_batches(self, phase_index, first_step):
        steps = tf.data.Dataset.range(first_step, np.iinfo(np.int64).max)
        return self.shared(steps.map(lambda step: self.batch(phase_index, step)))

    def evaluation_batches(self, phase_index):
        return self.shared(tf.data.Dataset.from_tensors(self.batch(1, tf.constant(99, tf.int64))))

    @staticmethod
    def shared(batches):
        """Splits global batches into the replicas' shares."""
        size = batches.element_spec["x"].shape[0]
        return lambda context: batches.unbatch().batch(size // context.num_replicas_in_sync, True)

    def sums(self, model, batch, training):
        return {"small_loss": tf.reduce_sum((model(batch["x"]) - batch["y"]) ** 2)}


def make_model():
    tf_keras.utils.set_random_seed(1)
    return tf_keras.Sequential(
        [tf_keras.layers.Input([5]), tf_keras.layers.Dense(4, "gelu"), tf_keras.layers.Dense(1)]
    )


class StopAt(StopRequest):
    """Acts as if a signal had arrived during the loop that ends at `step`."""

    def __init__(self, step):
        super().__init__()
        self.run = None
        self._step = step

    def __call__(self, output=None):
        if int(self.run.state.step.numpy()) == self._step:
            raise Interrupted(signal.SIGINT)


def train(strategy, recipe, folder, stop_at=None):
    """Starts or resumes the run in `folder`; returns (weights, updates since the last reset)."""
    folder.mkdir(exist_ok=True)
    stop = StopAt(stop_at)
    run = stop.run = small_run(LeastSquares(recipe), strategy, folder, stop=stop)
    run.fit()
    weights = [v.numpy() for v in run.model.trainable_variables]
    return weights, int(run.optimizer.iterations.numpy())


def plainly(recipe):
    """The reference: a plain loop, with a new optimizer where the slots are reset."""
    task, model = LeastSquares(recipe), make_model()
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
                loss = sums["small_loss"] / counts["small"]
            optimizer.learning_rate = float(schedule(step))
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return [v.numpy() for v in variables]


@pytest.mark.parametrize(
    ("optimizer", "reset"),
    [
        ("lamb", True),
        pytest.param("lamb", False, marks=pytest.mark.slow),
        pytest.param("adamw", True, marks=pytest.mark.slow),
        pytest.param("adagrad", True, marks=pytest.mark.slow),
    ],
)
def test_interruptions_between_and_inside_phases_change_no_result(optimizer, reset, tmp_path):
    """Bit-identical to an uninterrupted run, which is close to the plain loop."""
    recipe = make_recipe(optimizer, reset)
    where = tf.distribute.OneDeviceStrategy("/cpu:0")
    whole, updates = train(where, recipe, tmp_path / "whole")
    skipped = optimizer == "lamb" and not reset
    assert updates == (SECOND.steps if reset else END - skipped)
    for expected, found in zip(plainly(recipe), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # At the end of the first phase, at the start of the second one, then inside it.
    for stop_at in (BORDER, BORDER, BORDER + 3):
        with pytest.raises(Interrupted):
            train(where, recipe, tmp_path / "stopped", stop_at)
    again, updates_again = train(where, recipe, tmp_path / "stopped")
    assert updates_again == updates
    for expected, found in zip(whole, again, strict=True):
        np.testing.assert_array_equal(found, expected)
    rows = read_rows(tmp_path / "stopped/history.jsonl")
    rates = {row["step"]: row["learning_rate"] for row in rows}
    phases = optimizers.make_schedule(recipe)
    assert rates == {step: float(phases(step - 1)) for step in (3, 6, 9, 12)}


@pytest.mark.slow
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
        (1_800, 4_400, False),  # at the end of the first phase, which becomes longer
        (1_000, 1_000, True),  # into the second phase, but not at its start
        (818, 1_000, False),
    ],
)
def test_steps_may_change_only_if_the_run_stays_in_its_phase(tmp_path, step, steps, refused):
    recipe = find_recipe("bert-mini")
    compatibility.write_run_config(str(tmp_path), recipe, seed=1)
    (tmp_path / f"ckpt-{step}.index").touch()
    changed = resized(recipe, steps=steps)
    if refused:
        with pytest.raises(InputError, match=r"1800 and 400 steps; .* would be in another phase"):
            compatibility.check_compatible(str(tmp_path), changed, seed=1)
    else:
        compatibility.check_compatible(str(tmp_path), changed, seed=1)
