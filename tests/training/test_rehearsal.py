"""The rehearsal of a pod: real hosts on loopback, and what it finds wrong."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from pictures import prepared

import recipes
from inputs.bad_records import BadRecords
from inputs.damage import scratch_folder
from inputs.errors import InputError
from inputs.order import Order, row_batches, with_one_graph
from inputs.text.prepare import prepare_in_cache
from tasks import TASKS
from training import input_graph, rehearsal

ROOT = pathlib.Path(__file__).parents[2]
ONE = tf.distribute.InputContext(1, 0, 1)
TEXT_STEPS = 20


def rehearse(folder, *arguments):
    """Runs the command, which must connect before any operation; returns (report, figures)."""
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "train.py",
            "--rehearse=2",
            f"--rehearse_json={folder}/r.json",
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    assert "Traceback" not in done.stderr and "E0000" not in done.stderr
    assert not (folder / "runs").exists()  # of --model_dir
    return done.stdout, json.loads((folder / "r.json").read_text())


def check_figures(figures, steps):
    (phase,) = figures["phases"]
    assert figures["problems"] == [] and phase["steps"] == steps and len(phase["hosts"]) == 2
    assert phase["equal"] and phase["evaluation_batches"] > 0
    assert 0 < phase["sent_bytes"] < 10_000 < phase["set_up_bytes"] < 10**7
    assert phase["coordinator_read_bytes"] < min(host["read_bytes"] for host in phase["hosts"])
    for host in phase["hosts"]:
        assert host["examples_per_second"] > 0 and host["files"] > 0
        assert 0 < host["memory_bytes"] < host["peak_bytes"]
    return phase


def small_text(text, cache_dir):
    """(recipe, folder of the prepared text)."""
    recipe = recipes.override(
        recipes.resized(recipes.find_recipe("bert-mini-demo"), steps=TEXT_STEPS),
        ["vocabulary_size=300"],
    )
    records = BadRecords(0.0, skip=False, log=print)
    folder = prepare_in_cache(
        str(text), "", recipe, known_case=None, records=records, cache_dir=str(cache_dir), log=print
    )
    return recipe, folder


def test_two_hosts_of_text_and_the_losses_of_a_remote_host(text, tmp_path):
    recipe, data = small_text(text, tmp_path / "cache")
    report, figures = rehearse(tmp_path, f"--data_dir={data}", f"--steps={TEXT_STEPS}")
    phase = check_figures(figures, TEXT_STEPS)
    assert "the 20 global batches of 2 hosts equal those of one" in report
    assert {host["files"] for host in phase["hosts"]} == {3}  # tokens, chunks, sentences
    assert any(path.startswith(data) for path in phase["graph"]["paths"])
    # The same steps in this process.
    task = TASKS["bert"](
        recipe, data_dir=data, vocab="", resume_dir=None, seed=1, synthetic=False, log=print
    )
    here = types.SimpleNamespace(devices=["/cpu:0"])
    os.mkdir("local")
    local = rehearsal.train_on_host(task, here, model_dir="local", seed=1, log=print)
    assert len(local["losses"]) == TEXT_STEPS and local["losses"][-1] < local["losses"][0]
    np.testing.assert_allclose(figures["training"]["losses"], local["losses"], rtol=1e-6)


@pytest.mark.slow
def test_two_hosts_of_images(tmp_path):
    data = prepared(tmp_path, size=(40, 40))
    _, figures = rehearse(
        tmp_path,
        "--recipe=cifar10-momentum-128",
        f"--data_dir={data}",
        "--global_batch_size=8",
        "--steps=2",
        "--set=image_size=32",
        "--set=model=cifar-resnet-10",
        "--set=augmentation=crop",
    )
    phase = check_figures(figures, 2)
    assert phase["replicas"] == 4 and figures["training"]["batch"] == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rehearse=0"], "--rehearse must lie in [1, 64]"),
        (["--rehearse=65"], "--rehearse must lie in [1, 64]"),
        (["--rehearse=3"], "3 hosts cannot share a batch of 64 equally. Use --rehearse=2"),
        (["--rehearse=2", "--tpu=local"], "does not go together with --tpu"),
        (["--rehearse=2", "--synthetic"], "does not go together with --synthetic"),
        (["--rehearse=2", "--dry_run"], "does not go together with --dry_run"),
        (["--rehearse=2", "--preflight=v3:2x2"], "does not go together with --preflight"),
        (["--rehearse_json=a"], "--rehearse_json needs --rehearse"),
    ],
)
def test_flags_that_cannot_be_are_refused(arguments, said, in_process, capfd):
    assert in_process(arguments) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: ") and said in lines[0]


def test_tf_config_is_refused(in_process, capfd, monkeypatch):
    cluster = {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    assert in_process(["--rehearse=2"]) == 1
    assert "does not go together with TF_CONFIG" in capfd.readouterr().err


def test_raw_text_is_refused_with_the_command_that_prepares_it(text, tmp_path):
    with pytest.raises(InputError, match="python -m inputs.text.prepare --input=.*animals.txt"):
        TASKS["bert"](
            recipes.find_recipe("bert-mini-demo"),
            data_dir=str(text),
            vocab="",
            resume_dir=None,
            seed=1,
            synthetic=False,
            log=print,
            shared_dir=str(tmp_path),
        )


def test_the_replicas_of_a_host_divide_the_batches_of_all_phases():
    recipe = recipes.find_recipe("bert-mini-demo")
    (phase,) = recipe.phases
    assert rehearsal.replicas_per_host(recipe, 4) == 8  # 64 examples
    assert rehearsal.replicas_per_host(recipe, 16) == 4
    both = dataclasses.replace(
        recipe, phases=(phase, dataclasses.replace(phase, global_batch_size=24))
    )
    assert rehearsal.replicas_per_host(both, 4) == 2
    with pytest.raises(InputError, match="16 hosts cannot share a batch of 24"):
        rehearsal.replicas_per_host(both, 16)


def numbers(context):
    return tf.data.Dataset.range(64).batch(2).map(lambda x: {"a": x, "b": x * 2})


def test_a_difference_is_found_and_named():
    """Host 1 has another value in tensor "b" of one example."""

    def other(context):
        return (
            tf.data.Dataset.range(64)
            .batch(2)
            .map(lambda x: {"a": x, "b": tf.where(x == 7, x, x * 2)})
        )

    def shares(input_fn, context, host):  # host's 2 of 4 replicas with a batch of 2
        return (
            input_fn(context)
            .enumerate()
            .filter(lambda i, _: i // 2 % 2 == host)
            .map(lambda _, batch: batch)
        )

    contexts = [tf.distribute.InputContext(2, i, 4) for i in range(2)]
    made = [
        rehearsal.Batches(lambda c, i=i, fn=fn: shares(fn, c, i), contexts[i], "/cpu:0").read(3)
        for i, fn in enumerate((numbers, other))
    ]
    alone = rehearsal.Batches(numbers, tf.distribute.InputContext(1, 0, 4), "/cpu:0")
    expected = alone.read(3)
    assert expected[0].shape == (3, 8) and expected[1].shape == (3, 4, 2)
    (problem,) = rehearsal.compare(
        [m[0] for m in made], [m[1] for m in made], *expected[:2], alone.names
    )
    assert "1 of 24 examples differ" in problem
    assert "example 7 of step 0, on host 1, in b." in problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda host, batches: batches, None),
        (
            lambda host, batches: batches.take(6 - tf.cast(host == 1, tf.int64)),
            "In evaluations: the hosts make 6, 5 batches for their replicas, and a single host "
            "makes 12",
        ),
        (
            lambda host, batches: batches.map(lambda ids: ids + tf.cast(ids == 29, ids.dtype)),
            "In evaluations: The hosts do not make the batches that one host makes: 1 of 48 "
            "examples differ; the first is example 13 of step 1, on host 1, in numbers.",
        ),
    ],
)
def test_evaluations_of_all_hosts_are_those_of_one(change, said):
    order = Order(examples=43, batch=16, lanes=4, block=4, window=3, seed=None)
    hosts = types.SimpleNamespace(devices=["/cpu:0"] * 2)
    one = tf.distribute.InputContext(1, 0, 4)
    contexts = [tf.distribute.InputContext(2, i, 4) for i in range(2)]

    def numbers(context):
        rows = row_batches(order, context, 0, lambda examples, ids: ids[:, tf.newaxis])
        host = context.input_pipeline_id
        changed = change(host, rows) if context.num_input_pipelines > 1 else rows
        return changed.map(lambda row: {"numbers": row})

    steps, problems = rehearsal.compare_evaluations(numbers, hosts, contexts, one)
    if said is None:
        assert steps == 3 and problems == []  # the last batch is filled up
    else:
        assert steps == 0 and len(problems) == 1 and problems[0].startswith(said), problems


@pytest.mark.parametrize(("hosts", "seed"), [(8, 7), (2, None)])  # 8: two hosts for each lane
def test_all_hosts_have_one_graph_and_their_own_batches(hosts, seed):
    order = Order(examples=200, batch=32, lanes=4, block=4, window=3, seed=seed)
    traced = []

    def numbers(context):
        traced.append(context)
        return row_batches(order, context, 0, lambda examples, ids: tf.stack([examples, ids], 1))

    shared = with_one_graph(numbers)
    contexts = [tf.distribute.InputContext(hosts, i, 8) for i in range(hosts)]
    count = (6 if seed else 7) * 8 // hosts  # an evaluation ends after 7 steps
    found = []
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():  # traces for each device
        for i, context in enumerate(contexts):
            with tf.device(f"CPU:{i % 2}"):
                batches = shared(context).take(1000 if seed is None else count)
                found.append([*batches.as_numpy_iterator()])
    assert len(traced) == 1
    found = np.array(found)
    assert found.shape == (hosts, count, 4, 2)
    own = [*numbers(contexts[-1]).take(count).as_numpy_iterator()]
    np.testing.assert_array_equal(found[-1], own)
    ids = found[..., 1].ravel()
    assert sorted(ids) == list(range(ids.size))


def problems(dataset, shared_dir=""):
    return input_graph.examine(lambda context: dataset(), ONE, shared_dir).problems


def test_the_data_of_evaluations_are_examined_too():
    def records(path):
        return lambda context: tf.data.TFRecordDataset(tf.constant([path]))

    task = types.SimpleNamespace(
        train_batches=lambda phase_index, first_step: records("gs://bucket/train"),
        evaluation_batches=lambda phase_index: records("ram://held-out/a"),
    )
    graph = input_graph.examine_phase(task, 0, ONE)
    assert graph.paths == {"gs://bucket/train", "ram://held-out/a"}
    (said,) = graph.problems
    assert said.startswith("In evaluations: ram://held-out/a is in the memory of one process")


def test_what_a_host_cannot_run_is_named(tmp_path):
    def records(path):
        return lambda: tf.data.TFRecordDataset(tf.constant([path]))

    fine = input_graph.examine(lambda context: records("gs://bucket/a")(), ONE)
    assert fine.problems == () and fine.paths == {"gs://bucket/a"} and fine.mounted == []
    local = input_graph.examine(lambda context: records("/data/a")(), ONE)
    assert local.problems == () and local.mounted == ["/data"]

    python = problems(
        lambda: tf.data.Dataset.range(3).map(lambda x: tf.numpy_function(np.abs, [x], tf.int64))
    )
    assert len(python) == 1 and "calls a Python function (PyFunc)" in python[0]
    large = np.zeros(2**20 + 1, np.float32)
    (said,) = problems(lambda: tf.data.Dataset.range(3).map(lambda x: tf.constant(large)[x]))
    assert "a tensor of 4.0 MiB" in said
    captured = tf.constant(large)
    (said,) = problems(lambda: tf.data.Dataset.range(3).map(lambda x: captured[x]))
    assert "a tensor of 4.0 MiB" in said
    variable = tf.Variable(1)
    (said,) = problems(lambda: tf.data.Dataset.range(3).map(lambda x: variable + 1))
    assert "made outside of it" in said

    os.makedirs("data")
    pathlib.Path("data/a").touch()
    (said,) = problems(records("data/a"))
    assert said.startswith("data/a is relative")
    pathlib.Path("data/b").touch()
    (said,) = problems(lambda: tf.data.TFRecordDataset(["data/a", "data/b"]))
    assert said.startswith("data, where 2 of the files are, is relative")
    (said,) = problems(records("ram://a/b"))
    assert "one process only" in said
    owner = np.zeros(0)  # any object
    folder = scratch_folder(owner, "scratch-")
    (said,) = problems(records(f"{folder}/a"))
    assert "temporary folder of this machine" in said
    assert problems(records(f"{folder}/a"), folder) == ()


@pytest.mark.slow
def test_a_server_ends_with_the_process_that_started_it():
    started = subprocess.Popen(
        [sys.executable, "-m", "training.host", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert started.stdout.readline().startswith("127.0.0.1:")
    assert started.poll() is None
    started.stdin.close()  # as when the other process is killed
    assert started.wait(30) == 0
    started.stdout.close()
