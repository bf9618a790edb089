"""Unit tests of checkpoints, lock and signals; test_faults.py tests them in whole runs."""

import json
import os
import pathlib
import pty
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import tensorflow as tf

from inputs.errors import InputError
from inputs.storage.files import locked
from tasks.task import Metric
from training.checkpoint import manager
from training.checkpoint.interruption import handle_signals
from training.checkpoint.manager import (
    BestCheckpoint,
    CheckpointManager,
    SaveFailed,
    recover,
    saved_step,
    saved_steps,
)

ROOT = pathlib.Path(__file__).parents[3]


class Small:
    """A `CheckpointManager` of a step and a variable of 400 kB."""

    def __init__(self, folder, every=10, keep=3, **more):
        self.folder = str(folder)
        self.step = tf.Variable(0, dtype=tf.int64)
        self.values = tf.Variable(tf.random.stateless_normal([100_000], [1, 2]))
        checkpoint = tf.train.Checkpoint(step=self.step, values=self.values, **more)
        self.manager = CheckpointManager(
            checkpoint, self.folder, step=self.step, save_every_steps=every, keep=keep
        )

    def save_at(self, *steps):
        for step in steps:
            self.step.assign(step)
            self.values.assign(tf.fill([100_000], float(step)))
            self.manager.save(check_interval=False)
        return self


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in pathlib.Path(folder).rglob("*.*"))


def test_saves_are_due_at_multiples_and_the_newest_are_kept(tmp_path):
    small = Small(tmp_path, every=10, keep=2)
    for step in range(4, 45, 4):
        small.step.assign(step)
        small.manager.save()
    assert saved_steps(str(tmp_path)) == [32, 40]
    assert tf.train.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-40")
    kept = [f"ckpt-{step}.{part}" for step in (32, 40) for part in ("data-00000-of-00001", "index")]
    assert files(tmp_path) == kept
    again = Small(tmp_path)
    assert again.manager.restore_or_initialize() == str(tmp_path / "ckpt-40")
    assert again.step.numpy() == 40


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["data-00000-of-00001", "index"])
@pytest.mark.parametrize("damage", [truncated, flipped, pathlib.Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, part):
    Small(tmp_path).save_at(10, 20, 30)
    damage(tmp_path / f"ckpt-30.{part}")
    said = []
    recover(str(tmp_path), said.append)
    small = Small(tmp_path)
    small.manager.restore_or_initialize()
    assert small.step.numpy() == small.values.numpy()[-1] == 20
    if part == "index" and damage is pathlib.Path.unlink:  # the same as an unfinished checkpoint
        assert not said and saved_step(str(tmp_path)) == 20
    else:
        assert len(said) == 1 and "Checkpoint ckpt-30 is damaged (" in said[0]
        assert (tmp_path / "damaged").is_dir() and files(tmp_path / "damaged")
    small.save_at(30)
    assert (
        saved_steps(str(tmp_path)) == [10, 20, 30]
        and manager.read_error(str(tmp_path / "ckpt-30")) is None
    )


def test_a_folder_of_unreadable_checkpoints_is_refused(tmp_path):
    Small(tmp_path).save_at(10, 20)
    for path in tmp_path.glob("*.data*"):
        truncated(path)
    before = files(tmp_path)
    with pytest.raises(InputError, match="none of the checkpoints .* can be read.*ckpt-20"):
        recover(str(tmp_path), print)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["run.data-1", "a.index.new/run"])
