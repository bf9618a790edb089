"""Trains a recipe: python train.py [--recipe=NAME] [--data_dir=TEXT] [--tpu=NAME] ...

Without arguments it pre-trains a small BERT on the English text that comes with Python packages,
evaluates it on held-out text and exports a SavedModel. The same command resumes an interrupted run.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shlex
import sys
import time

STARTED = time.perf_counter()  # before TensorFlow is imported, which takes seconds
from inputs import process  # isort: split

import numpy as np
import tensorflow as tf
import tf_keras
from absl import app, flags, logging

import recipes
from export.saved_model import SAVED_MODEL, ClientFailed, check_export_dir, check_not_occupied
from inputs import damage, memory
from inputs.errors import (
    InputError,
    first_line,
    message_in,
    refuse_below,
    refuse_empty,
    refuse_misspelled,
)
from inputs.storage import files
from inputs.storage.files import locked, read_json, recover_folder, temporary_folder, write_json
from recipes.types import Recipe
from tasks import TASKS
from training import cluster, optimizers, strategy
from training.checkpoint import compatibility, manager
from training.checkpoint.interruption import Interrupted, handle_signals
from training.monitor.divergence import Diverged
from training.monitor.mllog import MLPerfLog
from training.monitor.progress import HISTORY, read_rows
from training.run import Run, shorten

FLAGS = flags.FLAGS
flags.DEFINE_string("recipe", "bert-mini-demo", f"What to train: {', '.join(recipes.RECIPES)}.")
flags.DEFINE_string(
    "data_dir",
    "",
    "Text, or TFRecords of masked examples: files, globs or folders, comma-separated. For SQuAD, "
    "prepared text and images: a folder.",
)
flags.DEFINE_string(
    "vocab", "", "A BERT vocab.txt. Default: learned from the text, or the checkpoint's."
)
flags.DEFINE_string(
    "cache_dir",
    "",
    "Folder for prepared raw text, and for index files that prepared data does not have. "
    "Default: inside --data_dir if that is prepared and writable, else ~/.cache/tf_lamb.",
)
flags.DEFINE_string("model_dir", "", "Folder of checkpoints and logs. Default: runs/RECIPE.")
flags.DEFINE_string("export_dir", "", "Folder of the SavedModel. Default: MODEL_DIR/export.")
flags.DEFINE_string("tpu", "", "A TPU's name or address, or 'local'. Default: the GPUs or the CPU.")
flags.DEFINE_float(
    "connect_seconds", 600, "How long to wait for the workers of TF_CONFIG, or for a TPU's address."
)
flags.DEFINE_integer("steps", None, "Total steps; phases and warm-up keep their share of them.")
flags.DEFINE_integer("global_batch_size", None, "Examples per step, over all replicas.")
flags.DEFINE_string(
    "scaling",
    "none",
    "How --global_batch_size changes learning rate and steps: none, sqrt, linear or evidence.",
)
flags.DEFINE_string(
    "grow_batch", "", "Batch warm-up: sizes such as 32,64,128, with equal numbers of examples."
)
flags.DEFINE_integer("steps_per_loop", 50, "Steps on the device between two logs or checkpoints.")
flags.DEFINE_integer("seed", 1, "Seed of weights, data order, sentence pairs and masks.")
flags.DEFINE_bool("synthetic", False, "Train on random batches of the shape of the real ones.")
flags.DEFINE_bool("dry_run", False, "Two steps of each phase, then export; keeps no files.")
flags.DEFINE_string(
    "preflight", "", "Do not train; report what the recipe needs on TPUs such as v3:32x32,v3-64."
)
flags.DEFINE_string(
    "preflight_json", "", "JSON file for the pre-flight's figures; a PNG is written beside it."
)
flags.DEFINE_bool("preflight_strict", False, "Also check that TensorFlow has all TPU kernels.")
flags.DEFINE_string("mllog", "", "A new file for MLPerf's log of the run.")
flags.DEFINE_integer(
    "rehearse",
    None,
    "Do not train; simulate a pod with this many hosts, as processes of this machine, and report.",
)
flags.DEFINE_string("rehearse_json", "", "File for the figures of the rehearsal.")
flags.DEFINE_multi_string("set", [], "field=value: sets any field of the recipe; repeatable.")

MAX_SECONDS = 10**6  # of --connect_seconds
DIVERGED = 3  # exit status of a run that diverged
LESS_MEMORY = (
    "Add --set accumulation=2 or more, with which the same run goes on, or use a smaller "
    "--global_batch_size in another --model_dir."
)
NOT_LOST = "Checkpoints that were saved are complete; the same command goes on from the newest."


def log(line: str) -> None:
    """Prints a line of progress to standard error; standard output is for the report.

    If that cannot be written, because Ctrl-C ended `tee` too or a disk is full, the run goes on: it
    may have to save a checkpoint.
    """
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def blame(flag: str):
    """Converts a `ValueError` inside to an `InputError` whose message starts with `flag`.

    An `InputError`, which is a `ValueError`, names its flag itself.
    """
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{flag}: {error}") from None


def choose_recipe() -> Recipe:
    """Returns the recipe of `--recipe`, changed as the other flags ask.

    Raises:
        InputError: a flag has a wrong value.
    """
    for flag in FLAGS.get_key_flags_for_module(sys.modules[__name__]):
        for value in flag.value if isinstance(flag.value, list) else [flag.value]:
            if flag.present:
                refuse_empty(**{flag.name: value})
                if isinstance(value, str):
                    refuse_misspelled(value.rpartition("=")[2], f"--{flag.name}")
    if not 0 <= FLAGS.seed < 2**32:
        raise InputError(f"--seed must lie in [0, 2**32). Received: --seed={FLAGS.seed}.")
    sizes = {name: FLAGS[name].value for name in ("steps", "global_batch_size", "steps_per_loop")}
    refuse_below(1, **sizes)
    for name, value in sizes.items():
        if value is not None and value >= 2**31:
            raise InputError(f"--{name} must be below 2**31. Received: --{name}={value}.")
    if not 0 < FLAGS.connect_seconds <= MAX_SECONDS:
        raise InputError(
            f"--connect_seconds must lie in (0, {MAX_SECONDS}]. Received: "
            f"--connect_seconds={FLAGS.connect_seconds:g}."
        )
    with blame("--recipe"):
        recipe = recipes.find_recipe(FLAGS.recipe)
    if FLAGS.scaling == "none":
        recipe = recipes.resized(recipe, global_batch_size=FLAGS.global_batch_size)
    elif FLAGS.global_batch_size is None:
        raise InputError(
            f"--scaling={FLAGS.scaling} needs the batch size to scale to. Give "
            "--global_batch_size too."
        )
    else:
        with blame("--scaling"):
            recipe = recipes.scale_recipe(recipe, FLAGS.global_batch_size, FLAGS.scaling)
    with blame("--steps"):
        recipe = recipes.resized(recipe, steps=FLAGS.steps)
    assignments = FLAGS.set
    if FLAGS.grow_batch:
        # The schedule of the phases is made from the fields of the only phase of the recipe.
        of_one_phase = [text for text in assignments if re.match(r"\s*phase\d*\.", text)]
        with blame("--set"):
            others = [text for text in assignments if text not in of_one_phase]
            recipe = recipes.override(recipe, others)
            for phase in recipe.phases:
                phase.check(recipe)
        recipe = grow_batch(recipe, FLAGS.grow_batch)
        assignments = of_one_phase
    with blame("--set"):
        recipe = recipes.override(recipe, assignments)
        recipe.check()
    if FLAGS.scaling != "none" and getattr(recipe, "sequences_per_example", 1) > 1:
        raise InputError(
            f"--scaling={FLAGS.scaling} follows the batch size in sequences, and with "
            "sequences_per_row or length_buckets it is in rows or groups. Leave out --scaling, and "
            "give --global_batch_size, --steps and the learning rate with --set."
        )
    on_tpu = FLAGS.tpu or FLAGS.preflight
    if on_tpu and not any(field.startswith("compute_dtype") for field in FLAGS.set):
        recipe = dataclasses.replace(recipe, compute_dtype="bfloat16")
    return recipe


def grow_batch(recipe: Recipe, text: str) -> Recipe:
    """Returns the recipe with the batch sizes of `--grow_batch`, one phase for each."""
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--grow_batch={text}: give batch sizes, such as --grow_batch=32,64,128."
        ) from None
    with blame("--grow_batch"):
        return recipes.grow_batch(recipe, batches)


@contextlib.contextmanager
def choose_folders(recipe: Recipe):
    """Yields (model_dir, export_dir); a dry run uses a temporary folder."""
    if FLAGS.dry_run:
        with temporary_folder("dry-run-") as folder:
            yield folder, os.path.join(folder, "export")
        return
    model_dir = FLAGS.model_dir or os.path.join("runs", recipe.name)
    export_dir = FLAGS.export_dir or os.path.join(model_dir, "export")
    normalize = files.absolute if files.is_remote(export_dir) else os.path.normpath
    yield model_dir, normalize(export_dir)


def connect() -> tf.distribute.Strategy:
    """Returns the strategy of the run, once all of its machines can be reached."""
    with handle_signals(log):
        remote = cluster.wait_until_reachable(FLAGS.tpu, FLAGS.connect_seconds, log)
    if not remote:
        return strategy.connect(FLAGS.tpu)
    log(f"Connecting, for at most {FLAGS.connect_seconds:g} s")
    with cluster.time_limit(FLAGS.connect_seconds):
        return strategy.connect(FLAGS.tpu)


def warn_of(shortage: str | None) -> None:
    """Logs a shortage of memory, if there is one, in each worker."""
    if shortage:
        log(f"train.py: {shortage}")


def check_replicas(recipe: Recipe, where) -> None:
    """Raises `InputError` unless the recipe's batches can be split over the replicas."""
    for phase in recipe.phases:
        strategy.check_batch(where, phase.global_batch_size, recipe.accumulation)
    if recipe.measure_noise_scale and where.num_replicas_in_sync * recipe.accumulation < 2:
        raise InputError(
            "--set measure_noise_scale=true compares the gradients of parts of a batch, and "
            "with one replica and accumulation=1 there is only one part. Set accumulation=2 or "
            "more, too."
        )


