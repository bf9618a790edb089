"""Where checkpoints lie: on a disk, or on object storage. Each is complete before it is visible.

On a disk (`DiskStore`) a checkpoint is written to a hidden folder, and its files are renamed, the
index last:

    FOLDER/ckpt-STEP.index and .data-*   a visible checkpoint
    FOLDER/.saving/                      the checkpoint that is being written
    FOLDER/damaged/                      checkpoints that could no longer be read

On object storage (`ObjectStore`) a rename is a copy, so a checkpoint is written under its own name.
It is visible when FOLDER/ckpt-STEP.complete is there, a small object that is written last. Listings
only propose steps; that object decides.
"""

import abc
import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable

import tensorflow as tf

from inputs.errors import InputError, first_line
from inputs.storage import files, remote
from inputs.storage.files import atomic_file, atomic_write, is_remote

SAVING = ".saving"
DAMAGED = "damaged"
STATE = "checkpoint"  # the file that `tf.train.latest_checkpoint` reads
MARK = ".complete"
HEADER = 64  # bytes of an index that hold the number of its data files


def read_error(prefix: str) -> str | None:
    """Reads all tensors, which checks their CRC-32C; returns the error's message, or None."""
    try:
        # `tf.train.load_checkpoint` would take the prefix for a folder on ram://.
        reader = tf.compat.v1.train.NewCheckpointReader(prefix)
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    except (tf.errors.OpError, IndexError, ValueError, RuntimeError) as error:
        return first_line(error)
    return None


