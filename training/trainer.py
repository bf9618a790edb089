"""The training loop: many steps on the device, and Orbit around them."""

import contextlib
from collections.abc import Callable

import orbit
import tensorflow as tf

from training.checkpoint.best import Best
from training.checkpoint.manager import Manager
from training.checkpoint.signals import Interrupted
from training.checkpoint.state import RunState
from training.monitor.divergence import Watch
from training.monitor.instruments import Instruments
from training.monitor.noise_scale import noise_scale
from training.step import ReplicaStep
from training.strategy import is_multi_worker


class Trainer(orbit.AbstractTrainer, orbit.AbstractEvaluator):
    """One task on one strategy, for Orbit's Controller.

    Args:
        strategy: a `tf.distribute.Strategy`.
        step: a `ReplicaStep`, made under the strategy's scope.
        train_dataset: `(step) -> distributed batches` without end, from that step on.
        eval_dataset: distributed batches of one evaluation.
        state: the run's counters.
        watch: judges the steps.
        stop: raises `Interrupted` if a signal has come. A process that evaluates alone asks it
            at each batch, too.
    """

    def __init__(
        self, strategy, step: ReplicaStep, train_dataset, eval_dataset, *,
        state: RunState, watch: Watch, stop: Callable,
    ):  # fmt: skip
        super().__init__()
        self.state, self._watch = state, watch
        self._stop = (lambda: None) if is_multi_worker(strategy) else stop
        self.strategy, self.model, self.optimizer = strategy, step.model, step.optimizer
        self._step = step
        self._train_dataset, self._eval_dataset = train_dataset, eval_dataset
        self._train_batches = None
        on_read = tf.VariableSynchronization.ON_READ
        self._statistics = [
            v for v in self.model.non_trainable_variables if v.synchronization == on_read
        ]

    def train(self, num_steps):
        """Runs `num_steps` steps on the device.

        Returns:
            The mean losses of the steps whose own are finite, the rate, `skipped_steps`, the
            updates skipped since the run began, and `input_wait_seconds`: the time from a step's
            end to the arrival of the next batch, 0 where that was there already, over all steps.
            On a CPU that is what the steps waited. On an accelerator, whose work is queued, a
            step may have ended for the host before it is computed, and it is the most they waited.

        Raises:
            Diverged: a step was beyond bearing.
        """
        if self._train_batches is None:  # not before: Orbit restores the step after __init__
            self._train_batches = iter(self._train_dataset(int(self.state.step.numpy())))
        totals, seen, waited = self._train_loop(num_steps)
        self._watch.judge(seen)
        means = self._means(totals)
        means |= noise_scale(means)
        return means | {
            "learning_rate": self.optimizer.learning_rate.numpy(),
            # tf_keras's own optimizers skip none.
            "skipped_steps": getattr(self.optimizer, "skipped_steps", 0),
            "input_wait_seconds": waited,
        }

    def evaluate(self, num_steps):
        """One pass over the evaluation batches, whatever `num_steps`; returns means."""
        del num_steps
        totals = None
        for batch in self._eval_dataset:
            self._stop()
            sums = self._eval_step(batch)
            totals = sums if totals is None else tf.nest.map_structure(tf.add, totals, sums)
        return self._means(totals)

    def _means(self, totals):
        sums, counts = totals
        return {name: value / counts[name.split("_")[0]] for name, value in sums.items()}

    @tf.function
    def _train_loop(self, num_steps):
        """(sums and counts of all steps, what `Watch` has seen in them, seconds of waiting)."""
        totals, *_ = self._train_step.get_concrete_function().structured_outputs
        totals = tf.nest.map_structure(lambda total: tf.zeros(total.shape, total.dtype), totals)
        seen = self._watch.start()
        waited, ended = tf.zeros([], tf.float64), tf.timestamp()
        for _ in tf.range(num_steps):
            step_totals, news, arrived, now = self._train_step()
            seen = self._watch.seen(seen, *news)
            totals = tf.nest.map_structure(tf.add, totals, step_totals)
            waited += tf.maximum(arrived - ended, 0.0)
            ended = now
        if self._statistics and self.strategy.num_replicas_in_sync > 1:
            self.strategy.run(self._average_statistics)
        return totals, seen, waited

    @tf.function
    def _train_step(self):
        """A step of all replicas.

        Returns:
            Its sums and counts; what `Watch.seen` takes: step, loss, whether updated, rows; and
            when the batch had arrived and the update was made, in seconds of the clock.
        """
        batch = next(self._train_batches)
        with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
            arrived = tf.timestamp()
        # Where one thread does everything, it could take the time when all else is done.
        with tf.control_dependencies([arrived]):
            sums, counts, updated, rows = self.strategy.run(self._counted_step, args=(batch,))
        totals = self._summed((sums, counts))
        means = self._means(totals)
        loss = tf.add_n([value for name, value in means.items() if name.endswith("_loss")])
        # The same on all replicas.
        updated, rows = (self.strategy.experimental_local_results(x)[0] for x in (updated, rows))
        with tf.control_dependencies([updated, *tf.nest.flatten(totals)]):
            ended = tf.timestamp()
        # One step's NaN would be the whole loop's.
        kept = tf.nest.map_structure(
            lambda value: tf.where(tf.math.is_finite(loss), value, tf.zeros_like(value)), totals
        )
        return kept, (self.state.step.read_value(), loss, updated, rows), arrived, ended

    def _counted_step(self, batch):
        """A replica's step: (sums, counts, whether it updated the weights, telemetry)."""
        before = tf.identity(self.optimizer.iterations)
        sums, counts = self._step.train(batch, self.state.step)
        self.state.step.assign_add(1)
        return sums, counts, self.optimizer.iterations > before, self._watch.rows()

    @tf.function
    def _eval_step(self, batch):
        return self._summed(self.strategy.run(self._step.evaluation, args=(batch,)))

    def _summed(self, per_replica):
        return tf.nest.map_structure(
            lambda value: self.strategy.reduce("SUM", value, axis=None), per_replica
        )

    def _average_statistics(self):
        """Moving averages differ among replicas; from here on each holds the mean of all."""
        context = tf.distribute.get_replica_context()
        for variable in self._statistics:
            variable.assign(context.all_reduce("MEAN", tf.convert_to_tensor(variable)))