def open_mllog(where, recipe: Recipe, model_dir: str) -> MLPerfLog | None:
    """Returns the log of `--mllog`, or None without that flag and in workers besides the chief.

    Raises:
        InputError: the run cannot have such a log.
    """
    if not FLAGS.mllog or not strategy.is_chief(where):
        return None
    if FLAGS.dry_run:
        raise InputError("--mllog: a dry run trains no model. Leave out --mllog or --dry_run.")
    if getattr(recipe, "sequences_per_example", 1) > 1:
        raise InputError(
            "--mllog: MLPerf's log counts sequences, of which packed rows and groups of length "
            "buckets have a varying number. Leave out --mllog, or the field of them, "
            "sequences_per_row or length_buckets."
        )
    step = manager.saved_step(model_dir)
    if step:
        raise InputError(
            f"--mllog: {model_dir} holds a run at step {step}, and MLPerf's log is of one "
            "uninterrupted run. Leave --mllog out, or choose another --model_dir."
        )
    platform = f"{where.num_replicas_in_sync} x {where.extended.worker_devices[0].split(':')[-2]}"
    return MLPerfLog(FLAGS.mllog, recipe, platform=platform, seed=FLAGS.seed, started=STARTED)


def damage_reports(where, model_dir: str) -> damage.Reports:
    """Returns how this process reports damaged records; see `inputs.damage.Reports`."""
    # Each start has its own folder, because the data may have been repaired since an earlier one.
    start = str(strategy.max_over_workers(where, time.time_ns()))
    has_others = strategy.is_multi_worker(where) or strategy.drives_other_hosts(where)
    return damage.Reports(
        log,
        folder=os.path.join(model_dir, damage.FOLDER, start) if has_others else "",
        worker=strategy.line_prefix(where),
        chief=strategy.is_chief(where),
    )


