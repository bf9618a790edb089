"""Runs with replicas, micro-batches or several processes train the same weights as a plain run.

The tests run train.py on real text, so that the number of masked tokens differs between replicas
and between micro-batches.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from batch_checks import corpora

from inputs.pages import PAGE_BYTES
from inputs.shards import FRAME_BYTES
from inputs.text.tokenization import vocabulary
from training import strategy
from training.checkpoint.manager import CheckpointManager, saved_step
from training.monitor.progress import read_rows
from training.run import Run

ROOT = pathlib.Path(__file__).parents[2]
COMPARED = 20  # steps
FLAGS = ("--steps=20000", "--steps_per_loop=5", "--global_batch_size=16")
for change in ("warmup_steps=10", "vocabulary_size=300", "save_every_steps=10"):
    FLAGS += ("--set", change)
FLAGS += ("--set", "keep_checkpoints=100")
SECONDS = 240  # timeout of a process


@contextlib.contextmanager
def workers(*flags, second=(), program=(str(ROOT / "train.py"),)):
    """Yields two processes of train.py that train together, and kills them at the end.

    `second` are additional flags of the second process; `program` are the arguments of Python.
    """
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("localhost", 0))
        addresses = [f"localhost:{free.getsockname()[1]}" for free in (one, other)]
    processes = []
    try:
        for index in range(2):
            task = {"type": "worker", "index": index}
            config = {"cluster": {"worker": addresses}, "task": task}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *program, *flags, *(second if index else ())],
                    cwd=ROOT,
                    env=os.environ | {"TF_CONFIG": json.dumps(config)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(path, processes):
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert all(process.poll() is None for process in processes), processes[0].stderr.read()
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def until(in_process):
    """A function that runs train.py in this process up to a step, where SIGINT stops it."""

    def run(step, where, model_dir, *flags):
        original = Run.train

        def train(self, num_steps):
            output = original(self, num_steps)
            if self.optimizer.iterations.numpy() >= step:
                signal.raise_signal(signal.SIGINT)
            return output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strategy, "connect", lambda tpu: where)
            patch.setattr(Run, "train", train)
            assert in_process([*FLAGS, f"--model_dir={model_dir}", *flags]) == 130
        return saved(model_dir, step)

    return run


def saved(model_dir, step, prefix="model/"):
    """Returns name -> array of the variables in the checkpoint whose name starts with `prefix`."""
    reader = tf.train.load_checkpoint(str(model_dir / f"ckpt-{step}"))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith(prefix)]
    return {name: reader.get_tensor(name) for name in names}


@pytest.fixture(scope="module")
def one_cpu(two_cpus):
    return tf.distribute.OneDeviceStrategy("/cpu:0")


@pytest.fixture(scope="module")
def exact(text):
    return f"--data_dir={text}", "--set", "dropout=0.0"


@pytest.fixture(scope="module")
def one_replica(until, one_cpu, exact, tmp_path_factory):
    """The weights of a plain run at half of its steps and at its end, as the reference."""
    folder = tmp_path_factory.mktemp("one")
    end = until(COMPARED, one_cpu, folder, *exact)
    return saved(folder, COMPARED // 2), end


def assert_same(found, one_replica):
    """Allows each variable an error of 1e-5 of its change in the second half (seen: 2e-6).

    The loss does not depend on the key biases of attention, whose gradients are rounding errors.
    """
    first, expected = one_replica
    assert found.keys() == expected.keys() and len(found) > 30
    for name in [name for name in expected if "_key_dense/bias" not in name]:
        error = np.linalg.norm(found[name] - expected[name])
        way = np.linalg.norm(expected[name] - first[name])
        assert error <= 1e-5 * way, f"{name}: {error} on a way of {way}"


@pytest.mark.slow
def test_two_replicas_match_one_replica(until, mirrored, one_replica, exact, tmp_path):
    assert_same(until(COMPARED, mirrored, tmp_path, *exact), one_replica)


@pytest.mark.slow
def test_accumulation_matches_the_whole_batch(until, one_cpu, one_replica, exact, tmp_path):
    flags = (*exact, "--set", "accumulation=4")
    assert_same(until(COMPARED, one_cpu, tmp_path, *flags), one_replica)


@pytest.mark.slow
def test_two_processes_match_one_replica_and_resume(one_replica, exact, tmp_path):
    """One is killed and both are restarted; then one gets SIGTERM and both save the same step."""
    flags = (*FLAGS, *exact, f"--model_dir={tmp_path}")
    with workers(*flags) as (chief, other):
        wait_for(tmp_path / f"ckpt-{COMPARED}.index", (chief, other))
        other.kill()
        _, said = chief.communicate(timeout=60)
        assert chief.returncode == 1
        assert "another worker of TF_CONFIG has ended" in said and "Traceback" not in said
    assert_same(saved(tmp_path, COMPARED), one_replica)
    newest = saved_step(tmp_path)
    with workers(*flags) as (chief, other):
        wait_for(tmp_path / f"ckpt-{newest + COMPARED}.index", (chief, other))
        other.send_signal(signal.SIGTERM)
        (_, chiefs), (_, others) = (p.communicate(timeout=SECONDS) for p in (chief, other))
        assert (chief.returncode, other.returncode) == (143, 143), chiefs + others
    assert f"Going on from step {newest} of" in chiefs
    assert f"SIGTERM: saved step {saved_step(tmp_path)} of" in chiefs
    # Only the chief logs progress and leaves files.
    assert "saved step" not in others and not re.search(r"^step \d", others, re.MULTILINE)
    assert len(list(tmp_path.glob("train/events*"))) == 2 and not list(tmp_path.glob("*work*"))


@pytest.mark.slow
def test_two_processes_train_and_export_batch_normalization(in_process, mirrored, tmp_path):
    """Its moving averages differ between replicas, and are averaged after each loop of steps."""
    flags = ("--recipe=cifar10-lamb-4096", "--synthetic", "--steps=2", "--global_batch_size=16")
    flags += ("--steps_per_loop=1", "--set", "evaluation_examples=16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "connect", lambda tpu: mirrored)
        assert in_process([*flags, f"--model_dir={tmp_path / 'one'}"]) == 0
    two = tmp_path / "two"
    with workers(*flags, f"--model_dir={two}") as (chief, other):
        said = [process.communicate(timeout=SECONDS)[1] for process in (chief, other)]
        assert (chief.returncode, other.returncode) == (0, 0), said
    assert not re.search("WARNING|AutoGraph|retracing", "".join(said)), said
    expected = saved(tmp_path / "one", 2)
    found = saved(two, 2)
    assert found.keys() == expected.keys()
    averages = [name for name in found if "moving_mean" in name]
    assert averages
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert tf.saved_model.load(str(two / "export")).signatures


@pytest.mark.slow
def test_workers_with_different_commands_are_refused(exact, tmp_path):
    """Otherwise they would wait for each other forever."""
    with workers(*FLAGS, *exact, f"--model_dir={tmp_path}", second=["--seed=7"]) as processes:
        for process in processes:
            _, said = process.communicate(timeout=SECONDS)
            assert process.returncode == 1, said
            assert "TF_CONFIG: the workers differ in seed. Give all the same command" in said


AGREEING = """
import sys
import tensorflow as tf
from inputs.errors import InputError
from training import strategy
from training.checkpoint.manager import CheckpointManager