def evaluation_steps(step: int, end: int, every: int | None) -> list[int]:
    """The multiples of `every` (None: none) beyond `step` and before `end`, and `end`."""
    if step >= end:
        return []
    return [*(range((step // every + 1) * every, end, every) if every else ()), end]


def run_phase(
    trainer: Trainer,
    manager: Manager,
    best: Best,
    instruments: Instruments,
    stop: Callable,
    *,
    number: int,
    end: int,
    steps_per_loop: int,
    evaluate_every_steps: int | None,
    evaluate_first: bool,
    model_dir: str,
) -> dict[str, float]:
    """Trains phase `number` up to step `end` from the newest checkpoint, under Orbit's Controller.

    `evaluate_first` makes up for an evaluation that the run before did not come to.

    Returns:
        The means of an evaluation at the end.

    Raises:
        Interrupted: a signal came; the state was saved.
        Diverged: the state was not saved.
        SaveFailed: a checkpoint could not be written.
    """
    # Orbit prints each line that it logs; `instruments` say the same and more.
    with contextlib.redirect_stdout(None):
        controller = orbit.Controller(
            global_step=trainer.state.step,
            trainer=trainer,
            evaluator=trainer,
            strategy=trainer.strategy,
            train_actions=[instruments, stop],
            eval_actions=[best, instruments.evaluated],
            steps_per_loop=instruments.loop_lengths(steps_per_loop),
            checkpoint_manager=manager,
            summary_dir=f"{model_dir}/train",
            eval_summary_dir=f"{model_dir}/eval",
        )
        instruments.begin(number)
        try:
            stop()
            means = controller.evaluate() if evaluate_first else None
            # Not `train_and_evaluate`, which counts the interval from where a run goes on.
            for target in evaluation_steps(
                int(trainer.state.step.numpy()), end, evaluate_every_steps
            ):
                controller.train(target, checkpoint_at_completion=target == end)
                means = controller.evaluate()
                stop()
            means = means or controller.evaluate()
            return {key: float(value) for key, value in means.items()}
        except Interrupted:
            manager.save(check_interval=False)
            raise
