"""The paper's ImageNet grids: the lines, their recipes and cost, and one toy run of each kind."""

import collections
import json
import math
import types

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_runs import begin

import recipes
from experiments import train_run
from experiments.__main__ import main
from experiments.grid import Cell, Group, Table, chip_hours, progress
from experiments.imagenet import GRIDS
from experiments.page import write_page
from experiments.runner import Places, load_runs, run_cell, state
from experiments.tables import TABLES
from tasks.resnet import ImageClassification
from training.optimizers import make_schedule
from training.run import Run

TABLE = TABLES["imagenet"]
# The best line of each published table that the paper's text or Table 4 names.
BEST = {
    "table-9": (0.4, 0.5538),
    "table-10": (14.0, 0.7201),
    "table-11": (0.001, 0.6604),
    "table-12": (0.002, 0.7348),
    "table-17": (0.002, 0.6727),
    "table-22-decay-0.0001": (0.002, 0.7307),
}
# Each optimizer, constant and with Goyal's schedule, with the L2 term and without.
KINDS = ("table-6-lamb-16k", "table-9", "table-12", "table-22-decay-0.0001")


def recipe_of(group, *changes):
    """The recipe of a group's first line, as train.py makes it of the command."""
    command = train_run.command(Cell(group, group.rates[0], 1), "data", "folder")
    flags = [part for part in command if part.startswith("--set=")]
    named = next(part for part in command if part.startswith("--recipe="))
    recipe = recipes.find_recipe(named.removeprefix("--recipe="))
    recipe = recipes.override(recipe, [flag.removeprefix("--set=") for flag in flags])
    recipe = recipes.override(recipe, list(changes))
    recipe.check()
    return recipe


def test_the_tables_have_the_published_numbers_of_lines():
    lines = collections.Counter()
    for grid in GRIDS:
        assert len(grid.top_1.split()) == len(grid.rates)
        lines[grid.number] += len(grid.rates)
    assert lines == {9: 27, 10: 27, 11: 11, 12: 19, **dict.fromkeys(range(13, 26), 20)}


@pytest.mark.parametrize("name", BEST)
def test_the_best_lines_are_those_of_table_4(name):
    published = TABLE.group(name).published
    best = max(published, key=published.get)
    assert (best, published[best]) == BEST[name]


def test_a_published_grid_is_not_extended_and_has_one_seed():
    group = TABLE.group("table-25")
    best_at_the_edge = {Cell(group, rate, 1).name: rate for rate in group.rates}
    found = progress(TABLE, group, best_at_the_edge)
    assert (found.todo, found.later, found.best, found.at_edge) == ([], 0, 0.05, True)


@pytest.mark.parametrize("group", TABLE.groups, ids=lambda group: group.name)
def test_every_group_is_a_recipe_of_90_epochs(group):
    recipe = recipe_of(group)
    (phase,) = recipe.phases
    assert phase.steps * phase.global_batch_size / 1_281_167 == pytest.approx(90, abs=0.01)
    assert phase.peak_learning_rate == pytest.approx(group.rates[0], rel=1e-5)
    rate = make_schedule(recipe)
    at = [float(rate(round(phase.steps * epoch / 90))) for epoch in (0, 5, 45, 70, 85)]
    grid = next((grid for grid in GRIDS if grid.name == group.name), None)
    if grid is None:
        assert (recipe.optimizer, recipe.weight_decay) == ("lamb", 0.01)
        return
    assert phase.global_batch_size == 16_384 and phase.steps == 7_038
    shape = [0, 1, 0.1, 0.01, 0.001] if grid.goyal else [1] * 5
    np.testing.assert_allclose(at, [group.rates[0] * part for part in shape], rtol=1e-3, atol=1e-9)
    assert (recipe.weight_decay, recipe.l2_regularization) == (grid.weight_decay, grid.l2)
    assert recipe.optimizer == {"adam": "adamw"}.get(grid.optimizer, grid.optimizer)
    assert recipe.label_smoothing == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_one_cell_of_each_kind_runs_at_toy_size(name, tmp_path):
    toy = ("model=cifar-resnet-10", "image_size=32", "global_batch_size=4", "steps=2")
    toy += ("warmup_steps=1", "compute_dtype=float32", "evaluation_examples=4", "accumulation=1")
    group = TABLE.group(name)
    if recipe_of(group).phases[0].decay_steps:
        toy += ("decay_steps=1",)
    recipe = recipe_of(group, "evaluate_every_steps=none", "decay_from=none", *toy)
    tf_keras.utils.set_random_seed(1)
    task = ImageClassification(
        recipe, data_dir="", vocab="", resume_dir=None, seed=1, synthetic=True, log=print
    )
    where = tf.distribute.OneDeviceStrategy("/cpu:0")
    run = begin(Run(task, recipe, where, model_dir=str(tmp_path), seed=1, steps_per_loop=1))
    before = [variable.numpy() for variable in run.model.trainable_variables]
    results = run.train(tf.constant(2))
    assert math.isfinite(results["image_loss"]) and 0 <= results["image_top1"] <= 1
    moved = zip(run.model.trainable_variables, before, strict=True)
    assert any(np.any(variable.numpy() != old) for variable, old in moved)


