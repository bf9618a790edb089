"""Pre-training examples in MLPerf's and tf-models' layouts."""

import gzip
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from batch_checks import joined

from inputs.bad_records import BadRecords
from inputs.errors import InputError, message_in
from inputs.shards import record_offsets
from inputs.text import pretraining_records
from inputs.text.batches import element_spec
from inputs.text.packing import LengthBuckets, PackedRows
from inputs.text.record_files import find_record_files

WORDS, LENGTH, PREDICTIONS = 60, 16, 4
MLPERF = {ours: theirs[0] for ours, theirs in pretraining_records.NAMES.items()}


def example(names, length, masks, padded_to=None, predictions=None, first=1):
    """An example of consecutive tokens, of which the first `masks` are masked."""
    row = list(range(first, first + length))
    values = {
        "input_word_ids": row,
        "input_mask": [1] * length,
        "input_type_ids": [0] * 3 + [1] * (length - 3),
        "masked_lm_positions": list(range(masks)),
        "masked_lm_ids": row[:masks],
        "masked_lm_weights": [1.0] * masks,
        "next_sentence_labels": [1],
    }
    features = {}
    for ours, value in values.items():
        size = padded_to if ours.startswith("input") else predictions
        if size and ours != "next_sentence_labels":
            value = value + [0] * (size - len(value))
        kind = "float_list" if ours == "masked_lm_weights" else "int64_list"
        lists = {"float_list": tf.train.FloatList, "int64_list": tf.train.Int64List}
        features[names[ours]] = tf.train.Feature(**{kind: lists[kind](value=value)})
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write(path, *records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return str(path)


def opened(folder, training, held_out=(), skip=True, said=None, share=0.9):
    """(training, held-out) files, with their index in the folder."""
    log = (said if said is not None else []).append
    records = BadRecords(share, skip=skip, log=log)
    return pretraining_records.open_records(
        [*training], [*held_out], records, cache_dir=str(folder / "cache"), log=log
    )


def examples_of(files, length=LENGTH, predictions=PREDICTIONS, **more):
    return pretraining_records.RecordExamples(
        files, WORDS, sequence_length=length, predictions=predictions, seed=1, **more
    )


@pytest.fixture
def alike(monkeypatch):
    """Files that differ in their middle, which is not compared, have the same fingerprint."""
    name = lambda files: f"{len(files)}-{files[0][-4:]}"  # noqa: E731
    monkeypatch.setattr(pretraining_records, "fingerprint", name)


@pytest.fixture
def many(tmp_path):
    """Two files of 40 records of 4 to 12 tokens; record i begins with token 1 + i % 40."""
    rng = np.random.default_rng(0)
    records = [
        example(MLPERF, int(n), 2, padded_to=LENGTH, predictions=PREDICTIONS, first=1 + i % 40)
        for i, n in enumerate(rng.integers(4, 13, 80))
    ]
    return [
        write(tmp_path / f"part-0000{i}-of-00002", *records[40 * i : 40 * i + 40]) for i in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [0, 1], ids=["MLPerf", "tf-models"])
@pytest.mark.parametrize("padded", [True, False])
def test_both_layouts_padded_and_not(tmp_path, layout, padded):
    names = {ours: theirs[layout] for ours, theirs in pretraining_records.NAMES.items()}
    size = {"padded_to": 16, "predictions": 4} if padded else {}
    records = [example(names, 9, 2, **size), example(names, 16, 4, **size)]
    path = write(tmp_path / "part-0", *records)
    assert pretraining_records.find_names(path) == names
    files, _ = opened(tmp_path, [path], [path])
    batches = examples_of(files).evaluation_batches(2, 10)
    assert batches.element_spec == element_spec(2, LENGTH, PREDICTIONS)
    (batch,) = batches
    np.testing.assert_array_equal(batch["input_word_ids"][0], [*range(1, 10), *[0] * 7])
    np.testing.assert_array_equal(batch["input_type_ids"][0], [0] * 3 + [1] * 6 + [0] * 7)
    np.testing.assert_array_equal(batch["input_mask"].numpy().sum(axis=1), [9, 16])
    np.testing.assert_array_equal(batch["masked_lm_weights"], [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(batch["masked_lm_positions"], [[0, 1, 0, 0], [0, 1, 2, 3]])
    np.testing.assert_array_equal(batch["masked_lm_ids"][1], [1, 2, 3, 4])
    np.testing.assert_array_equal(batch["next_sentence_labels"], [1, 1])
    np.testing.assert_array_equal(batch["next_sentence_weights"], [1, 1])


def test_an_index_that_is_there_is_opened_without_the_lock(many, tmp_path, monkeypatch):
    first, _ = opened(tmp_path, many)
    monkeypatch.setattr(pretraining_records, "locked", None)
    again, _ = opened(tmp_path, many)
    assert again.count == first.count


@pytest.mark.slow
@pytest.mark.parametrize("per_row", [1, 3])
def test_an_epoch_has_each_record_once_on_any_hosts_and_after_a_resume(many, tmp_path, per_row):
    files, held_out = opened(tmp_path, many)
    assert (files.count, held_out.first, held_out.count) == (78, 78, 2)
    examples = examples_of(files, layout=PackedRows(LENGTH, per_row) if per_row > 1 else None)
    count = examples.order(4).examples
    assert count == 78 if per_row == 1 else 78 / 3 <= count < 55
    whole = list(examples.training_batches(4).take(-(-count // 4)))
    epoch = {
        key: joined(whole)[key].reshape(-1, PREDICTIONS)[: count * per_row, 0]
        for key in ("masked_lm_ids", "masked_lm_weights")
    }
    firsts = epoch["masked_lm_ids"][epoch["masked_lm_weights"] > 0]
    assert sorted(firsts) == sorted(1 + i % 40 for i in range(78))
    again = next(iter(examples.training_batches(4, first_step=3)))
    tf.nest.map_structure(np.testing.assert_array_equal, again, whole[3])
    hosts = [
        next(iter(examples.training_batches(4, tf.distribute.InputContext(2, host, 2))))
        for host in range(2)
    ]
    tf.nest.map_structure(np.testing.assert_array_equal, joined(hosts), joined(whole[:1]))
    replicas = list(examples.training_batches(4, tf.distribute.InputContext(1, 0, 2)).take(2))
    tf.nest.map_structure(np.testing.assert_array_equal, joined(replicas), joined(whole[:1]))


def test_damage_is_named_and_costs_one_example(many, alike, tmp_path):
    path = pathlib.Path(many[1])
    data, place, header = bytearray(path.read_bytes()), *record_offsets(many[1])[[7, 20]]
    data[place + 30] ^= 1
    data[header + 1] ^= 1  # of the length
    path.write_bytes(data)
    said = []
    files, _ = opened(tmp_path, many, many[:1], said=said)
    assert files.count == 79
    assert f"Skipped: {path}, byte {header}: damaged (its length; " in " ".join(said)
    assert said[-1] == "1 of 120 records were damaged and skipped"
    with pytest.raises(
        InputError, match="1 of 80 records are damaged, more than the share of 0.01"
    ):
        opened(tmp_path, many, share=0.01)
    told = []
    records = BadRecords(0.9, skip=True, log=told.append)
    examples = examples_of(files, bad_records=records)
    batch = joined(examples.evaluation_batches(8, 1_000))
    examples.damage.collect()
    assert told == [f"Skipped: {path}, byte {place}: damaged or missing."] and records.bad == 1
    assert batch["example_weights"].sum() == batch["next_sentence_weights"].sum() == 78
    assert batch["masked_lm_weights"].sum() == 78 * 2
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=f"InputError: --data_dir: {path}, byte {place}: damaged",
    ) as caught:
        joined(examples_of(files).evaluation_batches(8, 1_000))
    assert message_in(caught.value).endswith("on_bad_record=skip.")
    with pytest.raises(InputError, match=f"{path}, byte {header}: damaged .* Repair it, or skip"):
        opened(tmp_path / "other", many, skip=False)
    data[header + 1] ^= 1
    path.write_bytes(data)
    assert opened(tmp_path, many, many[:1])[0].count == 80


def test_records_of_another_content_cost_one_example_each(tmp_path):
    """Also those that TensorFlow's parser refuses, with which it refuses all others of a block."""
    good = example(MLPERF, 9, 2, padded_to=LENGTH, predictions=PREDICTIONS)

    def changed(name, kind, values):
        made = tf.train.Example.FromString(good)
        feature = made.features.feature[name]
        feature.Clear()
        getattr(feature, kind).value[:] = values
        return made.SerializeToString()

    weights = [
        changed("masked_lm_weights", "float_list", [1, value, 0, 0])
        for value in (np.nan, np.inf, -np.inf, -1)
    ]
    bad = [
        b"\xff\xfe\x01garbage",
        b"",
        good[:-3],
        changed("masked_lm_weights", "int64_list", [1, 1]),
        changed("input_ids", "bytes_list", [b"the"]),
        changed("next_sentence_labels", "int64_list", [2]),
        changed("input_ids", "int64_list", [-1] * LENGTH),
        changed("masked_lm_positions", "int64_list", [0, 9, 0, 0]),
        changed("masked_lm_ids", "int64_list", [1, WORDS, 0, 0]),
        *weights,
    ]
    path = write(tmp_path / "part", good, *(record for each in bad for record in (each, good)))
    places = record_offsets(path)[1::2]
    said = []
    files, _ = opened(tmp_path, [path], [path])
    records = BadRecords(0.9, skip=True, log=said.append)
    examples = examples_of(files, bad_records=records)
    batch = joined(examples.evaluation_batches(8, 1_000))
    examples.damage.collect()
    assert records.bad == len(bad)  # and the first ten are named
    named = {f"Skipped: {path}, byte {place}: damaged or missing." for place in places}
    assert len(said) == 10 and named > {*said}
    assert batch["example_weights"].sum() == len(bad) + 1
    assert batch["masked_lm_weights"].sum() == 2 * (len(bad) + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [PackedRows(LENGTH, 2), LengthBuckets((LENGTH // 2, LENGTH // 2, LENGTH))]
)
def test_a_record_that_was_damaged_when_rows_were_planned_still_fits(alike, tmp_path, layout):
    records = [example(MLPERF, 8, 1) for _ in range(8)]
    path = write(tmp_path / "part", *records)
    data, place = bytearray((tmp_path / "part").read_bytes()), int(record_offsets(path)[2])
    data[place + 30] ^= 1
    (tmp_path / "part").write_bytes(data)
    held_out = [write(tmp_path / "eval", *records[:2])]

    def rows():
        files, _ = opened(tmp_path, [path], held_out)
        bad_records = BadRecords(0.9, skip=True, log=print)
        examples = examples_of(files, layout=layout, bad_records=bad_records)
        (batch,) = examples.training_batches(len(examples.plan)).take(1)
        return sum(batch["example_weights"].numpy().ravel())

    assert rows() == 7
    data[place + 30] ^= 1
    (tmp_path / "part").write_bytes(data)
    assert rows() == 8


def test_the_first_segments_leave_out_what_fills_a_batch(many, tmp_path):
    files, held_out = opened(tmp_path, many, many[:1])
    assert [ids.tolist() for ids in examples_of(files).first_segments(1)] == [[1, 2, 3]]
    shown = [*examples_of(held_out).first_segments(64)]
    assert [ids[0] for ids in shown] == [*range(1, 41)]


def test_records_that_do_not_fit_or_have_other_words_are_said(many, tmp_path):
    files, _ = opened(tmp_path, many)
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=r"InputError: .* more than the 8 tokens or 4 masked tokens of the phase. Set seq",
    ) as caught:
        joined(examples_of(files, length=8).evaluation_batches(8, 1_000))
    assert message_in(caught.value).endswith("that the records were made with.")
    with pytest.raises(tf.errors.InvalidArgumentError, match="the 16 tokens or 1 masked tokens"):
        joined(examples_of(files, predictions=1).evaluation_batches(8, 1_000))
    pieces = ["[PAD]", "[CLS]", "[SEP]", *map(str, range(WORDS))]
    pretraining_records.check_vocabulary(files, pieces)
    with pytest.raises(InputError, match=r"begins with the id 1, which is '\[SEP\]' in this voc"):
        pretraining_records.check_vocabulary(files, ["[PAD]", "[SEP]", "[CLS]"])


def test_mlperf_layout_of_a_folder(many, tmp_path):
    said = []
    assert find_record_files(str(tmp_path)) == (sorted(many), [])
    held_out = [write(tmp_path / name, example(MLPERF, 9, 2)) for name in ("eval_10k", "eval_all")]
    for name in ("vocab.txt", "eval.txt", "eval.md5"):
        (tmp_path / name).write_text("[CLS]")
    assert find_record_files(str(tmp_path), said.append) == (sorted(many), held_out[:1])
    assert "4 TFRecord files; 3 passed over: 2 × .txt, 1 × .md5" in said[0]
    assert said[1] == f"Passed over, as eval_10k is the held-out set: {held_out[1]}"
    assert find_record_files(f"{tmp_path}/part-*,{held_out[1]}")[1] == held_out[1:]
    assert find_record_files(f"{tmp_path}/vocab.txt") is None
    prepared = tmp_path / "text" / "shards"  # its TFRecords are no masked examples
    prepared.mkdir(parents=True)
    write(prepared / "shard-00000.tfrecord", example(MLPERF, 9, 2))
    (prepared / "manifest.json").write_text("{}")
    assert find_record_files(str(tmp_path / "text")) is None
    with pytest.raises(InputError, match="eval_10k is held out, and there is no file to train on"):
        find_record_files(held_out[0])
    with pytest.raises(InputError, match="has no TFRecord file, but other entries have"):
        find_record_files(f"{many[0]},{tmp_path}/vocab.txt")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(pathlib.Path(many[0]).read_bytes()))
    with pytest.raises(InputError, match=r"is a compressed TFRecord file.* gunzip -c .*packed.gz"):
        find_record_files(str(tmp_path))


def test_the_same_files_are_held_out_however_the_list_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["rec/train/part-0.tfrecord", "rec/train/part-1.tfrecord", "rec/eval/part-0.tfrecord"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(name, example(MLPERF, 9, 2))
    for spelling in ("rec", "rec/", "rec/*", "rec/*/*", "rec/**", "rec/train,rec/eval"):
        assert find_record_files(spelling) == (names[:2], names[2:]), spelling
    assert find_record_files("rec/train/*,rec/eval/*") == (names[:2], names[2:])
    assert find_record_files(",".join(names)) == (names[:2], names[2:])
    # What all files have in common says nothing about one of them.
    for spelling in ("rec/eval", "rec/eval/*", names[2]):
        assert find_record_files(spelling) == (names[2:], [])
    twice = find_record_files(f"rec/train,rec/./train/part-0.tfrecord,{tmp_path}/rec/train")[0]
    assert len(twice) == 2  # no file is read twice


def test_a_file_that_should_have_records_is_not_passed_over(tmp_path):
    for number in range(3):
        write(tmp_path / f"part{number}", example(MLPERF, 9, 2))
    (tmp_path / "notes").write_text("passed over")
    assert len(find_record_files(str(tmp_path))[0]) == 3
    for name in ("part3", "other.tfrecord", "x.tfrecord-00000-of-00002", "x-00001-of-00002"):
        path = tmp_path / name
        path.touch()
        with pytest.raises(InputError, match=rf"{name} is empty, by its name one of the data"):
            find_record_files(str(tmp_path))
        path.write_bytes(b"xx" + bytes(100))
        with pytest.raises(InputError, match=rf"{name} is no TFRecord file.* first record is dam"):
            find_record_files(str(tmp_path))
        path.unlink()


def test_what_is_no_such_file_is_said_in_one_sentence(tmp_path):
    other = tf.train.Example(
        features=tf.train.Features(
            feature={"image": tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))}
        )
    )
    path = write(tmp_path / "images", other.SerializeToString())
    with pytest.raises(
        InputError, match="has the features image. Pre-training examples have input_i"
    ):
        pretraining_records.find_names(path)
    with pytest.raises(InputError, match="has no records"):
        pretraining_records.find_names(write(tmp_path / "empty"))
    (tmp_path / "text").write_text("no record at all, but a line of text")
    with pytest.raises(InputError, match="is no TFRecord file"):
        pretraining_records.find_names(str(tmp_path / "text"))
    wrong = tf.train.Example.FromString(example(MLPERF, 9, 2))
    wrong.features.feature["masked_lm_weights"].int64_list.value[:] = [1, 1]
    with pytest.raises(InputError, match="masked_lm_weights is a int64_list, but .* a float_list"):
        pretraining_records.find_names(write(tmp_path / "kinds", wrong.SerializeToString()))
    damaged = gzip.compress(bytes(1000))
    (tmp_path / "a.tar.gz").write_bytes(damaged[:10] + b"\xff\xff" + damaged[12:])
    assert find_record_files(f"{tmp_path}/a.tar.gz") is None
    with pytest.raises(InputError, match="holds no tf.train.Example"):
        pretraining_records.find_names(write(tmp_path / "bytes", b"\xff\xff\xff"))
