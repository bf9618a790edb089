"""Exported models beside the same models called from Python, on the CPU.

    python -m benchmarks.serving SQUAD.json[.gz] VOCAB.txt [--size=base]

exports a BERT of that size with random weights, and asks each signature the file's questions and
contexts: milliseconds for one string, and strings per second in batches of 32. "Python" is the
code that was exported, run as it stands: the tokenizer's ops one by one, then the Keras model.
Both answer in turn, so that a slow moment of the machine falls on both.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import tensorflow as tf

from export.bert import pretrained_export
from export.saved_model import write_export
from export.squad import answering_export
from inputs.squad import files as squad
from inputs.text import vocabulary
from models import bert
from models.squad import build_span_labeler
from recipes.squad import SQUAD_BASE

POSITIONS = 512


def exports(size: str, pieces: list[str]):
    """name -> an export with random weights."""
    made = bert.SIZES[size], len(pieces), POSITIONS
    weights = {"dropout": 0.1, "initializer_stddev": 0.02}
    return {
        "pretrained": pretrained_export(bert.build_pretrainer(*made, **weights), pieces, POSITIONS),
        "squad": answering_export(
            build_span_labeler(*made, types=2, **weights), pieces, SQUAD_BASE
        ),
    }


def calls(read: squad.Squad):
    """(export, signature, function of (first string, their number) that makes its arguments)."""
    questions = [question.text for question in read.questions]
    contexts = [read.contexts[question.context] for question in read.questions]
    masked = [f"{question} [MASK]" for question in questions]

    def of(**columns):
        return lambda first, number: {
            key: tf.constant(column[first : first + number]) for key, column in columns.items()
        }

    return [
        ("pretrained", "serving_default", "fill a mask in a question", of(text=masked)),
        ("pretrained", "encode", "encode a question", of(text=questions)),
        ("squad", "serving_default", "answer it", of(question=questions, context=contexts)),
    ]


def seconds(functions, make, number: int, repeats: int) -> list[float]:
    """Each function's median seconds for `number` strings; other strings every time."""
    for function in functions:
        function(**make(0, number))
    taken = [[] for _ in functions]
    for repeat in range(1, repeats + 1):
        for times, function in zip(taken, functions, strict=True):
            arguments = make(repeat * number, number)
            begin = time.perf_counter()
            result = function(**arguments)
            [value.numpy() for value in result.values()]
            times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in taken]


def main():
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("squad")
    parser.add_argument("vocab")
    parser.add_argument("--size", default="mini", choices=bert.SIZES)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    pieces = vocabulary.load_vocabulary(arguments.vocab)
    read = squad.read_squad(arguments.squad)
    print(f"BERT-{arguments.size}, {len(pieces):,} word pieces, {os.cpu_count()} CPU cores")
    print(f"{'':27}{'one string, ms':>24}{'strings/s at 32':>24}")
    print(f"{'':27}{'SavedModel':>12}{'Python':>12}{'SavedModel':>12}{'Python':>12}")
    with tempfile.TemporaryDirectory() as folder:
        made = exports(arguments.size, pieces)
        loaded = {}
        for name, one in made.items():
            write_export(one, "", os.path.join(folder, name))
            loaded[name] = tf.saved_model.load(os.path.join(folder, name))
        for name, signature, what, make in calls(read):
            pair = [
                loaded[name].signatures[signature],
                made[name].signatures[signature].python_function,
            ]
            alone = seconds(pair, make, 1, arguments.repeats)
            together = seconds(pair, make, 32, max(3, arguments.repeats // 3))
            latency = "".join(f"{1e3 * time:12.1f}" for time in alone)
            print(f"{what:27}{latency}" + "".join(f"{32 / time:12.0f}" for time in together))


if __name__ == "__main__":
    main()
