"""MLPerf's log: the compliance checker and the checker of convergence read what is written here."""

import json
import logging
import sys
import time

import pytest

import recipes
from inputs.errors import InputError
from inputs.storage import files
from training.monitor.mllog import MLPerfLog

checker = pytest.importorskip("mlperf_logging.compliance_checker.mlp_compliance")
convergence = pytest.importorskip("mlperf_logging.rcp_checker.rcp_checker")
LAST_RULES = {"bert": "5.0.0", "resnet": "4.0.0"}  # the last rules with these benchmarks
BERT = recipes.find_recipe("mlperf-bert-batch-256")
RESNET = recipes.find_recipe("mlperf-resnet50-batch-4096")
IMAGES = 1_281_167


def complaints(path, rules):
    """What the compliance checker finds wrong."""
    found = checker.make_checker("training", rules, quiet=False, werror=True)
    checker.enqueued_configs.clear()
    valid, *_ = checker.main(str(path), f"training_{rules}/common.yaml", found)
    messages = [*found.overwritable.values(), *found.not_overwritable]
    assert valid == (not messages)
    return messages


def write(path, recipe, evaluations, images=None):
    """Writes the log of a run that evaluates at these steps, with these accuracies."""
    log = MLPerfLog(str(path), recipe, platform="a test", seed=1, started=time.perf_counter())
    log.run_start(recipe.evaluation_examples, images)
    last = 0
    for step, accuracy in evaluations:
        with log.block(last, step):
            pass
        with log.evaluation():
            log.accuracy(accuracy)
        last = step
    log.close()
    log.close()
    return path


def events(path):
    lines = path.read_text().splitlines()
    assert all(line.startswith(":::MLLOG ") for line in lines)
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


@pytest.fixture(scope="module")
def bert_log(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "result_0.txt"
    return write(path, BERT, [(4_999, 0.6), (9_972, 0.7201)])


def test_the_log_of_a_run_that_reaches_its_target_passes(bert_log, tmp_path):
    assert complaints(bert_log, LAST_RULES["bert"]) == []
    resnet = write(tmp_path / "log", RESNET, [(1_251, 0.3), (12_511, 0.7595)], IMAGES)
    assert complaints(resnet, LAST_RULES["resnet"]) == []
    by_key = {event["key"]: event for event in events(resnet)}
    assert by_key["eval_accuracy"]["metadata"]["epoch_num"] == pytest.approx(40.0, abs=0.01)
    assert by_key["lars_opt_learning_rate_warmup_epochs"]["value"] == pytest.approx(5, abs=0.01)


def test_the_events_are_in_the_order_of_the_run(bert_log):
    keys = [event["key"] for event in events(bert_log)]
    order = "init_start init_stop run_start block_start block_stop eval_start eval_accuracy "
    order += "eval_stop block_start block_stop eval_start eval_accuracy eval_stop train_samples "
    order += "run_stop"
    assert [key for key in keys if key in order.split()] == order.split()
    by_key = {event["key"]: event for event in events(bert_log)}
    assert by_key["opt_lamb_beta_2"]["value"] == 0.999
    assert by_key["train_samples"]["value"] == 9_972 * 256
    assert by_key["run_stop"]["metadata"]["status"] == "success"
    times = [event["time_ms"] for event in events(bert_log) if event["key"] in order.split()]
    assert times == sorted(times)


def test_a_log_on_object_storage_is_the_same(ram, tmp_path):
    """Each line is there at once, and a log that exists is refused."""
    local = write(tmp_path / "log", BERT, [(9_972, 0.7201)])
    log = MLPerfLog(f"{ram}/log", BERT, platform="a test", seed=1, started=time.perf_counter())
    assert b'"cache_clear"' in files.read_file(f"{ram}/log")
    log.close()
    assert not files.exists(f"{ram}/log")  # of a run that did not begin
    write(f"{ram}/log", BERT, [(9_972, 0.7201)])
    (tmp_path / "copy").write_bytes(files.read_file(f"{ram}/log"))
    keys = [[event["key"] for event in events(path)] for path in (local, tmp_path / "copy")]
    assert keys[0] == keys[1] and complaints(tmp_path / "copy", LAST_RULES["bert"]) == []
    with pytest.raises(InputError, match=r"cannot be created \(File exists\)"):
        write(f"{ram}/log", BERT, [(9_972, 0.7201)])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace("opt_lamb_beta_2", "opt_lamb_beta_two"), "opt_lamb_beta_2"),
        (lambda text: text.replace("0.7201", "0.7101"), "0.720"),
        (lambda text: text[: text.rindex(":::MLLOG")], "run_stop"),
        (lambda text: text.replace('"key": "init_stop"', '"key": "init_stopped"'), "init_stop"),
        (lambda text: text.replace('"value"', '"worth"', 1), "parsing errors"),
        (lambda text: "no log\n", "No log lines"),
    ],
    ids=["no beta", "below the target", "cut off", "no init_stop", "a broken line", "no log"],
)
def test_a_damaged_log_does_not_pass(bert_log, tmp_path, damage, said):
    path = tmp_path / "result_0.txt"
    path.write_text(damage(bert_log.read_text()))
    try:
        messages = complaints(path, LAST_RULES["bert"])
    except KeyError as error:  # the checker itself stops at a line without a value
        messages = [f"parsing errors: {error}"]
    assert any(said in message for message in messages)


