"""Times exported models, and the same models called from Python, on the CPU.

    python -m benchmarks.serving SQUAD.json[.gz] VOCAB.txt [--size=base]

Exports BERT models with random weights, and calls each signature with the questions and contexts
of the file: milliseconds for one string, and strings per second in batches of 32. "Python" runs the
exported code eagerly: the tokenizer's ops one by one, then the Keras model. The two take turns, so
that other load on the machine affects both.
"""

import argparse
import os
import statistics
import tempfile
import time

from inputs import process  # isort: split

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import tensorflow as tf

from export.bert import pretrained_export
from export.saved_model import write_export
from export.squad import answering_export
from inputs.errors import InputError, refuse_below
from inputs.squad import files as squad
from inputs.text.tokenization import vocabulary
from inputs.text.tokenization.casing import is_cased
from models import bert
from models.squad import build_span_labeler
from recipes.squad import SQUAD_BASE

POSITIONS = 512
BATCH = 32  # strings of a call, for the rate


def exports(size: str, pieces: list[str]):
    """Name -> export of a model with random weights."""
    made = bert.SIZES[size], len(pieces), POSITIONS
    weights = {"dropout": 0.1, "initializer_stddev": 0.02}
    case = {"lower_case": not is_cased(pieces)}
    pretrainer = bert.build_pretrainer(*made, **weights)
    labeler = build_span_labeler(*made, types=2, **weights)
    return {
        "pretrained": pretrained_export(pretrainer, pieces, POSITIONS, **case),
        "squad": answering_export(labeler, pieces, SQUAD_BASE, **case),
    }


def calls(read: squad.Squad):
    """(export, signature, description, function (first, count) -> arguments) for each call."""
    questions = [question.text for question in read.questions]
    contexts = [read.contexts[question.context] for question in read.questions]
    masked = [f"{question} [MASK]" for question in questions]

    def of(**columns):
        return lambda first, count: {
            key: tf.constant(column[first : first + count]) for key, column in columns.items()
        }

    return [
        ("pretrained", "serving_default", "fill a mask in a question", of(text=masked)),
        ("pretrained", "encode", "encode a question", of(text=questions)),
        ("squad", "serving_default", "answer it", of(question=questions, context=contexts)),
    ]


def seconds(functions, make, count: int, repeats: int) -> list[float]:
    """Median seconds of each function for `count` strings; different strings in each repeat."""
    for function in functions:
        function(**make(0, count))
    taken = [[] for _ in functions]
    for repeat in range(1, repeats + 1):
        for times, function in zip(taken, functions, strict=True):
            arguments = make(repeat * count, count)
            begin = time.perf_counter()
            result = function(**arguments)
            [value.numpy() for value in result.values()]
            times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in taken]


def check_enough(read: squad.Squad, repeats: int, batches: int) -> None:
    """Checks that there are different questions for each call, and for a first call before them.

    Raises:
        InputError: the file has too few questions.
    """
    needed = max(repeats + 1, BATCH * (batches + 1))
    if len(read.questions) < needed:
        raise InputError(
            f"SQUAD: {read.path} has {len(read.questions):,} questions, but --repeats={repeats} "
            f"needs {needed:,} different ones. Give a file with more, or fewer repeats."
        )


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__.split("\n")[0]
    )
    parser.add_argument("squad", metavar="SQUAD", help="a SQuAD v1.1 file, gzipped or not")
    parser.add_argument("vocab", metavar="VOCAB", help="a BERT vocab.txt")
    parser.add_argument(
        "--size", default="mini", choices=bert.SIZES, help="size of BERT, with random weights"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=15,
        help="calls of each signature with one string, and a third as many, but at least 3, with "
        "32; the medians are printed",
    )
    arguments = parser.parse_args()
    refuse_below(1, repeats=arguments.repeats)
    pieces = vocabulary.load_vocabulary(arguments.vocab, "VOCAB")
    read = squad.read_squad(arguments.squad, flag="SQUAD")
    batches = max(3, arguments.repeats // 3)
    check_enough(read, arguments.repeats, batches)
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
            together = seconds(pair, make, BATCH, batches)
            latency = "".join(f"{1e3 * time:12.1f}" for time in alone)
            print(f"{what:27}{latency}" + "".join(f"{BATCH / time:12.0f}" for time in together))


if __name__ == "__main__":
    process.run(main)