def test_a_folder_may_be_called_as_a_part_of_a_checkpoint(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    Small(folder).save_at(10, 20)
    recover(str(folder), pytest.fail)
    assert saved_steps(str(folder)) == [10, 20] and len(files(folder)) == 4


def test_files_of_a_killed_run_are_removed(tmp_path):
    Small(tmp_path).save_at(10)
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving/ckpt-20.index").write_text("half")
    (tmp_path / "ckpt-20.data-00000-of-00001").write_text("half")
    (tmp_path / "ckpt-20.index.new").write_text("half")
    recover(str(tmp_path), pytest.fail)
    assert files(tmp_path) == ["ckpt-10.data-00000-of-00001", "ckpt-10.index"]


def test_a_checkpoint_with_other_variables_is_refused(tmp_path):
    Small(tmp_path, more=tf.Variable(1.0)).save_at(10)
    with pytest.raises(InputError, match="of another model or version"):
        Small(tmp_path).manager.restore_or_initialize()
    Small(tmp_path / "less").save_at(10)
    with pytest.raises(InputError, match="of another model or version"):
        Small(tmp_path / "less", more=tf.Variable(1.0)).manager.restore_or_initialize()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; skips the test if it cannot be mounted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_raises_save_failed_and_keeps_earlier_checkpoints(small_disk):
    small = Small(small_disk).save_at(10, 20)
    with pytest.raises(SaveFailed) as error:
        small.save_at(30)
    assert "step 30 could not be written (No space left on device)" in str(error.value)
    assert "the last good one is of step 20" in str(error.value)
    assert len(files(small_disk)) == 4 and not (small_disk / ".saving").exists()
    again = Small(small_disk)
    again.manager.restore_or_initialize()
    assert again.values.numpy()[0] == 20
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    assert saved_steps(again.save_at(30).folder) == [10, 20, 30]


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path):
    small = Small(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SaveFailed, match=r"could not be written \(File too large\); there is"):
            small.save_at(10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


ACCURACY = Metric("accuracy", "count", higher_is_better=True)
LOSS = Metric("the_loss", "count", higher_is_better=False)


def test_a_worker_whose_temporary_folder_is_full_names_it(tmp_path, monkeypatch):
    small = Small(tmp_path / "run")
    small.manager._scratch = str(tmp_path / "worker-1/scratch")

    def full(step, options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(small.manager, "_write", full)
    with pytest.raises(SaveFailed) as error:
        small.save_at(10)
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/worker-1/scratch: the checkpoint of step 10 could not be")
    assert "or set TMPDIR to a folder on another one; the same command resumes" in said


def test_the_best_checkpoint_is_kept(tmp_path):
    small = Small(tmp_path, keep=2)
    for step, accuracy in ((10, 0.2), (20, 0.5), (30, 0.4), (40, 0.4), (50, float("nan"))):
        small.save_at(step)
        BestCheckpoint(small.manager, ACCURACY)({"accuracy": accuracy})  # as after a resume
    assert saved_steps(str(tmp_path)) == [40, 50] and saved_steps(str(tmp_path / "best")) == [20]
    assert json.loads((tmp_path / "best/metrics.json").read_text()) == {"step": 20, "accuracy": 0.5}
    assert manager.read_error(tf.train.latest_checkpoint(tmp_path / "best")) is None
    BestCheckpoint(small.manager, LOSS)({"the_loss": 2.0})  # metrics.json does not have this metric
    BestCheckpoint(small.manager, LOSS)({"the_loss": 3.0})
    assert saved_steps(str(tmp_path / "best")) == [50]


def test_the_best_checkpoint_of_an_earlier_run_is_not_that_of_a_new_one(tmp_path):
    """After a user deleted the other checkpoints to start again."""
    BestCheckpoint(Small(tmp_path).save_at(90).manager, ACCURACY)({"accuracy": 0.9})
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()
    assert saved_steps(str(tmp_path / "best")) == [90]
    for step, accuracy in ((10, 0.2), (20, 0.3)):
        small = Small(tmp_path)
        small.manager.restore_or_initialize()
        best = BestCheckpoint(small.manager, ACCURACY)
        small.save_at(step)
        best({"accuracy": accuracy})
        assert saved_steps(str(tmp_path / "best")) == [step]


@pytest.mark.parametrize("old_step", [10, 20])
def test_a_kill_leaves_a_best_checkpoint_that_can_be_read(old_step, tmp_path, monkeypatch):
    """At any file operation; `old_step` 20: the files have the names of those they replace."""

    class Killed(BaseException):
        pass

    def kill_at(operation):
        folder = tmp_path / str(operation)
        small = Small(folder).save_at(old_step)
        BestCheckpoint(small.manager, ACCURACY)({"accuracy": 0.5})
        small.save_at(30, 20)
        counted = iter(range(99))

        def counting(function):
            def call(*arguments):
                if next(counted) == operation:
                    raise Killed
                return function(*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "link", "remove"):
                patch.setattr(manager.os, name, counting(getattr(os, name)))
            try:
                BestCheckpoint(small.manager, ACCURACY)._keep(20, {"accuracy": 0.9})
                killed = False
            except Killed:
                killed = True
        best = folder / "best"
        assert manager.read_error(tf.train.latest_checkpoint(best)) is None, operation
        # The next evaluation goes on from what is there.
        BestCheckpoint(small.manager, ACCURACY)._keep(30, {"accuracy": 1.0})
        assert saved_steps(str(best)) == [30] and not list(best.glob("*.new"))
        assert manager.read_error(str(folder / "ckpt-20")) is None
        return killed

    assert [kill_at(operation) for operation in (0, 1, 2, 3, 4, 5, 6, 7)].count(True) >= 7
    assert not kill_at(60)


def python(code, *arguments, stderr=subprocess.PIPE):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def test_a_second_run_is_refused_while_the_first_is_running(tmp_path):
    code = (
        "import sys, time; from inputs.storage.files import locked\n"
        "with locked(sys.argv[1], '--model_dir'):\n    print('held', flush=True); time.sleep(600)"
    )
    with python(code, str(tmp_path)) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by process {first.pid} on "):
            with locked(str(tmp_path), "--model_dir"):
                pass
        first.kill()
    with locked(str(tmp_path), "--model_dir", log=pytest.fail):
        assert re.match(f"process {os.getpid()} on ", (tmp_path / ".lock").read_text())


# One long call into C, during which Python handles no signals, like a loop of steps on a device.
LONG_CALL = "hashlib.pbkdf2_hmac('sha256', b'', b'', int(sys.argv[1]))"
WAITING = f"""
import hashlib, signal, sys
from training.checkpoint.interruption import Interrupted, handle_signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
try:
    with handle_signals(lambda line: print(line, flush=True)) as stop, stop.deferred():
        print('ready', flush=True)
        {LONG_CALL}
        print('done', flush=True)
except Interrupted as interrupted:
    sys.exit(interrupted.exit_status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_logged_immediately_and_raised_after_the_call(signum):
    with python(WAITING, "3000000") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    first, second = output.splitlines()
    assert first.startswith(f"{signum.name}: stopping.") and second == "done"


@pytest.mark.slow
def test_a_second_signal_ends_the_process_immediately_and_shows_the_cursor():
    terminal, stderr = pty.openpty()
    # The call would take a quarter of an hour.
    with python(WAITING, "2000000000", stderr=stderr) as process:
        os.close(stderr)
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().startswith("SIGTERM: stopping.")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "done" not in output
    with open(terminal, "rb", buffering=0) as file:
        said = file.read(10**6)
    assert b"\x1b[?25h" in said and b"SIGTERM again: stopped at once, without a checkpoint" in said


CLOSED = """
import os, signal, sys, time
from training.checkpoint.interruption import Interrupted, handle_signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
said = open(sys.argv[1], "w")
def log(line):
    print(line, file=sys.stderr, flush=True)
try:
    with handle_signals(log) as stop, stop.deferred():
        copy = os.fdopen(os.dup(2), "w")  # as a bar has one
        print("ready", flush=True)
        time.sleep(2)
        print("saved", flush=True)
        print("the bar", file=copy, flush=True)
except Interrupted as interrupted:
    print(interrupted, file=said, flush=True)
"""


def test_a_closed_terminal_stops_a_run_and_breaks_no_output(tmp_path):
    terminal, output = pty.openpty()
    command = [sys.executable, "-c", CLOSED, str(tmp_path / "said")]
    with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        os.close(output)
        assert os.read(terminal, 100).startswith(b"ready")
        os.close(terminal)
        for _ in range(2):  # as the shell and the system do
            process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
    assert process.returncode == 0 and (tmp_path / "said").read_text() == "SIGHUP\n"


def test_a_run_under_nohup_ignores_a_closed_terminal():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals(pytest.fail) as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.signum is None
    finally:
        signal.signal(signal.SIGHUP, previous)
