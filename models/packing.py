"""BERT pre-training on packed rows: several sequences in a row, each as if it were alone."""

import tensorflow as tf

from models import bert


def encode_packed(encoder, batch, training: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Runs a `BertEncoderV2` on packed rows.

    A token attends to the tokens of its own sequence only, and its position counts from the start
    of its sequence. The layers and weights are the encoder's own.

    Args:
        encoder: from `models.bert.encoder_of`, already built.
        batch: as `inputs.text.packing.packed_spec` describes.
        training: whether dropout is on.

    Returns:
        A tuple (sequence_output [R, L, H], pooled_output [R, K, H]), floats in the compute dtype.
    """
    words = encoder._embedding_layer(batch["input_word_ids"])
    table = tf.cast(encoder._position_embedding_layer._position_embeddings, words.dtype)
    positions = tf.gather(table, batch["positions"])
    types = encoder._type_embedding_layer(batch["input_type_ids"])
    x = encoder._embedding_norm_layer(words + positions + types)
    x = encoder._embedding_dropout(x, training=training)
    own = batch["sequence_ids"]
    together = (own[:, :, None] == own[:, None, :]) & (own[:, None, :] > 0)
    mask = tf.cast(together, x.dtype)
    for layer in encoder._transformer_layers:
        x = layer([x, mask], training=training)
    first = tf.gather(x, batch["sequence_starts"], batch_dims=1)
    return x, encoder._pooler_layer(first)


def pretraining_sums(model, batch, training: bool) -> dict[str, tf.Tensor]:
    """Sums of losses and correct predictions over a packed batch.

    Args:
        model: from `models.bert.build_pretrainer`.
        batch: as `inputs.text.packing.packed_spec` describes.
        training: whether dropout is on.

    Returns:
        float32 scalars, as `models.bert.pretraining_sums` of the same sequences, unpacked. The
        divisors are `models.bert.pretraining_counts`, for packed batches, too.
    """
    sequences, pooled = encode_packed(bert.encoder_of(model), batch, training)
    logits = model.get_layer("masked_lm")(sequences, masked_positions=batch["masked_lm_positions"])
    masked, hits = bert.cross_entropy(logits, batch["masked_lm_ids"], batch["masked_lm_weights"])
    sentence, sentence_hits = bert.cross_entropy(
        model.get_layer("next_sentence")(pooled),
        batch["next_sentence_labels"],
        batch["next_sentence_weights"],
    )
    return {
        "masked_loss": masked,
        "masked_accuracy": hits,
        "sentence_loss": sentence,
        "sentence_accuracy": sentence_hits,
    }
