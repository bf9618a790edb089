"""Pre-training examples in MLPerf's and tf-models' layouts."""

import numpy as np
import pytest
import tensorflow as tf

from inputs.errors import InputError
from inputs.text import pretraining_records
from inputs.text.batches import element_spec


def example(names, length, masks, padded_to=None, predictions=None):
    """An example of tokens 1, 2, ..., of which the first `masks` are masked."""
    row = list(range(1, length + 1))
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


@pytest.mark.parametrize("layout", [0, 1], ids=["MLPerf", "tf-models"])
@pytest.mark.parametrize("padded", [True, False])
def test_both_layouts_padded_and_not(tmp_path, layout, padded):
    names = {ours: theirs[layout] for ours, theirs in pretraining_records.NAMES.items()}
    size = {"padded_to": 16, "predictions": 4} if padded else {}
    records = [example(names, 9, 2, **size), example(names, 16, 4, **size)]
    path = write(tmp_path / "part-0", *records)
    found = pretraining_records.find_names(path)
    assert found == names
    batch = pretraining_records.parse(tf.constant(records), found, 16, 4)
    spec = element_spec(2, 16, 4)
    assert batch.keys() == spec.keys()
    for key, value in batch.items():
        assert value.dtype == spec[key].dtype and spec[key].shape.is_compatible_with(value.shape)
    np.testing.assert_array_equal(batch["input_word_ids"][0], [*range(1, 10), *[0] * 7])
    np.testing.assert_array_equal(batch["input_mask"].numpy().sum(axis=1), [9, 16])
    np.testing.assert_array_equal(batch["masked_lm_weights"], [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(batch["masked_lm_ids"][1], [1, 2, 3, 4])
    np.testing.assert_array_equal(batch["next_sentence_labels"], [1, 1])


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
    with pytest.raises(InputError, match="holds no tf.train.Example"):
        pretraining_records.find_names(write(tmp_path / "bytes", b"\xff\xff\xff"))


def test_an_example_that_is_too_long_is_refused(tmp_path):
    names = {ours: theirs[0] for ours, theirs in pretraining_records.NAMES.items()}
    record = example(names, 20, 2)
    with pytest.raises(tf.errors.InvalidArgumentError, match="input_ids of an example has more"):
        pretraining_records.parse(tf.constant([record]), names, 16, 4)