class Store(abc.ABC):
    """The checkpoints in a folder.

    Attributes:
        folder: path of the folder.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def prefix(self, step: int) -> str:
        """The path of a checkpoint without its suffixes."""
        return os.path.join(self.folder, f"ckpt-{step}")

    def newest(self) -> int:
        """The step of the newest visible checkpoint; -1 if there is none."""
        return max(self.steps(), default=-1)

    @abc.abstractmethod
    def steps(self) -> list[int]:
        """The steps of the visible checkpoints, in ascending order."""

    @abc.abstractmethod
    def has(self, step: int) -> bool:
        """Whether the checkpoint of this step is visible."""

    @abc.abstractmethod
    def begin(self, step: int) -> str:
        """Returns the prefix to which the checkpoint of a step is to be written."""

    @abc.abstractmethod
    def publish(self, step: int) -> None:
        """Makes a checkpoint visible that was written completely to `begin(step)`."""

    @abc.abstractmethod
    def discard(self, step: int) -> None:
        """Deletes what is left of a checkpoint that was begun and is not visible."""

    @abc.abstractmethod
    def delete(self, step: int) -> None:
        """Deletes a checkpoint; it stops being visible first."""

    @abc.abstractmethod
    def copy(self, step: int, target: "Store") -> None:
        """Copies a checkpoint to another store of the same kind, where it becomes visible."""

    @abc.abstractmethod
    def keep_only(self, step: int) -> None:
        """Deletes all other checkpoints, also unfinished ones."""

    def find_lost(self, log) -> dict[int, str]:
        """Looks for checkpoints that were visible once, are not now, and cannot be read.

        Args:
            log: takes lines.

        Returns:
            Step -> error of each of them.
        """
        return {}

    @abc.abstractmethod
    def clean(self, log, keep=()) -> None:
        """Deletes the unfinished files of a killed run.

        Args:
            log: takes lines.
            keep: steps of which nothing is deleted.
        """

    def read_error(self, step: int) -> str | None:
        """See `read_error`."""
        return read_error(self.prefix(step))

    @abc.abstractmethod
    def set_aside(self, step: int) -> None:
        """Moves a checkpoint to damaged/."""

    def write_state(self, steps: list[int]) -> None:
        """Writes the file for `tf.train.latest_checkpoint`: a `CheckpointState` as text."""
        names = [f"ckpt-{step}" for step in steps]
        lines = [f'model_checkpoint_path: "{names[-1]}"']
        lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
        with atomic_write(os.path.join(self.folder, STATE)) as file:
            file.writelines(f"{line}\n" for line in lines)

    def recover(self, log) -> None:
        """Deletes the unfinished files of a killed run, and moves damaged checkpoints to damaged/.

        Checks from the newest checkpoint back to the first one that can be read. Call it only in
        the process that holds the folder's lock.

        Args:
            log: takes a line about each damaged checkpoint.

        Raises:
            InputError: there are checkpoints, and none of them can be read.
        """
        errors = self.find_lost(log)
        steps = sorted({*self.steps(), *errors})
        for step in reversed(steps):
            reason = errors.get(step) or self.read_error(step)
            if reason is None:
                break
            errors[step] = reason
        if errors and len(errors) == len(steps):
            raise InputError(
                f"--model_dir: none of the checkpoints in {self.folder} can be read; the newest, "
                f"ckpt-{steps[-1]}: {errors[steps[-1]]}. Restore the folder from a copy, or choose "
                "another one."
            )
        self.clean(log, keep=errors)
        for step, reason in errors.items():
            self.set_aside(step)
            log(
                f"Checkpoint ckpt-{step} is damaged ({reason}); it was moved to "
                f"{os.path.join(self.folder, DAMAGED)}"
            )


def open_store(folder: str, check: Callable[[], None] = lambda: None) -> Store:
    """The store of a folder's checkpoints.

    Args:
        folder: its path.
        check: called before a change is made visible on object storage; see `files.locked`.
    """
    return ObjectStore(folder, check) if is_remote(folder) else DiskStore(folder)


class DiskStore(Store):
    """Checkpoints on a disk, where a rename is atomic."""

    def steps(self):
        """See `Store`."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(
            int(found[1]) for name in names if (found := re.fullmatch(r"ckpt-(\d+)\.index", name))
        )

    def has(self, step):
        """See `Store`."""
        return os.path.exists(f"{self.prefix(step)}.index")

    def begin(self, step):
        """See `Store`."""
        return os.path.join(self.folder, SAVING, f"ckpt-{step}")

    def publish(self, step):
        """See `Store`."""
        prefix = self.begin(step)
        for path in _files(prefix):
            _sync(path)
        _move(prefix, self.folder)

    def discard(self, step):
        """See `Store`."""
        files.remove_folder(os.path.join(self.folder, SAVING))

    def delete(self, step):
        """See `Store`."""
        for path in reversed(_files(self.prefix(step))):
            os.remove(path)

    def copy(self, step, target):
        """Links the files, or copies them where the file system has no hard links."""
        for path in _files(self.prefix(step)):
            with atomic_file(os.path.join(target.folder, os.path.basename(path))) as temporary:
                # One that a killed process left may be a link to a file of another checkpoint.
                files.remove(temporary)
                try:
                    os.link(path, temporary)
                except OSError:
                    shutil.copyfile(path, temporary)

    def keep_only(self, step):
        """See `Store`."""
        kept = _files(self.prefix(step))
        for path in glob.glob(os.path.join(glob.escape(self.folder), "ckpt-*")):
            if path not in kept:
                os.remove(path)

    def clean(self, log, keep=()):
        """See `Store`; what is in `keep` has an index."""
        self.discard(0)
        for path in glob.glob(os.path.join(glob.escape(self.folder), "ckpt-*")):
            # The index is renamed last and deleted first: files without an index are unfinished.
            index = re.sub(r"\.(data-|index\.new).*$", ".index", os.path.basename(path))
            if not os.path.exists(os.path.join(self.folder, index)):
                os.remove(path)

    def set_aside(self, step):
        """See `Store`."""
        folder = os.path.join(self.folder, DAMAGED)
        os.makedirs(folder, exist_ok=True)
        _move(self.prefix(step), folder)


def _files(prefix: str) -> list[str]:
    """The files of a checkpoint, the index last."""
    return [*sorted(glob.glob(glob.escape(prefix) + ".data-*")), f"{prefix}.index"]


