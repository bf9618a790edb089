"""BERT pre-training on joined sequences, through the task: losses, gradients, replicas, resumes."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest
import tensorflow as tf
from batch_checks import joined

from inputs.errors import InputError
from inputs.text import pretraining_records
from inputs.text.packing import LengthBuckets, PackedRows
from inputs.text.tokenization import vocabulary
from recipes import find_recipe, override
from tasks.bert import BertPretraining
from training.monitor import run_monitor
from training.step import ReplicaStep

LENGTH, PREDICTIONS, PER_ROW = 128, 8, 3
SETTINGS = (
    f"max_sequence_length={LENGTH}",
    f"sequence_length={LENGTH}",
    f"predictions={PREDICTIONS}",
    f"sequences_per_row={PER_ROW}",
    "vocabulary_size=200",
    "global_batch_size=8",
    "lanes=2",
    "evaluation_examples=8",
)
BUCKETS = (32, 64, LENGTH)
# Of each way to join sequences: what turns packed rows into it, and its layout.
JOINED = {
    "rows": ((), PackedRows(LENGTH, PER_ROW)),
    "groups": (
        ("sequences_per_row=1", f"length_buckets={','.join(map(str, BUCKETS))}"),
        LengthBuckets(BUCKETS),
    ),
}


@pytest.fixture(scope="module")
def make_task(text, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(*settings, said=None, **arguments):
        recipe = override(find_recipe("bert-mini-demo"), [*SETTINGS, *settings])
        recipe.check()
        recipe = dataclasses.replace(recipe, task="bert")
        defaults = {
            **{"data_dir": str(text), "vocab": "", "resume_dir": None, "seed": 1},
            **{"synthetic": False, "cache_dir": cache},
        }
        log = (said if said is not None else []).append
        return BertPretraining(recipe, log=log, **defaults | arguments)

    return make


@pytest.fixture(scope="module")
def task(make_task):
    return make_task()


@pytest.fixture(scope="module")
def bucket_task(make_task):
    return make_task(*JOINED["groups"][0])


@pytest.fixture(scope="module")
def records(make_task, tmp_path_factory):
    """A folder in MLPerf's layout, with examples of the text."""
    folder = tmp_path_factory.mktemp("records")
    task = make_task("sequences_per_row=1")
    vocabulary.save_vocabulary(task.vocabulary, str(folder / "vocab.txt"))
    phase = task.recipe.phases[0]
    training = task._source.training_examples(phase, 1)
    for name, examples, count in (
        ("part-00000-of-00002", training, 40),
        ("part-00001-of-00002", training, 30),
        ("eval_10k", task._source.held_out_examples(phase), 2),
    ):
        batch = joined(examples.evaluation_batches(count, count))
        with tf.io.TFRecordWriter(os.path.join(folder, name)) as writer:
            for i in range(count):
                features = {}
                for ours, (theirs, _) in pretraining_records.NAMES.items():
                    values = np.atleast_1d(batch[ours][i]).tolist()
                    features[theirs] = (
                        tf.train.Feature(float_list=tf.train.FloatList(value=values))
                        if ours == "masked_lm_weights"
                        else tf.train.Feature(int64_list=tf.train.Int64List(value=values))
                    )
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
    return str(folder)


@pytest.fixture(scope="module")
def model(task):
    made = task.build_model()
    rng = np.random.default_rng(0)
    for variable in made.trainable_variables:  # biases, too, so that each matters
        variable.assign_add(0.03 * rng.normal(size=variable.shape))
    return made


def separate(batch):
    """The sequences of a joined batch, one in a row: the layout of a batch that is not joined."""
    return unpacked(batch) if "sequence_ids" in batch else out_of_buckets(batch)


def out_of_buckets(batch):
    keys = ("input_word_ids", "input_type_ids", "input_mask")
    found = {key: value for key, value in batch.items() if not key.startswith(keys)}
    for key in keys:
        padded = [
            np.pad(batch[f"{key}_{length}"], [(0, 0), (0, 0), (0, LENGTH - length)])
            for length in BUCKETS
        ]
        found[key] = np.concatenate(padded, axis=1)
    present = batch["example_weights"] > 0
    return {key: value[present] for key, value in found.items()}


def unpacked(packed):
    """The sequences of packed rows."""
    found = []
    for row in range(len(packed["sequence_ids"])):
        slots = np.flatnonzero(packed["example_weights"][row] > 0)
        for number, k in enumerate(slots, start=1):
            place = np.flatnonzero(packed["sequence_ids"][row] == number)
            picks = slice(k * PREDICTIONS, (k + 1) * PREDICTIONS)
            words, types, mask = (np.zeros(LENGTH, np.int32) for _ in range(3))
            words[: len(place)] = packed["input_word_ids"][row, place]
            types[: len(place)] = packed["input_type_ids"][row, place]
            mask[: len(place)] = 1
            np.testing.assert_array_equal(packed["positions"][row, place], range(len(place)))
            found.append(
                {
                    "input_word_ids": words,
                    "input_type_ids": types,
                    "input_mask": mask,
                    "masked_lm_positions": packed["masked_lm_positions"][row, picks] - place[0],
                    "masked_lm_ids": packed["masked_lm_ids"][row, picks],
                    "masked_lm_weights": packed["masked_lm_weights"][row, picks],
                    "next_sentence_labels": packed["next_sentence_labels"][row, k],
                    "next_sentence_weights": packed["next_sentence_weights"][row, k],
                    "example_weights": np.float32(1),
                }
            )
    return {key: np.stack([one[key] for one in found]) for key in found[0]}


