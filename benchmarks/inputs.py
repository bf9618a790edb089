"""Times the text pipeline: python -m benchmarks.inputs --text=wiki.jsonl.gz --vocab=vocab.txt

First measures tokenization into shards, and the tokenizer alone. Then measures batches from these
shards, tf-models' `pretrain_text_dataloader` on the same text, and a copy of as many bytes. The
pipelines take turns in one process, so that other load on the machine affects all of them; compare
the ratios.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

from inputs import process  # isort: split

import numpy as np
import psutil
import tensorflow as tf
from official.nlp.data import pretrain_text_dataloader

from inputs.bad_records import BadRecords
from inputs.errors import InputError, refuse_below
from inputs.storage.files import check_file_writable, write_json
from inputs.text import documents
from inputs.text import examples as text
from inputs.text.corpus import load_prepared
from inputs.text.files import find_files
from inputs.text.tokenization.casing import is_cased
from inputs.text.tokenization.vocabulary import load_vocabulary
from inputs.text.tokenization.word_pieces import Tokenizer, batch_documents

BATCH = 64
PREDICTIONS = {128: 20, 512: 76}
# Longer than an epoch of the text of the results page, in which ours makes rows in bursts.
ROUND_SECONDS = 5.0
# For tf-models, whose rate does not depend on the amount of text.
ARTICLES = 2_000
# tf-models makes a sequence from two lines and does not fill it up, so its lines are half as long
# as a sequence. With one sentence per line, as documented, its sequences are a third as long as
# ours.
AS_FULL = "tf-models, as full"


def read(path):
    """Yields the documents of a text."""
    records = BadRecords(0.001, skip=True, log=print)
    return documents.read_documents(find_files(path, "--text"), records)


def cpu_seconds(command) -> tuple[float, float]:
    """(wall, CPU) seconds of a command and all its child processes.

    Raises:
        InputError: the command failed. The message ends with the last line of its errors.
    """
    start = time.perf_counter()
    spent = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while child.poll() is None:
            family = [child]
            try:
                family += child.children(recursive=True)
                for member in family:
                    times = member.cpu_times()
                    spent[member.pid] = times.user + times.system
            except psutil.Error:  # the child ended
                pass
            time.sleep(0.1)
        wall = time.perf_counter() - start
        if child.returncode:
            errors.seek(0)
            lines = errors.read().splitlines() or [process.describe_exit(child.returncode)]
            raise InputError(f"`{shlex.join(command)}` failed: {lines[-1]}")
    return wall, sum(spent.values())


def tokenizing(path, vocab, folder) -> dict:
    """Measures tokens per second: text to shards, and the tokenizer alone."""
    wall, cpu = cpu_seconds(
        [sys.executable, "-m", "inputs.text.prepare"]
        + [f"--input={path}", f"--vocab={vocab}", f"--output={folder}"]
    )
    with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
        tokens = json.load(file)["tokens"]
    _, _, vocabulary, _ = load_prepared(folder, "", BadRecords(0, skip=False, log=print))
    tokenizer = Tokenizer(vocabulary, lower_case=not is_cased(vocabulary))
    alone = 0.0
    both = 0.0
    seen = 0
    for batch in batch_documents(read(path)):
        start = time.thread_time()
        seen += len(tokenizer(batch).tokens)
        both += time.thread_time() - start
        paragraphs = tf.constant([paragraph for document in batch for paragraph in document])
        start = time.thread_time()
        tokenizer.pieces(paragraphs)
        alone += time.thread_time() - start
    return {
        "tokens": tokens,
        "prepare_seconds": wall,
        "prepare_cpu_seconds": cpu,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
        "with_sentences_tokens_per_thread_second": seen / both,
        "tokenizer_alone_tokens_per_thread_second": seen / alone,
    }


def write_records(path, vocabulary, file, line_tokens) -> str:
    """Writes the text for tf-models: one record per document, with lines that become segments.

    Args:
        path: the text.
        vocabulary: list of word pieces.
        file: the TFRecord file to write.
        line_tokens: a line has as many sentences as fit in this many tokens; one if 0.

    Returns:
        `file`.
    """
    tokenizer = Tokenizer(vocabulary, lower_case=not is_cased(vocabulary))
    with tf.io.TFRecordWriter(file) as writer:
        for document in itertools.islice(read(path), ARTICLES):
            sentences = tokenizer.break_sentences(document).flat_values
            lengths = tokenizer.pieces(sentences).row_lengths().numpy()
            lines = []
            room = 0
            for sentence, length in zip(sentences.numpy(), lengths, strict=True):
                if length > room:
                    lines.append(sentence)
                    room = line_tokens - length
                else:
                    lines[-1] += b" " + sentence
                    room -= length
            value = tf.train.BytesList(value=[b"\n".join(lines)])
            feature = {"text": tf.train.Feature(bytes_list=value)}
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())
    return file


def pipelines(path, folder, records, vocab, length) -> dict:
    """Name -> iterator over batches."""
    training, _, vocabulary, _ = load_prepared(folder, "", BadRecords(0, skip=False, log=print))
    made = {}
    for name, more in {
        "pairs": {},
        "pairs, whole words": {"whole_word": True},
        "full sentences": {"packing": "full-sentences"},
    }.items():
        choices = {"whole_word": False, "seed": 1, "predictions": PREDICTIONS[length]} | more
        examples = text.Examples(training, vocabulary, sequence_length=length, **choices)
        made[name] = examples.training_batches(BATCH)
    for name, line_tokens in {AS_FULL: (length - 3) // 2, "tf-models, sentences": 0}.items():
        file = os.path.join(records, f"{line_tokens}.tfrecord")
        params = pretrain_text_dataloader.BertPretrainTextDataConfig(
            input_path=write_records(path, vocabulary, file, line_tokens),
            vocab_file_path=vocab,
            seq_length=length,
            max_predictions_per_seq=PREDICTIONS[length],
            global_batch_size=BATCH,
        )
        made[name] = pretrain_text_dataloader.BertPretrainTextDataLoader(params).load()
    return {name: iter(batches_) for name, batches_ in made.items()}


def rate(iterator) -> tuple[float, float, float]:
    """Measures a pipeline for about `ROUND_SECONDS`.

    Returns:
        Sequences per second, tokens per second, and sequences per CPU second. Prefer the last one
        if other programs use the cores: wall time then favors pipelines with more threads.
    """
    wait_for_idle()
    start = time.perf_counter()
    sequences = 0
    tokens = 0
    cpu = time.process_time()
    while (spent := time.perf_counter() - start) < ROUND_SECONDS:
        mask = next(iterator)["input_mask"].numpy()
        sequences += len(mask)
        tokens += int(mask.sum())
    cpu = time.process_time() - cpu
    return sequences / spent, tokens / spent, sequences / cpu


def wait_for_idle() -> None:
    """Waits until the threads of the pipeline measured before have filled their buffers."""
    for _ in range(40):
        before = time.process_time()
        time.sleep(0.05)
        if time.process_time() - before < 0.003:
            return


def copy_rate(batch) -> float:
    """Sequences per second of copying a batch's arrays, on one thread."""
    arrays = [array.numpy() for array in batch.values()]
    targets = [np.empty_like(array) for array in arrays]
    start = time.perf_counter()
    rounds = 0
    while time.perf_counter() - start < 0.2:
        for target, array in zip(targets, arrays, strict=True):
            np.copyto(target, array)
        rounds += 1
    return rounds * len(arrays[0]) / (time.perf_counter() - start)


