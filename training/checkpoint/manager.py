"""Defines what a checkpoint holds, and saves and restores checkpoints.

Each checkpoint is read back before it becomes visible.

MODEL_DIR/ckpt-STEP.*   the newest checkpoints; see `training.checkpoint.stores`
MODEL_DIR/best/         the checkpoint with the best evaluation, and its metrics
MODEL_DIR/damaged/      checkpoints that could no longer be read
"""

import contextlib
import errno
import json
import math
import os
import re
import time

import orbit
import tensorflow as tf

from inputs.errors import InputError, first_line
from inputs.storage import files
from inputs.storage.files import atomic_write, is_remote
from training.checkpoint.stores import Store, open_store, read_error

BEST = "best"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# A shared disk may show a worker only after some seconds what another one has written.
APPEAR_SECONDS = 10.0


class RunState(tf.Module):
    """The counters of a run. Create it in the strategy's scope.

    step: int64, steps done so far, including those whose update was skipped. The learning rate
        and the next batch are functions of it. (The optimizer's `iterations` counts the updates
        since the slots were reset, for bias correction, and excludes skipped updates.)
    skipped_in_row: int64, consecutive updates skipped up to now.
    rate_factor: float32, multiplies the schedule's learning rate; below 1 after a rollback.
    rollbacks: int64, number of rollbacks.
    """

    def __init__(self):
        super().__init__()
        self.step = orbit.utils.create_global_step()
        self.skipped_in_row = _host_variable(0, tf.int64, "skipped_in_row")
        self.rate_factor = _host_variable(1.0, tf.float32, "rate_factor")
        self.rollbacks = _host_variable(0, tf.int64, "rollbacks")


def _host_variable(value, dtype, name):
    """A variable that only the host assigns, with the same value on all replicas."""
    return tf.Variable(value, dtype=dtype, trainable=False, name=name)


class RunConfigText(tf.train.experimental.PythonState):
    """The run's settings as text, stored in the checkpoint for people and tools that read it."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def serialize(self):
        """Returns the text."""
        return self.text

    def deserialize(self, string_value):
        """Does nothing: the text of the current start is kept, not the checkpoint's."""


def make_checkpoint(model, optimizer, state: RunState, settings: str) -> tf.train.Checkpoint:
    """Returns a `tf.train.Checkpoint` of all that a run needs to resume, and its settings."""
    return tf.train.Checkpoint(
        model=model, optimizer=optimizer, state=state, settings=RunConfigText(settings)
    )


class SaveFailed(Exception):
    """A checkpoint could not be written; the earlier ones are unchanged."""


def describe_disk_error(error: Exception) -> str | None:
    """Returns the system's message if an `OSError` or `OpError` is a disk error, else None."""
    message = str(error)
    return next((text for text in map(os.strerror, DISK_ERRORS) if text in message), None)


def saved_steps(model_dir: str) -> list[int]:
    """Returns the steps of the visible checkpoints in ascending order.

    Raises:
        InputError: the folder has a checkpoint of another program.
    """
    newest = tf.train.latest_checkpoint(model_dir)
    if newest and not re.fullmatch(r"ckpt-\d+", os.path.basename(newest)):
        raise InputError(
            f"--model_dir: {model_dir} holds a checkpoint of another program, "
            f"{os.path.basename(newest)}. Choose another folder."
        )
    return open_store(model_dir).steps()


def saved_step(model_dir: str) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max(saved_steps(model_dir), default=0)


def recover(model_dir: str, log) -> None:
    """See `training.checkpoint.stores.Store.recover`."""
    open_store(model_dir).recover(log)


