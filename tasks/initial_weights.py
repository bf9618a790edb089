"""Encoder weights for fine-tuning, from a pre-training run or a checkpoint in tf-models' layout.

As in google-research/bert, optimizer slots are not read. The published BERT TF2 checkpoints and
those written by tf-models' `tf2_bert_encoder_checkpoint_converter` have tf-models' layout.
"""

import dataclasses
import os

import numpy as np
import tensorflow as tf
import tf_keras
from official.nlp.modeling import networks

from inputs.errors import InputError, first_line
from inputs.storage.files import check_checkpoint_path, exists, is_folder, list_names
from models import bert

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# Suffixes of the embedding tables' names in `BertEncoderV2`, which pre-training runs use, and in
# the functional `BertEncoder`. Word embeddings shared with a masked-LM head may have its name.
TABLES = {
    "vocabulary_size": ("/_embedding_layer/embeddings", "-0/embeddings", "/embedding_table"),
    "max_sequence_length": ("/_position_embedding_layer/embeddings", "-1/embeddings"),
    "types": ("/_type_embedding_layer/embeddings", "-2/embeddings"),
}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder in a checkpoint: the checkpoint's prefix, its object path there, and its sizes."""

    checkpoint: str
    path: str
    functional: bool
    size: bert.Size
    vocabulary_size: int
    max_sequence_length: int
    types: int

    @property
    def vocabulary_file(self) -> str:
        """The path of vocab.txt beside the checkpoint. The file may not exist."""
        return os.path.join(os.path.dirname(self.checkpoint), "vocab.txt")


def find_encoder(init_from: str) -> Encoder:
    """Finds the encoder in a checkpoint, given as a folder or as the checkpoint's prefix.

    Raises:
        InputError: there is no checkpoint, it cannot be read, or it has no BERT encoder.
    """
    checkpoint = find_checkpoint(init_from)
    shapes = read_shapes(checkpoint)
    query = "/_attention_layer/_query_dense/kernel" + VALUE
    queries = sorted(key for key in shapes if key.endswith(query))
    tables = {
        field: next(
            (shapes[key][0] for end in ends for key in shapes if key.endswith(end + VALUE)), None
        )
        for field, ends in TABLES.items()
    }
    if not queries or None in tables.values():
        raise InputError(
            f"--set init_from={init_from}: {checkpoint} has no BERT encoder in the layout of "
            "train.py or tf-models, nor, for pre-training, in that of google-research/bert and "
            "MLPerf. Fine-tuning takes a TensorFlow 1 checkpoint that was converted with "
            "`python -m official.nlp.tools.tf2_bert_encoder_checkpoint_converter`."
        )
    functional = "/_transformer_layers/" not in queries[0]
    path = queries[0].split("/layer_with_weights-" if functional else "/_transformer_layers/")[0]
    width, heads, _ = shapes[queries[0]]
    return Encoder(checkpoint, path, functional, bert.Size(len(queries), width, heads), **tables)


def read_shapes(checkpoint: str) -> dict[str, list[int]]:
    """Returns the shape of each tensor in a checkpoint, by key.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    try:
        return open_checkpoint(checkpoint).get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise InputError(f"--set init_from: {checkpoint} cannot be read ({reason}).") from None


def open_checkpoint(prefix: str):
    """Opens a checkpoint by its prefix, and returns what `tf.train.load_checkpoint` does.

    On ram:// that function takes the prefix for a folder.

    Raises:
        tf.errors.OpError, RuntimeError: it cannot be read.
    """
    return tf.compat.v1.train.NewCheckpointReader(prefix)


def find_checkpoint(init_from: str) -> str:
    """Returns the prefix of the checkpoint in a folder, or given as a prefix.

    Raises:
        InputError: there is none, or TensorFlow cannot read it.
    """
    check_checkpoint_path(init_from, "--set init_from")
    if is_folder(init_from):
        found = tf.train.latest_checkpoint(init_from)
        # The published archives have no `checkpoint` file, which `latest_checkpoint` reads.
        indices = [name for name in list_names(init_from) if name.endswith(".index")]
        if not found and len(indices) == 1:
            found = os.path.join(init_from, indices[0].removesuffix(".index"))
        if found:
            return found
    elif exists(f"{init_from}.index"):
        return init_from
    raise InputError(
        f"--set init_from={init_from}: there is no checkpoint. Give a pre-training run's "
        "--model_dir, or the folder of a published BERT TF2 checkpoint. Pre-training also takes "
        "a TensorFlow 1 checkpoint, such as MLPerf's."
    )


def read_encoder(saved: Encoder) -> dict[str, np.ndarray]:
    """Returns the encoder's weights by their names in `models.bert.encoder_variables`.

    Raises:
        InputError: the checkpoint lacks some weights, or has other shapes.
    """
    settings = {
        "vocab_size": saved.vocabulary_size,
        "hidden_size": saved.size.width,
        "num_layers": saved.size.layers,
        "num_attention_heads": saved.size.heads,
        "max_sequence_length": saved.max_sequence_length,
        "type_vocab_size": saved.types,
        "inner_dim": 4 * saved.size.width,
    }
    if saved.functional:
        encoder = networks.BertEncoder(**settings)
    else:
        encoder = networks.BertEncoderV2(**settings)
        tf_keras.Model(dict(encoder.inputs), encoder(dict(encoder.inputs)))  # creates its variables
    holder = encoder
    for name in reversed(saved.path.split("/")):
        holder = tf.train.Checkpoint(**{name: holder})
    try:
        status = holder.read(saved.checkpoint).expect_partial()
        status.assert_existing_objects_matched()
    # TensorFlow's reader raises IndexError for a truncated file.
    except (AssertionError, ValueError, IndexError, RuntimeError, tf.errors.OpError) as error:
        reason = first_line(error)
        raise InputError(
            f"--set init_from: {saved.checkpoint} is not a complete BERT ({reason})."
        ) from None
    return {name: v.numpy() for name, v in bert.encoder_variables(encoder).items()}


def check_size(saved: Encoder, model: str, sequence_length: int) -> None:
    """Raises `InputError` unless the encoder has the model's size and enough positions."""
    if saved.size != bert.SIZES[model]:
        name = next((name for name, size in bert.SIZES.items() if size == saved.size), None)
        fix = f"Give --set model={name} or" if name else "Give"
        raise InputError(
            f"--set init_from: {saved.checkpoint} is a BERT of {_describe(saved.size)}, but "
            f"model={model} has {_describe(bert.SIZES[model])}. {fix} another checkpoint."
        )
    if sequence_length > saved.max_sequence_length:
        raise InputError(
            f"--set sequence_length={sequence_length}: the position table of {saved.checkpoint} "
            f"has only {saved.max_sequence_length} rows. Set at most {saved.max_sequence_length}."
        )


def _describe(size: bert.Size) -> str:
    return f"{size.layers} layers, width {size.width} and {size.heads} heads"