def _move(prefix: str, folder: str) -> None:
    """Moves a checkpoint; an index is only present in a folder if its data files are, too."""
    target = os.path.join(folder, os.path.basename(prefix))
    paths = _files(prefix)
    if os.path.exists(f"{target}.index"):
        for path in reversed(_files(target)):
            os.remove(path)
    if os.path.exists(paths[-1]):
        os.replace(paths[-1], f"{target}.index.new")
    for path in paths[:-1]:
        os.replace(path, os.path.join(folder, os.path.basename(path)))
    if os.path.exists(f"{target}.index.new"):
        os.replace(f"{target}.index.new", f"{target}.index")
    _sync(folder)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of the network cannot do this to a folder.
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def count_shards(index: bytes) -> int:
    """The number of a checkpoint's data files, from the beginning of its index; 0 if damaged.

    The index is a table, not compressed, whose first key is empty and has a `BundleHeaderProto`
    (tensorflow/core/protobuf/tensor_bundle.proto), whose first field is `num_shards`.
    """
    shared, length, _, *header = index.ljust(4, b"\0")
    if (shared, length) != (0, 0) or header[0] != 1 << 3:
        return 0
    shards = 0
    for place, byte in enumerate(header[1:6]):  # a varint
        shards |= (byte & 127) << 7 * place
        if byte < 128:
            break
    return shards


