"""Estimates a training step on a TPU, this project's and tf-models': python -m benchmarks.tpu_step

The TPU compiler's estimates of a replica's training step (`preflight.compiler.program`) and of
its update alone, in variants: ours; ours with `skip_nonfinite=False`; ours with tf-models'
optimizer; and, for BERT, also with the dropout and losses of tf-models' task (those of Keras, whose
dropout masks differ after a resume). No TPU is needed and no time is measured. The extra
`preflight` installs the compiler. BERT-Large takes about 7 GB and, on two free cores, more than a
quarter of an hour.
"""

import argparse
import contextlib
import dataclasses
from unittest import mock

from inputs import process  # isort: split

from preflight.compiler import compile as tpu  # isort: skip  sets the environment before JAX is imported
import tensorflow as tf
import tf_keras
from official.modeling.optimization import lamb, lars

import recipes
from inputs.errors import InputError, refuse_below
from inputs.storage.files import check_file_writable, write_json
from models import bert
from preflight.compiler.program import Replica
from preflight.compiler.topology import parse_topology
from preflight.estimate import counts_main_memory, modelled_seconds
from training import dropout as randomness
from training import optimizers


def _adapted(base):
    """A subclass of a tf-models optimizer with the methods that `Replica` calls on ours."""

    class Adapted(base):
        def build(self, variables):
            self._create_all_weights(variables)

        def apply_gradients(self, pairs, skip_gradients_aggregation=False):
            return super().apply_gradients(
                pairs, experimental_aggregate_gradients=not skip_gradients_aggregation
            )

    return Adapted


def never_skipping(recipe, schedule):
    """The recipe's optimizer with `skip_nonfinite=False`, to show the cost of skipping."""
    return optimizers.make_optimizer(dataclasses.replace(recipe, skip_nonfinite=False), schedule)


def tf_models_optimizer(recipe, schedule):
    """The recipe's optimizer from tf-models-official."""
    if recipe.optimizer == "lars":
        return _adapted(lars.LARS)(
            schedule,
            momentum=recipe.momentum,
            weight_decay_rate=recipe.weight_decay,
            exclude_from_weight_decay=list(recipe.exclude_from_weight_decay),
        )
    return _adapted(lamb.LAMB)(
        schedule,
        beta_1=recipe.beta_1,
        beta_2=recipe.beta_2,
        epsilon=recipe.epsilon,
        weight_decay_rate=recipe.weight_decay,
        exclude_from_weight_decay=list(recipe.exclude_from_weight_decay),
    )


@contextlib.contextmanager
def tf_models_task():
    """Replaces dropout and losses by those that `official.nlp.tasks.masked_lm` uses."""

    def cross_entropy(logits, labels, weights):
        logits = tf.cast(logits, tf.float32)
        losses = tf_keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        hits = tf_keras.metrics.sparse_categorical_accuracy(labels, logits)
        return tf.reduce_sum(losses * weights), tf.reduce_sum(hits * weights)

    def dropout(layer, inputs, rate, noise_shape=None):
        return tf.nn.dropout(inputs, rate, noise_shape)

    with (
        mock.patch.object(bert, "cross_entropy", cross_entropy),
        mock.patch.object(randomness.LayerGenerator, "dropout", dropout),
    ):
        yield


def rows(recipe, phase_index, batch, topology):
    """Yields the compiler's figures for each variant and program."""
    devices = tpu.open_topology(topology)
    variants = {
        "ours": (optimizers.make_optimizer, contextlib.nullcontext),
        "ours, no skipping": (never_skipping, contextlib.nullcontext),
        f"tf-models' {recipe.optimizer.upper()}": (tf_models_optimizer, contextlib.nullcontext),
    }
    if recipe.task == "bert":
        variants["tf-models' step"] = tf_models_optimizer, tf_models_task
    for name, (make, task) in variants.items():
        with task():
            replica = Replica(recipe, phase_index, len(devices), make)
            programs = {"step": replica.step_program(batch, recipe.accumulation)}
            if task is not tf_models_task:
                programs["update"] = replica.update_program()
        for part, hlo in programs.items():
            figures = tpu.figures(tpu.compile_program(tpu.from_hlo(hlo), devices))
            yield {"variant": name, "program": part, "parameters": replica.parameters} | figures


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--recipe", default="bert-large-64k-32k", help="the recipe to compile")
    parser.add_argument("--phase", type=int, default=1, help="phase of the recipe, from 1")
    parser.add_argument("--batch", type=int, default=32, help="examples per replica")
    parser.add_argument(
        "--topology", default="v3:2x2", help="TPU to compile for, such as v3:2x2 or v3-2048"
    )
    parser.add_argument("--set", action="append", default=[], help="field=value of the recipe")
    parser.add_argument("--json", help="write the rows to this file")
    flags = parser.parse_args()
    refuse_below(1, batch=flags.batch)
    if flags.json:
        check_file_writable(flags.json, f"--json={flags.json}")
    try:
        recipe = recipes.override(
            recipes.find_recipe(flags.recipe), ["compute_dtype=bfloat16", *flags.set]
        )
        recipe.check()
        optimizers.make_optimizer(recipe, optimizers.make_schedule(recipe))  # checks its arguments
    except ValueError as error:
        raise InputError(f"--recipe or --set: {error}") from None
    if not 1 <= flags.phase <= len(recipe.phases):
        raise InputError(f"--phase={flags.phase}: the recipe has {len(recipe.phases)} phase(s).")
    topology = parse_topology(flags.topology, "--topology")
    found = []
    print(
        "variant           program  estimated ms       GB     floats/parameter   GiB  all-reduces"
    )
    for row in rows(recipe, flags.phase - 1, flags.batch, topology.name):
        found.append(row)
        moved, seconds = row["bytes_accessed"], row["seconds"]
        if not counts_main_memory(row):
            moved, seconds = row["main_bytes"], modelled_seconds(topology, row)
        print(
            f"{row['variant']:17} {row['program']:7} {1e3 * seconds:12.3f} "
            f"{moved / 1e9:8.3f} {moved / 4 / row['parameters']:20.2f} "
            f"{row['hbm_bytes'] / 2**30:5.2f} {row['all_reduces']:12}",
            flush=True,
        )
    if flags.json:
        write_json(flags.json, found)


if __name__ == "__main__":
    process.run(main)
