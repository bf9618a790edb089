"""Measures the memory of one host's input pipeline at full size: python -m benchmarks.host_memory

Makes a corpus of 3.3 G tokens, as many as Wikipedia and BookCorpus have, and 1,024 files of 1,251
images each, as ImageNet has. Both are synthetic: pages of random tokens that repeat, and links to
one file of images. They need 9 GB in --folder, and are deleted at the end. Then a process for each
case makes the batches of some steps, as a single host or as one of several.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from inputs import process  # isort: split

import numpy as np
import tensorflow as tf

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.images import index
from inputs.images.examples import Images
from inputs.pages import Pages, PagesWriter, open_pages
from inputs.storage.files import check_writable
from inputs.text.chunks import FULL, TABLE
from inputs.text.examples import Examples
from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS

TOKENS = 3_300_000_000
LENGTH = 128
VOCABULARY = 30_522
FILES = 1_024
IMAGES_PER_FILE = 1_251
SIDE = 224
STEPS = 20
CASES = (("text", 1, 4_096), ("text", 16, 32_768), ("images", 1, 256), ("images", 16, 4_096))


class SyntheticCorpus:
    """What `Examples` asks of a corpus: runs of tokens that fill sequences."""

    def __init__(self, folder):
        self.tokens: Pages
        arrays, _ = open_pages(folder)
        self.tokens = arrays["tokens"]
        self._table = arrays[TABLE]

    def chunks(self, sequence_length, packing):
        """The table of chunks, which was made for `LENGTH` tokens and full sentences."""
        assert (sequence_length, packing) == (LENGTH, FULL)
        return {TABLE: self._table}


def write_corpus(folder: str) -> None:
    """Writes the arrays of a corpus."""
    room = LENGTH - 2
    rng = np.random.default_rng(0)
    tokens = rng.integers(len(SPECIAL_TOKENS), VOCABULARY, 2**22).astype(np.uint16)
    with PagesWriter(folder, {"tokens": np.uint16, TABLE: np.int64}, {TABLE: 2}) as writer:
        for first in range(0, TOKENS, len(tokens)):
            writer.append(tokens=tokens[: TOKENS - first])
        for first in range(0, TOKENS // room, 2**20):
            starts = np.arange(first, min(first + 2**20, TOKENS // room)) * room
            writer.append(**{TABLE: np.stack([starts, starts + room], axis=1)})


def write_images(folder: str) -> None:
    """Writes one TFRecord file, links to it, and their index."""
    source = os.path.join(folder, "records")
    os.makedirs(source)
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, [SIDE // 8, SIDE // 8, 3])
    pixels = np.kron(small, np.ones([8, 8, 1])).astype(np.uint8)
    jpeg = tf.io.encode_jpeg(pixels, quality=90).numpy()
    first = os.path.join(source, f"train-00000-of-{FILES:05d}")
    with tf.io.TFRecordWriter(first) as writer:
        for _ in range(IMAGES_PER_FILE):
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg]))
            label = tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))
            features = {"image/encoded": image, "image/class/label": label}
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    for number in range(1, FILES):
        os.link(first, os.path.join(source, f"train-{number:05d}-of-{FILES:05d}"))
    classes = os.path.join(folder, "classes.csv")
    pathlib.Path(classes).write_text("index,wnid,name\n0,a,A\n", encoding="utf-8")
    index.index(source, os.path.join(folder, "index"), classes, None)


def measure(folder: str, kind: str, hosts: int, batch: int) -> dict:
    """Makes the batches of `STEPS` steps as the first of `hosts` hosts, in this process."""
    records = BadRecords(0.0, skip=False, log=print)
    if kind == "text":
        pieces = [*SPECIAL_TOKENS, *map(str, range(VOCABULARY - len(SPECIAL_TOKENS)))]
        data = Examples(
            SyntheticCorpus(os.path.join(folder, "corpus")),
            pieces,
            sequence_length=LENGTH,
            predictions=20,
            whole_word=False,
            seed=1,
            packing=FULL,
            bad_records=records,
        )
    else:
        path = os.path.join(folder, "images", "index", "train")
        data = Images(path, SIDE, seed=1, bad_records=records)
    before = memory()
    context = tf.distribute.InputContext(hosts, 0, hosts * 8)
    begin, spent = time.perf_counter(), time.process_time()
    batches = iter(data.training_batches(batch, context))
    next(batches)
    first = time.perf_counter() - begin, time.process_time() - spent
    for _ in range(STEPS * 8 - 1):
        next(batches)
    after = memory()
    return {
        "kind": kind,
        "hosts": hosts,
        "batch": batch,
        "examples": data.num_examples,
        "before_bytes": before["RssAnon"],
        "after_bytes": after["RssAnon"],
        "peak_bytes": after["VmHWM"],
        "first_seconds": first[0],
        "first_cpu_seconds": first[1],
    }


def memory() -> dict[str, int]:
    """Bytes of this process: anonymous memory, and the peak with mapped files."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {key: int(status[key].split()[0]) * 1024 for key in ("RssAnon", "VmHWM")}


def check_folder(folder: str) -> None:
    """Checks `--folder`.

    Raises:
        InputError: it is not a folder of this machine, or it cannot be written.
    """
    if not os.path.isdir(folder):
        raise InputError(f"--folder={folder} is not a folder of this machine. Create it first.")
    check_writable(folder, "--folder")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", help="for the synthetic data (default: a temporary folder)")
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.case is not None:
        print(json.dumps(measure(flags.folder, *CASES[flags.case])))
        return
    if flags.folder:
        check_folder(flags.folder)
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        write_corpus(os.path.join(folder, "corpus"))
        write_images(os.path.join(folder, "images"))
        print(
            "| data | hosts | global batch | before | after 20 steps, MB | peak, with libraries |"
        )
        print("|---|---|---|---|---|---|")
        for case in range(len(CASES)):
            command = [sys.executable, "-m", "benchmarks.host_memory", f"--folder={folder}"]
            done = subprocess.run(
                [*command, f"--case={case}"], check=True, stdout=subprocess.PIPE, text=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            sizes = (row[f"{when}_bytes"] / 1e6 for when in ("before", "after", "peak"))
            print(
                f"| {row['kind']}, {row['examples']:,} examples | {row['hosts']} | "
                f"{row['batch']:,} | {' | '.join(f'{size:,.0f}' for size in sizes)} | "
                f"{row['first_seconds']:.1f} | {row['first_cpu_seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    process.run(main)
