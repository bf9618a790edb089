"""Pre-training starts from a run, a TensorFlow 1 checkpoint or a checkpoint of tf-models."""

import json

import numpy as np
import pytest
import tensorflow as tf
from official.nlp.modeling import networks

import recipes
from inputs.errors import InputError
from models import bert
from tasks import initial_pretraining, initial_weights
from tasks.bert import BertPretraining
from tf_lamb import tf_keras as ours
from training import optimizers
from training.monitor.progress import read_rows
from training.run import Run

WORDS, POSITIONS = 30, 16


def build(seed=None):
    model = bert.build_pretrainer(
        bert.SIZES["tiny"], WORDS, POSITIONS, dropout=0.0, initializer_stddev=0.02
    )
    if seed is not None:
        rng = np.random.default_rng(seed)
        for variable in model.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
    return model


@pytest.fixture(scope="module")
def trained():
    """A model with random weights, and a LAMB with random moments after 28,252 updates."""
    model = build(1)
    optimizer = ours.LAMB(1e-3, telemetry=True)
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(2)
    shapes = [variable.shape for variable in model.trainable_variables]
    slots = [[rng.normal(size=shape) ** 2 for shape in shapes] for _ in range(2)]
    optimizers.assign_slots(optimizer, 28_252, slots)
    return model, optimizer, slots


# The weights of a layer of google-research/bert's modeling.py, run_pretraining.py: name, and shape
# for width 128. Written down here instead of being derived from our names.
TF1_LAYER = {
    **{f"attention/self/{part}/kernel": [128, 128] for part in ("query", "key", "value")},
    **{f"attention/self/{part}/bias": [128] for part in ("query", "key", "value")},
    "attention/output/dense/kernel": [128, 128],
    "attention/output/dense/bias": [128],
    "attention/output/LayerNorm/gamma": [128],
    "attention/output/LayerNorm/beta": [128],
    "intermediate/dense/kernel": [128, 512],
    "intermediate/dense/bias": [512],
    "output/dense/kernel": [512, 128],
    "output/dense/bias": [128],
    "output/LayerNorm/gamma": [128],
    "output/LayerNorm/beta": [128],
}
TF1 = {
    "bert/embeddings/word_embeddings": [WORDS, 128],
    "bert/embeddings/position_embeddings": [POSITIONS, 128],
    "bert/embeddings/token_type_embeddings": [2, 128],
    "bert/embeddings/LayerNorm/gamma": [128],
    "bert/embeddings/LayerNorm/beta": [128],
    **{f"bert/encoder/layer_{i}/{name}": s for i in range(2) for name, s in TF1_LAYER.items()},
    "bert/pooler/dense/kernel": [128, 128],
    "bert/pooler/dense/bias": [128],
    "cls/predictions/output_bias": [WORDS],
    "cls/predictions/transform/dense/kernel": [128, 128],
    "cls/predictions/transform/dense/bias": [128],
    "cls/predictions/transform/LayerNorm/gamma": [128],
    "cls/predictions/transform/LayerNorm/beta": [128],
    "cls/seq_relationship/output_weights": [2, 128],
    "cls/seq_relationship/output_bias": [2],
}


def write_tf1(folder, without=(), moments=("/LAMB", "/LAMB_1")):
    """Writes a checkpoint in TensorFlow 1's format; returns its arrays by name."""
    rng = np.random.default_rng(3)
    arrays = {
        name + end: np.float32(rng.normal(size=shape))
        for name, shape in TF1.items()
        for end in ("", *moments)
        if name not in without
    }
    arrays["global_step"] = np.int64(28_252)
    folder.mkdir(exist_ok=True)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in arrays.items():
            tf.compat.v1.get_variable(name, initializer=value)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver()
        saver.save(session, str(folder / "model.ckpt-28252"), write_state=False)
    return arrays


def test_every_weight_has_its_name_in_tensorflow_1():
    names = [initial_pretraining.own_name(v) for v in build().trainable_variables]
    assert {initial_pretraining.tf1_name(name) for name in names} == set(TF1)


@pytest.mark.parametrize("moments", [("/LAMB", "/LAMB_1"), ("/adam_m", "/adam_v")])
def test_a_tensorflow_1_checkpoint(tmp_path, moments):
    arrays = write_tf1(tmp_path / "tf1", moments=moments)
    start = initial_pretraining.Start(str(tmp_path / "tf1"), slots=True)
    model = build()
    assert start.assign(model) == []
    slots = start.read_slots(model)
    assert slots.step == 28_252
    for variable in model.trainable_variables:
        own = initial_pretraining.own_name(variable)
        name = initial_pretraining.tf1_name(own)
        for value, end in zip(
            (variable.numpy(), *(moment[own] for moment in slots.moments)),
            ("", *moments),
            strict=True,
        ):
            expected = arrays[name + end]
            if name == "cls/seq_relationship/output_weights":
                expected = expected.T
            np.testing.assert_array_equal(value, expected.reshape(variable.shape))
    # The query of head 1 is the second half of the columns.
    kernel = model.trainable_variables[5].numpy()
    query = arrays["bert/encoder/layer_0/attention/self/query/kernel"]
    np.testing.assert_array_equal(kernel[:, 1], query[:, 64:])


def write_run(folder, trained, optimizer="lamb"):
    model, lamb, _ = trained
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps({"optimizer": optimizer}))
    checkpoint = tf.train.Checkpoint(model=model, optimizer=lamb)
    manager = tf.train.CheckpointManager(checkpoint, str(folder), 1)
    manager.save()