def sums_and_gradients(task, model, batch):
    batch = {key: tf.constant(value) for key, value in batch.items()}
    counts = task.counts(batch)
    with tf.GradientTape() as tape:
        parts = [task.sums(model, part, False) for part in task.parts(batch)]
        sums = {key: tf.add_n([part[key] for part in parts]) for key in parts[0]}
        loss = sums["masked_loss"] / counts["masked"] + sums["sentence_loss"] / counts["sentence"]
    gradients = tape.gradient(loss, model.trainable_variables)
    return sums, counts, [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["text", "records"])
@pytest.mark.parametrize("form", JOINED)
def test_losses_and_gradients_are_those_of_the_sequences_alone(
    make_task, model, text, records, data, form
):
    settings, layout = JOINED[form]
    task = make_task(*settings, data_dir=records if data == "records" else str(text))
    batches = task.train_batches(0, 0)(None)
    assert batches.element_spec == layout.spec(8, PREDICTIONS)
    packed = joined(batches.take(1))
    alone = separate(packed)
    assert 12 <= len(alone["input_mask"]) <= 24
    sums, counts, gradients = sums_and_gradients(task, model, alone)
    packed_sums, packed_counts, packed_gradients = sums_and_gradients(task, model, packed)
    for name, value in sums.items():
        assert float(packed_sums[name]) == pytest.approx(float(value), rel=5e-6), name
    for name, value in counts.items():
        assert float(packed_counts[name]) == float(value), name
    largest = max(np.abs(gradient).max() for gradient in gradients)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["task", "bucket_task"])
def test_rows_depend_neither_on_replicas_and_hosts_nor_on_a_resume(request, form):
    task = request.getfixturevalue(form)
    whole = list(task.train_batches(0, 0)(None).take(4))
    resumed = next(iter(task.train_batches(0, 3)(None)))
    tf.nest.map_structure(np.testing.assert_array_equal, resumed, whole[3])
    for hosts, replicas in ((1, 2), (2, 2)):
        parts = [
            list(
                task.train_batches(0, 2)(tf.distribute.InputContext(hosts, host, replicas)).take(
                    replicas // hosts
                )
            )
            for host in range(hosts)
        ]
        together = joined(part for some in parts for part in some)
        tf.nest.map_structure(np.testing.assert_array_equal, together, joined(whole[2:3]))


def test_an_epoch_has_every_chunk_once(make_task):
    said = []
    task = make_task("global_batch_size=1", "lanes=1", said=said)
    batches = task.train_batches(0, 0)(None)
    (line,) = [line for line in said if line.startswith("Packed: ")]
    sequences, rows = (int(line.split()[i].replace(",", "")) for i in (1, 4))
    assert sequences / rows > 1.5
    epoch = joined(batches.take(rows))
    assert epoch["example_weights"].sum() == sequences
    # The number of chunks, from the task without packed rows.
    alone = make_task("sequences_per_row=1", "global_batch_size=1", "lanes=1")
    examples = alone._source.training_examples(alone.recipe.phases[0], 1)
    assert examples.num_examples == sequences


def test_an_epoch_of_buckets_has_every_chunk_once(make_task):
    said = []
    settings = (*JOINED["groups"][0], "global_batch_size=1", "lanes=1")
    task = make_task(*settings, said=said)
    batches = task.train_batches(0, 0)(None)
    (line,) = [line for line in said if line.startswith("In buckets: ")]
    sequences, groups = (int(line.split()[i].replace(",", "")) for i in (2, 5))
    epoch = joined(batches.take(groups))
    assert epoch["example_weights"].sum() == sequences
    alone = make_task("sequences_per_row=1", "global_batch_size=1", "lanes=1")
    examples = alone._source.training_examples(alone.recipe.phases[0], 1)
    assert examples.num_examples == sequences
    used = {
        n: epoch[f"input_mask_{n}"].sum(axis=2) * epoch["example_weights"][:, [i]]
        for i, n in enumerate(BUCKETS)
    }
    assert used[32].max() <= 32 < used[LENGTH].max()