def make_task(
    recipe: Recipe, shared_dir: str, resume_dir: str | None = None, log=log, reports=None
):
    """Returns the task of the recipe with the data of the flags; see `tasks.task.Task`."""
    if recipe.compute_dtype != "float32":
        tf_keras.mixed_precision.set_global_policy(f"mixed_{recipe.compute_dtype}")
    return TASKS[recipe.task](
        recipe,
        data_dir=FLAGS.data_dir,
        vocab=FLAGS.vocab,
        resume_dir=resume_dir,
        seed=FLAGS.seed,
        synthetic=FLAGS.synthetic,
        log=log,
        cache_dir=FLAGS.cache_dir,
        shared_dir=shared_dir,
        reports=reports,
    )


def train(where, recipe, model_dir, export_dir, stop, log_line, check_lock, mllog=None) -> None:
    """Loads the data, builds the model, trains, exports and prints the report."""
    chief = strategy.is_chief(where)
    tf_keras.utils.set_random_seed(FLAGS.seed)
    with blame("--set"):
        schedule = optimizers.make_schedule(recipe)
    if FLAGS.dry_run:
        recipe = shorten(recipe)
    task = make_task(
        recipe,
        shared_dir=model_dir if strategy.drives_other_hosts(where) else "",
        resume_dir=model_dir if resumes(where, model_dir) else None,
        log=log_line,
        reports=damage_reports(where, model_dir),
    )
    with blame("--set"):
        run = Run(
            task,
            task.recipe,
            where,
            model_dir=model_dir,
            seed=FLAGS.seed,
            steps_per_loop=1 if FLAGS.dry_run else FLAGS.steps_per_loop,
            schedule=schedule,
            stop=stop,
            log=log_line,
            started=STARTED,
            mllog=mllog,
            check_lock=check_lock,
        )
    if "CPU" in where.extended.worker_devices[0]:
        weights = run.model.trainable_variables
        size = sum(weight.dtype.size * int(np.prod(weight.shape)) for weight in weights)
        size *= len(where.extended.worker_devices)
        warn_of(memory.describe_shortage(size, "each step's gradients alone"))
    results = run.fit()
    if not FLAGS.dry_run:
        results |= task.final_metrics(run.model, where, model_dir if chief else None)
    strategy.check_together(where, task.end_data)
    if not chief:
        # Reading batch normalization's averages, which each replica has, takes all processes.
        with temporary_folder("export-") as folder:
            task.export(run.model, folder, results, run.steps_done)
    else:
        check_lock()
        task.export(run.model, export_dir, results, run.steps_done)
        if FLAGS.dry_run:
            print(describe_dry_run(recipe, model_dir, export_dir), flush=True)
        else:
            report(run, results, model_dir, export_dir)


