"""Runs whose model_dir is on object storage: they resume, and lose nothing where it fails.

`ram://` is a file system of TensorFlow that is not a local one; `faulty_storage` is between it and
the program.
"""

import os
import pathlib
import random
import re
import signal
import uuid

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from faulty_storage import Killed, faulty_storage, lease_times
from small_runs import SmallTask, small_recipe, small_run

from inputs.errors import InputError
from inputs.storage import files, lease, remote
from recipes.types import Phase
from tasks.bert import BertPretraining
from tasks.task import Metric
from tf_lamb.telemetry import read_records
from training.checkpoint import manager, stores
from training.checkpoint.manager import (
    BestCheckpoint,
    CheckpointManager,
    SaveFailed,
    recover,
    saved_step,
    saved_steps,
)
from training.checkpoint.stores import count_shards, read_error
from training.monitor import plot
from training.monitor.progress import Rows, read_rows
from training.run import Run

ACCURACY = Metric("accuracy", "count", higher_is_better=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short times for leases; they are not renewed."""
    lease_times(monkeypatch)


class Small:
    """A `CheckpointManager` of a step and a small variable."""

    def __init__(self, folder, keep=3, **more):
        self.folder = folder
        self.step = tf.Variable(0, dtype=tf.int64)
        self.values = tf.Variable(tf.zeros([1_000]))
        checkpoint = tf.train.Checkpoint(step=self.step, values=self.values)
        self.manager = CheckpointManager(
            checkpoint, folder, step=self.step, save_every_steps=10, keep=keep, **more
        )

    def save_at(self, *steps):
        for step in steps:
            self.step.assign(step)
            self.values.assign(tf.fill([1_000], float(step)))
            self.manager.save(check_interval=False)
        return self

    def restore(self):
        self.manager.restore_or_initialize()
        assert self.values.numpy()[0] == self.step.numpy()
        return int(self.step.numpy())


def test_the_newest_checkpoints_are_kept_and_marked(ram):
    Small(ram, keep=2).save_at(10, 20, 30)
    assert saved_steps(ram) == [20, 30] and Small(ram).restore() == 30
    assert tf.train.latest_checkpoint(ram) == f"{ram}/ckpt-30"
    parts = ("complete", "data-00000-of-00001", "index")
    assert files.list_names(ram) == [
        "checkpoint",
        *(f"ckpt-{step}.{part}" for step in (20, 30) for part in parts),
    ]
    mark = files.read_json(f"{ram}/ckpt-30.complete")
    assert mark["step"] == 30 and mark["files"].keys() == {f"ckpt-30.{p}" for p in parts[1:]}


def test_what_has_no_complete_mark_is_no_checkpoint(ram):
    Small(ram).save_at(10, 20, 30)
    remote.upload(f"{ram}/ckpt-30.complete", remote.read(f"{ram}/ckpt-30.complete")[:9])
    remote.remove(f"{ram}/ckpt-20.complete")
    assert saved_steps(ram) == [10] and Small(ram).restore() == 10


def test_a_run_that_was_copied_from_a_disk_goes_on(tmp_path, ram):
    """There are no marks on a disk; a checkpoint that cannot be read is put aside."""
    Small(str(tmp_path)).save_at(10, 20, 30)
    os.truncate(tmp_path / "ckpt-30.data-00000-of-00001", 100)
    for path in tmp_path.iterdir():
        if path.is_file():
            remote.upload(f"{ram}/{path.name}", path.read_bytes())
    said = []
    recover(ram, said.append)
    assert saved_steps(ram) == [10, 20] and Small(ram).restore() == 20
    assert said[:2] == [
        f"Checkpoint ckpt-{step} is complete and had no mark; it is used" for step in (10, 20)
    ]
    assert said[2].startswith("Checkpoint ckpt-30 is damaged (") and len(said) == 3
    assert "ckpt-30.index" in files.list_names(f"{ram}/damaged")


def test_a_copy_of_which_no_checkpoint_can_be_read_is_refused(ram):
    """It is not trained from the beginning, and nothing is deleted."""
    Small(ram).save_at(10)
    remote.remove(f"{ram}/ckpt-10.complete")
    remote.upload(f"{ram}/ckpt-10.data-00000-of-00001", b"half")
    before = files.list_names(ram)
    with pytest.raises(InputError, match="none of the checkpoints in .* can be read; the newest"):
        recover(ram, print)
    assert files.list_names(ram) == before


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(ram):
    Small(ram).save_at(10, 20)
    for name in ("ckpt-20.data-00000-of-00001",):
        remote.upload(f"{ram}/{name}", remote.read(f"{ram}/{name}")[:-8])
    said = []
    recover(ram, said.append)
    assert len(said) == 1 and "Checkpoint ckpt-20 is damaged (" in said[0]
    assert saved_steps(ram) == [10] and "ckpt-20.index" in files.list_names(f"{ram}/damaged")
    remote.upload(f"{ram}/ckpt-10.index", b"")
    with pytest.raises(InputError, match="none of the checkpoints .* can be read"):
        recover(ram, print)


def test_an_incomplete_checkpoint_is_removed_and_told(ram):
    Small(ram).save_at(10)
    remote.upload(f"{ram}/ckpt-20.data-00000-of-00001", b"half")
    said = []
    recover(ram, said.append)
    assert said == ["Checkpoint ckpt-20 is not complete; it was removed"]
    assert saved_steps(ram) == [10] and not files.exists(f"{ram}/ckpt-20.data-00000-of-00001")


def test_the_last_checkpoint_is_not_deleted_when_it_lacks_a_file(ram):
    """As after a copy that was interrupted: the run is not trained from the beginning."""
    Small(ram).save_at(10)
    remote.upload(f"{ram}/ckpt-20.data-00000-of-00001", b"half")
    for name in ("ckpt-10.complete", "ckpt-10.index"):
        remote.remove(f"{ram}/{name}")
    before = files.list_names(ram)
    with pytest.raises(
        InputError, match="none of the .* can be read; .*ckpt-10: it is not complete"
    ):
        recover(ram, print)
    assert files.list_names(ram) == before
    Small(ram).save_at(30)
    recover(ram, lambda line: None)
    assert saved_steps(ram) == [30]


def test_an_incomplete_checkpoint_that_was_visible_is_put_aside(ram):
    Small(ram).save_at(10, 20)
    for name in ("ckpt-20.complete", "ckpt-20.index"):
        remote.remove(f"{ram}/{name}")
    said = []
    recover(ram, said.append)
    assert saved_steps(ram) == [10] and len(said) == 1 and "ckpt-20 is damaged (" in said[0]
    assert files.list_names(f"{ram}/damaged") == ["ckpt-20.data-00000-of-00001"]


def test_an_error_of_the_storage_that_passes_is_no_damage(ram, monkeypatch):
    Small(ram).save_at(10, 20)
    before = files.list_names(ram)
    errors = ["the storage does not answer"]

    def failing(prefix):
        return errors.pop() if errors else read_error(prefix)

    monkeypatch.setattr(stores, "read_error", failing)
    recover(ram, pytest.fail)
    assert not errors and saved_steps(ram) == [10, 20]
    # One that does not pass ends the run, and moves nothing.
    errors = ["the storage does not answer"]
    original = remote.open_reader

    def refused(path):
        if ".data-" in path:
            raise OSError(5, "the storage does not answer", path)
        return original(path)

    monkeypatch.setattr(remote, "open_reader", refused)
    with pytest.raises(OSError, match="the storage does not answer"):
        recover(ram, pytest.fail)
    assert files.list_names(ram) == before


def test_the_newest_is_found_where_the_listing_is_old(ram, monkeypatch):
    small = Small(ram).save_at(10)
    with monkeypatch.context() as patch:
        old = files.list_names(ram)
        patch.setattr(tf.io.gfile, "listdir", lambda path: old)
        small.save_at(20)
        assert small.manager.store.newest() == 20
        assert saved_step(ram) == 20  # another process finds it in `checkpoint`
        remote.remove(f"{ram}/checkpoint")
        assert saved_step(ram) == 10 and small.manager.store.newest() == 20
        assert small.restore() == 20


@pytest.mark.parametrize("shards", [1, 3, 300])
def test_the_index_says_how_many_data_files_there_are(shards, tmp_path):
    prefixes = [str(tmp_path / f"part-{i}") for i in range(shards)]
    for i, prefix in enumerate(prefixes):
        tf.raw_ops.SaveV2(
            prefix=prefix, tensor_names=[f"a{i}"], shape_and_slices=[""], tensors=[tf.zeros([2])]
        )
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=prefixes, destination_prefix=str(tmp_path / "all")
    )
    assert count_shards((tmp_path / "all.index").read_bytes()[:64]) == shards
    assert len([*tmp_path.glob("all.data-*")]) == shards
    assert count_shards(b"") == count_shards(b"\1\0\3\10\1") == count_shards(bytes(64)) == 0


@pytest.mark.slow
def test_a_checkpoint_survives_a_kill_at_any_operation(monkeypatch):
    """Of saving one and deleting an older one, with stale listings."""
    for operation in range(1, 200):
        folder = f"ram://{uuid.uuid4().hex}"
        files.make_folder(folder)
        with faulty_storage(monkeypatch, seed=operation) as storage:
            small = Small(folder, keep=2).save_at(10, 20)
            storage.kill_at(operation)
            killed = True
            try:
                small.save_at(30)
                killed = False
            except Killed:
                pass
            storage.restart()
            recover(folder, lambda line: None)
            newest = Small(folder).restore()
            assert newest in ((20, 30) if killed else (30,))
            assert Small(folder).save_at(40).restore() == 40
        for step in saved_steps(folder):
            assert read_error(f"{folder}/ckpt-{step}") is None
        if not killed:
            return
    raise AssertionError("it never ends")


def test_history_is_written_before_its_checkpoint(ram):
    """A checkpoint that is complete is used after a kill, so its history must be there, too."""
    seen = []
    Small(ram, before_write=lambda: seen.append(files.list_names(ram))).save_at(10)
    assert seen == [[]]


def test_a_storage_that_fails_raises_save_failed(ram, monkeypatch):
    small = Small(ram).save_at(10)
    with faulty_storage(monkeypatch) as storage:
        storage.failing = 1.0
        with pytest.raises(SaveFailed) as error:
            small.save_at(20)
        assert str(error.value) == (
            f"{ram}: the checkpoint of step 20 could not be written (the storage does not answer); "
            "the last good one is of step 10. Check the connection and the rights to write there; "
            "the same command resumes from there."
        )
    assert saved_steps(ram) == [10] and not files.exists(f"{ram}/ckpt-20.index")
    assert Small(ram).save_at(20).restore() == 20


def test_a_process_that_lost_its_lease_publishes_nothing(ram):
    def check():
        raise lease.LeaseLost("--model_dir: taken over")

    Small(ram).save_at(10)
    with pytest.raises(lease.LeaseLost):
        Small(ram, check=check).save_at(20)
    assert saved_steps(ram) == [10]
    rows = Rows(f"{ram}/history.jsonl", check)
    rows.append({"step": 1})
    with pytest.raises(lease.LeaseLost):
        rows.flush()


def test_workers_agree_on_the_newest_checkpoint_before_each_restore(ram):
    """Also the one after a rollback. Each worker looks for it by its name."""
    Small(ram).save_at(10, 20)
    agreed = []
    small = Small(ram, agree=lambda step: max(step, 20), check_agreement=agreed.append)
    remote.remove(f"{ram}/checkpoint")
    small.manager.store._names = lambda: ["ckpt-10.complete"]  # this worker's listing
    assert small.manager.store.newest() == 10 and small.restore() == 20 and small.restore() == 20
    assert agreed == [20, 20]
    other = Small(ram, agree=lambda step: 30, check_agreement=agreed.append)  # not there
    manager_seconds = manager.APPEAR_SECONDS
    assert manager_seconds > 0
    with pytest.raises(InputError, match="ckpt-30 is damaged, or of another model"):
        other.manager.restore_or_initialize()
    assert agreed == [20, 20, -1]


@pytest.mark.parametrize("place", ["ram", "tmp_path"])
def test_a_checkpoint_of_step_0_is_one(place, request):
    """A run that may roll back saves one before its first step."""
    folder = str(request.getfixturevalue(place))
    assert Small(folder).manager.restore_or_initialize() is None
    small = Small(folder)
    small.values.assign(tf.fill([1_000], 7.0))
    small.manager.save(check_interval=False)
    small.values.assign(tf.zeros([1_000]))
    assert small.manager.restore_or_initialize() == f"{folder}/ckpt-0"
    assert small.values.numpy()[0] == 7


def test_the_best_checkpoint_is_kept(ram):
    small = Small(ram, keep=2)
    for step, accuracy in ((10, 0.2), (20, 0.5), (30, 0.4), (40, 0.4)):
        small.save_at(step)
        BestCheckpoint(small.manager, ACCURACY)({"accuracy": accuracy})  # as after a resume
    assert saved_steps(ram) == [30, 40] and saved_steps(f"{ram}/best") == [20]
    assert files.read_json(f"{ram}/best/metrics.json") == {"step": 20, "accuracy": 0.5}
    assert read_error(tf.train.latest_checkpoint(f"{ram}/best")) is None


@pytest.mark.slow
def test_a_kill_leaves_a_best_checkpoint_that_can_be_read(monkeypatch):
    for operation in range(1, 200):
        folder = f"ram://{uuid.uuid4().hex}"
        files.make_folder(folder)
        with faulty_storage(monkeypatch, seed=operation) as storage:
            small = Small(folder).save_at(10)
            BestCheckpoint(small.manager, ACCURACY)({"accuracy": 0.5})
            small.save_at(20)
            storage.kill_at(operation)
            killed = True
            try:
                BestCheckpoint(small.manager, ACCURACY)({"accuracy": 0.6})
                killed = False
            except Killed:
                pass
            storage.restart()
            steps = saved_steps(f"{folder}/best")
            assert steps in ([10], [20], [10, 20])
            assert read_error(f"{folder}/best/ckpt-{steps[-1]}") is None
            # The next evaluation goes on from what is there.
            small = Small(folder)
            small.restore()
            BestCheckpoint(small.manager, ACCURACY)({"accuracy": 0.7})
            assert saved_steps(f"{folder}/best") == [20]
        if not killed:
            return
    raise AssertionError("it never ends")


def test_history_is_written_as_a_whole(ram):
    path = f"{ram}/history.jsonl"
    rows = Rows(path)
    for step in (1, 2, 3):
        rows.append({"step": step, "loss": float("nan")})
    assert read_rows(path) == []
    rows.flush()
    assert read_rows(path) == [{"step": step, "loss": None} for step in (1, 2, 3)]
    rows = Rows(path)
    rows.drop_after(1)
    rows.append({"step": 2, "loss": 0.5})
    rows.flush()
    assert read_rows(path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


class Sums(SmallTask):
    """A small model whose batch is a function of the step."""

    def __init__(self, recipe):
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(8, 4, 3)).astype(np.float32)
        super().__init__(
            recipe,
            model=lambda: tf_keras.Sequential(
                [tf_keras.layers.Dense(4, input_shape=(3,)), tf_keras.layers.Dense(1)]
            ),
            sums=lambda model, batch, training: tf.reduce_sum(
                (model(batch["x"]) - batch["x"][:, :1]) ** 2
            ),
            batches=tf.data.Dataset.from_tensor_slices({"x": inputs}),
        )

    def train_batches(self, phase_index, first_step):
        return lambda context: self._batches.repeat().skip(first_step)


RECIPE = small_recipe(
    Phase(steps=60, global_batch_size=4, peak_learning_rate=0.01, warmup_steps=0),
    save_every_steps=4,
    evaluate_every_steps=12,
    keep_checkpoints=2,
    jit_compile=False,
)


def train(folder):
    """As train.py: the lease, the recovery, the run."""
    tf_keras.utils.set_random_seed(1)
    files.check_writable(folder, "--model_dir")
    where = tf.distribute.OneDeviceStrategy("/cpu:0")
    with files.locked(folder, "--model_dir", log=lambda line: None) as check:
        recover(folder, lambda line: None)
        run = small_run(Sums(RECIPE), where, folder, steps_per_loop=2, check_lock=check)
        run.fit()


def state(folder):
    """All numbers of the last checkpoint, and the rows of the run without times."""
    reader = tf.compat.v1.train.NewCheckpointReader(f"{folder}/ckpt-{saved_step(folder)}")
    names = [n for n in reader.get_variable_to_shape_map() if not n.startswith(("_", "settings"))]
    tensors = {name: reader.get_tensor(name).tobytes() for name in names}
    losses = [(row["step"], row["loss"]) for row in read_rows(f"{folder}/history.jsonl")]
    return tensors, losses, read_rows(f"{folder}/evaluations.jsonl")


@pytest.mark.slow
def test_twenty_interruptions_lose_nothing(monkeypatch):
    """At random operations: half-written objects, stale listings, renames that are not atomic."""
    whole, cut = (f"ram://{uuid.uuid4().hex}/run" for _ in range(2))
    train(whole)
    rng = random.Random(0)
    interruptions = 0
    with faulty_storage(monkeypatch, stale=0.3, failing=0.002) as storage:
        while interruptions < 20 or saved_step(cut) < 60:
            if interruptions < 20:
                storage.kill_at(rng.randrange(1, 120))
            try:
                train(cut)
            except (Killed, SaveFailed, OSError) as error:
                print(type(error).__name__, "at", saved_step(cut) if not storage.restart() else 0)
                interruptions += 1
                assert interruptions < 60
            storage.restart()
    expected, found = state(whole), state(cut)
    assert [step for step, _ in expected[1]] == list(range(2, 61, 2))
    assert [row["step"] for row in expected[2]] == [12, 24, 36, 48, 60]
    assert len(expected[0]) > 10 and found == expected
    assert read_error(f"{cut}/best/ckpt-{saved_step(f'{cut}/best')}") is None
    best = [files.read_json(f"{folder}/best/metrics.json") for folder in (whole, cut)]
    assert best[0] == best[1]


SETTINGS = {
    "model": "tiny",
    "vocabulary_size": 300,
    "max_sequence_length": 16,
    "sequence_length": 16,
    "predictions": 2,
    "evaluation_examples": 32,
    "dropout": 0.1,
    "save_every_steps": 10,
    "evaluate_every_steps": 10,
    "profile": "12:14",
    "jit_compile": "false",
}
RATIOS = "telemetry/trust_ratios.jsonl"
FLAGS = ["--steps=30", "--global_batch_size=8", "--steps_per_loop=5"]
FLAGS += [part for k, v in SETTINGS.items() for part in ("--set", f"{k}={v}")]


@pytest.mark.slow
def test_a_run_on_object_storage_is_interrupted_resumed_and_exported(
    in_process, ram, text, capfd, tmp_path, monkeypatch
):
    """Text, checkpoints, logs, picture and SavedModel are on ram://; compared with a local run."""
    with monkeypatch.context() as patch:
        patch.setattr(BertPretraining, "export", lambda *unused: None)
        patch.setattr(plot, "draw", lambda *unused: None)
        assert in_process([*FLAGS, f"--data_dir={text}", f"--model_dir={tmp_path}/local"]) == 0
    remote.make_folder(f"{ram}/data")
    remote.upload(f"{ram}/data/animals.txt", text.read_bytes())
    given = [*FLAGS, f"--data_dir={ram}/data", f"--model_dir={ram}/run"]
    with monkeypatch.context() as patch:
        original = Run.train

        def stopping(self, num_steps):
            if self.state.step.numpy() > 10:
                signal.raise_signal(signal.SIGTERM)
            return original(self, num_steps)

        patch.setattr(Run, "train", stopping)
        assert in_process(given) == 143
    saved = re.search(r"SIGTERM: saved step (\d+) of 30 in", capfd.readouterr().err)[1]
    assert 10 < int(saved) < 30
    assert not files.exists(f"{ram}/run/.lock")
    assert in_process(given) == 0
    said = capfd.readouterr()
    assert f"Going on from step {saved} of 30 in {ram}/run" in said.err
    assert f"SavedModel {ram}/run/export" in said.out
    assert not pathlib.Path("ram:").exists()
    found, expected = (state(folder) for folder in (f"{ram}/run", f"{tmp_path}/local"))
    assert found == expected
    assert [step for step, _ in found[1]] == [5, 10, 12, 14, 19, 20, 25, 30]
    names = set(remote.list_tree(f"{ram}/run"))
    assert {"recipe.json", "vocab.txt", "results.json", "history.png", "best/metrics.json"} <= names
    assert any(re.match(r"train/plugins/profile/.*\.xplane\.pb", name) for name in names)
    assert any(re.match(r"train/events", name) for name in names)
    ratios = [
        {row["step"]: list(row["layers"].values()) for row in read_records(f"{folder}/{RATIOS}")}
        for folder in (f"{ram}/run", f"{tmp_path}/local")
    ]
    assert ratios[0] == ratios[1] and max(ratios[0]) == 30
    assert remote.read(f"{ram}/run/history.png").startswith(b"\x89PNG")
    signatures = tf.saved_model.load(f"{ram}/run/export").signatures
    filled = signatures["serving_default"](text=tf.constant(["the [MASK] sat"]))
    assert filled["tokens"].shape[0] == 1
    # Plot reads both. A model_dir that was copied to a disk is one there.
    assert plot.main([f"{ram}/run", f"{tmp_path}/local"]) == 0
    assert remote.exists(f"{ram}/run/telemetry/trust_ratios.png")
    for name in names:
        if not name.endswith(".new"):
            copy = tmp_path / "copy" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(remote.read(f"{ram}/run/{name}"))
    assert saved_steps(f"{tmp_path}/copy") == saved_steps(f"{ram}/run") and saved_step(ram) == 0
    assert saved_step(f"{tmp_path}/copy") == 30


def test_flags_that_name_no_storage_are_one_sentence(in_process, capfd, text):
    for flag in ("--model_dir", "--export_dir", "--data_dir", "--vocab", "--cache_dir"):
        given = {"--data_dir": str(text), "--model_dir": "run"} | {flag: "foo://bucket/a"}
        assert in_process(FLAGS + [f"{name}={value}" for name, value in given.items()]) == 1
        (said,) = (line for line in capfd.readouterr().err.splitlines() if "train.py:" in line)
        assert "foo://bucket" in said and "has no file system for foo://, only for file://" in said
    assert not pathlib.Path("foo:").exists() and not pathlib.Path("ram:").exists()


def test_a_second_run_is_refused(in_process, ram, capfd, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 60)
    with files.locked(ram, "--model_dir"):
        assert in_process([*FLAGS, "--synthetic", f"--model_dir={ram}"]) == 1
    said = capfd.readouterr().err
    assert f"train.py: --model_dir: {ram} is in use by process {os.getpid()} on " in said
