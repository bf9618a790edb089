"""Times BERT on padded, bucketed and packed sequences, on the CPU or by the TPU compiler.

    python -m benchmarks.packing [--size=tiny] [--length=128] [--sequences=64]
    python -m benchmarks.packing --topology=v4-512 [--recipe=mlperf-bert-batch-4096]

On the CPU, loss and gradients of sequences with random tokens and uniformly distributed lengths are
timed. All three forms of a batch have the same loss and gradients (tests/models/test_packing.py).
They take turns, so that other load on the machine affects all.

With --topology, the step of a recipe is compiled for a TPU, without one: with one sequence in a
row, with the same number of sequences in fewer rows, --per_row in each, and with the same number in
length buckets.
"""

import argparse
import math
import os
import statistics
import sys
import time

from inputs import process  # isort: split

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import tensorflow as tf

import recipes
from inputs.errors import InputError, refuse_below
from inputs.text import packing
from models import bert
from models import packing as packed_bert
from preflight import run as preflight
from preflight.compiler.children import show_progress
from preflight.compiler.topology import parse_topology

WORDS = 1_000
CPU_ONLY = ("size", "length", "sequences", "rounds")
COMPILED_ONLY = ("recipe", "per_row", "length_buckets")


def made_up_batch(sequences: int, length: int, predictions: int) -> dict:
    """Returns a padded batch, in the layout of `inputs.text.batches.element_spec`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(predictions + 1, length + 1, sequences)
    ones = np.ones([sequences], np.float32)
    return {
        "input_word_ids": rng.integers(1, WORDS, [sequences, length], np.int32),
        "input_mask": (np.arange(length) < lengths[:, None]).astype(np.int32),
        "input_type_ids": np.zeros([sequences, length], np.int32),
        "masked_lm_positions": np.tile(
            np.arange(1, predictions + 1, dtype=np.int32), (sequences, 1)
        ),
        "masked_lm_ids": rng.integers(1, WORDS, [sequences, predictions], np.int32),
        "masked_lm_weights": np.ones([sequences, predictions], np.float32),
        "next_sentence_labels": rng.integers(0, 2, [sequences], np.int32),
        "next_sentence_weights": ones,
        "example_weights": ones,
    }


def compiled(model, sums, parts):
    """Returns a compiled function `batch -> gradients` of the summed losses of its parts."""

    def of_part(batch):
        with tf.GradientTape() as tape:
            values = sums(model, batch, True)
            loss = values["masked_loss"] + values["sentence_loss"]
        found = tape.gradient(loss, model.trainable_variables)
        return [tf.convert_to_tensor(g) for g in found]

    @tf.function(jit_compile=True)
    def gradients(batch):
        return [tf.add_n(terms) for terms in zip(*map(of_part, parts(batch)), strict=True)]

    return gradients


def compile_steps(name: str, topology: str, per_row: int, lengths: str) -> None:
    """Prints the estimated time of a step of a recipe: padded, packed and in length buckets."""
    where = parse_topology(topology, "--topology")
    try:
        recipe = recipes.find_recipe(name)
    except ValueError as error:
        raise InputError(f"--recipe={name}: {error}") from None
    if len(recipe.phases) > 1:
        raise InputError(f"--recipe={name} has several phases; give a recipe of one phase.")
    (phase,) = recipe.phases
    places = len(lengths.split(","))
    packed = [f"sequences_per_row={per_row}", f"global_batch_size={examples_of(phase, per_row)}"]
    buckets = [f"length_buckets={lengths}", f"global_batch_size={examples_of(phase, places)}"]
    try:
        forms = {
            form: recipes.override(recipe, ["compute_dtype=bfloat16", *settings])
            for form, settings in (("padded", []), ("packed", packed), ("buckets", buckets))
        }
        for changed in forms.values():
            changed.check()
    except ValueError as error:
        raise InputError(f"--recipe, --per_row or --length_buckets: {error}") from None
    for form, changed in forms.items():
        with show_progress(lambda line: print(line, file=sys.stderr), total=1) as progress:
            (result,) = preflight.examine(
                changed,
                [where],
                progress=progress,
                search=False,
            )
        if result.error:
            print(f"{form:8}  does not compile: {result.error}")
            continue
        speed = phase.global_batch_size / result.time.step
        print(
            f"{form:8}  {result.global_batch_size:6,} examples, {result.replica_batch_size} on "
            f"each replica  {result.program['hbm_bytes'] / 2**30:.2f} GiB  "
            f"{1e3 * result.time.step:.1f} ms a step  {speed:,.0f} sequences/s"
        )


def examples_of(phase, sequences: int) -> int:
    """The number of examples of a phase's batch, of so many sequences each."""
    examples, rest = divmod(phase.global_batch_size, sequences)
    if rest:
        raise InputError(
            f"{sequences} sequences in an example do not divide the batch of "
            f"{phase.global_batch_size}. Give other --per_row or --length_buckets."
        )
    return examples


def main() -> None:
    """Prints sequences per second and tokens computed of the three forms."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packing", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", default="tiny", choices=sorted(bert.SIZES), help="of the BERT")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--sequences", type=int, default=64, help="sequences of a batch")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each form")
    parser.add_argument("--topology", default="", help="a slice of TPUs, to compile for")
    parser.add_argument("--recipe", default="mlperf-bert-batch-4096", help="with --topology")
    parser.add_argument("--per_row", type=int, default=2, help="sequences in a row; --topology")
    parser.add_argument(
        "--length_buckets",
        default="128,256,256,512",
        help="lengths of a group's places; --topology",
    )
    flags = parser.parse_args()
    for name in CPU_ONLY if flags.topology else COMPILED_ONLY:
        if getattr(flags, name) != parser.get_default(name):
            other = "with" if flags.topology else "without"
            raise InputError(f"--{name} has no effect {other} --topology. Leave it out.")
    refuse_below(2, length=flags.length)  # a word to predict, and another
    refuse_below(1, sequences=flags.sequences, rounds=flags.rounds, per_row=flags.per_row)
    if flags.topology:
        compile_steps(flags.recipe, flags.topology, flags.per_row, flags.length_buckets)
        return
    batch = made_up_batch(flags.sequences, flags.length, max(1, flags.length // 7))
    quarters = tuple(math.ceil(flags.length * k / 4) for k in range(1, 5))
    buckets = packing.join_batch(batch, packing.LengthBuckets(quarters))
    packed = packing.join_batch(batch, packing.PackedRows(flags.length, 4))
    forms = {
        "padded": (bert.pretraining_sums, lambda batch: [batch], batch),
        "buckets": (bert.pretraining_sums, packing.bucket_batches, buckets),
        "packed": (packed_bert.pretraining_sums, lambda batch: [batch], packed),
    }
    model = bert.build_pretrainer(
        bert.SIZES[flags.size], WORDS, flags.length, dropout=0.0, initializer_stddev=0.02
    )
    functions = {name: compiled(model, sums, parts) for name, (sums, parts, _) in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(flags.rounds + 1):
        for name, (_, _, of_form) in forms.items():
            tensors = {key: tf.constant(value) for key, value in of_form.items()}
            start = time.perf_counter()
            functions[name](tensors)[-1].numpy()
            if number:  # the first call compiles
                seconds[name].append(time.perf_counter() - start)
    for name, (_, _, of_form) in forms.items():
        tokens = sum(
            value.size for key, value in of_form.items() if key.startswith("input_word_ids")
        )
        speed = flags.sequences / statistics.median(seconds[name])
        print(f"{name:8}  {tokens:8,} tokens computed  {speed:8,.1f} sequences/s")


if __name__ == "__main__":
    process.run(main)
