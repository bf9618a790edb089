"""Trains a recipe: python train.py [--recipe=NAME] [--data_dir=TEXT] [--tpu=NAME] ...

With no arguments a small BERT is pre-trained on the English of this installation, evaluated on
held-out text, and exported. The same command again goes on from the last checkpoint.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
import time

STARTED = time.perf_counter()  # before TensorFlow is imported, which takes seconds
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: its start-up notices

import numpy as np
import tensorflow as tf
import tf_keras
from absl import app, flags, logging

import recipes
from export.saved_model import check_export_dir
from inputs.errors import InputError
from recipes.types import Recipe
from tasks import TASKS
from training import dry_run, optimizers, strategy
from training.checkpoint import compatibility, lock, manager, signals
from training.checkpoint.state import RunSchedule, RunState
from training.monitor.divergence import Diverged
from training.run import Run
from training.step import ReplicaStep

FLAGS = flags.FLAGS
flags.DEFINE_string("recipe", "bert-mini-demo", f"What to run: {', '.join(recipes.RECIPES)}.")
flags.DEFINE_string("data_dir", "", "Text: files, globs, folders; SQuAD, shards: the folder.")
flags.DEFINE_string("vocab", "", "A BERT vocab.txt; learned from the text, or the checkpoint's.")
flags.DEFINE_string("model_dir", "", "Checkpoints and logs. Default: runs/RECIPE.")
flags.DEFINE_string("export_dir", "", "The SavedModel. Default: MODEL_DIR/export.")
flags.DEFINE_string("tpu", "", "A TPU's name, or 'local'; empty for the GPUs or the CPU.")
flags.DEFINE_integer("steps", None, "Steps in all; phases and warm-up keep their share of them.")
flags.DEFINE_integer("global_batch_size", None, "Examples per step over all replicas.")
flags.DEFINE_string(
    "scaling", "none", "Rates and steps for --global_batch_size: none (as they are), sqrt, linear."
)
flags.DEFINE_integer("steps_per_loop", 50, "Steps on the device between two looks from the host.")
flags.DEFINE_integer("seed", 1, "Decides weights, data order, pairs and masks.")
flags.DEFINE_bool("synthetic", False, "Made-up data of the same shape.")
flags.DEFINE_bool("dry_run", False, "Two steps of each phase, then export; nothing is kept.")
flags.DEFINE_string(
    "preflight", "", "Trains nothing; says what the recipe needs on TPUs such as v3:32x32,v3-64."
)
flags.DEFINE_string("preflight_json", "", "The pre-flight's figures; the picture goes beside it.")
flags.DEFINE_bool("preflight_strict", False, "Asks TensorFlow's own TPU kernels, too.")
flags.DEFINE_multi_string("set", [], "field=value, any field of the recipe; repeatable.")

INTERRUPTED = 130  # the shell's exit status for Ctrl-C


def say(line: str) -> None:
    """A line of progress; standard output is for the report alone."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def users(flag: str):
    """A `ValueError` in here is about what the user gave with `flag`."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{flag}: {error}") from None


def chosen_recipe() -> Recipe:
    """The recipe that the flags name, with what they change in it."""
    if not 0 <= FLAGS.seed < 2**32:
        raise InputError(f"--seed must lie in [0, 2**32). Received: --seed={FLAGS.seed}.")
    for name in ("steps", "global_batch_size", "steps_per_loop"):
        value = FLAGS[name].value
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1. Received: --{name}={value}.")
    with users("--recipe"):
        recipe = recipes.find_recipe(FLAGS.recipe)
    if FLAGS.scaling == "none":
        recipe = recipes.resized(recipe, global_batch_size=FLAGS.global_batch_size)
    elif FLAGS.global_batch_size is None:
        raise InputError(
            f"--scaling={FLAGS.scaling} needs the batch size to scale to. Give "
            "--global_batch_size too."
        )
    else:
        with users("--scaling"):
            recipe = recipes.scale_recipe(recipe, FLAGS.global_batch_size, FLAGS.scaling)
    recipe = recipes.resized(recipe, steps=FLAGS.steps)
    with users("--set"):
        recipe = recipes.override(recipe, FLAGS.set)
        recipe.check()
    on_tpu = FLAGS.tpu or FLAGS.preflight
    if on_tpu and not any(field.startswith("compute_dtype") for field in FLAGS.set):
        recipe = dataclasses.replace(recipe, compute_dtype="bfloat16")
    return recipe


def report(task, recipe, model, results, progress, where, model_dir, export_dir):
    """Prints what was trained, how well, how fast, and where it is."""
    parameters = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    with open(os.path.join(model_dir, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results | {"examples_per_second": progress.examples_per_second}, file)
    print(
        f"""
