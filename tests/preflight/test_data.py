"""The check of a pod's data: what its hosts could read, and what they could not."""

import dataclasses
import errno
import json
import os
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf
import test_run
from pictures import prepared

import recipes
from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.text.prepare import prepare_in_cache
from preflight import data, example_data
from preflight import run as preflight
from preflight.compiler.topology import parse_topologies
from tasks import TASKS
from training import input_graph


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """Runs the pre-flight without a compiler; returns (status, rows, what it prints).

    Without a folder, it has no data.
    """
    monkeypatch.setattr(preflight, "Children", test_run.Compiler)
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    monkeypatch.setattr(data, "MEASURED_SECONDS", 0.1)

    def run(recipe, folder, topologies):
        def make_task(shared_dir):
            return TASKS[recipe.task](
                recipe,
                data_dir=folder,
                vocab="",
                resume_dir=None,
                seed=1,
                synthetic=False,
                log=print,
                shared_dir=shared_dir,
            )

        path = tmp_path / "rows.json"
        status = preflight.run(
            recipe,
            topologies,
            json_path=str(path),
            log=print,
            search=False,
            make_task=make_task if folder else None,
        )
        return status, json.loads(path.read_text()), capsys.readouterr().out

    return run


@pytest.fixture
def text_of(text, tmp_path):
    """A recipe -> the folder of the text, prepared for it."""

    def prepare(recipe):
        records = BadRecords(0.0, skip=False, log=print)
        return prepare_in_cache(
            str(text),
            "",
            recipe,
            known_case=None,
            records=records,
            cache_dir=str(tmp_path / "cache"),
            log=print,
        )

    return prepare


@pytest.fixture
def recipe():
    demo = recipes.resized(recipes.find_recipe("bert-mini-demo"), global_batch_size=64)
    return recipes.override(demo, ["vocabulary_size=300"])


@pytest.mark.slow
def test_the_data_of_each_slice_is_examined_and_measured(check, text_of, recipe):
    folder = text_of(recipe)
    status, rows, printed = check(recipe, folder, "v3:2x2,v3:4x4")
    assert status == 0
    for row, hosts in zip(rows, (1, 4), strict=True):
        assert row["data_problems"] == [] and row["examples_per_core"] > 0
        # 8 replicas of a host, at the step's 0.1 s.
        assert row["examples_per_host"] == pytest.approx(64 / hosts / row["step_seconds"])
        assert f"read by {hosts} host(s)" in printed
    mounts = f"every host must have {folder}/pages/held_out, {folder}/pages/training"
    assert printed.count(mounts) == 1  # of several hosts
    assert "which this machine made of the data" in printed and "not checked" not in printed


@pytest.mark.slow
def test_a_folder_of_this_machine_is_a_problem_of_several_hosts_only(
    check, text_of, recipe, monkeypatch
):
    folder = text_of(recipe)
    monkeypatch.setattr(data.input_graph, "SCRATCH", {folder})
    status, (one, four), printed = check(recipe, folder, "v3:2x2,v3:4x4")
    assert status == 1 and one["data_problems"] == []
    assert four["data_problems"] and four["examples_per_core"] is None
    assert all("in a temporary folder of this machine" in said for said in four["data_problems"])
    assert "NO: " in printed and four["compiles"]  # the program does


def test_data_of_which_nothing_can_be_read_is_a_problem(check, text_of, recipe):
    folder = pathlib.Path(text_of(recipe))
    tokens = folder / "pages/training/tokens"
    tokens.write_bytes(b"x" * tokens.stat().st_size)  # the size alone is checked at the start
    status, (row,), printed = check(recipe, str(folder), "v3:2x2")
    assert status == 1
    (problem,) = row["data_problems"]
    assert "tokens" in problem and "damaged" in problem and f"NO: {problem}" in printed


def test_hosts_that_cannot_share_the_lanes(check, text_of, recipe):
    recipe = dataclasses.replace(recipe, lanes=3)
    batch = recipes.resized(recipe, global_batch_size=96)
    status, (row,), _ = check(batch, text_of(recipe), "v3:4x4")
    assert status == 1
    (problem,) = row["data_problems"]
    assert "--set lanes=3: 4 hosts cannot share 3 lanes" in problem


def test_raw_text_is_refused_for_several_hosts_with_the_command_that_prepares_it(
    check, text, recipe
):
    with pytest.raises(InputError, match="python -m inputs.text.prepare --input=.*animals.txt"):
        check(recipe, str(text), "v3:4x4")