def test_a_step_of_buckets_is_a_step_of_its_sequences(bucket_task, model):
    """Also with micro-batches."""
    strategy = tf.distribute.get_strategy()
    batch = joined(bucket_task.train_batches(0, 0)(None).take(1))
    counts = {key: float(value) for key, value in bucket_task.counts(batch).items()}
    found = []
    for accumulation, of_step in ((1, batch), (4, batch), (1, separate(batch))):
        step = ReplicaStep(
            bucket_task, model, None, seed=1, accumulation=accumulation, jit_compile=False
        )
        of_step = {key: tf.constant(value) for key, value in of_step.items()}
        found.append(strategy.run(step.sums_and_gradients, (of_step, counts, tf.constant([1, 2]))))
    for sums, gradients in found[:2]:
        for name, value in found[2][0].items():
            assert float(sums[name]) == pytest.approx(float(value), rel=5e-6), name
        largest = max(np.abs(gradient).max() for gradient in found[2][1])
        for ours, theirs in zip(gradients, found[2][1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * largest)


@pytest.mark.slow
def test_held_out_examples_are_not_packed(task, make_task):
    packed = joined(task.evaluation_batches(0)(None))
    alone = joined(make_task("sequences_per_row=1").evaluation_batches(0)(None))
    tf.nest.map_structure(np.testing.assert_array_equal, packed, alone)


@pytest.mark.parametrize("form", JOINED)
def test_synthetic_rows_have_the_same_spec(make_task, model, form):
    settings, layout = JOINED[form]
    synthetic = make_task("vocabulary_size=100", *settings, synthetic=True)
    batches = synthetic.train_batches(0, 0)(None)
    assert batches.element_spec == layout.spec(8, PREDICTIONS)
    for part in synthetic.parts(next(iter(batches))):
        sums = synthetic.sums(model, part, True)
        assert np.isfinite(float(sums["masked_loss"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "said", "other", "refused"),
    [
        ("rows", "Packed: ", "sequences_per_row=2", "sequences_per_row 3 (now 2)"),
        (
            "groups",
            "In buckets: ",
            "length_buckets=64,128",
            "length_buckets [32, 64, 128] (now [64",
        ),
    ],
)
def test_a_run_trains_and_keeps_its_layout(
    records, in_process, tmp_path, capfd, monkeypatch, form, said, other, refused
):
    monkeypatch.setattr(BertPretraining, "export", lambda *arguments: None)
    # As on an accelerator, whose utilization is reported.
    monkeypatch.setattr(run_monitor, "peak_flops", lambda strategy, dtype: 1e12)
    more = "save_every_steps=2", "dropout=0.1", *JOINED[form][0]

    def run(*settings):
        return in_process(
            [f"--data_dir={records}", "--model_dir=run", "--steps=4", "--steps_per_loop=1"]
            + [f"--cache_dir={tmp_path}"]
            + [f"--set={setting}" for setting in (*SETTINGS, *more, *settings)]
        )

    assert run() == 0, capfd.readouterr().err
    out, err = capfd.readouterr()
    assert f"4 steps of 8 {form}, on" in out and said in err
    assert "MFU" in err
    assert "To train on: 70 masked sequences; held out: 2" in err
    settings = json.loads((tmp_path / "run/recipe.json").read_text())
    layout = JOINED[form][1]
    assert settings["sequences_per_row"] == (layout.columns if form == "rows" else 1)
    assert tuple(settings["length_buckets"]) == (() if form == "rows" else layout.lengths)
    assert run(other) == 1
    assert refused in capfd.readouterr().err


@pytest.mark.slow
def test_sentences_of_records_get_masks(make_task, records):
    task = make_task("sequences_per_row=1", data_dir=records)
    sentence, word = task._source.masked_sentences()[0]
    assert "[MASK]" in sentence and word.isalpha() and sentence.startswith("the ")


@pytest.mark.parametrize("form", JOINED)
def test_counts_of_sequences_exclude_joined_ones(in_process, capfd, text, form):
    flags = [f"--set={setting}" for setting in (*SETTINGS, *JOINED[form][0])]
    scaled = ["--scaling=sqrt", "--global_batch_size=8", *flags]
    assert in_process([f"--data_dir={text}", *scaled]) == 1
    assert "--scaling=sqrt follows the batch size in sequences" in capfd.readouterr().err
    assert in_process([f"--data_dir={text}", "--mllog=log.txt", *flags]) == 1
    assert (
        "of which packed rows and groups of length buckets have a varying number"
        in capfd.readouterr().err
    )


def test_masked_records_take_no_other_masking(make_task, tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "part-0")) as writer:
        writer.write(b"")
    with pytest.raises(InputError, match="holds masked examples, on which whole_word and packing"):
        make_task("whole_word=true", data_dir=str(tmp_path))
    with pytest.raises(InputError, match="--vocab is needed: .*part-0 holds ids, not text"):
        make_task(data_dir=str(tmp_path))
    with pytest.raises(InputError, match="--cache_dir is needed: where the records of .* begin"):
        make_task(data_dir=str(tmp_path), cache_dir="", shared_dir="shared")


@pytest.mark.parametrize("kind", ["text", "records"])
def test_the_total_of_damaged_records_is_reported(make_task, text, records, kind):
    said = []
    data_dir = str(text) if kind == "text" else records
    task = make_task("max_bad_record_share=0.9", said=said, data_dir=data_dir)
    task.evaluation_batches(0)
    (damage,) = task.damage()
    damage.report(*map(tf.constant, ("a.tfrecord", 5, 0, 1)))
    task.check_data()
    assert said[-1] == "Skipped: a.tfrecord, byte 5: damaged or missing."
    task.end_data()
    assert re.fullmatch("1 of [0-9]+ records were damaged and skipped", said[-1])