class CheckpointManager(tf.train.CheckpointManager):
    """A `tf.train.CheckpointManager` for Orbit's `Controller` that reads back what it writes.

    Args:
        checkpoint: a `tf.train.Checkpoint` of everything that a run needs to resume.
        model_dir: folder of the checkpoints.
        step: int64 `tf.Variable`, steps done so far; part of the checkpoints' names.
        save_every_steps: interval in steps. `save` is called after a loop of steps; it is due if
            the loop reached or passed a multiple of this.
        keep: how many of the newest checkpoints are kept.
        scratch: None in the chief. In another worker, a folder that no other process uses: saving
            is a collective operation, so this worker writes there and deletes the files.
        check: raises if this process must not write to `model_dir` any more; see `files.locked`.
        before_write: called before a checkpoint is written, to write what belongs to it. It is
            written first because a complete checkpoint is used after a kill, even if it was not
            visible yet.
        agree: `(step) -> step`, the largest of the steps that the workers pass to it.
        check_agreement: `(step) -> None`, raises unless all workers pass the same step.
    """

    def __init__(
        self,
        checkpoint,
        model_dir,
        *,
        step,
        save_every_steps,
        keep,
        scratch=None,
        check=lambda: None,
        before_write=lambda: None,
        agree=lambda step: step,
        check_agreement=lambda step: None,
    ):
        super().__init__(
            checkpoint,
            model_dir,
            max_to_keep=keep,
            step_counter=step,
            checkpoint_interval=save_every_steps,
        )
        self._keep = keep
        self._scratch = scratch
        self.check = check
        self._before_write = before_write
        self._agree = agree
        self._check_agreement = check_agreement
        self._saved: int | None = None  # the step of the last checkpoint written or read
        self.store: Store = open_store(self.directory, check)

    @property
    def checkpoints(self):
        """The prefixes of the visible checkpoints, oldest first."""
        return [self.store.prefix(step) for step in self.store.steps()]

    @property
    def saved(self) -> int | None:
        """The step of the last checkpoint that was written or read."""
        return self._saved

    @property
    def latest_checkpoint(self):
        """The prefix of the newest checkpoint, or None."""
        return next(reversed(self.checkpoints), None)

    def save(self, checkpoint_number=None, check_interval=True, options=None):
        """Saves the current state unless it is already saved or, with `check_interval`, not due.

        Returns:
            The checkpoint's prefix, or None.

        Raises:
            SaveFailed: the checkpoint could not be written or not be read back.
        """
        del checkpoint_number  # the step is used instead
        step = int(self._step_counter.numpy())
        every = self.checkpoint_interval
        due = step // every > (self._saved or 0) // every
        if step == self._saved or (check_interval and not due):
            return None
        try:
            self._write(step, options)
        except (OSError, tf.errors.OpError) as error:
            raise SaveFailed(self._describe_failure(step, error)) from None
        finally:
            with contextlib.suppress(OSError):  # what is left here is removed by `recover`
                if self._scratch:
                    files.remove_folder(self._scratch)
                else:
                    self.store.discard(step)
        self._saved = step
        return self.store.prefix(step)

    def _describe_failure(self, step: int, error: Exception) -> str:
        reason = describe_disk_error(error) or error
        if isinstance(error, OSError) and is_remote(self.directory):
            reason = error.strerror or error
        kept: list[int] = []
        with contextlib.suppress(OSError):
            kept = self.store.steps()
        last = f"the last good one is of step {kept[-1]}" if kept else "there is no earlier one"
        fix = "Free some space or repair the disk"
        if self._scratch:
            fix += ", or set TMPDIR to a folder on another one"
        elif is_remote(self.directory):
            fix = "Check the connection and the rights to write there"
        return (
            f"{self._scratch or self.directory}: the checkpoint of step {step} could not be "
            f"written ({reason}); {last}. {fix}; the same command resumes from there."
        )

    def _write(self, step: int, options) -> None:
        if self._scratch:
            self.checkpoint.write(os.path.join(self._scratch, f"ckpt-{step}"), options)
            return
        self._before_write()
        prefix = self.store.begin(step)
        self.checkpoint.write(prefix, options)
        error = read_error(prefix)
        if error:
            raise OSError(errno.EIO, error)
        self.store.publish(step)
        steps = self.store.steps()
        self.store.write_state(steps[-self._keep :])
        for old in steps[: -self._keep]:
            self.store.delete(old)

    def restore_or_initialize(self):
        """Reads the newest checkpoint. Returns its prefix, or None if there is none.

        Several workers read the same one: the newest that any of them finds. A listing may show it
        to one of them only, but each looks for it by its name. All of them must call this.

        Raises:
            InputError: it is damaged, its names or shapes do not match this run's variables, or a
                worker does not have it.
        """
        newest = self._agree(self.store.newest())
        end = time.monotonic() + (APPEAR_SECONDS if self._saved is not None else 0)
        while newest >= 0 and not self.store.has(newest) and time.monotonic() < end:
            time.sleep(0.1)
        self._check_agreement(newest if newest >= 0 and self.store.has(newest) else -1)
        return self.restore(self.store.prefix(newest)) if newest >= 0 else None

    def restore(self, prefix: str) -> str:
        """Reads the checkpoint with this prefix; see `restore_or_initialize`."""
        try:
            self.checkpoint.read(prefix).assert_consumed()
        except (AssertionError, ValueError, IndexError, tf.errors.OpError) as error:
            raise InputError(
                f"--model_dir: {prefix} is damaged, or of another model or version of this program "
                f"({first_line(error)}). Start again, or choose another folder."
            ) from None
        self._saved = int(self._step_counter.numpy())
        return prefix


class BestCheckpoint:
    """An Orbit evaluation action that keeps the checkpoint with the best metric in best/.

    On a disk the files are hard links to those of the step's checkpoint, or copies where the file
    system has no hard links; on object storage they are copies. `metrics.json` beside them holds
    the evaluation. It is written after the checkpoint; Orbit's `NewBestMetric` records a best value
    before its checkpoint exists.

    Args:
        manager: a `CheckpointManager`.
        metric: the `tasks.task.Metric` that is compared.
        is_chief: whether this process writes to best/. Other processes only join in saving.
        agree: `(score) -> score`, the largest of the scores that the workers pass to it.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        metric,
        is_chief: bool = True,
        agree=lambda score: score,
    ):
        self._manager = manager
        self._metric = metric
        self._is_chief = is_chief
        self._store = open_store(os.path.join(manager.directory, BEST), manager.check)
        self._metrics = os.path.join(self._store.folder, "metrics.json")
        best = -math.inf
        with contextlib.suppress(InputError, ValueError, KeyError, TypeError):
            if self._store.steps():  # a kill may have left none
                values = files.read_json(self._metrics)
                # A later step is of an earlier run, whose other checkpoints were deleted.
                if values["step"] <= (manager.saved or 0):
                    best = self._score(values)
        self._best = agree(best)

    def _score(self, values) -> float:
        value = float(values[self._metric.name])
        return value if self._metric.higher_is_better else -value

    def __call__(self, output):
        """Saves a checkpoint if the metric is better than the best one so far."""
        values = {name: float(value) for name, value in output.items()}
        if not self._score(values) > self._best:
            return
        self._best = self._score(values)
        self._manager.save(check_interval=False)
        if self._is_chief:
            self._keep(self._manager.saved, values)

    def _keep(self, step: int, values) -> None:
        files.make_folder(self._store.folder)
        self._manager.store.copy(step, self._store)
        self._store.write_state([step])
        with atomic_write(self._metrics) as file:
            json.dump({"step": step} | values, file)
        self._store.keep_only(step)
