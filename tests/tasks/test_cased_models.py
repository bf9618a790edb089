"""A cased model from text to SavedModel, and runs and shards made before there were any."""

import dataclasses
import json
import shutil

import pytest
import tensorflow as tf

from inputs.errors import InputError
from inputs.text import prepare
from inputs.text.shards import load_manifest
from inputs.text.tokenization import vocabulary
from recipes import find_recipe, override, resized
from tasks import TASKS
from training.checkpoint import compatibility

WORDS = "Ada Babbage wrote it in Paris paris Göttingen . The the who Who ?".split()
PIECES = [*vocabulary.SPECIAL_TOKENS, *WORDS]
SMALL = ("model=tiny", "max_sequence_length=16", "sequence_length=16", "predictions=2")


def recipe_of(name, *changes):
    return resized(override(find_recipe(name), changes), steps=2, global_batch_size=8)


def make(recipe, data_dir, *, vocab="", resume_dir=None, log=lambda line: None):
    return TASKS[recipe.task](
        recipe,
        data_dir=str(data_dir),
        vocab=str(vocab),
        resume_dir=resume_dir and str(resume_dir),
        seed=1,
        synthetic=False,
        log=log,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with text, a cased vocabulary and shards of them."""
    folder = tmp_path_factory.mktemp("cased")
    vocabulary.save_vocabulary(PIECES, folder / "vocab.txt")
    documents = [f"{a} wrote it in {b} . The {c}" for a in WORDS for b in WORDS for c in WORDS[:3]]
    (folder / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    prepare.prepare(f"{folder}/a.txt", f"{folder}/vocab.txt", f"{folder}/shards", workers=0)
    return folder


@pytest.mark.slow
def test_capitals_reach_the_shards(source):
    assert load_manifest(str(source / "shards"))["lower_case"] is False
    said = []
    raw = make(
        recipe_of("bert-mini-demo", *SMALL),
        source / "a.txt",
        vocab=source / "vocab.txt",
        log=said.append,
    )
    shards = make(recipe_of("bert-mini-demo", *SMALL), source / "shards")
    for task in (raw, shards):
        assert task.recipe.lower_case is False
        batches = task.train_batches(0, 0)(None).take(40)
        seen = {PIECES[i] for batch in batches for i in batch["input_word_ids"].numpy().ravel()}
        assert {"Göttingen", "Paris", "paris", "The", "the", "Ada"} <= seen
    assert "Text: capitals and accents kept (cased vocabulary)" in said
    assert any(line.startswith("0 of") and "[UNK] (0.00%)" in line for line in said)


def test_shards_decide(source, tmp_path):
    recipe = recipe_of("bert-mini-demo", *SMALL, "lower_case=true")
    with pytest.raises(InputError, match="lower_case=true contradicts the text in .*shards"):
        make(recipe, source / "shards")
    arguments = (f"{source}/a.txt", f"{source}/vocab.txt")
    with pytest.raises(InputError, match="lower_case=true contradicts the text that"):
        prepare.prepare(*arguments, f"{source}/shards", workers=0, lower_case=True)
    said = []
    prepare.prepare(*arguments, str(tmp_path / "low"), workers=0, lower_case=True, log=said.append)
    assert load_manifest(str(tmp_path / "low"))["lower_case"] is True
    assert "word pieces can never occur" in said[0] and said[-1].startswith("Warning:")
    # As an earlier version wrote it.
    manifest = json.loads((tmp_path / "low/manifest.json").read_text())
    del manifest["lower_case"]
    (tmp_path / "low/manifest.json").write_text(json.dumps(manifest))
    assert make(recipe_of("bert-mini-demo", *SMALL), tmp_path / "low").recipe.lower_case is True
    said.clear()
    prepare.prepare(*arguments, str(tmp_path / "low"), workers=0, log=said.append)
    assert "is finished already" in said[-1]


def test_a_vocabulary_is_learned_with_capitals(source):
    for asked, expected in (("none", True), ("false", False)):
        recipe = recipe_of("bert-mini-demo", *SMALL, "vocabulary_size=60", f"lower_case={asked}")
        task = make(recipe, source / "a.txt")
        assert task.recipe.lower_case is expected
        assert any(p[0] == "P" for p in task.vocabulary) is not expected
        assert ("ö" in "".join(task.vocabulary)) is not expected


@pytest.fixture(scope="module")
def run(source):
    """The folder of a run of the cased model, with its export."""
    task = make(recipe_of("bert-mini-demo", *SMALL), source / "shards")
    folder = source / "run"
    folder.mkdir()
    model = task.build_model()
    compatibility.write_run_config(str(folder), task.recipe, seed=1, **task.facts)
    tf.train.Checkpoint(model=model).save(str(folder / "ckpt"))
    task.write_files(str(folder))
    task.export(model, str(folder / "export"), {})
    return folder


def test_the_export_is_cased(run):
    module = tf.saved_model.load(str(run / "export"))
    encode = module.signatures["encode"]
    texts = ["Paris", "paris", "Göttingen", "Gottingen"]
    pooled = encode(text=tf.constant(texts))["pooled_output"].numpy()
    assert abs(pooled[0] - pooled[1]).max() > 1e-3 and abs(pooled[2] - pooled[3]).max() > 1e-3
    assert "Text: capitals and accents kept" in (run / "export/model_card.md").read_text()
    config = json.loads((run / "export/tf_models/tokenizer_config.json").read_text())
    assert config == {"do_lower_case": False}


def test_a_run_keeps_its_case(run, source):
    """Also one of an earlier version, which was lower-cased whatever its vocabulary."""
    recipe = recipe_of("bert-mini-demo", *SMALL)
    again = make(recipe, source / "a.txt", resume_dir=run)
    assert again.recipe.lower_case is False
    compatibility.check_compatible(str(run), recipe, seed=1)
    compatibility.check_compatible(str(run), again.recipe, seed=1, **again.facts)
    asked = dataclasses.replace(recipe, lower_case=True)
    with pytest.raises(InputError, match=r"lower_case False \(now True\)"):
        compatibility.check_compatible(str(run), asked, seed=1)
    old = source / "old"
    shutil.copytree(run, old)
    settings = json.loads((old / "recipe.json").read_text())
    del settings["lower_case"]
    (old / "recipe.json").write_text(json.dumps(settings))
    older = make(recipe, source / "a.txt", resume_dir=old)
    assert older.recipe.lower_case is True
    compatibility.check_compatible(str(old), older.recipe, seed=1)
    with pytest.raises(InputError, match=r"lower_case True \(now False\)"):
        compatibility.check_compatible(str(old), again.recipe, seed=1)


@pytest.fixture(scope="module")
def squad(source):
    folder = source / "squad"
    folder.mkdir()
    context = "The Babbage wrote it in Göttingen. The Ada wrote it in Paris."
    answers = [{"answer_start": context.index("Paris"), "text": "Paris"}]
    qas = [{"id": "q", "question": "Who wrote it in paris ?", "answers": answers}]
    content = json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]})
    for name in ("train", "dev"):
        (folder / f"{name}.json").write_text(content)
    return folder


QUICK = (
    "model=tiny",
    "sequence_length=16",
    "max_query_length=6",
    "doc_stride=4",
    "max_answer_length=2",
)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["", "export/tf_models"])
def test_fine_tuning_keeps_the_case(run, squad, place, tmp_path):
    recipe = recipe_of("squad-mini", *QUICK, f"init_from={run / place}")
    task = make(recipe, squad)
    assert task.recipe.lower_case is False
    features = task._source.training
    word = PIECES.index("Paris")
    assert features._contexts.ids[features.first_pieces[0]] == word
    assert features.text_of(0, features.first_pieces[0], features.last_pieces[0]) == "Paris"
    with pytest.raises(InputError, match="lower_case=true contradicts the checkpoint in"):
        make(dataclasses.replace(recipe, lower_case=True), squad)
    if not place:
        return
    task.export(task.build_model(), str(tmp_path / "export"), {})
    answer = tf.saved_model.load(str(tmp_path / "export")).signatures["serving_default"]
    scores = answer(
        question=tf.constant(["Who", "who", "Who"]),
        context=tf.constant(["Paris", "Paris", "paris"]),
    )["score"].numpy()
    assert len(set(scores.tolist())) == 3
    card = (tmp_path / "export/model_card.md").read_text()
    assert "capitals and accents kept" in card


def test_a_published_checkpoint_is_known_by_its_vocabulary(run, squad, tmp_path):
    published = tmp_path / "published"
    shutil.copytree(run / "export/tf_models", published)
    (published / "tokenizer_config.json").unlink()
    recipe = recipe_of("squad-mini", *QUICK, f"init_from={published}")
    assert make(recipe, squad).recipe.lower_case is False
    with pytest.raises(InputError, match="contradicts the vocabulary of .*which has capitals"):
        make(dataclasses.replace(recipe, lower_case=True), squad)
