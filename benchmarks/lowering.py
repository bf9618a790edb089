"""Traces a recipe's training step and lowers it by XLA, at the shapes that one replica of its pod
sees: python -m benchmarks.lowering --recipe=bert-large-64k-32k [--replicas=2048]

The step is the one that `train.py` runs, `training.step.ReplicaStep`, forward, backward and update
in one program, as a TPU replica runs it. Nothing is computed: an operation without an XLA form,
or a shape that is not static, stops it. Prints seconds and this process's peak memory.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: its start-up notices

import tensorflow as tf
import tf_keras

import recipes
from recipes.types import Recipe
from tasks import TASKS
from training import optimizers
from training.checkpoint.state import RunState
from training.step import ReplicaStep

REPLICAS = 2_048  # cores of the 1,024 TPUv3 chips of arXiv:1904.00962, Table 1


def replica_recipe(recipe: Recipe, replicas: int) -> Recipe:
    """The recipe with the batches that one of so many replicas sees.

    Raises:
        ValueError: a batch that they cannot share.
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
    """The replica step of a run of the recipe, and the run's state."""
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
        jit_compile=False,  # as on a TPU: the whole step is one program
    )
    return step, state


def lowered(step: ReplicaStep, state: RunState, batch) -> str:
    """The step's program, HLO as text, for batches of this one's static shapes."""
    one_step = tf.function(
        lambda batch: step.train(batch, state.step), jit_compile=True, autograph=False
    )
    return one_step.experimental_get_compiler_ir(batch)(stage="hlo")


def peak_gib() -> float:
    """The most memory that this process has held (VmHWM), in GiB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(recipe: Recipe, say=print) -> list[str]:
    """Lowers every phase of a recipe, whose batches are one replica's; returns the programs."""
    if recipe.compute_dtype != "float32":
        tf_keras.mixed_precision.set_global_policy(f"mixed_{recipe.compute_dtype}")
    try:
        task = TASKS[recipe.task](
            recipe, data_dir="", vocab="", resume_dir=None, seed=1, synthetic=True, log=say
        )
        start = time.perf_counter()
        step, state = make_step(task, recipe)
        parameters = sum(v.shape.num_elements() for v in step.model.trainable_variables)
        say(
            f"{recipe.name}: {parameters:,} parameters, model and optimizer made in "
            f"{time.perf_counter() - start:.0f} s"
        )
        programs = []
        for number, phase in enumerate(recipe.phases):
            start = time.perf_counter()
            batch = next(iter(task.train_batches(number, 0)(None)))
            programs.append(lowered(step, state, batch))
            shape = max(batch.values(), key=tf.size).shape
            say(
                f"phase {number + 1}: batch {phase.global_batch_size} per replica, {tuple(shape)}: "
                f"{programs[-1].count(' = '):,} instructions, "
                f"{time.perf_counter() - start:.0f} s, peak memory {peak_gib():.2f} GiB"
            )
        return programs
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


def main(arguments=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="bert-large-64k-32k")
    parser.add_argument("--replicas", type=int, default=REPLICAS)
    options = parser.parse_args(arguments)
    try:
        measure(replica_recipe(recipes.find_recipe(options.recipe), max(options.replicas, 1)))
    except ValueError as error:
        print(f"benchmarks.lowering: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