def test_the_chip_hours_are_those_of_the_pre_flight_s_page(capsys):
    assert chip_hours("resnet50-adamw-16k") == pytest.approx(1.96 * 512 / 60)
    assert chip_hours("bert-large-64k-32k") == pytest.approx((23.2 + 11.2) * 1024 / 60)
    with pytest.raises(KeyError, match="no recipe resnet50-none"):
        chip_hours("resnet50-none")
    assert all(chip_hours(group.chip_hours_of) > 10 for group in TABLE.groups)
    assert main(["imagenet", "--list", "--groups=table-22-decay-0.0001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[6] == (
        "to do table-22-decay-0.0001-rate0.002-seed1  published 0.7307  16.7 chip-hours"
    )
    assert "167 TPU chip-hours by the pre-flight" in lines[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["imagenet", "--groups=table-99"], "--groups: the table imagenet has no group 'table-99'"),
        (["mnist", "--train_flag=--tpu=x"], "--train_flag: the table mnist does not run train.py"),
        (["summary", "--list"], "--list has no effect with summary"),
        (["summary", "--groups=lamb"], "--groups has no effect with summary"),
        (["summary", "--limit=0"], "--limit has no effect with summary"),
        (["summary", "--jobs=0"], "--jobs has no effect with summary"),
        (["summary", "--data_dir=d"], "--data_dir has no effect with summary"),
        (["summary", "--runs=r"], "--runs has no effect with summary"),
        (["summary", "--train_flag=--x"], "--train_flag has no effect with summary"),
        (["mnist", "--cell=lamb-rate0.01-seed1", "--groups=lamb"], "--groups has no effect with"),
        (["mnist", "--cell=lamb-rate0.01-seed1", "--limit=0"], "--limit has no effect with --cell"),
        (["mnist", "--cell=lamb-rate0.01-seed1", "--page=p"], "--page has no effect with --cell"),
        (["mnist", "--list", "--cell=lamb-rate0.01-seed1"], "--cell has no effect with --list"),
        (["mnist", "--limit=0", "--groups=,"], "--groups=, names no group"),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags, said, capsys):
    assert main(flags) == 1
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_train_py_keeps_curves_and_its_page_shows_both_scales(
    in_process, tmp_path, monkeypatch
):
    """One command of a table of train.py: run file, curves, the page with the published line."""

    def run_here(arguments, log):
        del log
        ended = types.SimpleNamespace(returncode=in_process(arguments[2:]))
        return types.SimpleNamespace(process=ended)

    monkeypatch.setattr(train_run.children, "run", run_here)
    small = {"vocabulary_size": 100, "predictions": 4, "sequence_length": 16, "warmup_steps": 1}
    settings = {
        "recipe": "bert-mini-demo",
        "batch": 8,
        "flags": {"global_batch_size": 8, "steps": 4, "steps_per_loop": 2},
        "set": {**small, "evaluation_examples": 8, "evaluate_every_examples": 16},
        "rates": {"peak_learning_rate": 0.5},
        "curve": ["masked_loss"],
        "evaluations": ["masked_loss", "masked_accuracy"],
    }
    group = Group("lamb-8", settings, (0.02,), seeds=(1,), published={0.02: 0.5}, extended=False)
    larger = Group("lamb-16", {**settings, "batch": 16}, (0.02,), seeds=(1,), extended=False)
    table = Table("toy", "Toy", "train", "masked_accuracy", (group, larger))
    places = Places("", str(tmp_path / "runs"), str(tmp_path / "toy"), ("--synthetic",))
    monkeypatch.setattr(train_run, "command", _without_data_dir(train_run.command))
    run = run_cell(table, Cell(group, 0.02, 1), places)
    assert run["curve"]["step"] == [2, 4] and len(run["curve"]["masked_loss"]) == 2
    assert run["evaluations"]["step"] == [2, 4]
    assert run["evaluations"]["masked_accuracy"][-1] == run["result"]["masked_accuracy"]
    folder = tmp_path / "runs/toy/lamb-8-rate0.02-seed1/run"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["phases"][0]["peak_learning_rate"] == 0.01  # the cell's rate times the factor
    assert not list(folder.glob("ckpt-*"))
    other = {**run, "settings": dict(larger.settings), "cell": "lamb-16-rate0.02-seed1"}
    (tmp_path / "toy" / "lamb-16-rate0.02-seed1.json").write_text(json.dumps(other))
    assert len(load_runs(table, places.output)) == 2
    write_page(table, state(table, places.output), str(tmp_path / "toy.md"), places)
    page = (tmp_path / "toy.md").read_text()
    assert f"| lamb 8, rate 0.02 |  | 0.5000 | {run['result']['masked_accuracy']:.4f} |" in page
    assert "The rule of tuning" not in page  # nothing is tuned


def _without_data_dir(command):
    """The command without the empty --data_dir, which train.py refuses."""

    def shorter(*arguments):
        return [part for part in command(*arguments) if part != "--data_dir="]

    return shorter