def reading(path, folder, records, vocab, length, rounds) -> list[dict]:
    """One row per pipeline: median rates, and median ratios to tf-models."""
    made = pipelines(path, folder, records, vocab, length)
    first = {name: next(iterator) for name, iterator in made.items()}
    for iterator in made.values():
        rate(iterator)  # warm-up and autotuning
    found = [
        {name: (*rate(iterator), copy_rate(first[name])) for name, iterator in made.items()}
        for _ in range(rounds)
    ]
    return [
        {
            "length": length,
            "name": name,
            "sequences_per_second": statistics.median(row[name][0] for row in found),
            "tokens_per_second": statistics.median(row[name][1] for row in found),
            "sequences_per_cpu_second": statistics.median(row[name][2] for row in found),
            "times_tf_models": statistics.median(row[name][0] / row[AS_FULL][0] for row in found),
            "times_tf_models_per_cpu_second": statistics.median(
                row[name][2] / row[AS_FULL][2] for row in found
            ),
            "times_tf_models_tokens": statistics.median(
                row[name][1] / row[AS_FULL][1] for row in found
            ),
            "share_of_copy": statistics.median(row[name][0] / row[name][3] for row in found),
        }
        for name in made
    ]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inputs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", required=True, help="files, globs or folders")
    parser.add_argument("--vocab", required=True, help="a BERT vocab.txt")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each pipeline; the medians are printed"
    )
    parser.add_argument("--json", help="write the figures to this file")
    flags = parser.parse_args()
    refuse_below(1, rounds=flags.rounds)
    find_files(flags.text, "--text")
    load_vocabulary(flags.vocab)
    if flags.json:
        check_file_writable(flags.json, f"--json={flags.json}")
    with tempfile.TemporaryDirectory() as folder:
        shards = os.path.join(folder, "shards")
        figures = {"tokenizing": tokenizing(flags.text, flags.vocab, shards), "reading": []}
        for name, value in figures["tokenizing"].items():
            print(f"{name:44} {value:16,.1f}")
        print(f"\n{'':26}sequences/s      tokens/s  times tf-models: sequences, sequences per")
        print(f"{'':53}CPU second, tokens; share of a copy")
        for length in PREDICTIONS:
            for row in reading(flags.text, shards, folder, flags.vocab, length, flags.rounds):
                figures["reading"].append(row)
                print(
                    f"{length:4} {row['name']:20} {row['sequences_per_second']:11,.0f} "
                    f"{row['tokens_per_second']:13,.0f} {row['times_tf_models']:7.1f} "
                    f"{row['times_tf_models_per_cpu_second']:7.1f} "
                    f"{row['times_tf_models_tokens']:7.1f} {row['share_of_copy']:9.3f}",
                    flush=True,
                )
    if flags.json:
        write_json(flags.json, figures)


if __name__ == "__main__":
    process.run(main)
