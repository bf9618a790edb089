"""train.py end to end on a few kilobytes of text, and its messages for users' mistakes."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import pytest
import tensorflow as tf

from export.saved_model import ClientFailed
from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS
from recipes import find_recipe
from training.checkpoint.interruption import Interrupted
from training.checkpoint.manager import saved_step
from training.monitor import plot
from training.monitor.divergence import Diverged
from training.monitor.progress import read_rows

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
SMALL = (f"--steps={STEPS}", "--steps_per_loop=10", "--global_batch_size=16")
SMALL += ("--set", "vocabulary_size=300", "--set", "evaluate_every_steps=30")


def command(*arguments):
    return [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]


def train(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd="/")


@pytest.fixture(scope="module")
def whole_run(text, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    result = train(f"--data_dir={text}", f"--model_dir={folder}", *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result


def test_the_loss_falls_and_the_report_says_what_was_done(whole_run, text):
    folder, result = whole_run
    losses = [float(loss) for loss in re.findall(r"step .* loss (\d+\.\d+)", result.stderr)]
    assert losses[-1] < losses[0] - 1
    assert "InitializeLog" not in result.stderr and "Compiled cluster" not in result.stderr
    for said in ("masked-token accuracy", "most frequent token", "examples/s", str(text)):
        assert said in result.stdout
    assert str(folder / "export") in result.stdout and "[MASK]" in result.stdout
    metrics = json.loads((folder / "results.json").read_text())
    assert metrics["masked_accuracy"] > metrics["frequent_token"]
    assert list((folder / "train").glob("events*")) and list((folder / "eval").glob("events*"))
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["vocabulary_size"], recipe["phases"][0]["steps"]) == (300, STEPS)


def run_until(arguments, path, stop, log):
    """Sends train.py a signal as soon as `path` exists; returns (exit status, its log)."""
    with (
        open(log, "w") as file,
        subprocess.Popen(command(*arguments), stderr=file, stdout=subprocess.DEVNULL) as process,
    ):
        while process.poll() is None and not path.exists():
            time.sleep(0.02)
        process.send_signal(stop)
    return process.returncode, log.read_text()


def tensors(folder):
    """Returns name -> bytes of the weights and slots in the last checkpoint."""
    reader = tf.train.load_checkpoint(str(folder / f"ckpt-{STEPS}"))
    names = (name for name in reader.get_variable_to_shape_map() if name[0] not in "_s")
    return {name: reader.get_tensor(name).tobytes() for name in names}


@pytest.mark.slow
@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_is_saved_by_ctrl_c(text, tmp_path):
    """`train.py 2>&1 | tee log`: Ctrl-C ends tee, too."""
    arguments = (f"--data_dir={text}", f"--model_dir={tmp_path}/run", *SMALL)
    asked = command(*arguments, "--set", "save_every_steps=1000", "--steps=6000")
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(asked, text=True, **pipe) as child:
        for line in child.stdout:
            if line.startswith("step 10/"):
                break
        child.stdout.close()
        child.send_signal(signal.SIGINT)
        assert child.wait() == 130
    assert saved_step(tmp_path / "run") >= 10


def test_an_export_into_a_mount_point_is_refused(in_process, capfd, monkeypatch, tmp_path):
    """The export replaces its folder, which a mount point does not allow."""
    monkeypatch.setattr(os.path, "ismount", lambda path: path == f"{tmp_path}/mounted")
    (tmp_path / "mounted").mkdir()
    place = [f"--model_dir={tmp_path}/run", f"--export_dir={tmp_path}/mounted"]
    assert in_process(["--synthetic", *place, *SMALL]) == 1
    assert f"--export_dir: {tmp_path}/mounted is a mount point" in capfd.readouterr().err
    assert not list(tmp_path.glob("run/ckpt*"))


def test_an_interrupted_killed_and_damaged_run_matches_a_whole_run(whole_run, text, tmp_path):
    """After SIGINT, kill -9 and a truncated checkpoint, all results are bit-identical."""
    folder, log = tmp_path / "run", tmp_path / "said"
    arguments = (f"--data_dir={text}", f"--model_dir={folder}", *SMALL)
    arguments += ("--set", "save_every_steps=10", "--set", "keep_checkpoints=9")
    status, said = run_until(arguments, folder / "ckpt-10.index", signal.SIGINT, log)
    first = saved_step(folder)
    assert status == 130 and 10 <= first < STEPS
    assert f"SIGINT: saved step {first} of" in said and "Traceback" not in said
    status, said = run_until(arguments, folder / f"ckpt-{first + 10}.index", signal.SIGKILL, log)
    assert status == -signal.SIGKILL and f"Going on from step {first} of {STEPS}" in said
    second = saved_step(folder)
    data = folder / f"ckpt-{second}.data-00000-of-00001"
    os.truncate(data, data.stat().st_size // 2)
    again = train(*arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"Checkpoint ckpt-{second} is damaged" in again.stderr
    assert f"Going on from step {second - 10} of {STEPS}" in again.stderr
    ours, theirs = (
        [(row["step"], row["loss"]) for row in read_rows(run / "history.jsonl")]
        for run in (folder, whole_run[0])
    )
    assert ours == theirs and tensors(folder) == tensors(whole_run[0])


def test_the_history_is_plotted(whole_run, tmp_path, capfd):
    folder, _ = whole_run
    lines = (folder / "history.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(10, STEPS + 1, 10))
    draw = [sys.executable, "-m", "training.monitor.plot"]
    drawn = subprocess.run([*draw, folder, folder], cwd=ROOT, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert (folder / "history.png").read_bytes().startswith(b"\x89PNG")
    assert plot.main([str(tmp_path)]) == 1
    assert "has no history.jsonl" in capfd.readouterr().err


def test_a_finished_run_is_not_trained_again(whole_run, text, in_process, capfd):
    folder, first = whole_run
    results = json.loads((folder / "results.json").read_text())
    assert results["examples_per_second"] > 0
    assert in_process([f"--data_dir={text}", f"--model_dir={folder}", *SMALL]) == 0
    again = capfd.readouterr()
    assert "loss" not in again.err and "nothing was left to train" in again.out
    held_out = re.compile("Held out.*")
    assert held_out.search(again.out)[0] == held_out.search(first.stdout)[0]
    assert json.loads((folder / "results.json").read_text()) == results


def test_a_model_dir_with_other_settings_is_refused_and_unchanged(
    whole_run, text, in_process, capfd
):
    folder, _ = whole_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    other = ["--set", "weight_decay=0.5"]
    assert in_process([f"--data_dir={text}", f"--model_dir={folder}", *SMALL, *other]) == 1
    said = capfd.readouterr().err
    assert "weight_decay 0.01 (now 0.5)" in said and "Traceback" not in said
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stray"], "'stray' is not a flag"),
        (["--seed=-1"], "--seed must lie in"),
        (["--set", "task=foo"], "no field is called 'task'"),
        (["--synthetic", "--set", "vocabulary_size=3"], "vocabulary_size must be at least 6"),
        (
            ["--synthetic", "--export_dir=/proc/none/x"],
            "--export_dir: /proc/none cannot be written",
        ),
        (["--synthetic", "--export_dir=@ROOT"], "exists and is not a SavedModel"),
        (["--synthetic", "--export_dir=@MODEL/.."], "contains --model_dir"),
        (["--data_dir=@LATIN1", "--vocab=@VOCAB"], "line 1, byte 3: not UTF-8"),
        (["--model_dir="], "variable is not set. Give a value, or leave out --model_dir."),
        (["--tpu="], "--tpu is empty"),
        (["--data_dir= "], "--data_dir is empty"),
        (["--data_dir=gs:/b/x"], "--data_dir: gs:/b/x has one slash after its scheme"),
        (["--set", "init_from=file://b/x"], "--set: file://b/x has two slashes after file:"),
        (["--preflight="], "--preflight is empty"),
        (["--set="], "--set is empty"),
        (["--connect_seconds=0"], "--connect_seconds must lie in (0, 1000000]"),
        (["--connect_seconds=nan"], "--connect_seconds must lie in (0, 1000000]"),
        (["--set", "learning_rate=1"], "Did you mean 'peak_learning_rate'?"),
        (["--recipe=bert-mini-dem"], "Did you mean 'bert-mini-demo'"),
        (["--set", "weight_decai=1"], "Did you mean 'weight_decay'"),
        (
            ["--set", "weight_decay=-1", "--synthetic"],
            "`weight_decay` must be a number",
        ),
        (["--set", "peak_learning_rate=0", "--synthetic"], "`peak_learning_rate` must be"),
        (["--set", "sequence_length=128"], "beyond the position table"),
        (["--set", "packing=loose"], "packing must be one of pairs, full-sentences"),
        (["--set", "model=huge"], "no such size. Sizes: tiny"),
        (["--set", "compute_dtype=int8"], "compute_dtype must be one of float32, bfloat16"),
        (["--set", "predictions=99"], "predictions must lie in [1, sequence_length)"),
        (["--steps=0"], "--steps must be at least 1"),
        (["--steps=99999999999999999999"], "--steps must be below 2**31. Received: --steps=9"),
        (["--set", "steps=99999999999999999999"], "--set: steps must be below 2**31"),
        (["--set", "target=nan"], "--set: target must be finite. Received: target=nan."),
        (["--set", "target=-1"], "--set: target must be at least 0"),
        (["--set", "l2_regularization=inf"], "--set: l2_regularization must be finite"),
        (["--set", "initializer_stddev=-1"], "--set: initializer_stddev must be at least 0"),
        (["--scaling=sqrt"], "--scaling=sqrt needs the batch size to scale to"),
        (["--scaling=cubic", "--global_batch_size=8"], "--scaling: rule must be one of sqrt"),
        (
            ["--recipe=bert-large-32k", "--scaling=sqrt", "--global_batch_size=262144"],
            "--scaling: global_batch_size=262144 leaves 1758 steps for phase 1",
        ),
        (["--set", "optimizer=adam"], "optimizer must be one of lamb, lars, adamw"),
        (
            ["--set", "optimizer=adamw", "--set", "variant=nvlamb"],
            "optimizer=adamw does not take variant",
        ),
        (["--set", "variant=nvlam", "--synthetic"], "`variant` must be one of"),
        (["--set", "profile=110:100"], 'profile must be "first:last"'),
        (["--steps=50", "--set", "profile=10:60"], "profile must end within the 50 steps"),
        (["--tpu=local"], "--tpu=local: this TensorFlow has no TPU support"),
        (["--data_dir=/nowhere/*.txt"], "'/nowhere/*.txt' does not exist, or holds no text"),
        (["--vocab=/nowhere/vocab.txt", "--data_dir=@TEXT"], "--vocab: /nowhere/vocab.txt"),
        (["--synthetic", "--model_dir=/proc/none"], "--model_dir: /proc/none cannot be written"),
        (["--synthetic", "--model_dir=/tmp/a [1]/b"], "cannot read checkpoints from /tmp/a [1]/b"),
        (["--synthetic", "--model_dir=/tmp/a\\b"], "takes brackets and backslashes in a path for"),
    ],
)
def test_a_mistake_is_reported_in_one_line(arguments, said, text, tmp_path, capfd, in_process):
    (tmp_path / "latin1.txt").write_bytes("caf\xe9\n\n".encode("latin-1") * 9)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "c", "##a", "##f"]))
    places = {"@TEXT": text, "@ROOT": ROOT, "@MODEL": tmp_path / "run"}
    places |= {"@LATIN1": tmp_path / "latin1.txt", "@VOCAB": tmp_path / "vocab.txt"}
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    if not any(a.startswith("--model_dir") for a in arguments):
        arguments.append(f"--model_dir={tmp_path}/run")
    assert in_process(arguments) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.glob("run/ckpt*"))


@pytest.mark.slow
def test_a_dry_run_trains_and_exports_but_keeps_no_files(tmp_path, in_process, capfd, monkeypatch):
    monkeypatch.setattr("inputs.memory.free_memory", lambda: 2**20)  # as in a small container
    model_dir = tmp_path / "run"
    asked = ["--dry_run", "--synthetic", f"--model_dir={model_dir}", *SMALL]
    assert in_process([*asked, "--set", "telemetry=true", "--set", "profile=10:20"]) == 0
    said = capfd.readouterr()
    assert "step 2/2" in said.err and "Traceback" not in said.err
    assert "0.00 GiB of memory are free" in said.err and "a small run needs 1.00 GiB" in said.err
    assert "each step's gradients alone needs 0.00 GiB" in said.err
    assert "no file is kept" in said.out and re.search(r"SavedModel \d", said.out)
    assert not model_dir.exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Interrupted(signal.SIGTERM), "SIGTERM: the dry run was stopped; it keeps no files"),
        (Diverged("no"), "train.py: no; a dry run keeps none. Lower --set peak_learning_rate or"),
    ],
)
def test_a_dry_run_that_ends_early_names_no_checkpoint(error, said, in_process, capfd, monkeypatch):
    import train as program

    monkeypatch.setattr(program, "train", mock.Mock(side_effect=error))
    assert in_process(["--dry_run", "--synthetic", *SMALL]) in (128 + signal.SIGTERM, 3)
    err = capfd.readouterr().err
    assert said in err and "goes on" not in err and "newest checkpoint" not in err


@pytest.mark.parametrize(
    "error",
    [
        ClientFailed("it ended with exit status 1"),
        OSError(28, "No space left on device"),
        UnicodeEncodeError("ascii", "\u4e2d", 0, 1, "ordinal not in range"),
    ],
)
def test_a_finished_run_without_its_examples_is_reported(error, in_process, tmp_path, capfd):
    import train as program

    def fail(export_dir):
        raise error

    task = types.SimpleNamespace(
        example_unit="examples", data="data", describe=str, demonstrate=fail
    )
    progress = types.SimpleNamespace(examples_per_second=1.0, describe_speed=lambda: "1 example/s")
    run = types.SimpleNamespace(
        task=task,
        recipe=find_recipe("bert-mini-demo"),
        progress=progress,
        model=types.SimpleNamespace(trainable_variables=[]),
        strategy=types.SimpleNamespace(num_replicas_in_sync=1),
        steps_done=1,
    )
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "history.png").mkdir()
    program.report(run, {"loss": 1.0}, str(tmp_path), "exported")
    said = capfd.readouterr()
    assert "SavedModel exported" in said.out
    assert "its picture could not be drawn: [Errno 21] Is a directory" in said.err
    assert said.err.endswith(
        "train.py: the run is complete, but export.client could not show examples of the "
        f"SavedModel: {error}\n"
    )
    assert json.loads((tmp_path / "results.json").read_text())["loss"] == 1.0


def test_too_little_memory_or_a_folder_in_the_way_is_one_sentence(
    in_process, monkeypatch, capfd, tmp_path
):
    from training import strategy

    for error, said in (
        (
            tf.errors.ResourceExhaustedError(None, None, "OOM when allocating\nmore"),
            "out of memory (OOM when allocating). Add --set accumulation=2 or more",
        ),
        (MemoryError(), "out of memory. Add --set accumulation=2 or more"),
        (
            IsADirectoryError(21, "Is a directory", f"{tmp_path}/results.json"),
            f"{tmp_path}/results.json: Is a directory. Checkpoints that were saved are complete",
        ),
    ):

        def fail(tpu, error=error):
            raise error

        monkeypatch.setattr(strategy, "connect", fail)
        assert in_process(["--synthetic", f"--model_dir={tmp_path}"]) == 1
        assert capfd.readouterr().err.startswith(f"train.py: {said}")
    # In the default folder, also as an absolute path.
    for path in ("runs/bert-mini-demo/history.jsonl", os.path.abspath("runs/x/export/old")):

        def refuse(tpu, path=path):
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(strategy, "connect", refuse)
        assert in_process(["--synthetic"]) == 1
        said = f"train.py: {path}: Permission denied. Checkpoints that were saved are complete"
        assert capfd.readouterr().err.startswith(said)


def test_other_text_in_the_same_model_dir_is_refused(whole_run, text, tmp_path, in_process, capfd):
    """The vocabulary is read from model_dir, so only the hash of the data shows the change."""
    folder, _ = whole_run
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("cat", "cow"))
    assert in_process([f"--data_dir={other}", f"--model_dir={folder}", *SMALL]) == 1
    said = capfd.readouterr().err
    assert f"train.py: --model_dir: {folder} holds a run with other settings: data" in said


def test_a_run_beyond_the_requested_steps_is_refused(whole_run, text, in_process, capfd):
    folder, _ = whole_run
    shorter = [argument.replace(f"steps={STEPS}", "steps=10") for argument in SMALL]
    assert in_process([f"--data_dir={text}", f"--model_dir={folder}", *shorter]) == 1
    assert f"a run at step {STEPS}, beyond the 10 steps" in capfd.readouterr().err


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(in_process, capfd, tmp_path):
    huge = ["--set", "peak_learning_rate=1e30", "--set", "warmup_steps=0"]
    small = ["--synthetic", "--steps=20", "--steps_per_loop=5", "--global_batch_size=8"]
    assert in_process([*small, *huge, f"--model_dir={tmp_path}/run"]) == 3
    said = capfd.readouterr().err
    assert "the gradients were not finite in 11 steps in a row, up to step" in said
    assert "not finite in " in said and "word_embeddings/embeddings" in said
    assert "the newest checkpoint is from step 0" in said
    assert not list(tmp_path.glob("run/ckpt*"))


def test_an_indivisible_batch_size_is_refused_with_a_suggestion(
    in_process, capfd, monkeypatch, mirrored, tmp_path
):
    from training import strategy

    monkeypatch.setattr(strategy, "connect", lambda tpu: mirrored)
    arguments = ["--global_batch_size=15", "--synthetic", f"--model_dir={tmp_path}/run"]
    assert in_process(arguments) == 1
    assert "not divisible by the 2 replicas of this run. Use 14" in capfd.readouterr().err


@pytest.mark.slow
def test_adamw_with_a_scaled_recipe(in_process, capfd, tmp_path):
    """recipe.json has the changes of --scaling and --set optimizer."""
    small = ["--synthetic", "--steps=4", "--steps_per_loop=2", "--set", "vocabulary_size=100"]
    scaled = ["--global_batch_size=16", "--scaling=sqrt", "--set", "optimizer=adamw"]
    assert in_process([*small, *scaled, f"--model_dir={tmp_path}/run"]) == 0
    assert "step 4/4" in capfd.readouterr().err
    recipe = json.loads((tmp_path / "run/recipe.json").read_text())
    (phase,) = recipe["phases"]
    assert (recipe["optimizer"], phase["global_batch_size"], phase["steps"]) == ("adamw", 16, 4)
    assert phase["peak_learning_rate"] == 0.01 / 2  # the demo's, whose batch is 64


@pytest.mark.slow
def test_two_phases_on_two_replicas_with_synthetic_data(
    in_process, capfd, monkeypatch, mirrored, tmp_path
):
    """A shortened version of the paper's two-phase recipe runs on a MirroredStrategy."""
    from training import strategy

    monkeypatch.setattr(strategy, "connect", lambda tpu: mirrored)
    small = {
        "model": "tiny",
        "vocabulary_size": 100,
        "max_sequence_length": 32,
        "predictions": 4,
        "phase1.sequence_length": 16,
        "phase2.sequence_length": 32,
    }
    changes = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    flags = ["--recipe=bert-large-32k", "--synthetic", "--steps=20", "--global_batch_size=8"]
    assert in_process([*flags, *changes, f"--model_dir={tmp_path}/run", "--steps_per_loop=5"]) == 0
    captured = capfd.readouterr()
    assert "on 2 replicas: " in captured.out and "step 20/20" in captured.err
    assert (tmp_path / "run/ckpt-20.index").exists()
