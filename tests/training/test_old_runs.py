"""A run of an earlier version can be resumed with the current one.

tests/data/run/bert-tiny.json records a run made at commit 5f7eda5: its recipe.json, history and
evaluations, and the name and shape of each variable in its checkpoint. (The weights would take
5 MB.) Do not regenerate the file with a later version.
"""

import json
import pathlib

import pytest
import tensorflow as tf

import recipes
from tasks import TASKS
from training.checkpoint import compatibility
from training.checkpoint.manager import CheckpointManager
from training.checkpoint.state import make_checkpoint
from training.monitor import plot
from training.run import Run

FILE = pathlib.Path(__file__).parents[1] / "data/run/bert-tiny.json"
CHANGES = (
    *("model=tiny", "vocabulary_size=60", "max_sequence_length=16", "sequence_length=16"),
    *("predictions=2", "evaluation_examples=32", "save_every_steps=2"),
)


@pytest.fixture(scope="module")
def old():
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def recipe():
    demo = recipes.find_recipe("bert-mini-demo")
    return recipes.override(recipes.resized(demo, steps=4, global_batch_size=8), CHANGES)


def test_its_settings_are_compatible(old, recipe, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(old["recipe"]))
    (tmp_path / "ckpt-4.index").touch()
    facts = {name: old["recipe"][name] for name in ("seed", "vocabulary", "data")}
    compatibility.check_compatible(str(tmp_path), recipe, **facts)


def test_its_checkpoint_has_the_current_variables(old, recipe, tmp_path):
    task = TASKS["bert"](
        recipe,
        data_dir="",
        vocab="",
        resume_dir=None,
        seed=1,
        synthetic=True,
        log=lambda line: None,
    )
    assert task.facts == {name: old["recipe"][name] for name in ("vocabulary", "data")}
    where = tf.distribute.OneDeviceStrategy("/cpu:0")
    run = Run(task, recipe, where, model_dir=str(tmp_path), seed=1, steps_per_loop=2)
    manager = CheckpointManager(
        make_checkpoint(run.model, run.optimizer, run.state, ""),
        str(tmp_path),
        step=run.state.step,
        save_every_steps=2,
        keep=3,
    )
    reader = tf.train.load_checkpoint(manager.save(check_interval=False))
    shapes = reader.get_variable_to_shape_map()
    assert {name: shape for name, shape in shapes.items() if name[0] != "_"} == old["checkpoint"]


def test_its_history_is_plotted(old, tmp_path):
    for name in ("history", "evaluations"):
        lines = "".join(json.dumps(row) + "\n" for row in old[name])
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "telemetry").mkdir()
    (tmp_path / "telemetry/trust_ratios.jsonl").touch()  # no update was recorded
    with open(tmp_path / "evaluations.jsonl", "a") as file:
        file.write('{"step": 5, "masked_loss": null, "sentence_loss": 0.5}\n')
    assert plot.main([str(tmp_path)]) == 0
    assert (tmp_path / "history.png").stat().st_size > 10_000
