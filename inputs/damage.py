"""Damaged records that input graphs find while they are read.

A graph runs on the host that reads the data, which may be another machine, and without Python. So
it writes a small file for each damaged record into a folder that all hosts share, and the program
collects these files. Workers that train together share the folder, too, so that the limit holds for
all of them together.
"""

import dataclasses
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from typing import Self

import tensorflow as tf

from inputs.bad_records import BadRecords
from inputs.storage.files import list_names, open_bytes

FOLDER = "damaged-records"  # of the reports, in a folder that all hosts share
END = "\n."  # of each report
SCRATCH: set[str] = set()  # all folders of `scratch_folder`, which other hosts cannot open


def scratch_folder(owner: object, prefix: str) -> str:
    """A new temporary folder, which is removed together with its owner."""
    folder = tempfile.mkdtemp(prefix=prefix)
    SCRATCH.add(folder)
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclasses.dataclass(frozen=True)
class Reports:
    """How a process of a run reports damaged records.

    Attributes:
        log: takes the lines.
        folder: of this start of the run, which all hosts can write; "" if there is one host.
        worker, chief: see `BadRecords`.
    """

    log: Callable[[str], object]
    folder: str = ""
    worker: str = ""
    chief: bool = True

    @classmethod
    def of_one_process(cls, log: Callable[[str], object], shared_dir: str) -> Self:
        """Those of the only process that reads the data; see `shared_dir` of `tasks.task.Task`."""
        return cls(log, shared_dir and os.path.join(shared_dir, FOLDER))

    def bad_records(self, recipe) -> BadRecords:
        """Counts the damaged records of a data set, as a `recipes.types.Recipe` says."""
        return BadRecords(
            recipe.max_bad_record_share,
            skip=recipe.on_bad_record == "skip",
            log=self.log,
            worker=self.worker,
            chief=self.chief,
        )

    def folder_of(self, name: str) -> str:
        """The `folder` of the `Damage` of a data set."""
        return self.folder and os.path.join(self.folder, name)


class Damage:
    """The damaged records of one data set.

    Args:
        records: counts them, and decides whether reading may go on.
        examples: the number of all examples, of which those lost are a share.
        folder: an empty folder where hosts report them, on a file system that all of them share; ""
            for a temporary folder of this machine.
    """

    def __init__(self, records: BadRecords, examples: int, folder: str = ""):
        self._records = records
        self._folder = folder or scratch_folder(self, "damaged-records-")
        self._seen: set[str] = set()
        records.expect(examples)

    def report(self, path, offset, example, lost, reason=None):
        """Reports a record, in a graph.

        Args:
            path: string scalar, the file.
            offset: int64 scalar, where the record begins, in bytes.
            example: int64 scalar, the number of the first example that is lost with it.
            lost: int64 scalar, how many examples are lost.
            reason: string scalar, what is wrong with a record that is not damaged, and what to do.

        Returns:
            An operation. It fails if damaged records may not be skipped; the error then ends in an
            `inputs.errors.InputError` as text.
        """
        place = [path, ", byte ", tf.strings.as_string(offset), ": "]
        message = tf.strings.join([*place, "damaged or missing." if reason is None else reason])
        if not self._records.skip:
            fix = f" {self._records.repair}" if reason is None else ""
            return tf.debugging.Assert(
                False, [tf.strings.join(["InputError: --data_dir: ", message, fix])]
            )
        key = tf.strings.to_hash_bucket_strong(
            tf.strings.format("{} {} {}", (path, offset, example)), 2**62, [1, 2]
        )
        content = tf.strings.join(
            [tf.strings.as_string(lost), "\n", self._records.worker, "\n", message, END]
        )
        return tf.io.write_file(
            tf.strings.join([self._folder + "/", tf.strings.as_string(key)]), content
        )

    def collect(self) -> None:
        """Counts what the hosts have reported since the last call.

        Raises:
            InputError: more records are damaged than may be skipped.
        """
        try:
            names = list_names(self._folder)
        except FileNotFoundError:  # nothing was reported yet
            return
        for name in sorted(set(names) - self._seen):
            with open_bytes(os.path.join(self._folder, name)) as file:
                content = file.read().decode(errors="replace")
            if not content.endswith(END):  # it is being written
                continue
            self._seen.add(name)
            lost, worker, message = content.removesuffix(END).split("\n", 2)
            self._records.add_bad(message, int(lost), worker)

    def end(self) -> None:
        """Collects, and logs the total. Call it when nothing is read any more.

        Raises:
            InputError: more records are damaged than may be skipped.
        """
        self.collect()
        self._records.end()
