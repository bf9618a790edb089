"""A run of an earlier version can be resumed with the current one.

tests/data/run/bert-tiny.json records a run made at commit 5f7eda5: its recipe.json, history and
evaluations, and the name and shape of each variable in its checkpoint. (The weights would take
5 MB.) tests/data/run_v0_1_0 is a run of version 0.1.0, with its checkpoints (see make.py there). Do
not regenerate the files with a later version.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import runpy
import types
import zipfile

import numpy as np
import pytest
import tensorflow as tf

import recipes
from inputs.errors import InputError
from inputs.order import Order, number_of_lanes
from models import bert, resnet, squad
from tasks import TASKS
from training.checkpoint import compatibility
from training.checkpoint.manager import CheckpointManager, make_checkpoint
from training.monitor import plot
from training.run import Run

FILE = pathlib.Path(__file__).parents[2] / "data/run/bert-tiny.json"
V0_1_0 = pathlib.Path(__file__).parents[2] / "data/run_v0_1_0"
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


@pytest.fixture
def first_version(tmp_path):
    """The files of a run of 0.1.0: `folder`, its parts, and `made`, how it was made."""
    with zipfile.ZipFile(V0_1_0 / "files.zip") as archive:
        archive.extractall(tmp_path)
    made = types.SimpleNamespace(**runpy.run_path(str(V0_1_0 / "make.py")))
    return types.SimpleNamespace(
        model_dir=tmp_path / "run", text=tmp_path / "text.txt", folder=tmp_path, made=made
    )


def weights(prefix):
    reader = tf.train.load_checkpoint(str(prefix))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
    return {name: reader.get_tensor(name) for name in names}


@pytest.mark.slow
def test_a_run_of_0_1_0_goes_on(first_version, in_process, monkeypatch, capfd):
    """With its weights and slots, and a word about the order of the examples, which is another."""
    monkeypatch.setitem(bert.SIZES, "tiny", bert.Size(*first_version.made.SIZE))
    text, model_dir = first_version.text, first_version.model_dir
    before = weights(model_dir / "ckpt-4")
    flags = [f"--data_dir={text}", f"--model_dir={model_dir}", *first_version.made.ARGUMENTS]
    assert in_process(flags) == 0
    said = capfd.readouterr().err
    assert "Going on from step 4 of 8" in said
    assert (
        f"{model_dir} was begun by an earlier version, which read the examples in another" in said
    )
    finished = weights(first_version.folder / "finished/ckpt-8")
    found = weights(model_dir / "ckpt-8")
    assert found.keys() == finished.keys() and len(found) > 25
    # Its own four steps with other examples lead about as far from where it was.
    moved = [
        np.linalg.norm(found[name] - before[name]) / np.linalg.norm(finished[name] - before[name])
        for name in found
        if "word_embeddings" in name or "_kernel" in name or "/kernel" in name
    ]
    assert moved and 0.2 < np.median(moved) < 5


def change(model_dir, **changes):
    """Sets fields of recipe.json; None removes a field."""
    path = model_dir / "recipe.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def test_only_what_changes_the_training_is_compared(first_version):
    demo = recipes.find_recipe("bert-mini-demo")
    resized = recipes.resized(demo, steps=8, global_batch_size=8)
    sets = [a.removeprefix("--set=") for a in first_version.made.ARGUMENTS if "--set=" in a]
    recipe = recipes.override(resized, sets)
    folder = first_version.model_dir

    def check(recipe=recipe, **facts):
        compatibility.check_compatible(str(folder), recipe, seed=1, **facts)

    check()
    check(dataclasses.replace(recipe, name="renamed", reference="cited", evaluation_examples=9))
    with pytest.raises(InputError, match=r"other settings: dropout 0.0 \(now 0.1\)\. Give"):
        check(dataclasses.replace(recipe, dropout=0.1))
    # A field or a fact that is newer than the run: the field had its default, the fact is unknown.
    change(folder, packing=None)
    check(added_later="x")
    with pytest.raises(InputError, match=r"packing 'pairs' \(now 'full-sentences'\)"):
        check(dataclasses.replace(recipe, packing="full-sentences"))
    with pytest.raises(InputError, match=r"seed 1 \(now 2\)"):
        compatibility.check_compatible(str(folder), recipe, seed=2)
    with pytest.raises(InputError, match=r"the number of phases 1 \(now 2\)"):
        check(dataclasses.replace(recipe, phases=2 * recipe.phases))
    # The next start writes the current format, and does not lose a setting of a later version.
    old = json.loads((folder / "recipe.json").read_text())
    facts = {name: old[name] for name in ("vocabulary", "data")}
    change(folder, phases=[old["phases"][0] | {"cooldown": 3}], sharpness=0.5)
    with pytest.raises(InputError, match="does not know: phase1.cooldown, sharpness. Use the vers"):
        compatibility.write_run_config(str(folder), recipe, seed=1, **facts)
    assert json.loads((folder / "recipe.json").read_text())["sharpness"] == 0.5
    change(folder, phases=old["phases"], sharpness=None)
    compatibility.write_run_config(str(folder), recipe, seed=1, **facts)
    assert json.loads((folder / "recipe.json").read_text())["format"] == compatibility.FORMAT
    check()
    change(folder, format=compatibility.FORMAT + 1)
    with pytest.raises(InputError, match="a later version of this program wrote .* has format 6"):
        check()


@pytest.mark.parametrize(("batch", "earlier"), [(13_888, 248), (64, 64)])
def test_a_run_keeps_the_number_of_lanes_that_was_found_earlier(first_version, batch, earlier):
    """Format 3 found another number for some batches; the sentence says how to keep it."""
    folder = str(first_version.model_dir)
    recipe = recipes.resized(
        recipes.find_recipe("bert-mini-demo"), steps=8, global_batch_size=batch
    )
    kept = dataclasses.replace(recipe, lanes=earlier)
    (first_version.model_dir / "recipe.json").write_text(
        json.dumps({"format": 3} | dataclasses.asdict(recipe) | {"seed": 1})
    )

    def start(recipe):
        lanes = recipe.lanes or number_of_lanes(batch, 10**6)
        order = Order(10**6, batch, lanes, 1, 1, 1)
        compatibility.check_compatible(folder, recipe, seed=1)
        compatibility.check_lanes(folder, recipe, lambda phase_index: order)
        compatibility.write_run_config(folder, recipe, seed=1)

    other = dataclasses.replace(recipe, lanes=32)
    with pytest.raises(
        InputError, match=f"in {earlier} lanes. With the 32 of now.* Give --set lanes={earlier} to"
    ):
        start(other)
    if earlier == number_of_lanes(batch, 10**6):
        start(recipe)
        start(recipe)
        return
    with pytest.raises(InputError, match=f"Give --set lanes={earlier} to keep it"):
        start(recipe)
    start(kept)
    start(kept)
    with pytest.raises(InputError, match=rf"lanes {earlier} \(now None\)"):
        start(recipe)


def test_a_run_whose_rate_drops_may_be_made_longer(tmp_path):
    recipe = recipes.find_recipe("resnet50-momentum-8k")
    path = tmp_path / "recipe.json"
    path.write_text(compatibility.run_config(recipe, {}))
    (tmp_path / "ckpt-2.index").touch()
    longer = recipes.resized(recipe, steps=2 * recipe.steps)
    assert longer.phases[0].decay_steps != recipe.phases[0].decay_steps
    compatibility.check_compatible(str(tmp_path), longer)


@pytest.mark.parametrize(("optimizer", "is_refused"), [("momentum", True), ("lars", False)])
def test_a_run_whose_momentum_contains_the_rate_is_not_resumed(tmp_path, optimizer, is_refused):
    """Up to format 4; the slot would be used as if it were larger by 1 / rate."""
    recipe = recipes.find_recipe("cifar10-momentum-128")
    recipe = recipes.resized(recipes.override(recipe, [f"optimizer={optimizer}"]), steps=4)
    (tmp_path / "recipe.json").write_text(json.dumps({"format": 4} | dataclasses.asdict(recipe)))
    (tmp_path / "ckpt-2.index").touch()
    refused = pytest.raises(InputError, match="a version whose momentum contains the learning rate")
    with refused if is_refused else contextlib.nullcontext():
        compatibility.check_compatible(str(tmp_path), recipe)


@pytest.mark.parametrize(("step", "is_refused"), [(3, True), (4, False), (5, False)])
def test_only_the_lanes_of_what_is_left_of_a_run_count(tmp_path, step, is_refused):
    recipe = recipes.resized(recipes.find_recipe("bert-mini-demo"), steps=4)
    phases = [dataclasses.replace(recipe.phases[0], global_batch_size=b) for b in (13_888, 64)]
    recipe = dataclasses.replace(recipe, phases=tuple(phases))
    (tmp_path / "recipe.json").write_text(json.dumps({"format": 3} | dataclasses.asdict(recipe)))
    (tmp_path / f"ckpt-{step}.index").touch()

    def order(phase_index):
        batch = phases[phase_index].global_batch_size
        return Order(10**6, batch, number_of_lanes(batch, 10**6), 1, 1, 1)

    refused = pytest.raises(InputError, match="in 248 and 64 lanes. With the 224 and 64 of now")
    with refused if is_refused else contextlib.nullcontext():
        compatibility.check_lanes(str(tmp_path), recipe, order)


def test_a_new_field_of_a_recipe_has_a_default(first_version):
    """Which stands for the value of the runs that were made before it."""
    old = json.loads((first_version.model_dir / "recipe.json").read_text())
    for recipe in recipes.RECIPES.values():
        for dataclass, known in ((recipe, old), (recipe.phases[0], old["phases"][0])):
            fields = dataclasses.fields(dataclass)
            needed = {f.name for f in fields if f.default is dataclasses.MISSING}
            assert needed <= known.keys(), recipe.name


def test_earlier_patterns_select_the_same_variables():
    span = {"types": 2, "dropout": 0.0, "initializer_stddev": 0.02}
    models = (
        bert.build_pretrainer(bert.Size(1, 8, 2), 60, 16, dropout=0.0, initializer_stddev=0.02),
        squad.build_span_labeler(bert.Size(1, 8, 2), 60, 16, **span),
        resnet.build_classifier(
            resnet.SIZES["cifar-resnet-10"], 32, 3, normalization="cifar10", batch_norm_momentum=0.9
        ),
    )
    assert len(compatibility.EARLIER_PATTERNS) == 2
    lists = list(compatibility.EARLIER_PATTERNS.items())
    for model, (earlier, current) in zip(models, (lists[0], lists[0], lists[1]), strict=True):
        names = [v.name.removesuffix(":0") for v in model.trainable_variables]
        excluded = [n for n in names if any(re.search(pattern, n) for pattern in earlier)]
        assert excluded == [n for n in names if any(re.search(p, n) for p in current)]
        assert 0 < len(excluded) < len(names)
