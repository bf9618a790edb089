"""The training loop: one compiled step, many of them on the device, Orbit around them."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable

import orbit
import tensorflow as tf


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: raised between two inner loops, when the state is whole."""


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


class Progress:
    """Prints loss, rate, examples/s and time left; as a train action, once per inner loop.

    Args:
        step: the optimizer's `iterations`.
        total_steps: where the run ends.
        phase: whose `global_batch_size` a step takes.
        write: takes each line.
        every_seconds: least time between two lines.
    """

    def __init__(self, step, total_steps, phase, write, every_seconds=5.0):
        self._step, self._total, self._batch_size = step, total_steps, phase.global_batch_size
        self._write, self._every = write, every_seconds
        self._last_step, self._last_time = int(step.numpy()), time.perf_counter()
        self._printed = 0.0
        self.examples, self.seconds = 0, 0.0  # without the first loop, which compiles
        self._warm = False

    def __call__(self, output):
        """Takes the output of an inner loop."""
        step, now = int(self._step.numpy()), time.perf_counter()
        taken, steps = now - self._last_time, step - self._last_step
        self._last_step, self._last_time = step, now
        if self._warm:
            self.examples += steps * self._batch_size
            self.seconds += taken
        self._warm = True
        done = step >= self._total
        if now - self._printed < self._every and not done:
            return
        self._printed = now
        loss = sum(float(value) for name, value in output.items() if name.endswith("_loss"))
        left = time.strftime("%H:%M:%S", time.gmtime((self._total - step) * taken / steps))
        self._write(
            f"step {step}/{self._total}  loss {loss:.4f}  "
            f"rate {float(output['learning_rate']):.3e}  "
            f"{self._batch_size * steps / taken:,.0f} sequences/s  left {left}"
        )

    @property
    def examples_per_second(self) -> float | None:
        """Over all loops but the first; None before the second has run."""
        return self.examples / self.seconds if self.seconds else None


@contextlib.contextmanager
def stop_on_signal():
    """Yields a train action that raises `Interrupted` once Ctrl-C or SIGTERM has come.

    A second Ctrl-C stops at once.
    """
    received: list[int] = []

    def remember(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("Stopping after this loop of steps; Ctrl-C again stops at once.", file=sys.stderr)

    def action(output):
        del output
        if received:
            raise Interrupted(signal.Signals(received[0]).name)

    previous = {n: signal.signal(n, remember) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield action
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def make_controller(
    trainer: Trainer,
    manager: tf.train.CheckpointManager,
    steps_per_loop: int,
    model_dir: str,
    actions: list[Callable],
) -> orbit.Controller:
    """Orbit's outer loop: checkpoints, TensorBoard summaries, evaluation, and our actions.

    It restores the newest checkpoint of `model_dir`, if there is one.
    """
    return orbit.Controller(
        global_step=trainer.optimizer.iterations,
        trainer=trainer,
        evaluator=trainer,
        strategy=trainer.strategy,
        train_actions=actions,
        steps_per_loop=steps_per_loop,
        checkpoint_manager=manager,
        summary_interval=steps_per_loop,
        summary_dir=f"{model_dir}/train",
        eval_summary_dir=f"{model_dir}/eval",
    )


def run(controller: orbit.Controller, end: int, evaluate_every_steps: int | None) -> None:
    """Trains up to step `end`, evaluating every so many steps if asked to."""
    if evaluate_every_steps:
        controller.train_and_evaluate(end, eval_interval=evaluate_every_steps)
    else:
        controller.train(end)
