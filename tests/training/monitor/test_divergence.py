"""Divergence is recorded on the device and checked once per loop of steps."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_runs import SmallTask, small_recipe, small_run

from recipes.types import Phase
from tf_lamb import tf_keras as optimizers
from training.checkpoint.manager import saved_steps
from training.monitor.divergence import Diverged, DivergenceMonitor

GOOD, NAN, INF = 1.0, float("nan"), float("inf")


class Small:
    """Two layers. "second/kernel" gets the gradients passed to `run`, "first/kernel" ones."""

    def __init__(self, max_skipped_in_row=2, max_loss=None, skip_nonfinite=True):
        self.variables = [tf.Variable([3.0, 4.0], name=f"{n}/kernel") for n in ("first", "second")]
        self.optimizer = optimizers.LAMB(0.1, skip_nonfinite=skip_nonfinite, telemetry=True)
        self.optimizer.build(self.variables)
        self.skipped_in_row = tf.Variable(0, dtype=tf.int64)
        self.monitor = DivergenceMonitor(
            self.optimizer,
            self.skipped_in_row,
            max_skipped_in_row=max_skipped_in_row,
            max_loss=max_loss,
        )
        self.done = 0

    def run(self, gradients, losses=None):
        """Runs a loop of steps on the device, then the check on the host."""
        losses = losses or [1.0] * len(gradients)
        record = self._loop(
            tf.constant(gradients), tf.constant(losses), tf.constant(self.done, tf.int64)
        )
        self.done += len(gradients)
        self.monitor.check(record)

    @tf.function
    def _loop(self, gradients, losses, done):
        record = self.monitor.initial()
        for i in tf.range(tf.size(gradients)):
            before = tf.identity(self.optimizer.iterations)
            pair = [tf.ones([2]), tf.fill([2], gradients[i])]
            self.optimizer.apply_gradients(zip(pair, self.variables, strict=True))
            updated = self.optimizer.iterations > before
            step = done + tf.cast(i, tf.int64) + 1
            rows = self.monitor.telemetry_rows()
            record = self.monitor.update(record, step, losses[i], updated, rows, tf.constant(False))
        return record


def test_a_few_skipped_steps_are_accepted_and_counted_across_loops():
    small = Small()
    small.run([GOOD, NAN, NAN, GOOD, NAN], [1.0, NAN, NAN, 1.0, NAN])
    assert small.skipped_in_row.numpy() == 1 and small.optimizer.skipped_steps == 3
    with pytest.raises(Diverged) as error:
        small.run([INF, NAN, NAN])
    assert "not finite in 3 steps in a row, up to step 7" in str(error.value)
    assert "not finite in second/kernel" in str(error.value)


def test_too_many_skipped_steps_inside_a_loop_stop_the_run():
    with pytest.raises(Diverged, match="3 steps in a row, up to step 4; not finite in second/"):
        Small().run([GOOD, NAN, NAN, NAN, NAN, GOOD, GOOD])


def test_a_loss_above_max_loss_is_reported_with_its_step():
    small = Small(max_loss=5.0)
    small.run([GOOD, GOOD], [4.0, 5.0])
    with pytest.raises(Diverged, match="the loss is 7 at step 4, above max_loss=5; the largest"):
        small.run([GOOD, GOOD, GOOD], [4.0, 7.0, 9.0])


def test_without_max_loss_any_finite_loss_is_accepted_but_not_nan():
    small = Small(skip_nonfinite=False)
    small.run([GOOD, GOOD], [1e30, 1e38])
    with pytest.raises(Diverged, match="the loss is nan at step 4; not finite in second/kernel"):
        small.run([GOOD, NAN], [1.0, NAN])


def test_a_skipped_step_leaves_the_weights_as_they_were():
    small = Small()
    before = [variable.numpy() for variable in small.variables]
    small.run([NAN, NAN])
    assert all(map(np.array_equal, before, (variable.numpy() for variable in small.variables)))
    assert small.optimizer.iterations.numpy() == 0


def test_the_schedule_follows_the_run_and_is_scaled_exactly():
    from training.checkpoint.manager import RunState
    from training.optimizers import RunSchedule

    state = RunState()
    schedule = optimizers.WarmupPolynomialDecay(0.3, warmup_steps=3, total_steps=9)
    scaled = RunSchedule(schedule, state)
    assert isinstance(scaled, tf_keras.optimizers.schedules.LearningRateSchedule)
    for step in range(9):
        state.step.assign(step)
        assert scaled(0).numpy() == schedule(step).numpy()  # the optimizer's own step is ignored
    state.step.assign(5)
    state.rate_factor.assign(0.5)
    assert scaled(0).numpy() == 0.5 * schedule(5).numpy()


def test_an_optimizer_that_skips_nothing_stops_at_the_first_nan():
    """An optimizer of tf_keras has no telemetry, so the message names no layer."""
    optimizer = tf_keras.optimizers.AdamW(0.1)
    optimizer.build([tf.Variable([1.0])])
    monitor = DivergenceMonitor(
        optimizer, tf.Variable(0, dtype=tf.int64), max_skipped_in_row=2, max_loss=None
    )
    record = monitor.update(
        monitor.initial(),
        tf.constant(1, tf.int64),
        tf.constant(NAN),
        tf.constant(True),
        monitor.telemetry_rows(),
        tf.constant(False),
    )
    with pytest.raises(Diverged, match="^the loss is nan at step 1$"):
        monitor.check(record)


class Poisoned(SmallTask):
    """A weight whose gradient is infinite in step 3, where the loss is finite."""

    def __init__(self, recipe):
        batches = tf.data.Dataset.from_tensor_slices({"x": np.float32([4, 4, 0, 4])[:, None, None]})
        super().__init__(recipe, self.model, self.roots, batches.repeat())

    @staticmethod
    def model():
        inputs = tf_keras.Input([1])
        layer = tf_keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        return tf_keras.Model(inputs, layer(inputs))

    @staticmethod
    def roots(model, batch, training):
        return tf.reduce_sum(tf.sqrt(model(batch["x"])))


@pytest.mark.parametrize(
    "changes", [{"optimizer": "adamw"}, {"optimizer": "adagrad"}, {"skip_nonfinite": False}]
)
def test_an_update_that_is_not_skipped_is_not_saved(changes, tmp_path):
    """With a checkpoint due at the step of the bad gradient, whose loss is finite."""
    phase = Phase(steps=8, global_batch_size=1, peak_learning_rate=0.01, warmup_steps=1)
    recipe = small_recipe(phase, save_every_steps=3, weight_decay=0.0, **changes)
    one = tf.distribute.OneDeviceStrategy("/cpu:0")
    with pytest.raises(Diverged, match="a gradient was not finite at step 3, and the optimizer"):
        small_run(Poisoned(recipe), one, tmp_path).fit()
    assert saved_steps(str(tmp_path)) == []
