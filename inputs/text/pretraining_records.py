"""Reads pre-training examples that another program masked and wrote as TFRecords.

MLPerf's data, and that of google-research/bert's `create_pretraining_data.py`, have the keys of the
first column of `NAMES`; tf-models' program writes those of the second, with `use_v2_feature_names`.
Examples may be padded to the sequence length, or hold their own tokens only.
"""

import tensorflow as tf

from inputs.errors import InputError

# Ours -> google-research/bert's and MLPerf's, and tf-models'.
NAMES = {
    "input_word_ids": ("input_ids", "input_word_ids"),
    "input_mask": ("input_mask", "input_mask"),
    "input_type_ids": ("segment_ids", "input_type_ids"),
    "masked_lm_positions": ("masked_lm_positions", "masked_lm_positions"),
    "masked_lm_ids": ("masked_lm_ids", "masked_lm_ids"),
    "masked_lm_weights": ("masked_lm_weights", "masked_lm_weights"),
    "next_sentence_labels": ("next_sentence_labels", "next_sentence_labels"),
}
TOKENS = ("input_word_ids", "input_mask", "input_type_ids")


def find_names(path: str) -> dict[str, str]:
    """Returns our key -> the file's key, from the first record of a file.

    Raises:
        InputError: the file cannot be read, is empty, or has another layout.
    """
    try:
        first = next(iter(tf.data.TFRecordDataset(path).take(1)), None)
    except tf.errors.OpError as error:
        raise InputError(
            f"--data_dir: {path} is no TFRecord file ({str(error).splitlines()[0]})."
        ) from None
    if first is None:
        raise InputError(f"--data_dir: {path} has no records.")
    example = tf.train.Example()
    try:
        example.ParseFromString(first.numpy())
    except Exception as error:  # google.protobuf.message.DecodeError, in any version
        raise InputError(f"--data_dir: {path} holds no tf.train.Example ({error}).") from None
    found = set(example.features.feature)
    for layout in range(2):
        names = {ours: theirs[layout] for ours, theirs in NAMES.items()}
        if set(names.values()) <= found:
            return names
    raise InputError(
        f"--data_dir: {path} has the features {', '.join(sorted(found)) or 'none'}. Pre-training "
        f"examples have {', '.join(theirs[0] for theirs in NAMES.values())} (MLPerf, "
        "google-research/bert), or tf-models' names."
    )


def parse(records, names: dict[str, str], sequence_length: int, predictions: int):
    """Parses a batch of records.

    Args:
        records: [N] string tensor, serialized `tf.train.Example`s.
        names: from `find_names`.
        sequence_length: L. Shorter examples are padded; a longer one is an error when it is read.
        predictions: P, likewise.

    Returns:
        A batch as `inputs.text.batches.element_spec` describes.
    """
    kinds = {names[ours]: tf.io.RaggedFeature(tf.int64) for ours in NAMES}
    kinds[names["masked_lm_weights"]] = tf.io.RaggedFeature(tf.float32)
    parsed = tf.io.parse_example(records, kinds)
    batch = {}
    for ours in NAMES:
        length = sequence_length if ours in TOKENS else predictions
        if ours == "next_sentence_labels":
            length = 1
        values = parsed[names[ours]]
        longest = tf.reduce_max(values.row_lengths())
        check = tf.debugging.assert_less_equal(
            longest,
            tf.constant(length, longest.dtype),
            f"{names[ours]} of an example has more values than the phase takes, {length}",
        )
        with tf.control_dependencies([check]):
            dense = values.to_tensor(shape=[None, length])
        dtype = tf.float32 if ours == "masked_lm_weights" else tf.int32
        batch[ours] = tf.cast(dense, dtype)
    batch["next_sentence_labels"] = batch["next_sentence_labels"][:, 0]
    ones = tf.ones_like(batch["next_sentence_labels"], tf.float32)
    return batch | {"next_sentence_weights": ones, "example_weights": ones}