def rehearse(recipe) -> int:
    """Runs the rehearsal of a pod; returns the exit status.

    Raises:
        InputError: another flag asks for something else, or the rehearsal cannot run.
    """
    from training import rehearsal

    others = {
        "--tpu": FLAGS.tpu,
        "--preflight": FLAGS.preflight,
        "--synthetic": FLAGS.synthetic,
        "--dry_run": FLAGS.dry_run,
        "TF_CONFIG": cluster.read_cluster(),
    }
    if given := [name for name, value in others.items() if value]:
        raise InputError(
            f"--rehearse={FLAGS.rehearse} starts its own hosts on this machine, to read real data; "
            f"it does not go together with {' and '.join(given)}. Leave out one of them."
        )

    return rehearsal.run(
        functools.partial(make_task, recipe),
        recipe,
        FLAGS.rehearse,
        seed=FLAGS.seed,
        json_path=FLAGS.rehearse_json,
        log=log,
    )


def resumes(where, model_dir: str) -> bool:
    """Whether the run goes on from a checkpoint, of which each worker may see another one."""
    return bool(strategy.max_over_workers(where, manager.saved_step(model_dir)))


def report(run: Run, results: dict, model_dir: str, export_dir: str) -> None:
    """Writes results.json and prints what was trained, how well and how fast."""
    from training.monitor import plot  # matplotlib takes a second to import

    task = run.task
    recipe = run.recipe
    results_file = os.path.join(model_dir, "results.json")
    speed = run.progress.examples_per_second or earlier_speed(results_file)
    write_json(results_file, results | {"examples_per_second": speed})
    picture = os.path.join(model_dir, plot.PICTURE)
    parameters = sum(int(np.prod(v.shape)) for v in run.model.trainable_variables)
    replicas = run.strategy.num_replicas_in_sync
    print(
        f"""
Trained    {recipe.name}: {recipe.task} {recipe.model}, {parameters:,} parameters, \
{recipe.describe_steps(run.steps_done, task.example_unit)}, on {task.data}
Held out   {task.describe(results)}
Speed      on {replicas} replica{"s" * (replicas > 1)}: {run.progress.describe_speed()}
SavedModel {export_dir}
Picture    {picture}
Logs       tensorboard --logdir={shlex.quote(model_dir)}""",
        flush=True,
    )
    try:
        if read_rows(os.path.join(model_dir, HISTORY)):
            plot.draw([model_dir], picture)
    except (InputError, OSError) as error:
        log(f"train.py: the run is complete, but its picture could not be drawn: {error}")
    try:
        task.demonstrate(export_dir)
    except (ClientFailed, OSError, ValueError) as error:  # a ValueError: a name or text, encoded
        log(
            "train.py: the run is complete, but export.client could not show examples of the "
            f"SavedModel: {error}"
        )


