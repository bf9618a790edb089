"""Times image pipelines, ours and tf-models': python -m benchmarks.image_inputs --data_dir=DIR

DIR/train contains shards of JPEGs from `inputs.images.prepare`; tf-models reads the same
images from TFRecords. Training batches are 224 pixels wide. The pipelines take turns in one run.
Images per second of CPU time are the rate of one core, independent of other load on the machine.
Rates are medians over the rounds, ratios medians of the ratio in each round.
The limit is a pipeline that only decodes, crops drawn in the same way.
"""

import argparse
import os
import statistics
import tempfile
import time

from inputs import process  # isort: split

import tensorflow as tf
from official.core import config_definitions, input_reader
from official.vision.dataloaders import classification_input

from inputs.errors import refuse_below, refuse_not_positive
from inputs.images import decoding, examples
from inputs.storage.files import check_file_writable, write_json

IMAGE_SIZE = 224
CLASSES = 1_000


def write_records(data: examples.Images, path: str) -> None:
    """Writes the images as a TFRecord file that tf-models reads."""
    with tf.io.TFRecordWriter(path) as writer:
        for image, label in data.files(data.num_examples):
            features = {
                "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())


def tf_models_batches(path: str, batch_size: int, dtype: str) -> tf.data.Dataset:
    """The training pipeline of `resnet_imagenet` in tf-models."""
    parser = classification_input.Parser([IMAGE_SIZE, IMAGE_SIZE], CLASSES, dtype=dtype)
    return input_reader.InputReader(
        config_definitions.DataConfig(
            input_path=path,
            global_batch_size=batch_size,
            is_training=True,
            shuffle_buffer_size=256,
        ),
        decoder_fn=classification_input.Decoder().decode,
        parser_fn=parser.parse_fn(True),
    ).read()


def decoding_alone(data: examples.Images, batch_size: int) -> tf.data.Dataset:
    """Decodes the crops of our pipeline, without resizing or batching them."""
    files = [image for image, _ in data.files(data.num_examples)]
    sizes = [tf.image.extract_jpeg_shape(image).numpy() for image in files]
    height, width = (tf.constant([size[axis] for size in sizes], tf.int64) for axis in (0, 1))
    numbers = tf.range(len(files), dtype=tf.int64)
    windows = decoding.random_windows(height, width, decoding.window_draws(seed=1, ids=numbers))

    def decoded(image, window):
        return tf.shape(decoding.decode_crop(image, window, IMAGE_SIZE))

    rows = tf.data.Dataset.from_tensor_slices((files, windows)).repeat()
    return rows.map(decoded, tf.data.AUTOTUNE).batch(batch_size).prefetch(2)


def measure(batches: dict, batch_size: int, rounds: int, seconds: float) -> dict:
    """name -> (images/s of wall time, images/s of CPU time) of each round."""
    figures: dict[str, list] = {name: [] for name in batches}
    for _ in range(rounds):
        for name, dataset in batches.items():
            # A new iterator for each turn: one that waits goes on filling its buffers, at the
            # expense of the pipeline that is measured.
            iterator = iter(dataset)
            start = time.perf_counter()
            while time.perf_counter() - start < seconds / 2:  # warm-up, until buffers are in use
                next(iterator)
            count = 0
            wall = time.perf_counter()
            cpu = time.process_time()
            while time.perf_counter() - wall < seconds:
                next(iterator)
                count += batch_size
            figures[name].append(
                (count / (time.perf_counter() - wall), count / (time.process_time() - cpu))
            )
            del iterator
    return figures


def median_ratio(rows: list, others: list) -> float:
    """The median over the rounds of the ratio of two pipelines, by CPU time.

    Two turns of one round are neighbours in time, so that a change of the machine's speed between
    rounds does not count.
    """
    return statistics.median(row[1] / other[1] for row, other in zip(rows, others, strict=True))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.image_inputs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data_dir", required=True, help="folder that `inputs.images.prepare` wrote"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch")
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns of each pipeline; the medians are printed"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of a turn")
    parser.add_argument("--json", default="", help="write the figures to this file")
    flags = parser.parse_args()
    refuse_below(1, batch_size=flags.batch_size, rounds=flags.rounds)
    refuse_not_positive(seconds=flags.seconds)
    if flags.json:
        check_file_writable(flags.json, f"--json={flags.json}")
    folder = os.path.join(flags.data_dir, "train")
    ours = examples.Images(folder, IMAGE_SIZE, seed=1)
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "train-00000-of-00001")
        write_records(ours, path)
        figures = measure(
            {
                "decoding alone": decoding_alone(ours, flags.batch_size),
                "tf_lamb, uint8": ours.training_batches(flags.batch_size),
                "tf-models, float32": tf_models_batches(path, flags.batch_size, "float32"),
                "tf-models, bfloat16": tf_models_batches(path, flags.batch_size, "bfloat16"),
            },
            flags.batch_size,
            flags.rounds,
            flags.seconds,
        )
    limit = figures["decoding alone"]
    own = figures["tf_lamb, uint8"]
    print(f"{'':22}{'images/s':>10}{'per core':>10}{'of limit':>10}{'ours':>10}")
    for name, rows in figures.items():
        wall, cpu = (statistics.median(row[column] for row in rows) for column in (0, 1))
        share = median_ratio(rows, limit)
        print(f"{name:22}{wall:10.0f}{cpu:10.0f}{share:10.2f}{median_ratio(own, rows):9.2f}x")
    if flags.json:
        write_json(flags.json, figures)


if __name__ == "__main__":
    process.run(main)