where = tf.distribute.MultiWorkerMirroredStrategy()
worker = where.cluster_resolver.task_id
print(*(strategy.max_over_workers(where, value) for value in (worker, not worker, 0.5 - worker)))
with where.scope():
    step = tf.Variable(0, dtype=tf.int64)
checkpoint = tf.train.Checkpoint(step=step)
manager = CheckpointManager(
    checkpoint, sys.argv[1], step=step, save_every_steps=1, keep=9,
    agree=lambda newest: strategy.max_over_workers(where, newest),
    check_agreement=lambda found: strategy.check_workers_agree(where, checkpoint=found),
)
if worker:  # an old listing
    manager.store._names = lambda: ["ckpt-10.complete"]
print(manager.store.newest())
for _ in range(2):  # at the start, and at a rollback
    step.assign(0)
    manager.restore_or_initialize()
    print(int(step.numpy()))
if worker:
    manager.store.has = lambda step: step == 10
try:
    manager.restore_or_initialize()
except InputError as error:
    print(error)
"""


@pytest.mark.slow
def test_workers_restore_the_same_checkpoint_where_one_sees_an_old_listing(tmp_path):
    folder = f"file://{tmp_path}"
    step = tf.Variable(0, dtype=tf.int64)
    manager = CheckpointManager(
        tf.train.Checkpoint(step=step), folder, step=step, save_every_steps=1, keep=9
    )
    for value in (10, 20):
        step.assign(value)
        manager.save()
    (tmp_path / "checkpoint").unlink()
    with workers(
        folder,
        program=(
            "-c",
            "import training.checkpoint.manager as m\nm.APPEAR_SECONDS = 0.1\n" + AGREEING,
        ),
    ) as processes:
        for newest, process in zip((20, 10), processes, strict=True):
            printed, said = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, said
            first, second, *restored, refused = printed.splitlines()
            assert (first, second) == ("1 True 0.5", str(newest))
            assert restored == ["20", "20"]
            assert refused.startswith("TF_CONFIG: the workers differ in checkpoint. Give all")


@pytest.mark.slow
def test_dropout_of_a_resumed_run_is_bit_identical(until, mirrored, text, tmp_path):
    flags = (f"--data_dir={text}", "--set", "dropout=0.1", "--set", "accumulation=2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    until(COMPARED, mirrored, whole, *flags)
    cut.mkdir()
    for kept in (*whole.glob("ckpt-10.*"), whole / "recipe.json", whole / "vocab.txt"):
        shutil.copy(kept, cut)
    until(COMPARED, mirrored, cut, *flags)
    everything = ("model/", "optimizer/", "state/")
    expected, resumed = (saved(folder, COMPARED, everything) for folder in (whole, cut))
    assert expected.keys() == resumed.keys()
    assert all(expected[name].tobytes() == resumed[name].tobytes() for name in expected)
    losses = [
        [row["loss"] for row in read_rows(f"{folder}/history.jsonl") if row["step"] > 10]
        for folder in (whole, cut)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.fixture
def damaged_text(tmp_path):
    """Damages the first page of some workers' lanes; returns flags, the file and the places."""

    def damage(*lanes):
        documents = [
            [f"word {'the ' * (i % 30)} number {i}." for _ in range(5)] for i in range(400)
        ]
        pieces = [*vocabulary.SPECIAL_TOKENS, "word", "the", "number", ".", *"0123456789"]
        pieces += [f"##{digit}" for digit in range(10)]
        training, _ = corpora(documents, pieces, tmp_path / "data")
        path = pathlib.Path(training.tokens.path)
        content = bytearray(path.read_bytes())
        places = [(1, 4)[lane] * (PAGE_BYTES + FRAME_BYTES) for lane in lanes]
        for place in places:
            content[place + 500] ^= 1
        path.write_bytes(content)
        flags = (f"--data_dir={tmp_path}/data", f"--model_dir={tmp_path}/run", "--steps=2")
        flags += ("--global_batch_size=16", "--steps_per_loop=1", "--set", "lanes=2")
        return (*flags, "--set", "evaluation_examples=16"), path, places

    return damage