def test_images(check, tmp_path):
    folder = prepared(tmp_path, size=(40, 40))
    recipe = recipes.resized(recipes.find_recipe("cifar10-momentum-128"), global_batch_size=8)
    recipe = recipes.override(recipe, ["image_size=32", "augmentation=crop"])
    status, (row,), printed = check(recipe, str(folder), "v4:2x2x1")
    assert status == 0 and row["examples_per_core"] > 0, printed


def test_without_data_the_report_says_so(check, recipe):
    status, (row,), printed = check(recipe, "", "v3:2x2")
    assert status == 0 and row["data_is_example"]
    assert row["data_problems"] == [] and row["examples_per_core"] is None
    assert re.search(r"data  +example data; [0-9]+ kinds of operation", printed)
    assert printed.count("Give the real one with --data_dir") == 1


@pytest.mark.parametrize(
    "name",
    [
        "bert-large-64k-32k",
        "squad-base",
        "resnet50-lars-32k",
        "cifar10-lamb-4096",
        "mlperf-bert-v4-8192-2.0",
    ],
)
def test_a_recipe_without_data_has_a_graph_for_hosts(name, tmp_path):
    recipe = recipes.find_recipe(name)
    topologies = parse_topologies("v3:2x2,v3:8x8")
    results = data.examine_example(recipe, topologies, str(tmp_path))
    assert [result.hosts for result in results] == [1, 16] * len(recipe.phases)
    for result in results:
        assert not result.problems and not result.graph.paths
        assert len(result.graph.operations) > 50 and result.graph.largest_constant < 2**20


@pytest.mark.parametrize(
    "fields",
    [
        ["sequences_per_row=3", "dropout=0.0"],
        ["length_buckets=16,64"],
        ["packing=full-sentences", "whole_word=true"],
    ],
)
def test_the_operations_of_example_data_are_those_of_real_data(fields, text_of, recipe, tmp_path):
    recipe = recipes.override(recipe, fields)
    (example,) = data.examine_example(recipe, parse_topologies("v3:2x2"), str(tmp_path))
    task = TASKS["bert"](
        recipe,
        data_dir=text_of(recipe),
        vocab="",
        resume_dir=None,
        seed=1,
        synthetic=False,
        log=print,
    )
    real = input_graph.examine_phase(task, 0, tf.distribute.InputContext(1, 0, 8))
    assert example.graph.operations == real.operations


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bert-mini-demo", ["lower_case=false"]),
        ("bert-mini-demo", ["lower_case=true"]),
        ("bert-mini-demo", ["init_from=/nowhere", "target=0.7"]),
        ("squad-mini", ["sequence_length=1024", "init_from=/nowhere"]),
        ("resnet50-lars-32k", ["image_size=8000"]),
    ],
)
def test_what_is_not_in_the_input_graph_is_not_checked_with_example_data(name, fields, tmp_path):
    recipe = recipes.override(recipes.find_recipe(name), fields)
    for result in data.examine_example(recipe, parse_topologies("v3:2x2"), str(tmp_path)):
        assert not result.problems and result.graph.operations


@pytest.mark.parametrize("name", ["bert-mini-demo", "squad-mini"])
def test_a_temporary_folder_that_cannot_be_used_is_named(name, tmp_path):
    folder = tmp_path / "a,b"
    folder.mkdir()
    recipe = recipes.find_recipe(name)
    with pytest.raises(InputError, match="a,b: the name .* has a comma. Set .* TMPDIR"):
        data.examine_example(recipe, parse_topologies("v3:2x2"), str(folder))


@pytest.mark.parametrize("name", ["bert-mini-demo", "squad-mini", "resnet50-lars-32k"])
def test_example_data_on_a_full_disk(name, tmp_path, monkeypatch):
    def full(*arguments, **names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(example_data, "save_vocabulary", full)
    monkeypatch.setattr(example_data.shards, "write_shard", full)
    recipe = recipes.find_recipe(name)
    with pytest.raises(InputError, match=r"cannot be written \(No space left.* Set .* TMPDIR"):
        data.examine_example(recipe, parse_topologies("v3:2x2"), str(tmp_path))


def test_without_data_a_graph_that_hosts_cannot_run_is_a_problem(check, recipe, monkeypatch):
    train_batches = TASKS["bert"].train_batches

    def with_python(self, phase_index, first_step):
        batches = train_batches(self, phase_index, first_step)
        return lambda context: batches(context).map(
            lambda batch: tf.numpy_function(lambda: np.int32(0), [], tf.int32)
        )

    monkeypatch.setattr(TASKS["bert"], "train_batches", with_python)
    status, (one, four), printed = check(recipe, "", "v3:2x2,v3:4x4")
    assert status == 1 and one["data_problems"] == []  # a single host is this machine
    (problem,) = four["data_problems"]
    assert "calls a Python function (PyFunc)" in problem and f"NO: {problem}" in printed
