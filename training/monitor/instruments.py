"""Everything that looks at a run while it runs, put together from its recipe."""

import contextlib
import os
import time

from recipes.types import profile_window
from tf_lamb.layerwise import Layerwise
from training.monitor.display import display
from training.monitor.mfu import peak_flops, training_flops
from training.monitor.profile import Profiler, loop_lengths
from training.monitor.progress import Machine, Progress
from training.monitor.trust_ratios import TrustRatios


class Instruments:
    """The instruments of one run; a context, which closes their files.

    Args:
        task: one of `tasks.TASKS`, made from the recipe.
        recipe: a `recipes.types.Recipe`.
        replica_step: the run's `ReplicaStep`.
        step: int `tf.Variable`, steps done so far.
        strategy: a `tf.distribute.Strategy`.
        model_dir: folder of logs.
        write: takes lines of progress.
        stream: standard error where this process speaks, which may be a terminal; else None.
        started: `time.perf_counter()` when the program began. Then the time to the end of the first
            loop is told.
    """

    def __init__(
        self, task, recipe, replica_step, step, strategy, model_dir, write, stream=None,
        started=None,
    ):  # fmt: skip
        self._started = started
        self._task, self._recipe, self._replica_step = task, recipe, replica_step
        self._step, self._model_dir = step, model_dir
        self._write, self._stream = write, stream
        replicas = strategy.num_replicas_in_sync
        self._machine = Machine(replicas, peak_flops(strategy, recipe.compute_dtype))
        self._window = recipe.profile and profile_window(recipe.profile)
        self._others, self.progress = [], None
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            recipe, model = self._recipe, self._replica_step.model
            optimizer = self._replica_step.optimizer
            if recipe.telemetry and isinstance(optimizer, Layerwise):
                ratios = TrustRatios(
                    self._step,
                    optimizer,
                    model.trainable_variables,
                    self._model_dir,
                    recipe.save_every_steps,
                )
                self._others.append(stack.enter_context(contextlib.closing(ratios)))
            if self._window:
                folder = os.path.join(self._model_dir, "train")
                profiler = Profiler(self._step, self._window, folder)
                self._others.append(stack.enter_context(contextlib.closing(profiler)))
            shown = display(recipe.steps, self._write, self._stream)
            self._display = stack.enter_context(shown)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def begin(self, number: int) -> None:
        """Phase `number` (from 0) begins, or goes on, at the step that is restored by now."""
        replicas, replica_step = self._machine.replicas, self._replica_step

        def flops_per_step():
            return replicas * training_flops(
                lambda batch: self._task.sums(replica_step.model, batch, training=False),
                replica_step.batch_spec,
            )

        self.progress = Progress(
            self._step,
            self._recipe.steps,
            self._recipe.phases[number].global_batch_size,
            self._model_dir,
            self._display,
            phase=number + 1,
            machine=self._machine,
            flops_per_step=flops_per_step,
        )
        self.progress.begin()
        for other in self._others:
            other.begin()

    def __call__(self, output):
        """Orbit's train action, after each inner loop."""
        if self._started is not None:
            seconds, self._started = time.perf_counter() - self._started, None
            self._write(f"The first steps were done {seconds:.1f} s after the start")
        for instrument in (self.progress, *self._others):
            instrument(output)

    def evaluated(self, output):
        """Orbit's eval action."""
        self.progress.evaluated(output)

    def loop_lengths(self, steps_per_loop: int):
        """Steps of an inner loop, for Orbit: a number, or a function of the step."""
        return loop_lengths(steps_per_loop, self._window) if self._window else steps_per_loop
