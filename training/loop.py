"""The training loop: one compiled step, many of them on the device, Orbit around them."""

import contextlib
import signal
import sys
from collections.abc import Callable

import orbit
import tensorflow as tf

from training.progress import Progress


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: raised between two inner loops, when the state is whole."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.exit_status = 128 + number  # as shells count it


class Trainer(orbit.AbstractTrainer, orbit.AbstractEvaluator):
    """One task on one strategy, for Orbit's Controller.

    Args:
        strategy: a `tf.distribute.Strategy`.
        model: a tf_keras model, made under the strategy's scope.
        optimizer: a tf_keras optimizer, likewise.
        sums: `(model, batch, training) -> dict` of summed losses and hits, float32 scalars.
        counts: `(batch) -> dict` of what the sums are divided by, float32 scalars. A sum's name
            begins with its count's: "masked_loss" is divided by "masked".
        train_dataset: `(step) -> distributed batches` without end, from that step on.
        eval_dataset: distributed batches of one evaluation.
    """

    def __init__(self, strategy, model, optimizer, sums, counts, train_dataset, eval_dataset):
        super().__init__()
        self.strategy, self.model, self.optimizer = strategy, model, optimizer
        self._sums, self._counts = sums, counts
        self._train_dataset, self._eval_dataset = train_dataset, eval_dataset
        self._train_batches = None
        on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
        # A TPU replica's program is XLA already. Elsewhere forward and backward are compiled as
        # one; the sum over replicas stays outside, where every strategy has it.
        self._compiled = (lambda f: f) if on_tpu else tf.function(jit_compile=True)
        self._gradients = self._compiled(self._sums_and_gradients)
        self._evaluated = self._compiled(self._evaluation_sums)

    def train(self, num_steps):
        """Runs `num_steps` steps on the device; returns their mean losses and the rate."""
        if self._train_batches is None:  # not before: Orbit restores the step after __init__
            self._train_batches = iter(self._train_dataset(int(self.optimizer.iterations.numpy())))
        totals = self._train_loop(num_steps)
        return self._means(totals) | {"learning_rate": self.optimizer.learning_rate.numpy()}

    def evaluate(self, num_steps):
        """One pass over the evaluation batches, whatever `num_steps`; returns means."""
        del num_steps
        totals = None
        for batch in self._eval_dataset:
            sums = self._eval_step(batch)
            totals = sums if totals is None else tf.nest.map_structure(tf.add, totals, sums)
        return self._means(totals)

    def _means(self, totals):
        sums, counts = totals
        return {name: value / counts[name.split("_")[0]] for name, value in sums.items()}

    @tf.function
    def _train_loop(self, num_steps):
        totals = self._train_step()
        for _ in tf.range(num_steps - 1):
            totals = tf.nest.map_structure(tf.add, totals, self._train_step())
        return totals

    def _train_step(self):
        per_replica = self.strategy.run(self._replica_step, args=(next(self._train_batches),))
        return self._summed(per_replica)

    @tf.function
    def _eval_step(self, batch):
        return self._summed(self.strategy.run(self._replica_evaluation, args=(batch,)))

    def _summed(self, per_replica):
        return tf.nest.map_structure(
            lambda value: self.strategy.reduce("SUM", value, axis=None), per_replica
        )

    def _replica_step(self, batch):
        counts = self._counts(batch)
        # The loss is the mean over the global batch, so its divisor is summed over the replicas.
        context = tf.distribute.get_replica_context()
        total_counts = {key: context.all_reduce("SUM", value) for key, value in counts.items()}
        sums, gradients = self._gradients(batch, total_counts)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        return sums, counts

    def _replica_evaluation(self, batch):
        # Not handed to `strategy.run` itself: that would trace it once, for the first replica.
        return self._evaluated(batch)

    def _sums_and_gradients(self, batch, total_counts):
        with tf.GradientTape() as tape:
            sums = self._sums(self.model, batch, training=True)
            loss = tf.add_n(
                [
                    value / total_counts[name.split("_")[0]]
                    for name, value in sums.items()
                    if name.endswith("_loss")
                ]
            )
        gradients = tape.gradient(loss, self.model.trainable_variables)
        return sums, [tf.convert_to_tensor(g) for g in gradients]

    def _evaluation_sums(self, batch):
        return self._sums(self.model, batch, training=False), self._counts(batch)


@contextlib.contextmanager
def stop_on_signal():
    """Yields a train action that raises `Interrupted` once Ctrl-C or SIGTERM has come."""
    received: list[int] = []

    def remember(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("Stopping: the state is saved first.", file=sys.stderr)

    def action(output):
        del output
        if received:
            raise Interrupted(signal.Signals(received[0]))

    previous = {n: signal.signal(n, remember) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield action
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_phase(
    trainer: Trainer,
    manager: tf.train.CheckpointManager,
    progress: Progress,
    stop: Callable,
    *,
    end: int,
    steps_per_loop: int,
    evaluate_every_steps: int | None,
    model_dir: str,
) -> dict[str, float]:
    """Trains up to step `end` from the newest checkpoint, under Orbit's Controller.

    Returns:
        The means of an evaluation at the end.

    Raises:
        Interrupted: a signal came; the state was saved.
        Diverged: from `progress`; the state was not saved.
    """
    # Orbit prints each line that it logs; `progress` says the same and more.
    with contextlib.redirect_stdout(None):
        controller = orbit.Controller(
            global_step=trainer.optimizer.iterations,
            trainer=trainer,
            evaluator=trainer,
            strategy=trainer.strategy,
            train_actions=[progress, stop],
            steps_per_loop=steps_per_loop,
            checkpoint_manager=manager,
            summary_interval=steps_per_loop,
            summary_dir=f"{model_dir}/train",
            eval_summary_dir=f"{model_dir}/eval",
        )
        progress.begin()
        try:
            if evaluate_every_steps:
                controller.train_and_evaluate(end, eval_interval=evaluate_every_steps)
            else:
                controller.train(end)
            means = {key: float(value) for key, value in controller.evaluate().items()}
            stop(means)
        except Interrupted:
            step = int(trainer.optimizer.iterations.numpy())
            manager.save(checkpoint_number=step, check_interval=False)
            raise
        return means
