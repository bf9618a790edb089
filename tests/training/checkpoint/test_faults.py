"""Runs of train.py in which something fails: they resume, and the message says what failed."""

import json
import os
import pathlib
import signal
import subprocess

import pytest
import tensorflow as tf

from tasks.bert import BertPretraining
from training.checkpoint.manager import saved_steps
from training.monitor.progress import read_rows
from training.run import Run

ROOT = pathlib.Path(__file__).parents[3]
SYNTHETIC = ["--synthetic", "--global_batch_size=8", "--steps_per_loop=5"]
SETTINGS = {
    "model": "tiny",
    "vocabulary_size": 60,
    "max_sequence_length": 16,
    "sequence_length": 16,
    "predictions": 2,
    "evaluation_examples": 32,
}


def flags(*more, **settings):
    pairs = (SETTINGS | settings).items()
    return [*SYNTHETIC, *more, *(part for k, v in pairs for part in ("--set", f"{k}={v}"))]


def state(model_dir, step):
    """Returns name -> bytes of all tensors in a checkpoint."""
    reader = tf.train.load_checkpoint(os.path.join(model_dir, f"ckpt-{step}"))
    names = reader.get_variable_to_shape_map()
    return {n: tf.io.serialize_tensor(reader.get_tensor(n)).numpy() for n in names if n[0] != "_"}


def losses(model_dir):
    return [(row["step"], row["loss"]) for row in read_rows(f"{model_dir}/history.jsonl")]


def stopping(owner, name, monkeypatch):
    """Patches the method `name` of `owner` to raise SIGTERM before it runs."""
    original = getattr(owner, name)

    def method(*arguments, **named):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, method)


@pytest.fixture
def no_export(monkeypatch):
    """Skips the export, which takes time."""
    monkeypatch.setattr(BertPretraining, "export", lambda *unused: None)


@pytest.mark.slow
def test_interruptions_at_bad_moments_change_no_result(
    in_process, capfd, tmp_path, monkeypatch, text
):
    """In an evaluation, at the start of a training loop, and in the export."""
    more = {"vocabulary_size": 300, "phase2.sequence_length": 32, "max_sequence_length": 32}
    more |= {"evaluate_every_steps": 10, "save_every_steps": 5, "compute_dtype": "float32"}
    given = flags("--recipe=bert-large-32k", "--steps=20", f"--data_dir={text}", **more)
    given.remove("--synthetic")
    given.append("--steps_per_loop=10")
    with monkeypatch.context() as patch:
        patch.setattr(BertPretraining, "export", lambda *unused: None)
        assert in_process([*given, f"--model_dir={tmp_path}/whole"]) == 0
    capfd.readouterr()
    for owner, name, saved in (
        (Run, "_evaluate_batch", 10),
        (Run, "train", 18),  # the first loop after resuming, which ends with the first phase
        (tf.saved_model, "save", 20),
    ):
        with monkeypatch.context() as patch:
            stopping(owner, name, patch)
            assert in_process([*given, f"--model_dir={tmp_path}/cut"]) == 143
            said = capfd.readouterr().err
            assert "SIGTERM: stopping." in said and "Traceback" not in said
            assert f"SIGTERM: saved step {saved} of 20" in said
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ours, theirs = (read_rows(tmp_path / run / "evaluations.jsonl") for run in ("cut", "whole"))
    assert ours == theirs and [row["step"] for row in ours] == [10, 18, 20]
    assert state(tmp_path / "cut", 20) == state(tmp_path / "whole", 20)
    assert not list((tmp_path / "cut").glob("*export*"))


@pytest.mark.slow
def test_a_full_disk_is_reported_in_one_line_and_the_run_resumes_after_it(
    in_process, capfd, tmp_path, no_export
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        arguments = flags("--steps=20", f"--model_dir={disk}/run", save_every_steps=5)
        assert in_process(arguments) == 1
        said = [line for line in capfd.readouterr().err.splitlines() if "train.py:" in line]
        assert len(said) == 1 and "No space left on device" in said[0]
        assert "the checkpoint of step 15 could not be written" in said[0]
        assert saved_steps(f"{disk}/run") == [5, 10]
        assert not (disk / "run/.saving").exists()
        subprocess.run(["mount", "-o", "remount,size=99m", disk], check=True)
        assert in_process(arguments) == 0
        assert "Going on from step 10 of 20" in capfd.readouterr().err
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert in_process(arguments) == 1
        assert "cannot be written (Read-only file system)" in capfd.readouterr().err
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_run_that_diverges_rolls_back_with_a_lower_rate(in_process, capfd, tmp_path, no_export):
    """The learning rate is 1e30 times too high before the rollback, and right after it."""
    arguments = flags(
        "--steps=30",
        f"--model_dir={tmp_path}/run",
        peak_learning_rate=1e28,
        warmup_steps=0,
        max_skipped_in_row=3,
        on_divergence="rollback",
        rollback_rate_factor=1e-30,
    )
    assert in_process(arguments) == 0
    said = capfd.readouterr().err
    assert (
        said.count("Going back to step 0 with the learning rate times 1e-30 (rollback 1 of 3)") == 1
    )
    rows = read_rows(f"{tmp_path}/run/history.jsonl")
    assert [row["step"] for row in rows] == list(range(5, 31, 5))
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["skipped_steps"] == 0
    reader = tf.train.load_checkpoint(f"{tmp_path}/run/ckpt-30")
    kept = [
        reader.get_tensor(f"state/{n}/.ATTRIBUTES/VARIABLE_VALUE")
        for n in ("step", "rate_factor", "rollbacks")
    ]
    assert kept == [30, tf.constant(1e-30).numpy(), 1]
    recipe = json.loads(reader.get_tensor("settings/.ATTRIBUTES/py_state"))
    assert recipe["name"] == "bert-mini-demo" and recipe["seed"] == 1


def test_damaged_text_stops_the_run_if_asked(in_process, capfd, tmp_path, text):
    content = bytearray(text.read_bytes())
    place = len(content) // 2
    content[place] = 0xFF
    line = content[:place].count(b"\n") + 1
    (tmp_path / "a.txt").write_bytes(content)
    arguments = [f"--data_dir={tmp_path}/a.txt", f"--model_dir={tmp_path}/run"]
    assert in_process([*arguments, "--set", "on_bad_record=fail"]) == 1
    said = capfd.readouterr().err
    assert f"a.txt, line {line}, byte {place}: not UTF-8" in said and "on_bad_record=skip" in said
    assert in_process(arguments) == 1
    assert "1 of 400 records are damaged, more than the share of 0.001" in capfd.readouterr().err
    assert not saved_steps(f"{tmp_path}/run")
