"""Times the SQuAD pipeline, and checks that word pieces decode to the annotated answers.

    python -m benchmarks.squad_inputs SQUAD.json[.gz] VOCAB.txt

Prints the time of reading and tokenization, windows per second of the pipeline, and the answers
that differ after encoding and decoding, by cause.
"""

import argparse
import collections
import dataclasses
import time

from inputs import process  # isort: split

from inputs.bad_records import BadRecords
from inputs.errors import refuse_below
from inputs.squad import examples as squad_examples
from inputs.squad import files as squad
from inputs.text.tokenization import vocabulary
from inputs.text.tokenization.casing import is_cased
from tasks import squad_answers

SETTINGS = {"sequence_length": 384, "max_query_length": 64, "doc_stride": 128}


def lost_answers(features):
    """[(cause, annotated, decoded, question)] of answers that differ after decoding."""
    lost = []
    for i, question in enumerate(features.squad.questions):
        _, wanted = question.placed
        found = features.text_of(i, features.first_pieces[i], features.last_pieces[i])
        if found == wanted:
            continue
        at = found.find(wanted)
        cause = {
            (True, True): "begin and end inside a word piece",
            (True, False): "begin inside a word piece",
            (False, True): "end inside a word piece",
        }.get((at > 0, 0 <= at < len(found) - len(wanted)), "differ otherwise")
        lost.append((cause, wanted, found, question))
    return lost


def same_normalized(found: str, question: squad.Question) -> bool:
    """Whether the decoded answer is an exact match by the official metric."""
    one = squad.Squad([], [dataclasses.replace(question, answers=(question.placed,))], "")
    return squad_answers.metrics(one, {question.id: found})["exact_match"] == 100


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.squad_inputs", description=__doc__.split("\n")[0]
    )
    parser.add_argument("squad", metavar="SQUAD", help="a SQuAD v1.1 file, gzipped or not")
    parser.add_argument("vocab", metavar="VOCAB", help="a BERT vocab.txt")
    parser.add_argument("--batches", type=int, default=500, help="batches of 64 windows to time")
    parser.add_argument(
        "--max_bad_record_share", type=float, default=0.01, help="of questions that are skipped"
    )
    arguments = parser.parse_args()
    refuse_below(1, batches=arguments.batches)
    share = arguments.max_bad_record_share
    records = BadRecords(share, skip=True, log=print, limit_flag="--max_bad_record_share")
    pieces = vocabulary.load_vocabulary(arguments.vocab, "VOCAB")
    begin = time.perf_counter()
    read = squad.read_squad(arguments.squad, records, flag="SQUAD")
    parsed = time.perf_counter()
    lower_case = not is_cased(pieces)
    features = squad_examples.Features(read, pieces, lower_case=lower_case, **SETTINGS, seed=1)
    ready = time.perf_counter()
    for _ in features.training_batches(64).take(arguments.batches):
        pass
    per_second = 64 * arguments.batches / (time.perf_counter() - ready)
    whole = ready - begin + features.num_examples / per_second
    print(
        f"{len(read.questions):,} questions, {features.num_examples:,} windows of 384\n"
        f"read and checked in {parsed - begin:.1f} s, tokenized in {ready - parsed:.1f} s, "
        f"then {per_second:,.0f} windows/s\n"
        f"the first epoch, with reading and tokenization: "
        f"{features.num_examples / whole:,.0f} windows/s"
    )
    lost = lost_answers(features)
    counted = [entry for entry in lost if not same_normalized(*entry[2:])]
    total = len(read.questions)
    print(
        f"encoded and decoded: {total - len(lost):,} of {total:,} answers are identical "
        f"({1 - len(lost) / total:.2%}), {total - len(counted):,} after normalization "
        f"({1 - len(counted) / total:.2%})"
    )
    for cause, count in collections.Counter(entry[0] for entry in counted).most_common():
        first = next(entry for entry in counted if entry[0] == cause)
        print(f"  {count} {cause}, such as {first[1]!r} in {first[2]!r}")


if __name__ == "__main__":
    process.run(main)
