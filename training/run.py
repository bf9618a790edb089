"""A run from its newest checkpoint to its end: phase by phase, and back if it must."""

import itertools
import os
import sys

import numpy as np

from training import trainer as loop
from training.checkpoint.best import Best
from training.checkpoint.manager import Manager
from training.checkpoint.preemption import stop_together
from training.checkpoint.state import make_checkpoint
from training.monitor.divergence import Diverged, Watch
from training.monitor.history import EVALUATIONS, read_rows
from training.monitor.instruments import Instruments
from training.optimizers import reset_slots
from training.strategy import endless, is_chief


class Run:
    """All that training takes, put together.

    Args:
        task: one of `tasks.TASKS`, made from the recipe.
        recipe: a `recipes.types.Recipe`.
        step: a `ReplicaStep`, whose optimizer's rate is a `RunSchedule` of `state`.
        state: a `RunState`.
        strategy: a `tf.distribute.Strategy`.
        settings: text that the checkpoints hold, what the run depends on.
        model_dir: folder of the checkpoints.
        folder: where this process writes; `model_dir` itself for the chief.
        steps_per_loop: steps on the device between two looks from the host.
        stop: this process's `signals.StopRequest`.
        log: takes lines of progress.
        started: as `Instruments` takes it.
    """

    def __init__(
        self, task, recipe, step, state, strategy, *,
        settings, model_dir, folder, steps_per_loop, stop, log, started=None,
    ):  # fmt: skip
        self._task, self._recipe, self._strategy = task, recipe, strategy
        self._replica_step, self._state = step, state
        self._model_dir, self._folder = model_dir, folder
        self._steps_per_loop, self._request, self._log = steps_per_loop, stop, log
        self._manager = Manager(
            make_checkpoint(step.model, step.optimizer, state, settings),
            model_dir,
            step=state.step,
            save_every_steps=recipe.save_every_steps,
            keep=recipe.keep_checkpoints,
            scratch=None if is_chief(strategy) else os.path.join(folder, "scratch"),
        )
        self._best = Best(self._manager, task.best_metric, is_chief(strategy))
        # Only the chief speaks, to a terminal if that is one.
        stream = sys.stderr if is_chief(strategy) else None
        self._instruments = Instruments(
            task, recipe, step, state.step, strategy, folder, log, stream, started
        )
        self._watch = Watch(
            step.optimizer,
            state.skipped_in_row,
            max_skipped_in_row=recipe.max_skipped_in_row,
            max_loss=recipe.max_loss,
        )

    def train(self):
        """Runs the phases that are left; returns (metrics on held-out data, the progress).

        Raises:
            Interrupted: a signal came; the state was saved.
            Diverged: as often as the recipe goes back, or it does not.
            SaveFailed: a checkpoint could not be written.
            InputError: the newest checkpoint is not of this run.
        """
        with self._request.deferred():
            with self._strategy.scope():
                restored = self._manager.restore_or_initialize()
            if restored:
                self._log(
                    f"Going on from step {self._step} of {self._recipe.steps} in {self._model_dir}"
                )
            if self._recipe.on_divergence == "rollback":
                self._manager.save(check_interval=False)  # the start too is a place to go back to
            stop = stop_together(
                self._strategy,
                self._request,
                lambda: self._manager.save(check_interval=False),
                self._folder,
            )
            missed = self._missed_evaluation()
            with self._instruments:
                while True:
                    try:
                        return self._phases(stop, missed)
                    except Diverged as error:
                        self._go_back(error)
                        missed = False

    @property
    def _step(self) -> int:
        return int(self._state.step.numpy())

    def _missed_evaluation(self) -> bool:
        """Whether one was due at the step that was restored, and the run ended before it."""
        every, step = self._recipe.evaluate_every_steps, self._step
        ends = itertools.accumulate(phase.steps for phase in self._recipe.phases)
        due = step in ends or (every and step % every == 0)
        if not due or not 0 < step < self._recipe.steps:
            return False
        rows = read_rows(os.path.join(self._model_dir, EVALUATIONS))
        return step not in [row["step"] for row in rows]

    def _phases(self, stop, missed):
        start, begun = 0, self._step
        for number, phase in enumerate(self._recipe.phases):
            end = start + phase.steps
            if begun < end or end == self._recipe.steps or (missed and begun == end):
                metrics = self._phase(number, start, end, stop, missed and begun > start)
                missed = False
            start = end
        return metrics, self._instruments.progress

    def _phase(self, number: int, start: int, end: int, stop, missed: bool):
        # Also where a run goes on from a checkpoint just there, which has them as they were.
        if self._recipe.phases[number].reset_slots and self._step == start:
            with self._strategy.scope():
                reset_slots(self._replica_step.optimizer)
        distribute = self._strategy.distribute_datasets_from_function
        trainer = loop.Trainer(
            self._strategy,
            self._replica_step,
            lambda step: distribute(endless(self._task.train_batches(number, step - start))),
            distribute(self._task.evaluation_batches(number)),
            state=self._state,
            watch=self._watch,
            stop=stop,
        )
        return loop.run_phase(
            trainer,
            self._manager,
            self._best,
            self._instruments,
            stop,
            number=number,
            end=end,
            steps_per_loop=self._steps_per_loop,
            evaluate_every_steps=self._recipe.evaluate_every_steps,
            evaluate_first=missed,
            model_dir=self._folder,
        )

    def _go_back(self, error: Diverged) -> None:
        """To the newest checkpoint, at a lower rate, over the same data; or raises the error."""
        recipe, state = self._recipe, self._state
        rollbacks = int(state.rollbacks.numpy()) + 1
        if recipe.on_divergence != "rollback" or rollbacks > recipe.max_rollbacks:
            raise error
        factor = state.rate_factor.numpy() * np.float32(recipe.rollback_rate_factor)
        with self._strategy.scope():
            self._manager.restore(self._manager.latest_checkpoint)
        state.rate_factor.assign(factor)
        state.rollbacks.assign(rollbacks)
        self._log(
            f"{error}. Going back to step {self._step} with the rate times {factor:g} "
            f"(rollback {rollbacks} of {recipe.max_rollbacks})"
        )
