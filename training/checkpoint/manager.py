"""Checkpoints on disk. Each is written to a hidden folder, read back, and then made visible.

MODEL_DIR/ckpt-STEP.index and .data-*   the newest checkpoints
MODEL_DIR/best/                         the checkpoint with the best evaluation, and its metrics
MODEL_DIR/damaged/                      checkpoints that could no longer be read
MODEL_DIR/.saving/                      the checkpoint that is being written
"""

import contextlib
import errno
import glob
import json
import math
import os
import re
import shutil

import tensorflow as tf

from inputs.errors import InputError
from inputs.files import atomic_file, atomic_write

SAVING = ".saving"
DAMAGED = "damaged"
BEST = "best"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class SaveFailed(Exception):
    """A checkpoint could not be written; the earlier ones are unchanged."""


def describe_disk_error(error: Exception) -> str | None:
    """Returns the system's message if an `OSError` or `OpError` is a disk error, else None."""
    message = str(error)
    return next((text for text in map(os.strerror, DISK_ERRORS) if text in message), None)


def saved_steps(model_dir: str) -> list[int]:
    """Returns the steps of the visible checkpoints in ascending order, from their file names.

    Raises:
        InputError: the folder has a checkpoint of another program.
    """
    newest = tf.train.latest_checkpoint(model_dir)
    if newest and not re.fullmatch(r"ckpt-\d+", os.path.basename(newest)):
        raise InputError(
            f"--model_dir: {model_dir} holds a checkpoint of another program, "
            f"{os.path.basename(newest)}. Choose another folder."
        )
    names = os.listdir(model_dir) if os.path.isdir(model_dir) else []
    return sorted(int(found[1]) for n in names if (found := re.fullmatch(r"ckpt-(\d+)\.index", n)))


def saved_step(model_dir: str) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max(saved_steps(model_dir), default=0)


