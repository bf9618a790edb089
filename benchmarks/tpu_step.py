"""A whole step on a TPU, ours and tf-models': python -m benchmarks.tpu_step

The TPU compiler's own estimates of the replica's real step (`preflight.program`) and of
its update apart: ours; ours where a gradient that is not finite skips nothing; ours with tf-models'
optimizer; and, of BERT, also with the dropout and the losses that tf-models' own task has (Keras's,
whose masks a resumed run does not repeat). No TPU is needed, and nothing here is a measured time.
The extra `preflight` brings the compiler. BERT-Large takes some 7 GB and, on two free cores, more
than a quarter of an hour.
"""

import argparse
import contextlib
import dataclasses
import json
import os
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from preflight import compile as tpu  # isort: skip  its settings come before JAX
import tensorflow as tf
import tf_keras
from official.modeling.optimization import lamb, lars

import recipes
from models import bert
from preflight.program import Replica
from training import dropout as randomness
from training import optimizers


def _peer(base):
    """An optimizer of tf-models, called as ours is."""

    class Peer(base):
        def build(self, variables):
            self._create_all_weights(variables)

        def apply_gradients(self, pairs, skip_gradients_aggregation=False):
            return super().apply_gradients(
                pairs, experimental_aggregate_gradients=not skip_gradients_aggregation
            )

    return Peer


def never_skipping(recipe, schedule):
    """The recipe's own optimizer, but that it takes every gradient: what skipping costs."""
    return optimizers.make_optimizer(dataclasses.replace(recipe, skip_nonfinite=False), schedule)


def tf_models_optimizer(recipe, schedule):
    """The recipe's rule as tf-models-official has it."""
    if recipe.optimizer == "lars":
        return _peer(lars.LARS)(
            schedule,
            momentum=recipe.momentum,
            weight_decay_rate=recipe.weight_decay,
            exclude_from_weight_decay=list(recipe.exclude_from_weight_decay),
        )
    return _peer(lamb.LAMB)(
        schedule,
        beta_1=recipe.beta_1,
        beta_2=recipe.beta_2,
        epsilon=recipe.epsilon,
        weight_decay_rate=recipe.weight_decay,
        exclude_from_weight_decay=list(recipe.exclude_from_weight_decay),
    )


@contextlib.contextmanager
def tf_models_task():
    """Inside, dropout and losses are what `official.nlp.tasks.masked_lm` has of tf_keras."""

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


def rows(recipe, number, batch, topology):
    """Yields for each variant and program what the compiler says."""
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
            replica = Replica(recipe, number, len(devices), make)
            programs = {"step": replica.step_program(batch, recipe.accumulation)}
            if task is not tf_models_task:
                programs["update"] = replica.update_program()
        for part, hlo in programs.items():
            figures = tpu.figures(tpu.compile_program(tpu.from_hlo(hlo), devices))
            yield {"variant": name, "program": part, "parameters": replica.parameters} | figures


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="bert-large-64k-32k")
    parser.add_argument("--phase", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="examples of a replica")
    parser.add_argument("--topology", default="v3:2x2")
    parser.add_argument("--set", action="append", default=[], help="field=value of the recipe")
    parser.add_argument("--json", help="write the rows here too")
    flags = parser.parse_args()
    recipe = recipes.override(
        recipes.find_recipe(flags.recipe), ["compute_dtype=bfloat16", *flags.set]
    )
    found = []
    print("variant           program  estimated ms       GB   floats a parameter   GiB   sums")
    for row in rows(recipe, flags.phase - 1, flags.batch, flags.topology):
        found.append(row)
        moved = row["bytes_accessed"]
        print(
            f"{row['variant']:17} {row['program']:7} {1e3 * row['seconds']:12.3f} "
            f"{moved / 1e9:8.3f} {moved / 4 / row['parameters']:20.2f} "
            f"{row['hbm_bytes'] / 2**30:5.2f} {row['all_reduces']:6}",
            flush=True,
        )
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