@pytest.mark.slow
def test_each_worker_names_the_damaged_pages_that_it_reads(damaged_text):
    flags, path, places = damaged_text(0, 1)
    with workers(*flags, "--set", "max_bad_record_share=0.9") as processes:
        chiefs, others = (process.communicate(timeout=SECONDS)[1] for process in processes)
        assert [process.returncode for process in processes] == [0, 0], chiefs + others
    of_chief, of_other = (
        f"worker {worker}: Skipped: {path}, byte {place}: damaged or missing.\n"
        for worker, place in enumerate(places)
    )
    assert of_chief in chiefs and of_other in chiefs
    assert of_other in others and of_chief not in others
    assert len(re.findall("of 990 records were damaged and skipped", chiefs)) == 1
    assert "were damaged and skipped" not in others


@pytest.mark.slow
def test_workers_stop_together_if_one_of_them_finds_too_much_damage(damaged_text):
    flags, path, (place,) = damaged_text(1)
    with workers(*flags, "--set", "max_bad_record_share=0.001") as processes:
        said = [process.communicate(timeout=SECONDS)[1] for process in processes]
        assert [process.returncode for process in processes] == [1, 1], said
    for one in said:
        assert re.search("records are damaged|another worker has found more damaged", one)
        assert "has ended" not in one and "Traceback" not in one
    assert f"{path}, byte {place}: damaged or missing" in said[1]