def earlier_speed(results_file: str) -> float | None:
    """Returns the speed of an earlier start, for one that had nothing left to train."""
    try:
        return read_json(results_file).get("examples_per_second")
    except (InputError, AttributeError):  # there is none, or it is damaged
        return None


def format_loss(loss: float | None) -> str:
    """A loss of the history, where None stands for a value that was not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def describe_dry_run(recipe: Recipe, model_dir: str, export_dir: str) -> str:
    """Formats a dry run's report: time and loss of each step, and the size of the SavedModel."""
    lines = [f"Dry run    {recipe.name}: trained, saved, evaluated and exported; no file is kept"]
    history = read_rows(os.path.join(model_dir, HISTORY))
    for index, phase in enumerate(recipe.phases, start=1):
        rows = [row for row in history if row["phase"] == index]
        first, second = (phase.global_batch_size / row["examples_per_second"] for row in rows)
        lines.append(
            f"Phase {index}    first step {first:.1f} s, with compilation; second {second:.3f} s; "
            f"loss {', '.join(format_loss(row['loss']) for row in rows)}"
        )
    exported = (path for path in pathlib.Path(export_dir).rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in exported)
    return "\n".join([*lines, f"SavedModel {size / 1e6:.1f} MB"])


# Tensors decide no Python branch or loop in the program, so AutoGraph would change nothing, and
# its conversion of every layer would take a quarter of the time until the first step.
@tf.autograph.experimental.do_not_convert
def main(arguments) -> int:
    """Checks the flags, then trains or runs the pre-flight; returns the exit status."""
    if arguments[1:]:
        raise InputError(
            f"{arguments[1]!r} is not a flag. Write --flag=value, and --set before each "
            "field=value."
        )
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    strategy.silence_tensorflow()
    if process.ASKED_BACKEND not in ("", "tensorflow"):
        log(f"KERAS_BACKEND={process.ASKED_BACKEND} is ignored: train.py runs on TensorFlow")
    recipe = choose_recipe()
    if FLAGS.rehearse is not None:
        return rehearse(recipe)
    if FLAGS.rehearse_json:
        raise InputError("--rehearse_json needs --rehearse=HOSTS.")
    if FLAGS.preflight:
        from preflight import run as preflight  # training does not need its dependencies

        has_data = FLAGS.data_dir and not FLAGS.synthetic
        return preflight.run(
            recipe,
            FLAGS.preflight,
            json_path=FLAGS.preflight_json,
            log=log,
            strict=FLAGS.preflight_strict,
            make_task=functools.partial(make_task, recipe) if has_data else None,
        )
    if FLAGS.preflight_strict or FLAGS.preflight_json:
        raise InputError("--preflight_strict and --preflight_json need --preflight=TPU.")
    with contextlib.ExitStack() as stack:
        model_dir, export_dir = stack.enter_context(choose_folders(recipe))
        compatibility.check_compatible(model_dir, recipe, seed=FLAGS.seed)
        check_export_dir(export_dir, model_dir)
        where = connect()
        check_replicas(recipe, where)
        small = memory.describe_shortage(memory.MINIMUM, "a small run")
        warn_of(memory.describe_small_limit() or small)
        chief = strategy.is_chief(where)
        log_line = log if chief else lambda line: None
        stop = stack.enter_context(handle_signals(log_line))
        if chief:
            lock = locked(model_dir, "--model_dir", log=log)
        else:  # the chief checks for all
            lock = contextlib.nullcontext(lambda: None)
        check_lock = stack.enter_context(lock)
        if chief:
            manager.recover(model_dir, log)
            files.remove_folder(os.path.join(model_dir, damage.FOLDER))  # of earlier starts
            if recover_folder(export_dir, last=SAVED_MODEL, log=log):
                log(f"{export_dir}: restored, because the process that replaced it was killed")
            check_not_occupied(export_dir)  # `check_export_dir` leaves what is to be recovered
        # This also makes the other workers wait until `recover` has finished in the chief.
        strategy.check_workers_agree(
            where, recipe=recipe, seed=FLAGS.seed, steps_per_loop=FLAGS.steps_per_loop
        )
        mllog = open_mllog(where, recipe, model_dir)
        if mllog:
            stack.callback(mllog.close)
        try:
            train(where, recipe, model_dir, export_dir, stop, log_line, check_lock, mllog)
        except Interrupted as signal:
            if FLAGS.dry_run:
                log_line(f"{signal}: the dry run was stopped; it keeps no files")
                return signal.exit_status
            step = manager.saved_step(model_dir)
            saved = f"saved step {step} of {recipe.steps} in" if step else "no step is saved in"
            log_line(f"{signal}: {saved} {model_dir}. The same command goes on from there.")
            return signal.exit_status
        except Diverged as error:
            step = manager.saved_step(model_dir)
            kept = f"the newest checkpoint is from step {step}" if step else "no step is saved"
            log_line(
                f"train.py: {error}; {'a dry run keeps none' if FLAGS.dry_run else kept}. Lower "
                "--set peak_learning_rate or lengthen the warm-up, in another --model_dir; --set "
                "on_divergence=rollback rolls back by itself."
            )
            return DIVERGED
    return 0


