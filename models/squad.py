"""BERT that answers questions: a span head on the encoder, its loss, and its best spans."""

import tensorflow as tf
import tf_keras
from official.modeling import tf_utils
from official.nlp.modeling import networks

from models import bert

IMPOSSIBLE = -1e30  # the score of a span that is none; a sum of two is still finite


def build_span_labeler(
    size: bert.Size,
    vocabulary_size: int,
    max_sequence_length: int,
    *,
    types: int,
    dropout: float,
    initializer_stddev: float,
    remat: str = "off",
) -> tf_keras.Model:
    """A BERT with tf-models' span head, its weights made under the strategy in scope.

    Its inputs are `input_word_ids`, `input_mask`, `input_type_ids` ([B, L] int32); its outputs
    `start_logits` and `end_logits` ([B, L] float). `remat`: see `recipes.bert`.
    """
    initializer = tf_keras.initializers.TruncatedNormal(stddev=initializer_stddev)
    encoder = bert.build_encoder(
        size, vocabulary_size, max_sequence_length, types, dropout, initializer
    )
    encoder.pooler_layer.trainable = False  # no gradient reaches it from the span head
    inputs = dict(encoder.inputs)
    span_labeling = networks.SpanLabeling(
        size.width, initializer=tf_utils.clone_initializer(initializer), name="span_labeling"
    )
    start, end = span_labeling(encoder(inputs)["sequence_output"])
    bert.rematerialize_layers(encoder, remat)
    return tf_keras.Model(inputs, {"start_logits": start, "end_logits": end}, name="span_labeler")


def span_sums(model, batch, training: bool) -> dict[str, tf.Tensor]:
    """Sums of the loss and of the correct predictions over a batch.

    Args:
        model: from `build_span_labeler`.
        batch: as `inputs.squad.examples.element_spec` describes.
        training: whether dropout is on.

    Returns:
        float32 scalars. `span_loss`: half the cross-entropy of the start plus half that of the
        end, in nats, as in google-research/bert. `span_accuracy`: windows with both correct.
    """
    outputs = model({key: batch[key] for key in model.input}, training=training)
    losses = 0.0
    hits = 1.0
    for key in ("start", "end"):
        logits = tf.cast(outputs[f"{key}_logits"], tf.float32)
        labels = batch[f"{key}_positions"]
        losses += 0.5 * tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        hits *= tf.cast(tf.argmax(logits, axis=-1, output_type=tf.int32) == labels, tf.float32)
    weights = batch["example_weights"]
    return {
        "span_loss": tf.reduce_sum(losses * weights),
        "span_accuracy": tf.reduce_sum(hits * weights),
    }


def span_counts(batch) -> dict[str, tf.Tensor]:
    """The divisor of `span_sums`: the number of windows."""
    # It can be 0: a dev file may give no right place of an answer.
    return {"span": tf.maximum(tf.reduce_sum(batch["example_weights"]), 1e-9)}


def best_spans(start_logits, end_logits, may_begin, may_end, *, n_best, max_answer_length):
    """The best spans of each row, as in google-research/bert, run_squad.py.

    The `n_best` starts with the largest logits are paired with the `n_best` ends. A pair is a span
    if it does not end before it starts and has at most `max_answer_length` pieces.

    *Differs from* run_squad.py: starts and ends are taken from the positions that an answer can
    have, not from the whole row, so that few rows have no span.

    Args:
        start_logits, end_logits: [W, L] float.
        may_begin, may_end: [W, L] bool.

    Returns:
        starts, ends: [W, n_best] int32, positions in the row. scores: [W, n_best] float32, the sum
        of both logits, descending; at most `IMPOSSIBLE` where there is no further span.
    """
    length = start_logits.shape[1]
    count = tf.minimum(n_best, tf.shape(start_logits)[1]) if length is None else min(n_best, length)
    best = []
    for logits, allowed in ((start_logits, may_begin), (end_logits, may_end)):
        logits = tf.where(allowed, tf.cast(logits, tf.float32), IMPOSSIBLE)
        best.append(tf.math.top_k(logits, count))
    (start_scores, starts), (end_scores, ends) = best
    starts, ends = starts[:, :, tf.newaxis], ends[:, tf.newaxis, :]
    fits = (ends >= starts) & (ends - starts < max_answer_length)
    scores = start_scores[:, :, tf.newaxis] + end_scores[:, tf.newaxis, :]
    scores = tf.where(fits, scores, 2 * IMPOSSIBLE)
    rows = tf.shape(scores)[0]
    scores, pair = tf.math.top_k(tf.reshape(scores, [rows, count * count]), count)

    def picked(places):
        flat = tf.reshape(tf.broadcast_to(places, [rows, count, count]), [rows, count * count])
        return tf.gather(flat, pair, batch_dims=1)

    return picked(starts), picked(ends), scores
