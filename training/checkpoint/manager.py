"""Checkpoints on disk: written aside, read back, then made visible; the newest and the best kept.

MODEL_DIR/ckpt-STEP.index and .data-*   checkpoints, every one of them read back once
MODEL_DIR/best/                         the one with the best evaluation, and its metrics
MODEL_DIR/damaged/                      what could no longer be read
MODEL_DIR/.saving/                      one being written
"""

import errno
import glob
import os
import re
import shutil

import tensorflow as tf

from inputs.errors import InputError

ASIDE, DAMAGED = ".saving", "damaged"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class SaveFailed(Exception):
    """A checkpoint could not be written; those before it are as they were."""


def disk_trouble(error: Exception) -> str | None:
    """What is wrong with the disk, in words, if that is what an `OSError` or TensorFlow says."""
    said = str(error)
    return next((text for text in map(os.strerror, DISK_ERRORS) if text in said), None)


def saved_steps(model_dir: str) -> list[int]:
    """The steps of the visible checkpoints, ascending. The files tell, not the `checkpoint` file.

    Raises:
        InputError: a checkpoint that no run of ours has named.
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
    """The step of the newest checkpoint, 0 if there is none."""
    return max(saved_steps(model_dir), default=0)


def flaw(prefix: str) -> str | None:
    """Reads every tensor, against its CRC-32C; says what is wrong, or None."""
    try:
        reader = tf.train.load_checkpoint(prefix)
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    except (tf.errors.OpError, IndexError, ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def name_newest(folder: str, names: list[str]) -> None:
    """Writes the file that `tf.train.latest_checkpoint` reads: a `CheckpointState` as text."""
    lines = [f'model_checkpoint_path: "{names[-1]}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    path = os.path.join(folder, "checkpoint")
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    os.replace(f"{path}.new", path)


def settle(model_dir: str, say) -> None:
    """Clears up after a run that died, and sets damaged newest checkpoints aside.

    For the one process that holds the folder's lock.

    Raises:
        InputError: there are checkpoints, and none of them can be read.
    """
    shutil.rmtree(os.path.join(model_dir, ASIDE), ignore_errors=True)
    steps = saved_steps(model_dir)
    for path in glob.glob(os.path.join(glob.escape(model_dir), "ckpt-*")):
        # The index comes last and goes first: what has none was not visible any more, or yet.
        if not os.path.exists(re.sub(r"\.(data-|index\.new).*$", ".index", path)):
            os.remove(path)
    flaws = {}
    for step in reversed(steps):
        reason = flaw(_prefix(model_dir, step))
        if reason is None:
            break
        flaws[step] = reason
    if flaws and len(flaws) == len(steps):
        raise InputError(
            f"--model_dir: none of the checkpoints in {model_dir} can be read; of the newest, "
            f"ckpt-{steps[-1]}: {flaws[steps[-1]]}. Restore the folder from a copy, or choose "
            "another one."
        )
    for step, reason in flaws.items():
        folder = os.path.join(model_dir, DAMAGED)
        os.makedirs(folder, exist_ok=True)
        _move(_prefix(model_dir, step), folder)
        say(f"Checkpoint ckpt-{step} is damaged ({reason}); it was moved to {folder}")


def _prefix(folder: str, step: int) -> str:
    return os.path.join(folder, f"ckpt-{step}")


def _files(prefix: str) -> list[str]:
    """A checkpoint's files, the index last."""
    return [*sorted(glob.glob(glob.escape(prefix) + ".data-*")), f"{prefix}.index"]


def _move(prefix: str, folder: str) -> None:
    """Moves a checkpoint so that neither place ever shows half of one."""
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


class Manager(tf.train.CheckpointManager):
    """Saves and restores for Orbit's Controller, which calls nothing else of a manager.

    Args:
        checkpoint: a `tf.train.Checkpoint` of all that a run needs to go on.
        model_dir: folder of the checkpoints.
        step: int64 `tf.Variable`, the batches that were used; it names the checkpoints.
        save_every_steps: a checkpoint is due at its multiples, at the end of a loop of steps.
        keep: how many of the newest stay.
        scratch: for a worker that is not the chief: a folder of its own, in which what it must
            write along with the others is written and dropped.
    """

    def __init__(self, checkpoint, model_dir, *, step, save_every_steps, keep, scratch=None):
        super().__init__(
            checkpoint,
            model_dir,
            max_to_keep=keep,
            step_counter=step,
            checkpoint_interval=save_every_steps,
        )
        self._keep, self._scratch = keep, scratch
        self._saved: int | None = None  # the step of the checkpoint last written or read

    @property
    def checkpoints(self):
        """Prefixes of the visible checkpoints, oldest first."""
        return [_prefix(self.directory, step) for step in saved_steps(self.directory)]

    @property
    def latest_checkpoint(self):
        """Prefix of the newest, or None."""
        return next(reversed(self.checkpoints), None)

    def save(self, checkpoint_number=None, check_interval=True, options=None):
        """Saves the state of now, unless that is done or, with `check_interval`, not yet due.

        Returns:
            The checkpoint's prefix, or None.

        Raises:
            SaveFailed: it could not be written or not be read back.
        """
        del checkpoint_number  # it is the step
        step, every = int(self._step_counter.numpy()), self.checkpoint_interval
        due = step // every > (self._saved or 0) // every
        if step == self._saved or (check_interval and not due):
            return None
        aside = self._scratch or os.path.join(self.directory, ASIDE)
        try:
            self._write(_prefix(aside, step), options)
        except (OSError, tf.errors.OpError) as error:
            kept = saved_steps(self.directory)
            last = f"the last good one is of step {kept[-1]}" if kept else "there is none before it"
            raise SaveFailed(
                f"{self.directory}: the checkpoint of step {step} could not be written "
                f"({disk_trouble(error) or error}); {last}. Make room, or mend the disk; the same "
                "command goes on from there."
            ) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._saved = step
        return _prefix(self.directory, step)

    def _write(self, aside: str, options) -> None:
        self.checkpoint.write(aside, options)
        if self._scratch:
            return
        wrong = flaw(aside)
        if wrong:
            raise OSError(wrong)
        for path in _files(aside):
            _sync(path)
        _move(aside, self.directory)
        prefixes = self.checkpoints
        name_newest(self.directory, list(map(os.path.basename, prefixes[-self._keep :])))
        for prefix in prefixes[: -self._keep]:
            _delete(prefix)

    def restore_or_initialize(self):
        """Reads the newest checkpoint, unless the state is that one; its prefix, or None.

        Raises:
            InputError: it does not hold what this run needs, name by name and shape by shape.
        """
        newest = self.latest_checkpoint
        if newest is None or self._saved == int(self._step_counter.numpy()):
            return newest
        return self.restore(newest)

    def restore(self, prefix: str) -> str:
        """Reads that checkpoint, whatever the state is; otherwise as `restore_or_initialize`."""
        try:
            self.checkpoint.read(prefix).assert_consumed()
        except (AssertionError, ValueError, IndexError, tf.errors.OpError) as error:
            raise InputError(
                f"--model_dir: {prefix} is damaged, or of another model or version of this program "
                f"({str(error).splitlines()[0]}). Start again, or choose another folder."
            ) from None
        self._saved = int(self._step_counter.numpy())
        return prefix