def run_set(folder, recipe, steps, **arguments):
    """Ten runs that reach the target at these steps."""
    folder.mkdir()
    for number, step in enumerate(steps):
        write(folder / f"result_{number}.txt", recipe, [(step, 0.721)], **arguments)
    return convergence.check_directory(
        str(folder), "training", LAST_RULES["bert"], False, False, rcp_pass="full_rcps"
    )


def test_the_checker_of_convergence_reads_a_set_of_logs(tmp_path, caplog):
    """2.55 million sequences are the reference's mean at batch 256; 2.0 million are too few."""
    caplog.set_level(logging.INFO)
    around = [9_972 + 200 * k for k in range(-5, 5)]
    assert run_set(tmp_path / "as_the_reference", BERT, around)[:2] == (True, "RCP found")
    assert run_set(tmp_path / "too_fast", BERT, [k - 2_000 for k in around])[0] is False
    smaller = recipes.resized(BERT, global_batch_size=300)
    passed, message, _ = run_set(tmp_path / "between", smaller, [8_500 + k for k in range(10)])
    assert (passed, message) == (True, "RCP Interpolation")
    damaged = tmp_path / "as_the_reference"
    for number in range(2):
        path = damaged / f"result_{number}.txt"
        path.write_text(path.read_text().replace('"success"', '"aborted"'))
    assert convergence.check_directory(
        str(damaged), "training", LAST_RULES["bert"], False, False, rcp_pass="full_rcps"
    )[:2] == (False, "Insufficient convergence")


SMALL = (
    *("--global_batch_size=8", "--steps=12", "--set=vocabulary_size=200", "--seed=3"),
    *("--set=sequence_length=16", "--set=predictions=2", "--set=max_sequence_length=16"),
    *("--set=evaluation_examples=32", "--set=evaluate_every_examples=40", "--set=telemetry=false"),
)


@pytest.mark.slow
def test_the_log_of_a_small_run(in_process, text, tmp_path, capsys):
    """It passes but for the accuracy, which only a full run reaches."""
    run = [*SMALL, f"--data_dir={text}", "--model_dir=run", "--mllog=logs/result_0.txt"]
    assert in_process([*run, "--set=target=0.72"]) == 0
    log = tmp_path / "logs" / "result_0.txt"
    (message,) = complaints(log, LAST_RULES["bert"])
    assert "v['value'] >= 0.720" in message
    found = events(log)
    accuracies = [event for event in found if event["key"] == "eval_accuracy"]
    assert [event["metadata"]["samples_count"] for event in accuracies] == [40, 80, 96]
    assert found[-1]["metadata"]["status"] == "aborted"
    with open("run/evaluations.jsonl") as file:
        values = [json.loads(line)["masked_accuracy"] for line in file]
    assert [event["value"] for event in accuracies] == pytest.approx(values)
    for arguments, said in (
        ([*run, "--set=target=0.72"], "run holds a run at step 12, and MLPerf's log is of one"),
        ([*run, "--model_dir=other", "--set=target=0.72"], "cannot be created (File exists)"),
        ([*run, "--model_dir=other", "--mllog=new"], "Give one, such as --set target=0.72"),
        ([*run, "--model_dir=other", "--mllog=new", "--dry_run"], "a dry run trains no model"),
        (["--recipe=bert-mini", "--mllog=new", "--set=target=1"], "have one phase. Received: 2"),
        (["--recipe=cifar10-adamw-128", "--mllog=new"], "Received: resnet with adamw"),
    ):
        assert in_process(arguments) == 1
        error = capsys.readouterr().err
        assert said in error and error.strip().splitlines()[-1].startswith("train.py: --mllog")
    assert not (tmp_path / "new").exists()


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlperf_logging.mllog.mllog", None)
    with pytest.raises(InputError, match="pip install mlperf-logging"):
        MLPerfLog(str(tmp_path / "log"), BERT, platform="-", seed=1, started=0.0)
