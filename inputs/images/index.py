"""Makes TFRecords of ImageNet usable in place: python -m inputs.images.index --source=DIR ...

Writes, for each split, a manifest and where each record begins, into a small folder that train.py
takes as --data_dir. The command reads the lengths of all records, and about 2,000 whole records of
each split: their labels must agree with the class list, and their images are decoded. The records
are those of the TPU demos (train-00000-of-01024) or of TensorFlow Datasets, and not compressed.
They stay where they are, and must not be changed. A record whose length is damaged is named and
left out, up to the next record that can be found. A file without a further record is refused: it
was probably truncated.
"""

import argparse
import dataclasses
import hashlib
import json
import os

from inputs import process  # isort: split

# Without it, TensorFlow 2.20 reads blocks of 64 MiB from gs://, according to its source.
os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "0")

from inputs.bad_records import BadRecords
from inputs.errors import InputError, refuse_empty
from inputs.images import tfrecords
from inputs.images.shards import missing_split
from inputs.progress import Progress, log
from inputs.record_index import write_index
from inputs.shards import IMAGES, MANIFEST
from inputs.storage.files import (
    absolute,
    check_writable,
    exists,
    file_sizes,
    locked,
    read_json,
    write_json,
)

NAME = "inputs.images.index"
FIX = "Copy it again; compressed files are converted by `python -m inputs.images.prepare`."


def index(
    source: str,
    output: str,
    classes_csv: str,
    label_base: int | None,
    max_bad_record_share: float = 0.001,
    log=log,
) -> dict:
    """Writes the manifests and the places of the records.

    Args:
        source: the folder of the TFRecords.
        output: the folder to write to, in which each split has a folder.
        classes_csv: CSV with the columns index, wnid, name; "" for label.labels.txt of TensorFlow
            Datasets in `source`.
        label_base: label of the first class; None for the layout's own, or that of the records.
        max_bad_record_share: the share of a split's records that may be left out because a length
            is damaged, and of the images that are checked that cannot be decoded, in [0, 1].
        log: receives lines.

    Returns:
        The manifest of each split.

    Raises:
        InputError: the records, the class list or the folder cannot be used, the labels contradict
            the class list, or more images cannot be decoded than `max_bad_record_share`.
    """
    source = tfrecords.version_folder(source)
    _check_output(output, source)
    splits = tfrecords.labeled_splits(source, log)
    if "test" in splits:
        splits["validation"] = splits.pop("test")
    if not splits:
        raise InputError(
            f"--source: {source} has no TFRecords of a split, such as train-00000-of-01024."
        )
    classes = tfrecords.listed_classes(source, classes_csv)
    if classes is None:
        raise InputError(
            "--classes is needed, as the labels of few records are read: give a CSV with the "
            "columns index (from 0), wnid, name. In the layout of TensorFlow Datasets, "
            f"label.labels.txt in {source} serves, too."
        )
    manifests = {}
    for split, files in splits.items():
        sizes = file_sizes(files)
        filled = [file for file, size in zip(files, sizes, strict=True) if size != 0]
        if not filled:
            raise InputError(f"--source: all {len(files)} files of {split} in {source} are empty.")
        layout = tfrecords.layout_of(filled[0])
        if label_base is None and layout == tfrecords.TFDS:
            label_base = tfrecords.find_label_base(
                [file for files in splits.values() for file in files], len(classes), log
            )
        base = layout.base if label_base is None else label_base
        check = _Check(max_bad_record_share, log, layout, base, classes)
        records = BadRecords(
            max_bad_record_share, skip=True, log=log, limit_flag="--max_bad_record_share"
        )
        folder = os.path.join(output, split)
        check_writable(folder, "--output")
        with locked(folder, "--output"), Progress(len(files), " files") as progress:
            counts = write_index(
                folder,
                files,
                progress=progress.advance,
                fix=FIX,
                bad_records=records,
                check=check,
                at_end=lambda ends=(records.end, check.end): [end() for end in ends],
            )
            names = [os.path.basename(file) for file in files]
            facts = [names, sizes, counts, base, dataclasses.asdict(layout), classes]
            manifests[split] = {
                "kind": IMAGES[1],
                "source": absolute(source),
                "pixels": None,
                "classes": classes,
                "layout": {"image": layout.image, "label": layout.label, "label_base": base},
                "count": sum(counts),
                "hash": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
                "shards": [
                    {"file": absolute(file), "count": count, "bytes": size}
                    for file, count, size in zip(files, counts, sizes, strict=True)
                ],
            }
            write_json(os.path.join(folder, MANIFEST), manifests[split])
    return manifests