def run(argv) -> int:
    """Runs `main`; reports a user's mistake or a disk error in one line, without a traceback."""
    try:
        return main(argv)
    except (InputError, manager.SaveFailed) as error:
        log(f"train.py: {error}")
    except (OSError, tf.errors.OpError) as error:
        log(f"train.py: {describe_error(error)}")
    except Interrupted as signal:
        log(f"train.py: {signal}: stopped before the training began")
        return signal.exit_status
    except MemoryError:
        log(f"train.py: out of memory.{memory.describe_limit()} {LESS_MEMORY}")
    except KeyboardInterrupt:
        trains = not (FLAGS.preflight or FLAGS.rehearse)
        kept = " Nothing was saved after the last checkpoint." if trains else ""
        log(f"train.py: stopped.{kept}")
        return process.INTERRUPTED
    return 1


def describe_error(error: Exception) -> str:
    """Describes an error of the disk, another worker or the data; raises any other error."""
    disk_error = manager.describe_disk_error(error)
    if disk_error and (FLAGS.preflight or FLAGS.rehearse):
        return f"{disk_error} ({first_line(error)}). Free some space or repair the disk."
    if disk_error:
        return (
            f"{disk_error}, while logs or the export were written "
            f"({first_line(error)}). The checkpoints are complete. Free some space or "
            "repair the disk; the same command resumes."
        )
    written = [path for path in (FLAGS.model_dir or "runs", FLAGS.export_dir) if path]
    remote = tuple(path for path in written if files.is_remote(path))
    if isinstance(error, OSError) and error.filename:
        said = f"{error.filename}: {error.strerror}."
        path = f"{files.absolute(os.fsdecode(error.filename))}/"
        if path.startswith(tuple(f"{files.absolute(folder)}/" for folder in written)):
            return f"{said} {NOT_LOST}"
        if files.is_remote(error.filename):
            return said
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return f"out of memory ({first_line(error)}).{memory.describe_limit()} {LESS_MEMORY}"
    if isinstance(error, tf.errors.OpError) and strategy.is_lost_worker(error):
        return (
            "another worker of TF_CONFIG has ended, so this one cannot continue. Start the "
            "same command on all of them again; it resumes from the newest checkpoint."
        )
    message = message_in(error)
    if message:
        return message
    if any(path in str(error) for path in remote):  # such as of TensorBoard's files
        return f"{first_line(error)}. {NOT_LOST}"
    raise error


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags as absl does, but ends --help and its like with status 0, not 1."""
    try:
        return FLAGS(argv)
    except SystemExit:
        sys.exit(0)
    except flags.Error:
        return app.parse_flags_with_usage(argv)  # prints the error and exits


if __name__ == "__main__":
    process.call(app.run, run, None, parse_flags)