Trained    {recipe.name}: {recipe.task} {recipe.model}, {parameters:,} parameters, \
{recipe.steps:,} steps of {recipe.phases[-1].global_batch_size} {task.unit}, on {task.data}
Held out   {task.in_words(results)}
Speed      {progress.speed} on {where.num_replicas_in_sync} replica(s)
SavedModel {export_dir}
Logs       tensorboard --logdir={model_dir}""",
        flush=True,
    )
    task.show(export_dir)


def fit(where, recipe, model_dir, export_dir, stop, log):
    """Data, model, optimizer, training, export, report."""
    chief = strategy.is_chief(where)
    planned = recipe
    if FLAGS.dry_run:
        recipe = dry_run.shortened(recipe)
    tf_keras.utils.set_random_seed(FLAGS.seed)
    if recipe.compute_dtype != "float32":
        tf_keras.mixed_precision.set_global_policy(f"mixed_{recipe.compute_dtype}")
    with where.scope():
        state = RunState()
        with users("--set"):
            schedule = RunSchedule(optimizers.make_schedule(planned), state)
            optimizer = optimizers.make_optimizer(planned, schedule)
    task = TASKS[recipe.task](
        recipe,
        data_dir=FLAGS.data_dir,
        vocab=FLAGS.vocab,
        model_dir=model_dir,
        seed=FLAGS.seed,
        synthetic_data=FLAGS.synthetic,
        log=log,
    )
    facts = {"seed": FLAGS.seed} | task.facts
    if chief:
        compatibility.claim(model_dir, recipe, **facts)
        task.write_files(model_dir)
    with where.scope():
        model = task.build_model()
        with users("--set"):
            optimizers.build(optimizer, recipe, model.trainable_variables)
    strategy.check_same_everywhere(where, **task.facts, checkpoint=manager.saved_step(model_dir))
    step = ReplicaStep(
        model,
        optimizer,
        task.sums,
        task.counts,
        seed=FLAGS.seed,
        accumulation=recipe.accumulation,
        jit_compile=strategy.compiles_step(where, recipe),
        measure_noise=recipe.measure_noise_scale,
    )
    with strategy.own_folder(where, model_dir) as folder:
        run = Run(
            task,
            recipe,
            step,
            state,
            where,
            settings=compatibility.settings(recipe, facts),
            model_dir=model_dir,
            folder=folder,
            steps_per_loop=1 if FLAGS.dry_run else FLAGS.steps_per_loop,
            stop=stop,
            log=log,
            started=STARTED,
        )
        metrics, progress = run.train()
    if not FLAGS.dry_run:
        kept_in = model_dir if chief else None
        metrics = task.results(metrics | task.final_metrics(model, where, kept_in))
    if chief:
        task.export(model, export_dir, metrics)
    if chief and FLAGS.dry_run:
        print(dry_run.in_words(recipe, model_dir, export_dir), flush=True)
    elif chief:
        report(task, recipe, model, metrics, progress, where, model_dir, export_dir)


@contextlib.contextmanager
def folders(recipe: Recipe):
    """Yields (model_dir, export_dir); of a dry run they are gone when it ends."""
    if FLAGS.dry_run:
        with tempfile.TemporaryDirectory(prefix="dry-run-") as aside:
            yield aside, os.path.join(aside, "export")
        return
    model_dir = FLAGS.model_dir or os.path.join("runs", recipe.name)
    yield model_dir, os.path.normpath(FLAGS.export_dir or os.path.join(model_dir, "export"))


def main(arguments):
    """Checks what was asked for, then does it; returns the exit status."""
    if arguments[1:]:
        raise InputError(
            f"{arguments[1]!r} is no flag. Write --flag=value, and --set before each field=value."
        )
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    recipe = chosen_recipe()
    if FLAGS.preflight:
        from preflight import run as preflight  # training needs nothing of it

        return preflight.run(
            recipe,
            FLAGS.preflight,
            json_path=FLAGS.preflight_json,
            log=say,
            strict=FLAGS.preflight_strict,
        )
    if FLAGS.preflight_strict or FLAGS.preflight_json:
        raise InputError("--preflight_strict and --preflight_json need --preflight=TPU.")
    with contextlib.ExitStack() as stack:
        model_dir, export_dir = stack.enter_context(folders(recipe))
        compatibility.check(model_dir, recipe, seed=FLAGS.seed)
        check_export_dir(export_dir, model_dir)
        where = strategy.connect(FLAGS.tpu)
        for phase in recipe.phases:
            strategy.check_batch(where, phase.global_batch_size, recipe.accumulation)
        if recipe.measure_noise_scale and where.num_replicas_in_sync * recipe.accumulation < 2:
            raise InputError(
                "--set measure_noise_scale=true compares the gradients of parts of a batch, and "
                "with one replica and accumulation=1 there is one part. Set accumulation=2 or "
                "more, too."
            )
        chief = strategy.is_chief(where)
        log = say if chief else lambda line: None
        stop = stack.enter_context(signals.caught(log))
        if chief:
            stack.enter_context(lock.held(model_dir, say))
            manager.settle(model_dir, say)
        # The others wait here until the chief has settled which checkpoint is the newest.
        flags_of_all = {"seed": FLAGS.seed, "steps_per_loop": FLAGS.steps_per_loop}
        strategy.check_same_everywhere(where, recipe=recipe, **flags_of_all)
        try:
            fit(where, recipe, model_dir, export_dir, stop, log)
        except signals.Interrupted as signal:
            log(
                f"{signal}: saved step {manager.saved_step(model_dir)} of {recipe.steps} in "
                f"{model_dir}. The same command goes on from there."
            )
            return signal.exit_status
        except Diverged as error:
            log(
                f"train.py: {error}; the newest checkpoint is from step "
                f"{manager.saved_step(model_dir)}. Lower --set peak_learning_rate, or lengthen "
                "warm-up, in another --model_dir; --set on_divergence=rollback goes back by itself."
            )
            return 1
    return 0


def run(argv):
    """`main`, with a user's mistake or a full disk as one sentence, without a stack trace."""
    try:
        return main(argv)
    except (InputError, manager.SaveFailed) as error:
        say(f"train.py: {error}")
    except (OSError, tf.errors.OpError) as error:
        say(f"train.py: {_in_words(error)}")
    except KeyboardInterrupt:
        say("train.py: stopped. Nothing was saved since the last checkpoint.")
        return INTERRUPTED
    return 1


def _in_words(error: Exception) -> str:
    """What went wrong outside of the program; raises the error if it is none of that."""
    trouble = manager.disk_trouble(error)
    if trouble:
        return (
            f"{trouble}, writing logs or the export ({str(error).splitlines()[0]}). The "
            "checkpoints are whole. Make room, or mend the disk; the same command goes on."
        )
    if isinstance(error, tf.errors.OpError) and strategy.is_lost_worker(error):
        return (
            "another worker of TF_CONFIG has ended, so this one cannot go on. Start the "
            "same command on all of them again; it goes on from the newest checkpoint."
        )
    # What reads the data says it in a thread of TensorFlow's, which quotes it.
    told = re.search(r"InputError: (.+)", str(error))
    if told:
        return told[1]
    raise error


if __name__ == "__main__":
    app.run(run)