class _Check:
    """Checks records of a split, in several threads.

    Args:
        max_share: the share of the images that may be impossible to decode.
        log: receives a line about these.
        layout, label_base, classes: see `tfrecords.check_record`.
    """

    def __init__(self, max_share, log, layout, label_base, classes):
        self._max_share = max_share
        self._log = log
        self._expected = layout, label_base, classes
        self._found: list[str] = []  # of each image: "", or what is wrong

    def __call__(self, path: str, offset: int) -> None:
        """Checks the record that begins at a place of a file."""
        self._found.append(tfrecords.check_record(path, offset, *self._expected))

    def end(self) -> None:
        """Reports images that cannot be decoded; raises `InputError` if there are too many."""
        wrong = sorted(filter(None, self._found))
        if not wrong:
            return
        count = f"{len(wrong):,} of {len(self._found):,} images that were checked cannot be decoded"
        if len(wrong) > self._max_share * len(self._found):
            raise InputError(
                f"{wrong[0]} Including it, {count}, more than the share of {self._max_share:g} "
                "that is accepted. Convert the records with `python -m inputs.images.prepare`, "
                "which leaves out what is damaged, or raise the limit with --max_bad_record_share."
            )
        self._log(f"{count}: {wrong[0]}")


def _check_output(output, source):
    """Raises `InputError` if a split in the folder was made from another source."""
    for split in ("train", "validation"):
        path = os.path.join(output, split, MANIFEST)
        if not exists(path):
            continue
        manifest = read_json(path, flag="--output", fix="Delete it, or give another folder.")
        found = manifest.get("source") if isinstance(manifest, dict) else None
        if found != absolute(source):
            maker = f"from {found}" if found else "by another command"
            raise InputError(
                f"--output: {os.path.dirname(path)} was made {maker}, and training would mix it "
                f"with {source}. Give another folder, or delete it."
            )


def main(arguments=None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, help="folder of the TFRecords")
    parser.add_argument("--output", required=True, help="folder for train/ and validation/")
    parser.add_argument(
        "--classes", default="", help="CSV of the classes with the columns index, wnid, name"
    )
    parser.add_argument(
        "--label_base",
        type=int,
        choices=(0, 1),
        help="label of the first class (default: 1 in the layout of the TPU demos; in that of "
        "TensorFlow Datasets it is found out from the labels)",
    )
    parser.add_argument(
        "--max_bad_record_share",
        type=float,
        default=0.001,
        help="the share of a split's records that may be left out because a length is damaged, and "
        "of the images that are checked that cannot be decoded (default: %(default)s)",
    )
    flags = parser.parse_args(arguments)
    try:
        refuse_empty(source=flags.source, output=flags.output)
        made = index(
            flags.source,
            flags.output,
            flags.classes,
            flags.label_base,
            flags.max_bad_record_share,
        )
    except InputError as error:
        log(f"{NAME}: {error}")
        return 1
    except OSError as error:
        log(f"{NAME}: {error.filename or flags.output}: {error.strerror or error}.")
        return 1
    except KeyboardInterrupt:
        log(f"{NAME}: stopped. The same command begins again.")
        return process.INTERRUPTED
    for split, manifest in made.items():
        print(
            f"{os.path.join(flags.output, split)}: {manifest['count']:,} images of "
            f"{len(manifest['classes']):,} classes in {len(manifest['shards']):,} files, hash "
            f"{manifest['hash']}"
        )
    if problem := missing_split(flags.output):
        log(problem)
    return 0


if __name__ == "__main__":
    process.run(main)
