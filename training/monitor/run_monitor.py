"""The monitoring of a run: progress, trust ratios, weight histograms and profiler traces."""

import contextlib
import functools
import os
import sys
import time

import tensorflow as tf

from inputs.errors import InputError
from recipes.types import profile_window
from tf_lamb.layerwise import Layerwise
from tf_lamb.telemetry import TelemetryWriter
from training.monitor.mfu import peak_flops, training_flops
from training.monitor.progress import Machine, Progress, make_display
from training.strategy import is_chief

TELEMETRY = "telemetry"  # the folder in a model_dir for trust ratios
HISTOGRAM_VALUES = 10_000  # largest number of values sampled from one variable


class RunMonitor:
    """The Orbit actions that monitor one run. A context manager that closes their files.

    Args:
        task: a `tasks.task.Task`.
        recipe: a `recipes.types.Recipe`.
        replica_step: the run's `ReplicaStep`.
        step: int `tf.Variable`, steps done so far.
        strategy: a `tf.distribute.Strategy`.
        model_dir: folder of the logs.
        log: takes lines of progress.
        started: `time.perf_counter()` at the start of the program, or None. The time from there to
            the end of the first loop of steps is logged.
        mllog: an `MLPerfLog`, or None.
        check_lock: raises if this process must not write to `model_dir` any more.
    """

    def __init__(
        self,
        task,
        recipe,
        replica_step,
        step,
        strategy,
        *,
        model_dir,
        log,
        started=None,
        mllog=None,
        check_lock=lambda: None,
    ):
        self._task = task
        self._recipe = recipe
        self._mllog = mllog
        self._replica_step = replica_step
        self._step = step
        self._model_dir = model_dir
        self._log = log
        self._started = started
        self._check_lock = check_lock
        # Only the chief draws a progress bar.
        self._stream = sys.stderr if is_chief(strategy) else None
        self._machine = Machine(
            strategy.num_replicas_in_sync, peak_flops(strategy, recipe.compute_dtype)
        )
        self._window = recipe.profile and profile_window(recipe.profile)
        self._observers = []
        self.progress: Progress | None = None  # while it is entered
        self._stack = contextlib.ExitStack()

        def flops_per_step():
            return strategy.num_replicas_in_sync * training_flops(
                lambda batch: [
                    task.sums(replica_step.model, part, training=False)
                    for part in task.parts(batch)
                ],
                replica_step.batch_spec,
            )

        self._flops_per_step = flops_per_step

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            recipe = self._recipe
            optimizer = self._replica_step.optimizer
            if recipe.telemetry and isinstance(optimizer, Layerwise):
                recorder = TelemetryRecorder(
                    self._step,
                    optimizer,
                    self._replica_step.model.trainable_variables,
                    self._model_dir,
                    recipe.save_every_steps,
                )
                self._observers.append(stack.enter_context(contextlib.closing(recorder)))
            if self._window:
                folder = os.path.join(self._model_dir, "train")
                profiler = Profiler(self._step, self._window, folder)
                self._observers.append(stack.enter_context(contextlib.closing(profiler)))
            self.progress = Progress(
                self._step,
                recipe.steps,
                self._model_dir,
                stack.enter_context(make_display(recipe.steps, self._log, self._stream)),
                machine=self._machine,
                flops_per_step=self._flops_per_step,
                higher_is_better=[m.name for m in self._task.metrics if m.higher_is_better],
                check_lock=self._check_lock,
            )
            stack.push(self._flush_at_end)
            if self._mllog:
                self._mllog.run_start(recipe.evaluation_examples, self._task.training_examples)
                stack.callback(self._mllog.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def _flush_at_end(self, kind, error, trace):
        del kind, trace
        # Rows that are lost because the storage fails are computed again after a resume.
        with contextlib.suppress(OSError):
            if not isinstance(error, InputError):  # after `check_lock`, nothing may be written
                self.flush()

    def flush(self) -> None:
        """Writes what is kept in memory; called before a checkpoint is written."""
        if self.progress is not None:
            self.progress.flush()
        for observer in self._observers:
            observer.flush()

    def begin_phase(self, phase_index: int) -> None:
        """Call it when a phase starts or resumes, after the step was restored."""
        batch_size = self._recipe.phases[phase_index].global_batch_size
        self.progress.begin_phase(phase_index + 1, batch_size)
        for observer in self._observers:
            observer.begin_phase()

    def __call__(self, output):
        """The Orbit action after each loop of steps."""
        if self._started is not None:
            seconds, self._started = time.perf_counter() - self._started, None
            self._log(f"The first steps were done {seconds:.1f} s after the start")
        for observer in (self.progress, *self._observers):
            observer(output)

    def evaluated(self, output):
        """The Orbit action after each evaluation."""
        if self._mllog:
            self._mllog.accuracy(float(output[self._task.best_metric.name]))
        self.progress.evaluated(output)

    def training(self, last: int):
        """Returns a context manager for the training up to step `last`."""
        if not self._mllog:
            return contextlib.nullcontext()
        return self._mllog.block(int(self._step.numpy()), last)

    def evaluation(self):
        """Returns a context manager for an evaluation."""
        return self._mllog.evaluation() if self._mllog else contextlib.nullcontext()

    def steps_per_loop(self, steps: int):
        """Returns `steps_per_loop` for Orbit: `steps`, or a function if the run is profiled."""
        return loop_lengths(steps, self._window) if self._window else steps


class TelemetryRecorder:
    """Records trust ratios after each loop of steps, and histograms of the weights less often.

    Histograms are rarer because one of all weights costs about as much as a checkpoint.

    Args:
        step: int `tf.Variable`, steps done so far.
        optimizer: an optimizer of `tf_lamb` with `telemetry=True`.
        variables: the model's trainable variables.
        model_dir: the folder in which to create `telemetry` and `weights`.
        histogram_every_steps: histograms are written after the loop that reaches or passes a
            multiple of this number of steps, and after the first loop.
    """

    def __init__(self, step, optimizer, variables, model_dir, histogram_every_steps):
        self._step = step
        self._variables = variables
        self._every = histogram_every_steps
        self._writer = TelemetryWriter(os.path.join(model_dir, TELEMETRY), optimizer)
        self._events = tf.summary.create_file_writer(os.path.join(model_dir, "weights"))
        self._last = None

    def __call__(self, output):
        """Records the last update of the loop."""
        del output
        step = int(self._step.numpy())
        self._writer.record(step)
        if self._last is None or step // self._every != self._last // self._every:
            self._write_histograms(step)
        self._last = step

    def begin_phase(self):
        """Does nothing, because the heat map uses the later of two records of a step."""

    def flush(self):
        """Writes the records that are kept in memory."""
        self._writer.flush()

    def _write_histograms(self, step: int):
        # A histogram is 200 operations. To execute them one by one costs less than to trace them.
        # They need float64, which a TPU has not.
        with self._events.as_default(step=step), tf.device("CPU:0"):
            for variable, values in zip(self._variables, self._sample(), strict=True):
                name = variable.name.split(":")[0]
                tf.summary.histogram(f"weights/{name}", values)

    @functools.partial(tf.function, autograph=False)
    def _sample(self):
        """Returns at most `HISTOGRAM_VALUES` of each variable, taken on the variable's device."""
        samples = []
        for variable in self._variables:
            stride = -(-variable.shape.num_elements() // HISTOGRAM_VALUES)
            samples.append(tf.reshape(variable.read_value(), [-1])[::stride])
        return samples

    def close(self):
        """Closes the files."""
        self._writer.close()
        self._events.close()


class Profiler:
    """Writes a profiler trace of the steps after `first` up to `last`.

    Args:
        step: int `tf.Variable`, steps done so far.
        window: (first, last), from `recipes.types.profile_window`.
        log_dir: TensorBoard's folder.
    """

    def __init__(self, step, window: tuple[int, int], log_dir: str):
        self._step = step
        self._window = window
        self._log_dir = log_dir
        self._running = False

    def begin_phase(self):
        """Starts the trace if the run resumes inside the window."""
        self(None)

    def __call__(self, output):
        """Starts or ends the trace at the edges of the window."""
        del output
        first, last = self._window
        inside = first <= int(self._step.numpy()) < last
        if inside and not self._running:
            tf.profiler.experimental.start(self._log_dir)
        elif self._running and not inside:
            tf.profiler.experimental.stop()
        self._running = inside

    def flush(self):
        """Does nothing: a trace is written at its end."""

    def close(self):
        """Ends the trace if the run ends inside the window."""
        if self._running:
            tf.profiler.experimental.stop()
            self._running = False


def loop_lengths(steps_per_loop: int, window: tuple[int, int]):
    """Returns `step -> number of steps of the next loop`; loops end at both edges of `window`."""

    def length(step):
        ahead = [edge - int(step) for edge in window if edge > step]
        return min([steps_per_loop, *ahead])

    return length