def read_error(prefix: str) -> str | None:
    """Reads all tensors, which checks their CRC-32C; returns the error's message, or None."""
    try:
        reader = tf.train.load_checkpoint(prefix)
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    except (tf.errors.OpError, IndexError, ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def write_checkpoint_state(folder: str, names: list[str]) -> None:
    """Writes the file that `tf.train.latest_checkpoint` reads: a `CheckpointState` as text.

    Args:
        folder: of the checkpoints.
        names: of the checkpoints, oldest first.
    """
    lines = [f'model_checkpoint_path: "{names[-1]}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    path = os.path.join(folder, "checkpoint")
    with atomic_write(path) as file:
        file.writelines(f"{line}\n" for line in lines)


def recover(model_dir: str, log) -> None:
    """Deletes the unfinished files of a killed run, and moves damaged checkpoints to damaged/.

    Checks from the newest checkpoint back to the first one that can be read. Call it only in the
    process that holds the folder's lock.

    Args:
        model_dir: folder of the checkpoints.
        log: takes a line about each damaged checkpoint.

    Raises:
        InputError: there are checkpoints, and none of them can be read.
    """
    shutil.rmtree(os.path.join(model_dir, SAVING), ignore_errors=True)
    steps = saved_steps(model_dir)
    for path in glob.glob(os.path.join(glob.escape(model_dir), "ckpt-*")):
        # The index is renamed last and deleted first, so files without an index are unfinished.
        if not os.path.exists(re.sub(r"\.(data-|index\.new).*$", ".index", path)):
            os.remove(path)
    errors = {}
    for step in reversed(steps):
        reason = read_error(_prefix(model_dir, step))
        if reason is None:
            break
        errors[step] = reason
    if errors and len(errors) == len(steps):
        raise InputError(
            f"--model_dir: none of the checkpoints in {model_dir} can be read; the newest, "
            f"ckpt-{steps[-1]}: {errors[steps[-1]]}. Restore the folder from a copy, or choose "
            "another one."
        )
    for step, reason in errors.items():
        folder = os.path.join(model_dir, DAMAGED)
        os.makedirs(folder, exist_ok=True)
        _move(_prefix(model_dir, step), folder)
        log(f"Checkpoint ckpt-{step} is damaged ({reason}); it was moved to {folder}")


def _prefix(folder: str, step: int) -> str:
    return os.path.join(folder, f"ckpt-{step}")


def _files(prefix: str) -> list[str]:
    """The files of a checkpoint, the index last."""
    return [*sorted(glob.glob(glob.escape(prefix) + ".data-*")), f"{prefix}.index"]


def _move(prefix: str, folder: str) -> None:
    """Moves a checkpoint; an index is only present in a folder if its data files are, too."""
    target = os.path.join(folder, os.path.basename(prefix))
    files = _files(prefix)
    if os.path.exists(f"{target}.index"):
        _delete(target)
    if os.path.exists(files[-1]):
        os.replace(files[-1], f"{target}.index.new")
    for path in files[:-1]:
        os.replace(path, os.path.join(folder, os.path.basename(path)))
    if os.path.exists(f"{target}.index.new"):
        os.replace(f"{target}.index.new", f"{target}.index")
    _sync(folder)


def _delete(prefix: str) -> None:
    for path in reversed(_files(prefix)):
        os.remove(path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """

    def __init__(self, checkpoint, model_dir, *, step, save_every_steps, keep, scratch=None):
        super().__init__(
            checkpoint,
            model_dir,
            max_to_keep=keep,
            step_counter=step,
            checkpoint_interval=save_every_steps,
        )
        self._keep = keep
        self._scratch = scratch
        self._saved: int | None = None  # the step of the last checkpoint written or read

    @property
    def checkpoints(self):
        """The prefixes of the visible checkpoints, oldest first."""
        return [_prefix(self.directory, step) for step in saved_steps(self.directory)]

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
        step, every = int(self._step_counter.numpy()), self.checkpoint_interval
        due = step // every > (self._saved or 0) // every
        if step == self._saved or (check_interval and not due):
            return None
        folder = self._scratch or os.path.join(self.directory, SAVING)
        try:
            self._write(_prefix(folder, step), options)
        except (OSError, tf.errors.OpError) as error:
            kept = saved_steps(self.directory)
            last = f"the last good one is of step {kept[-1]}" if kept else "there is no earlier one"
            fix = "Free some space or repair the disk"
            if self._scratch:
                fix += ", or set TMPDIR to a folder on another one"
            raise SaveFailed(
                f"{self._scratch or self.directory}: the checkpoint of step {step} could not be "
                f"written ({describe_disk_error(error) or error}); {last}. {fix}; the same command "
                "resumes from there."
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._saved = step
        return _prefix(self.directory, step)

    def _write(self, prefix: str, options) -> None:
        self.checkpoint.write(prefix, options)
        if self._scratch:
            return
        error = read_error(prefix)
        if error:
            raise OSError(error)
        for path in _files(prefix):
            _sync(path)
        _move(prefix, self.directory)
        prefixes = self.checkpoints
        names = [os.path.basename(prefix) for prefix in prefixes[-self._keep :]]
        write_checkpoint_state(self.directory, names)
        for prefix in prefixes[: -self._keep]:
            _delete(prefix)

    def restore_or_initialize(self):
        """Reads the newest checkpoint. Returns its prefix, or None if there is none.

        Raises:
            InputError: it is damaged, or its names or shapes do not match this run's variables.
        """
        newest = self.latest_checkpoint
        return newest and self.restore(newest)

    def restore(self, prefix: str) -> str:
        """Reads the checkpoint with this prefix; see `restore_or_initialize`."""
        try:
            self.checkpoint.read(prefix).assert_consumed()
        except (AssertionError, ValueError, IndexError, tf.errors.OpError) as error:
            raise InputError(
                f"--model_dir: {prefix} is damaged, or of another model or version of this program "
                f"({str(error).splitlines()[0]}). Start again, or choose another folder."
            ) from None
        self._saved = int(self._step_counter.numpy())
        return prefix


class BestCheckpoint:
    """An Orbit evaluation action that keeps the checkpoint with the best metric in best/.

    The files are hard links to those of the step's checkpoint, or copies where the file system has
    no hard links. `metrics.json` beside them holds the evaluation. It is written after the
    checkpoint; Orbit's `NewBestMetric` records a best value before its checkpoint exists.

    Args:
        manager: a `CheckpointManager`.
        metric: the `tasks.task.Metric` that is compared.
        is_chief: whether this process writes to best/. Other processes only join in saving.
    """

    def __init__(self, manager: CheckpointManager, metric, is_chief: bool = True):
        self._manager = manager
        self._metric = metric
        self._is_chief = is_chief
        self._folder = os.path.join(manager.directory, BEST)
        self._best = -math.inf
        with contextlib.suppress(OSError, ValueError, KeyError):
            with open(os.path.join(self._folder, "metrics.json"), encoding="utf-8") as file:
                self._best = self._score(json.load(file))

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
            self._keep(self._manager.latest_checkpoint, values)

    def _keep(self, prefix: str, values) -> None:
        os.makedirs(self._folder, exist_ok=True)
        name = os.path.basename(prefix)
        old = set(glob.glob(os.path.join(glob.escape(self._folder), "ckpt-*")))
        new = set()
        for path in sorted(glob.glob(glob.escape(prefix) + ".*")):
            copy = os.path.join(self._folder, os.path.basename(path))
            new.add(copy)
            with atomic_file(copy) as temporary:
                # One that a killed process left may be a link to a file of another checkpoint.
                with contextlib.suppress(FileNotFoundError):
                    os.remove(temporary)
                try:
                    os.link(path, temporary)
                except OSError:
                    shutil.copyfile(path, temporary)
        write_checkpoint_state(self._folder, [name])
        metrics = os.path.join(self._folder, "metrics.json")
        with atomic_write(metrics) as file:
            json.dump({"step": int(name.rpartition("-")[2])} | values, file)
        for path in old - new:
            with contextlib.suppress(FileNotFoundError):  # a .new that `atomic_file` removed
                os.remove(path)
