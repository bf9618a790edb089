"""The training loop: loops of steps on the device, called by Orbit's `Controller`."""

import contextlib
import dataclasses
import os

import numpy as np
import orbit
import tensorflow as tf

from inputs.order import with_one_graph
from tasks.task import loss_terms, means
from training import optimizers, strategy
from training.checkpoint import compatibility
from training.checkpoint.interruption import Interrupted, StopRequest, stop_together
from training.checkpoint.manager import BestCheckpoint, CheckpointManager, RunState, make_checkpoint
from training.monitor import noise_scale
from training.monitor.divergence import Diverged, DivergenceMonitor
from training.monitor.progress import EVALUATIONS, read_rows
from training.monitor.run_monitor import RunMonitor
from training.step import NONFINITE, ReplicaStep, step_settings

DRY_RUN_STEPS = 2  # of each phase: the first one includes compilation


def shorten(recipe):
    """Returns the recipe with two steps per phase and an evaluation of about one batch."""
    phases = tuple(dataclasses.replace(phase, steps=DRY_RUN_STEPS) for phase in recipe.phases)
    batch = max(phase.global_batch_size for phase in phases)
    return dataclasses.replace(
        recipe,
        phases=phases,
        evaluation_examples=batch,
        evaluate_every_steps=None,
        evaluate_every_examples=None,
        target=None,
        profile=None,
    )


