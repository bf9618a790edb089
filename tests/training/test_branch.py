"""Critical batch size by branching: settings of the branches, the report, and a small run."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import recipes
from inputs.errors import InputError
from training import branch
from training.checkpoint import manager
from training.monitor.progress import read_rows

SETTINGS = ("vocabulary_size=200", "sequence_length=16", "predictions=2", "max_sequence_length=16")
SETTINGS += ("evaluation_examples=32", "telemetry=false", "save_every_steps=5", "dropout=0.1")


@pytest.fixture(scope="module")
def trunk(in_process, text, tmp_path_factory):
    """A run of 10 steps of 8, with checkpoints at 5 and 10; its rate is 0 at the end."""
    folder = str(tmp_path_factory.mktemp("trunk") / "run")
    command = ["--global_batch_size=8", "--steps=10", f"--data_dir={text}", "--steps_per_loop=5"]
    command += [f"--set={setting}" for setting in SETTINGS]
    assert in_process([*command, f"--model_dir={folder}"]) == 0
    return folder


@pytest.mark.slow
def test_a_branch_has_the_runs_settings_and_its_own_batch(trunk):
    read = branch.read_trunk(trunk, 5, None)
    assert read.batch == 8 and read.step == 5
    # Its schedule: 10 steps, one of them warm-up; the last update of the loop had step 4 or 5.
    assert read.rate == pytest.approx(0.01 * 5 / 9, rel=0.3)
    command = branch.branch_command(read, 32, 320, "text.txt", "out")
    given = dict(
        part.split("=", 1) for part in command if part.startswith("--") and "set=" not in part
    )
    assert given["--steps"] == "10" and given["--vocab"] == f"{trunk}/vocab.txt"
    fields = dict(part.removeprefix("--set=").split("=", 1) for part in command if "--set=" in part)
    assert fields["init_from"] == f"{trunk}/ckpt-5" and fields["init_slots"] == "true"
    assert float(fields["peak_learning_rate"]) == pytest.approx(2 * read.rate)
    assert fields["end_learning_rate"] == fields["peak_learning_rate"]
    assert (fields["dropout"], fields["sequence_length"]) == ("0.1", "16")
    assert fields["global_batch_size"] == "32" and "measure_noise_scale" not in fields
    own = branch.branch_command(read, 8, 320, "", "out")
    assert "--set=measure_noise_scale=true" in own and "--set=accumulation=2" in own
    assert not any(part.startswith("--data_dir") for part in own)


def rows(*losses):
    return [
        {"batch": 8 * 2**k, "steps": 1, "learning_rate": 0.1, "loss": loss}
        for k, loss in enumerate(losses)
    ]


def test_the_largest_batch_that_loses_nothing():
    assert branch.critical_batch(rows(5.0, 4.99, 5.005, 5.2, 5.0), 0.01) == 32
    assert branch.critical_batch(rows(5.0, 5.011), 0.01) == 8
    assert branch.critical_batch(rows(5.0, 5.1, 4.9), 0.2) == 32
    assert branch.critical_batch(rows(5.0, float("nan")), 0.01) == 8


@pytest.mark.slow
def test_the_report(trunk):
    read = branch.read_trunk(trunk, 5, 0.1)
    text = branch.report(read, rows(5.0, 5.0, 6.0), 320, 0.01)
    assert "within 0.01 nats: 16\n" in text + "\n" and "+1.0000" in text
    assert "16 or more: no branch lost" in branch.report(read, rows(5.0, 5.0), 320, 0.01)


@pytest.mark.slow
def test_a_small_run_is_branched(trunk, text, in_process, monkeypatch, capsys, tmp_path):
    """Branches run in this process; each starts with the weights and moments of step 5."""

    monkeypatch.setattr(branch, "run_to_its_end", lambda command, path: in_process(command[2:]))
    arguments = [f"--model_dir={trunk}", "--step=5", "--batches=8,16", "--examples=64"]
    arguments += [f"--data_dir={text}", f"--output={tmp_path}/out"]
    assert branch.main(arguments) == 0
    out = capsys.readouterr().out
    assert re.search(r"Critical batch size by branching, within 0.01 nats: (8|16)", out)
    written = json.loads((tmp_path / "out" / "branches.json").read_text())
    assert [row["steps"] for row in written["branches"]] == [8, 4]
    folder = tmp_path / "out" / "step-5-64" / "batch-16"
    (step,) = manager.saved_steps(str(folder))
    key = "optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"
    assert tf.train.load_variable(str(folder / f"ckpt-{step}"), key) == 5 + 4
    rates = [row["learning_rate"] for row in read_rows(folder / "history.jsonl")]
    assert np.ptp(rates) == 0
    monkeypatch.setattr(branch, "run_to_its_end", None)  # finished branches are not run again
    assert branch.main(arguments) == 0
    # ... and not taken for those of another command.
    capsys.readouterr()
    before = (tmp_path / "out" / "branches.json").read_text()
    for more, reason in (
        (["--rate=0.5"], r"from other --rate \(0.00\d+, and now 0.5\)\. Give another --output"),
        ([f"--data_dir={text}x"], r"from other --data_dir\."),
    ):
        assert branch.main([*arguments, *more]) == 1
        error = capsys.readouterr().err
        assert re.search(f"^training.branch: --output: .*batch-8 holds .* {reason}", error)
    monkeypatch.setattr(branch, "read_file", lambda path: b"of another training")
    assert branch.main(arguments) == 1
    assert "from other weights in the checkpoint of --model_dir." in capsys.readouterr().err
    (tmp_path / "out" / "step-5-64" / "batch-8" / "branch.json").unlink()
    assert branch.main(arguments) == 1
    assert "from a run that is not known." in capsys.readouterr().err
    assert (tmp_path / "out" / "branches.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches=8"], "give at least two batch sizes"),
        (["--batches=8,x"], "give at least two batch sizes"),
        (["--batches=16,32"], "add the run's own batch size, 8"),
        (["--batches=8,16", "--step=7"], "no such checkpoint. There are: 5, 10"),
    ],
)
def test_what_cannot_be_branched_is_said_in_one_sentence(trunk, arguments, message, capsys):
    assert branch.main([f"--model_dir={trunk}", "--examples=64", *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("training.branch: --")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples=20"], "--examples=20: the largest batch, 16, needs two steps"),
        (["--examples=72"], "--examples=72 is not a multiple of the batch size 16, .* --examples="),
        (["--batches=8,12", "--examples=64"], "size 12, .* multiple of 24, such as --examples=72"),
        (["--batches=8,12", "--examples=25"], "size 8, .* multiple of 24, such as --examples=24"),
        (["--rate=-1"], "--rate must be positive and finite. Received: --rate=-1"),
        (["--rate=nan"], "--rate must be positive and finite"),
        (["--rate=inf"], "--rate must be positive and finite"),
        (["--tolerance=nan"], "--tolerance must be finite and at least 0"),
        (["--tolerance=-1"], "--tolerance must be finite and at least 0"),
    ],
)
def test_wrong_numbers_are_said_before_the_run_is_read(arguments, message, capsys):
    command = ["--model_dir=none", "--batches=8,16", "--examples=64", *arguments]
    assert branch.main(command) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def invented_trunk(folder, recipe):
    """A run without weights: a checkpoint of which only the index is there."""
    (folder / "ckpt-5.index").write_bytes(b"checksums")
    return branch.Trunk(str(folder), dataclasses.asdict(recipes.find_recipe(recipe)), 5, 0.1)


def test_a_branch_that_fails_shows_why(tmp_path, monkeypatch):
    said = "train.py: --set lanes: wrong.\nException ignored\n"
    script = f"import sys; sys.stderr.write({said!r}); sys.exit(1)"
    monkeypatch.setattr(branch, "branch_command", lambda *_: [sys.executable, "-c", script])
    trunk = invented_trunk(tmp_path, "bert-mini-demo")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.log").write_text("train.py: an earlier error\n")
    message = "^batch 64: train.py ended with status 1; see .*train.log. .* --set lanes: wrong.$"
    with pytest.raises(InputError, match=message):
        branch.run_branch(trunk, 64, 640, "", str(tmp_path / "out"))
    # Nothing was trained, so another rate may take the folder.
    trunk = dataclasses.replace(trunk, rate=0.2)
    with pytest.raises(InputError, match="ended with status 1"):
        branch.run_branch(trunk, 64, 640, "", str(tmp_path / "out"))


def test_an_interrupted_branch_saves_before_the_command_ends(tmp_path):
    """The child, like train.py, needs a moment for that, and dies of a second signal."""
    script = f"""
import signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
open("{tmp_path}/begun", "w").close()
time.sleep(60)
"""
    program = f"""
import os, signal, sys, threading, time
from inputs import process
from training import branch
def interrupt():
    while not os.path.exists("{tmp_path}/begun"):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=interrupt).start()
def main():
    with process.signals_as_interrupt():
        branch.run_to_its_end([sys.executable, "-c", {script!r}], "{tmp_path}/train.log")
process.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=branch.os.path.dirname(branch.TRAIN), check=False
    )
    assert done.returncode == 130
    assert (tmp_path / "train.log").read_text() == "saved\n"


def test_a_branch_of_other_data_is_refused(tmp_path):
    trunk = invented_trunk(tmp_path, "bert-mini-demo")
    trunk.settings["data"] = "that of the run"
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / branch.RESULTS).write_text('{"loss": 5.0}')
    (folder / branch.ORIGIN).write_text(json.dumps(branch.origin(trunk, "")))
    (folder / branch.RUN_CONFIG).write_text('{"data": "Python docstrings"}')
    with pytest.raises(InputError, match="was trained on other data than the run in"):
        branch.run_branch(trunk, trunk.batch, 512, "", str(folder), lambda line: None)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "mlperf-bert-batch-256",
            "^No noise scale: .* clips .* --set clip_each_replica=false",
        ),
        ("bert-mini-demo", "^No noise scale: .*history.jsonl has no gradient noise"),
    ],
)
def test_a_run_without_a_noise_scale_is_told_why(recipe, message, tmp_path):
    trunk = invented_trunk(tmp_path, recipe)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / branch.RESULTS).write_text('{"loss": 5.0}')
    (folder / branch.RUN_CONFIG).write_text("{}")
    (folder / branch.ORIGIN).write_text(json.dumps(branch.origin(trunk, "")))
    said = []
    row = branch.run_branch(trunk, trunk.batch, 512, "", str(folder), said.append)
    assert row["loss"] == 5.0 and "noise_scale" not in row
    assert len(said) == 1 and re.search(message, said[0])


@pytest.mark.slow
def test_where_the_rate_has_fallen_there_is_no_branch(trunk, monkeypatch):
    monkeypatch.setattr(branch, "read_rows", lambda path: [{"step": 10, "learning_rate": 0.0}])
    with pytest.raises(InputError, match="the learning rate is 0 there.*Choose an earlier"):
        branch.read_trunk(trunk, 10, None)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        branch.read_trunk(str(tmp_path), None, None)