class ObjectStore(Store):
    """Checkpoints on object storage.

    An instance remembers the steps that it has published, which a listing may not show yet.

    Args:
        folder: its path.
        check: raises if this process must not write any more; see `inputs.storage.lease`.
    """

    def __init__(self, folder: str, check: Callable[[], None] = lambda: None):
        super().__init__(folder)
        self._check = check
        self._published: set[int] = set()

    def steps(self):
        """See `Store`."""
        return sorted(step for step in self._candidates() if self.has(step))

    def _candidates(self) -> set[int]:
        """Steps in a listing, which may be out of date, in the file for TensorFlow, and our own."""
        found = {int(m[1]) for n in self._names() if (m := re.fullmatch(rf"ckpt-(\d+){MARK}", n))}
        return found | self._in_state() | self._published

    def _in_state(self) -> set[int]:
        """The steps in the file for TensorFlow, each of which was visible when it was written."""
        try:
            state = remote.read(os.path.join(self.folder, STATE)).decode(errors="replace")
        except FileNotFoundError:
            return set()
        return {int(step) for step in re.findall(r'"ckpt-(\d+)"', state)}

    def _names(self) -> list[str]:
        try:
            return files.list_names(self.folder)
        except FileNotFoundError:
            return []

    def has(self, step):
        """See `Store`."""
        return self._marked(step) is not None

    def _marked(self, step: int) -> dict | None:
        """Name -> size of the files of a visible checkpoint; None if it is not visible."""
        try:
            with remote.open_reader(self.prefix(step) + MARK) as file:
                mark = json.loads(file.read())
        except (FileNotFoundError, ValueError):  # a half of a mark is not JSON
            return None
        return mark["files"]

    def begin(self, step):
        """See `Store`."""
        self._remove(step)
        return self.prefix(step)

    def publish(self, step):
        """See `Store`."""
        folder = self.folder
        sizes = {name: files.file_size(os.path.join(folder, name)) for name in self._own(step)}
        self._check()
        mark = json.dumps({"step": step, "files": sizes})
        remote.upload(self.prefix(step) + MARK, mark.encode())
        self._published.add(step)

    def _own(self, step: int) -> list[str]:
        """The names of a checkpoint's files, the index last.

        Raises:
            FileNotFoundError: a file is missing.
        """
        with remote.open_reader(f"{self.prefix(step)}.index") as file:
            shards = count_shards(file.read(HEADER))
        names = [f"ckpt-{step}.data-{i:05d}-of-{shards:05d}" for i in range(shards)]
        missing = [name for name in names if not files.exists(os.path.join(self.folder, name))]
        if missing or not names:
            raise FileNotFoundError(2, "the checkpoint is not complete", self.prefix(step))
        return [*names, f"ckpt-{step}.index"]

    def discard(self, step):
        """See `Store`."""
        if not self.has(step):
            self._remove(step)

    def delete(self, step):
        """See `Store`."""
        self._remove(step)

    def _remove(self, step: int) -> None:
        names = set(self._marked(step) or ())
        names |= {f"ckpt-{step}.index", f"ckpt-{step}.data-00000-of-00001"}
        names |= {name for name in self._names() if name.startswith(f"ckpt-{step}.")}
        names.discard(f"ckpt-{step}{MARK}")
        self._check()
        remote.remove(self.prefix(step) + MARK)
        self._published.discard(step)
        # Data first: an index without them is removed by `clean`.
        for name in sorted(names):
            remote.remove(os.path.join(self.folder, name))
        remote.remove_tree(f"{self.prefix(step)}_temp")  # of TensorFlow's writer

    def copy(self, step, target):
        """See `Store`."""
        sizes = self._marked(step)
        if sizes is None:
            raise FileNotFoundError(2, "there is no such checkpoint", self.prefix(step))
        target.begin(step)
        for name in sizes:
            remote.copy(os.path.join(self.folder, name), os.path.join(target.folder, name))
        target.publish(step)

    def keep_only(self, step):
        """See `Store`."""
        names = (re.match(r"ckpt-(\d+)\.", name) for name in self._names())
        for other in {int(name[1]) for name in names if name} | self._candidates():
            if other != step:
                self._remove(other)

    def find_lost(self, log):
        """Also marks complete checkpoints without a mark, such as copies from a disk."""
        once_visible = self._candidates()
        in_state = self._in_state()
        errors = {}
        for step in self._begun():
            if self.has(step):
                continue
            try:
                self._own(step)
            except FileNotFoundError:
                if step in in_state:
                    errors[step] = "it is not complete"
                continue
            reason = self.read_error(step)
            if reason is None:
                self.publish(step)
                log(f"Checkpoint ckpt-{step} is complete and had no mark; it is used")
            elif step in once_visible:
                errors[step] = reason
        return errors

    def _begun(self) -> list[int]:
        """The steps of which there are files, in ascending order."""
        parts = (re.fullmatch(r"ckpt-(\d+)\.(?:data-.*|index)", name) for name in self._names())
        return sorted({int(part[1]) for part in parts if part})

    def clean(self, log, keep=()):
        """See `Store`."""
        for name in self._names():
            if re.fullmatch(r"ckpt-\d+_temp", name):
                remote.remove_tree(os.path.join(self.folder, name))
        for step in self._begun():
            if step not in keep and not self.has(step):
                self._remove(step)
                log(f"Checkpoint ckpt-{step} is not complete; it was removed")

    def read_error(self, step):
        """See `Store`; raises an `OSError` if the storage cannot be read, which is no damage."""
        reason = read_error(self.prefix(step))
        if reason is None:
            return None
        for name in self._marked(step) or self._own(step):
            path = os.path.join(self.folder, name)
            with contextlib.suppress(FileNotFoundError), remote.open_reader(path) as file:
                while file.read(remote.CHUNK):
                    pass
        return read_error(self.prefix(step))  # again, as the first error may have passed

    def set_aside(self, step):
        """See `Store`. Of an incomplete checkpoint, the files that exist are moved."""
        folder = os.path.join(self.folder, DAMAGED)
        try:
            names = self._marked(step) or self._own(step)
        except FileNotFoundError:
            names = [name for name in self._names() if name.startswith(f"ckpt-{step}.data-")]
            names.append(f"ckpt-{step}.index")
        remote.make_folder(folder)
        self._check()
        remote.remove(self.prefix(step) + MARK)
        self._published.discard(step)
        for name in names:
            source = os.path.join(self.folder, name)
            if files.exists(source):
                remote.move(source, os.path.join(folder, name))