class Run(orbit.AbstractTrainer, orbit.AbstractEvaluator):
    """One run of a recipe: trains, evaluates, saves and resumes.

    The constructor creates the model, the optimizer and their variables; `fit` does the rest.

    Args:
        task: a `tasks.task.Task`.
        recipe: the task's `recipes.types.Recipe`.
        where: a `tf.distribute.Strategy`.
        model_dir: existing folder of checkpoints and logs. A run in it is resumed.
        seed: int in [0, 2**32).
        steps_per_loop: number of steps on the device between two returns to the host.
        schedule: `(step) -> learning rate`; None for the recipe's schedule.
        stop: the `StopRequest` of this process, or None.
        log: takes lines of progress.
        started: see `RunMonitor`.
        mllog: an `MLPerfLog`, or None.
        check_lock: raises if this process must not write to `model_dir` any more; see
            `inputs.storage.files.locked`.

    Raises:
        InputError: `model_dir` holds a run with other settings, or the workers disagree.
        ValueError: a setting of the optimizer or its schedule is outside its range.
    """

    def __init__(
        self,
        task,
        recipe,
        where,
        *,
        model_dir,
        seed,
        steps_per_loop,
        schedule=None,
        stop=None,
        log=lambda line: None,
        started=None,
        mllog=None,
        check_lock=lambda: None,
    ):
        super().__init__()
        self.task = task
        self.recipe = recipe
        self.strategy = where
        self._model_dir = model_dir
        self._steps_per_loop = steps_per_loop
        self._stop_request = stop or StopRequest()
        self._log = log
        self._started = started
        self._mllog = mllog
        self._check_lock = check_lock
        facts = {"seed": seed} | task.facts
        self._config = compatibility.run_config(recipe, facts)
        if compatibility.has_earlier_order(model_dir):
            log(
                f"{model_dir} was begun by an earlier version, which read the examples in another "
                "order: in the current epoch some examples come twice and others not at all"
            )
        compatibility.check_lanes(model_dir, recipe, task.order)  # each worker; none waits for it
        if strategy.is_chief(where):
            compatibility.write_run_config(model_dir, recipe, **facts)
            task.write_files(model_dir)
        with where.scope():
            self.state = RunState()
            schedule = schedule or optimizers.make_schedule(recipe)
            self.optimizer = optimizers.make_optimizer(
                recipe, optimizers.RunSchedule(schedule, self.state)
            )
            self.model = task.build_model()
            weights = self.model.trainable_variables
            optimizers.build(self.optimizer, recipe, weights)
            slots = task.initial_slots(weights)
            if slots:
                optimizers.assign_slots(self.optimizer, *slots)
        strategy.check_workers_agree(where, **task.facts)
        self._replica_step = ReplicaStep(
            task,
            self.model,
            self.optimizer,
            seed=seed,
            accumulation=recipe.accumulation,
            jit_compile=strategy.compiles_step(where, recipe),
            **step_settings(recipe),
        )
        self._divergence = DivergenceMonitor(
            self.optimizer,
            self.state.skipped_in_row,
            max_skipped_in_row=recipe.max_skipped_in_row,
            max_loss=recipe.max_loss,
        )
        self._train_metrics = task.metrics
        if recipe.measure_noise_scale:
            self._train_metrics += noise_scale.METRICS
        on_read = tf.VariableSynchronization.ON_READ
        self._statistics = [
            v for v in self.model.non_trainable_variables if v.synchronization == on_read
        ]

    @property
    def progress(self):
        """The `Progress` of `fit`, which has the speed of the last phase."""
        return self._monitor.progress

    # The run: restoring, phases, evaluations and rollbacks.

    def fit(self) -> dict[str, float]:
        """Trains to the end of the recipe, and returns the means of the last evaluation.

        Raises:
            Interrupted: a signal arrived; the state was saved.
            Diverged: training diverged, and the recipe does not allow another rollback.
            SaveFailed: a checkpoint could not be written.
            InputError: the newest checkpoint does not match this run.
        """
        with (
            strategy.worker_folder(self.strategy, self._model_dir) as folder,
            self._stop_request.deferred(),
            contextlib.redirect_stdout(None),  # Orbit prints to it; `RunMonitor` logs instead
        ):
            chief = strategy.is_chief(self.strategy)
            self._manager = CheckpointManager(
                make_checkpoint(self.model, self.optimizer, self.state, self._config),
                self._model_dir,
                step=self.state.step,
                save_every_steps=self.recipe.save_every_steps,
                keep=self.recipe.keep_checkpoints,
                scratch=None if chief else os.path.join(folder, "scratch"),
                check=self._check_lock,
                before_write=lambda: self._monitor.flush(),
                agree=self._max_over_workers,
                check_agreement=lambda step: strategy.check_workers_agree(
                    self.strategy, checkpoint=step
                ),
            )
            self._monitor = RunMonitor(
                self.task,
                self.recipe,
                self._replica_step,
                self.state.step,
                self.strategy,
                model_dir=folder,
                log=self._log,
                started=self._started,
                mllog=self._mllog,
                check_lock=self._check_lock,
            )
            self._stop = stop_together(self.strategy, self._stop_request, self._save, folder)
            self._controller = orbit.Controller(  # restores the newest checkpoint
                global_step=self.state.step,
                trainer=self,
                evaluator=self,
                strategy=self.strategy,
                train_actions=[self._monitor, self._stop],
                eval_actions=[
                    BestCheckpoint(
                        self._manager, self.task.best_metric, chief, self._max_over_workers
                    ),
                    self._monitor.evaluated,
                ],
                steps_per_loop=self._monitor.steps_per_loop(self._steps_per_loop),
                checkpoint_manager=self._manager,
                summary_dir=os.path.join(folder, "train"),
                eval_summary_dir=os.path.join(folder, "eval"),
            )
            if self._manager.saved is not None:
                self._log(
                    f"Going on from step {self._step} of {self.recipe.steps} in {self._model_dir}"
                )
            if self.recipe.on_divergence == "rollback":
                self._save()  # so that there is a checkpoint to roll back to
            missed = self._missed_evaluation()
            try:
                with self._monitor:
                    return self._train_with_rollbacks(missed)
            except Interrupted:
                self._save()
                raise
            finally:
                self._controller = None  # closes its event files

    def _train_with_rollbacks(self, missed: bool) -> dict[str, float]:
        while True:
            try:
                return self._train_phases(missed)
            except Diverged as error:
                self._roll_back(error)
                missed = False

    @property
    def steps_done(self) -> int:
        """Steps done so far; fewer than the recipe's after `fit`, if it reached its target."""
        return self._step

    @property
    def _step(self) -> int:
        return int(self.state.step.numpy())

    def _save(self):
        self._manager.save(check_interval=False)

    def _max_over_workers(self, value):
        return strategy.max_over_workers(self.strategy, value)

    def _missed_evaluation(self) -> bool:
        """Whether an evaluation was due at the restored step and was not recorded."""
        step = self._step
        if step == self.recipe.steps or not self.recipe.evaluation_steps(step - 1, step):
            return False
        missed = step not in [row["step"] for row in self._evaluations()]
        return self._max_over_workers(missed)

    def _evaluations(self) -> list[dict]:
        return read_rows(os.path.join(self._model_dir, EVALUATIONS))

    def _reaches_target(self, results) -> bool:
        """Whether an evaluation is as good as the recipe's target, or better."""
        if self.recipe.target is None or not results:
            return False
        value = results[self.task.best_metric.name]
        metric = self.task.best_metric
        if value is None:  # not finite
            return False
        better = value >= self.recipe.target
        return bool(better if metric.higher_is_better else value <= self.recipe.target)

    def _reached_before(self) -> bool:
        """Whether the run had reached its target at this step when it was started again."""
        rows = [row for row in self._evaluations() if row["step"] == self._step]
        return self._max_over_workers(any(map(self._reaches_target, rows)))

    def _train_phases(self, missed: bool) -> dict[str, float]:
        """Runs a missed evaluation, if any, and trains the remaining phases."""
        start = 0
        resumed = self._step
        reached = self._reached_before()
        for index, phase in enumerate(self.recipe.phases):
            end = start + phase.steps
            again = resumed == end and (missed or reached)  # an evaluation at the phase's end
            if resumed < end or end == self.recipe.steps or again:
                results = self._train_phase(index, start, end, missed and resumed > start)
                missed = False
                if again and reached or self._reaches_target(results):
                    break
            start = end
        return {name: float(value) for name, value in results.items()}

    def _train_phase(self, index: int, start: int, end: int, missed: bool):
        """Trains phase `index`, steps `start` to `end`, or up to the recipe's target.

        Returns:
            The last evaluation.
        """
        # A checkpoint of step `start` has the slots of the previous phase.
        if self.recipe.phases[index].reset_slots and self._step == start:
            with self.strategy.scope():
                optimizers.reset_slots(self.optimizer)
        reached = self._reached_before()
        self._start_data(index, self._step - start)
        self._monitor.begin_phase(index)
        self._controller.step_timer = None
        self._stop()
        results = self._evaluate() if missed else None
        # Orbit's `train_and_evaluate` would count the interval from the step at which it resumes.
        steps = [] if reached else self.recipe.evaluation_steps(self._step, end)
        for step in steps:
            if self._reaches_target(results):
                break
            with self._monitor.training(step):
                self._controller.train(step, checkpoint_at_completion=step == end)
            results = self._evaluate()
            self._stop()
        results = results or self._evaluate()
        if self._reaches_target(results) and self._step < self.recipe.steps:
            self._save()
            metric = self.task.best_metric.name
            self._log(
                f"Reached {metric} {results[metric]:.4f}, the target being {self.recipe.target:g}, "
                f"after {self._step} steps ({self.recipe.examples_at(self._step):,} "
                f"{self.task.example_unit})"
            )
        return results

    def _evaluate(self):
        with self._monitor.evaluation():
            return self._controller.evaluate()

    def _roll_back(self, error: Diverged) -> None:
        """Restores the newest checkpoint with a lower learning rate, or raises `error`."""
        recipe = self.recipe
        state = self.state
        rollbacks = int(state.rollbacks.numpy()) + 1
        if recipe.on_divergence != "rollback" or rollbacks > recipe.max_rollbacks:
            raise error
        factor = state.rate_factor.numpy() * np.float32(recipe.rollback_rate_factor)
        with self.strategy.scope():
            self._manager.restore_or_initialize()
        state.rate_factor.assign(factor)
        state.rollbacks.assign(rollbacks)
        self._log(
            f"{error}. Going back to step {self._step} with the learning rate times {factor:g} "
            f"(rollback {rollbacks} of {recipe.max_rollbacks})"
        )

    # The interface of Orbit's controller: `train` and `evaluate`.

    def _start_data(self, phase_index: int, first_step: int):
        """Creates the datasets of a phase, from its step `first_step` on, and the functions."""
        distribute = self.strategy.distribute_datasets_from_function
        train_batches = strategy.with_infinite_cardinality(
            self.task.train_batches(phase_index, first_step)
        )
        evaluation_batches = self.task.evaluation_batches(phase_index)
        self._train_dataset = distribute(with_one_graph(train_batches))
        self._eval_dataset = distribute(with_one_graph(evaluation_batches))
        self._train_iterator = None
        # New functions, because each phase has its own shapes.
        self._train_loop = tf.function(self._run_steps, autograph=False)
        self._train_step = tf.function(self._run_step, autograph=False)
        self._eval_step = tf.function(self._evaluate_batch, autograph=False)

    def train(self, num_steps):
        """Runs `num_steps` steps on the device.

        Returns:
            The means of the task's metrics and the loss over the steps whose loss is finite;
            `noise_scale`, if it is measured; `learning_rate`; `skipped_steps`, the total number of
            skipped updates; and `input_wait_seconds`, the time from the end of a step to the
            arrival of the next batch, summed over the steps. On an accelerator this is an upper
            bound of the time that the device waited: work is queued, so a step may end for the host
            before the device has computed it.

        Raises:
            Diverged: a step diverged.
            InputError: more records are damaged than the recipe allows.
        """
        if self._train_iterator is None:  # not created if only an evaluation is left
            self._train_iterator = iter(self._train_dataset)
        totals, record, waited = self._train_loop(num_steps)
        self._divergence.check(record)
        strategy.check_together(self.strategy, self.task.check_data)
        values = self._means_and_loss(self._train_metrics, totals)
        return (
            values
            | noise_scale.noise_scale(values)
            | {
                "learning_rate": self.optimizer.learning_rate.numpy(),
                # tf_keras's own optimizers skip no updates.
                "skipped_steps": getattr(self.optimizer, "skipped_steps", 0),
                "input_wait_seconds": waited,
            }
        )

    def evaluate(self, num_steps):
        """Returns the means over all evaluation batches; ignores `num_steps`."""
        del num_steps
        totals = None
        for batch in self._eval_dataset:
            if not strategy.is_multi_worker(self.strategy):
                self._stop()
            sums = self._eval_step(batch)
            totals = sums if totals is None else tf.nest.map_structure(tf.add, totals, sums)
        strategy.check_together(self.strategy, self.task.check_data)
        return self._means_and_loss(self.task.metrics, totals)

    @staticmethod
    def _means_and_loss(metrics, totals):
        values = means(metrics, *totals)
        return values | {"loss": sum(float(term) for term in loss_terms(metrics, values))}

    def _run_steps(self, num_steps):
        """Returns ((sums, counts) over all steps, the divergence record, input wait in seconds)."""
        totals, *_ = self._train_step.get_concrete_function().structured_outputs
        totals = tf.nest.map_structure(lambda total: tf.zeros(total.shape, total.dtype), totals)
        record = self._divergence.initial()

        def step(i, totals, record, waited, ended):
            step_totals, news, arrived, now = self._train_step()
            record = self._divergence.update(record, *news)
            totals = tf.nest.map_structure(tf.add, totals, step_totals)
            return i + 1, totals, record, waited + tf.maximum(arrived - ended, 0.0), now

        start = tf.constant(0), totals, record, tf.zeros([], tf.float64), tf.timestamp()
        _, totals, record, waited, _ = tf.while_loop(lambda i, *_: i < num_steps, step, start)
        if self._statistics and self.strategy.num_replicas_in_sync > 1:
            self.strategy.run(self._average_statistics)
        return totals, record, waited

    def _run_step(self):
        """Runs one step on all replicas.

        Returns:
            (sums, counts); (step, loss, updated, telemetry, nonfinite) for
            `DivergenceMonitor.update`; and the times, in seconds, at which the batch had arrived
            and the update was done.
        """
        batch = next(self._train_iterator)
        with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
            arrived = tf.timestamp()
        # Without this dependency TensorFlow could run the step before it reads the clock.
        with tf.control_dependencies([arrived]):
            sums, counts, updated, rows = self.strategy.run(self._run_replica_step, args=(batch,))
        totals = self._sum_over_replicas((sums, counts))
        nonfinite = totals[0].pop(NONFINITE, tf.constant(0.0)) > 0
        metrics = self.task.metrics
        loss = tf.add_n(loss_terms(metrics, means(metrics, *totals)))
        # The same on all replicas.
        updated, rows = (self.strategy.experimental_local_results(x)[0] for x in (updated, rows))
        with tf.control_dependencies([updated, *tf.nest.flatten(totals)]):
            ended = tf.timestamp()
        # Otherwise the NaN of one step would make the means of the whole loop NaN.
        finite = tf.nest.map_structure(
            lambda value: tf.where(tf.math.is_finite(loss), value, tf.zeros_like(value)), totals
        )
        news = self.state.step.read_value(), loss, updated, rows, nonfinite
        return finite, news, arrived, ended

    def _run_replica_step(self, batch):
        """Runs a replica's step; returns (sums, counts, updated, telemetry)."""
        before = tf.identity(self.optimizer.iterations)
        sums, counts = self._replica_step.train(batch, self.state.step)
        self.state.step.assign_add(1)
        updated = self.optimizer.iterations > before
        return sums, counts, updated, self._divergence.telemetry_rows()

    def _evaluate_batch(self, batch):
        return self._sum_over_replicas(
            self.strategy.run(self._replica_step.evaluation, args=(batch,))
        )

    def _sum_over_replicas(self, per_replica):
        return tf.nest.map_structure(
            lambda value: self.strategy.reduce("SUM", value, axis=None), per_replica
        )

    def _average_statistics(self):
        """Sets each moving average, which differs between replicas, to its mean over them."""
        # A variable's value has no device, which the sum of several processes needs.
        values = [tf.identity(variable) for variable in self._statistics]
        means = tf.distribute.get_replica_context().all_reduce("MEAN", values)
        for variable, mean in zip(self._statistics, means, strict=True):
            variable.assign(mean)