def test_a_run_gives_weights_and_moments(tmp_path, trained):
    model, _, slots = trained
    write_run(tmp_path / "run", trained)
    start = initial_pretraining.Start(str(tmp_path / "run"), slots=True)
    other = build()
    assert start.assign(other) == []
    for ours_, theirs in zip(other.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(ours_.numpy(), theirs.numpy())
    read = start.read_slots(other)
    assert read.step == 28_252
    for moment, expected in zip(read.moments, slots, strict=True):
        for value, array in zip(moment.values(), expected, strict=True):
            np.testing.assert_array_equal(value, np.float32(array))


def test_an_encoder_of_tf_models_leaves_the_heads_random(tmp_path):
    encoder = networks.BertEncoder(
        vocab_size=WORDS,
        hidden_size=128,
        num_layers=2,
        num_attention_heads=2,
        max_sequence_length=POSITIONS,
        intermediate_size=512,
        type_vocab_size=2,
    )
    tf.train.Checkpoint(model=encoder).write(str(tmp_path / "bert_model.ckpt"))
    start = initial_pretraining.Start(str(tmp_path / "bert_model.ckpt"), slots=False)
    model = build()
    missing = start.assign(model)
    assert {name.split("/")[0] for name in missing} == {"masked_lm", "next_sentence"}
    assert len(missing) == 7 and start.read_slots(model) is None
    np.testing.assert_array_equal(
        model.trainable_variables[0].numpy(),
        bert.encoder_variables(encoder)["word_embeddings/embeddings"].numpy(),
    )


def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, trained):
    write_tf1(tmp_path / "part", without=["bert/encoder/layer_1/intermediate/dense/bias"])
    with pytest.raises(InputError, match="layer_1/intermediate/bias is missing"):
        initial_pretraining.Start(str(tmp_path / "part"), slots=False).assign(build())
    write_tf1(tmp_path / "none", moments=())
    with pytest.raises(InputError, match="init_slots=true: .* has no moments of LAMB"):
        initial_pretraining.Start(str(tmp_path / "none"), slots=True)
    write_run(tmp_path / "adamw", trained, optimizer="adamw")
    with pytest.raises(InputError, match="has no moments of LAMB"):
        initial_pretraining.Start(str(tmp_path / "adamw"), slots=True)
    larger = bert.build_pretrainer(
        bert.SIZES["tiny"], WORDS + 1, POSITIONS, dropout=0.0, initializer_stddev=0.02
    )
    with pytest.raises(InputError, match=r"\[30, 128\] in .* and \[31, 128\] in this run. Give"):
        initial_pretraining.Start(str(tmp_path / "none"), slots=False).assign(larger)
    with pytest.raises(InputError, match=r"init_from: TensorFlow cannot read .*/a\[1\]/ckpt-5"):
        initial_weights.find_checkpoint("/tmp/a[1]/ckpt-5")
    with pytest.raises(InputError, match="there is no checkpoint.* a TensorFlow 1 checkpoint"):
        initial_pretraining.Start(str(tmp_path / "nowhere"), slots=False)


def pretrain(text, folder, lines, *changes):
    """Pre-trains a small BERT in a folder; returns the losses of its loops of steps."""
    settings = ["vocabulary_size=300", "sequence_length=16", "predictions=3", "telemetry=false"]
    settings += ["max_sequence_length=16", "global_batch_size=16", "evaluation_examples=16"]
    demo = recipes.resized(recipes.find_recipe("bert-mini-demo"), steps=60)
    recipe = recipes.override(demo, [*settings, *changes])
    recipe.check()
    task = BertPretraining(
        recipe,
        data_dir=str(text),
        vocab="",
        resume_dir=None,
        seed=1,
        synthetic=False,
        log=lines.append,
    )
    one = tf.distribute.OneDeviceStrategy("/cpu:0")
    Run(task, task.recipe, one, model_dir=folder, seed=1, steps_per_loop=20, log=lines.append).fit()
    return [row["loss"] for row in read_rows(f"{folder}/history.jsonl")]


@pytest.mark.slow
def test_a_run_starts_where_another_ended(text):
    """The first loss of the second run is near the last of the first, and far from its first."""
    lines = []
    first = pretrain(text, "first", lines)
    changes = ["init_from=first", "init_slots=true", "peak_learning_rate=1e-5", "steps=20"]
    second = pretrain(text, "second", lines, *changes, "warmup_steps=0")
    assert "Starting from first/ckpt-60, its moments after 60 updates" in lines
    assert abs(second[0] - first[-1]) < 0.3 * (first[0] - first[-1])
    key = "optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"
    assert tf.train.load_variable("second/ckpt-20", key) == 80


def test_recipes_say_what_they_miss():
    recipe = recipes.find_recipe("bert-mini-demo")
    with pytest.raises(ValueError, match="init_slots needs a checkpoint"):
        recipes.override(recipe, ["init_slots=true"]).check()
    lines = []
    mlperf = recipes.override(recipes.find_recipe("mlperf-bert-batch-256"), ["model=tiny"])
    BertPretraining(
        mlperf, data_dir="", vocab="", resume_dir=None, seed=1, synthetic=True, log=lines.append
    )
    assert "Starting from random weights. The target of 0.72 was published" in lines[0]
