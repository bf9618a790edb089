"""Lowers a recipe's training step with XLA, at the shapes of one replica of its pod.

    python -m benchmarks.lowering --recipe=bert-large-64k-32k [--replicas=2048]

The step is the one that `train.py` runs, `training.step.ReplicaStep`: forward, backward and update
in one program, as on a TPU replica. Nothing is computed. An operation that XLA does not support, or
a shape that is not static, is an error. Prints the seconds and peak memory of this process.
"""

import argparse
import sys
import time

from inputs import process  # isort: split

import tensorflow as tf
import tf_keras

import recipes
from inputs.errors import refuse_below
from recipes.types import Recipe
from tasks import TASKS
from training import optimizers
from training.checkpoint.manager import RunState
from training.step import ReplicaStep

REPLICAS = 2_048  # cores of the 1,024 TPUv3 chips of arXiv:1904.00962, Table 1


def replica_recipe(recipe: Recipe, replicas: int) -> Recipe:
    """The recipe with the batch sizes of one replica.

    Args:
        recipe: the recipe.
        replicas: number of replicas.

    Raises:
        ValueError: a batch size does not divide by `replicas`.
    """
    changes = []
    for number, phase in enumerate(recipe.phases, start=1):
        size, rest = divmod(phase.global_batch_size, replicas)
        if rest or not size:
            raise ValueError(
                f"--replicas={replicas} does not divide phase {number}'s global_batch_size="
                f"{phase.global_batch_size}."
            )
        changes.append(f"phase{number}.global_batch_size={size}")
    return recipes.override(recipe, changes)


def make_step(task, recipe: Recipe):
    """The `ReplicaStep` of a run of the recipe, and the `RunState`."""
    state = RunState()
    schedule = optimizers.RunSchedule(optimizers.make_schedule(recipe), state)
    optimizer = optimizers.make_optimizer(recipe, schedule)
    model = task.build_model()
    optimizers.build(optimizer, recipe, model.trainable_variables)
    step = ReplicaStep(
        task,
        model,
        optimizer,
        seed=1,
        accumulation=recipe.accumulation,
        jit_compile=False,  # the caller compiles the whole step, as on a TPU
    )
    return step, state


def lower(step: ReplicaStep, state: RunState, batch) -> str:
    """The step's program as HLO text, for batches with the static shapes of `batch`."""
    one_step = tf.function(
        lambda batch: step.train(batch, state.step), jit_compile=True, autograph=False
    )
    return one_step.experimental_get_compiler_ir(batch)(stage="hlo")


def peak_gib() -> float:
    """Peak memory of this process (VmHWM) in GiB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(recipe: Recipe, log=print) -> list[str]:
    """Lowers every phase of a recipe from `replica_recipe`; returns the programs as HLO text."""
    if recipe.compute_dtype != "float32":
        tf_keras.mixed_precision.set_global_policy(f"mixed_{recipe.compute_dtype}")
    try:
        task = TASKS[recipe.task](
            recipe, data_dir="", vocab="", resume_dir=None, seed=1, synthetic=True, log=log
        )
        start = time.perf_counter()
        step, state = make_step(task, recipe)
        parameters = sum(v.shape.num_elements() for v in step.model.trainable_variables)
        log(
            f"{recipe.name}: {parameters:,} parameters, model and optimizer built in "
            f"{time.perf_counter() - start:.0f} s"
        )
        programs = []
        for phase_index, phase in enumerate(recipe.phases):
            start = time.perf_counter()
            batch = next(iter(task.train_batches(phase_index, 0)(None)))
            programs.append(lower(step, state, batch))
            shape = max(batch.values(), key=tf.size).shape
            log(
                f"phase {phase_index + 1}: batch {phase.global_batch_size} per replica, "
                f"{tuple(shape)}: {programs[-1].count(' = '):,} instructions, "
                f"{time.perf_counter() - start:.0f} s, peak memory {peak_gib():.2f} GiB"
            )
        return programs
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


def main(arguments=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lowering", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--recipe", default="bert-large-64k-32k", help="the recipe to lower")
    parser.add_argument(
        "--replicas",
        type=int,
        default=REPLICAS,
        help="number of replicas that share the global batch",
    )
    options = parser.parse_args(arguments)
    refuse_below(1, replicas=options.replicas)
    try:
        measure(replica_recipe(recipes.find_recipe(options.recipe), options.replicas))
    except ValueError as error:
        print(f"benchmarks.lowering: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    process.run(main)
