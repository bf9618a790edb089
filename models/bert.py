"""BERT for pre-training on tf-models-official: encoder, masked-LM and next-sentence heads."""

import dataclasses
import re

import tensorflow as tf
import tf_keras
from official.modeling import tf_utils
from official.nlp.modeling import layers, networks
from tf_keras.src.engine.base_layer_utils import call_context


@dataclasses.dataclass(frozen=True)
class Size:
    """The encoder's size. The inner width of a layer is four times `width`."""

    layers: int
    width: int
    heads: int


# tiny and mini: Turc et al., arXiv:1908.08962, Table 1; base and large: arXiv:1810.04805.
SIZES = {
    "tiny": Size(2, 128, 2),
    "mini": Size(4, 256, 4),
    "base": Size(12, 768, 12),
    "large": Size(24, 1024, 16),
}


def build_encoder(
    size: Size,
    vocabulary_size: int,
    max_sequence_length: int,
    types: int,
    dropout: float,
    initializer: tf_keras.initializers.Initializer,
) -> networks.BertEncoderV2:
    """The encoder, with the size of its three embedding tables. `types`: number of segments."""
    return networks.BertEncoderV2(
        vocab_size=vocabulary_size,
        hidden_size=size.width,
        num_layers=size.layers,
        num_attention_heads=size.heads,
        max_sequence_length=max_sequence_length,
        type_vocab_size=types,
        inner_dim=4 * size.width,
        output_dropout=dropout,
        attention_dropout=dropout,
        initializer=initializer,
    )


def rematerialize_layers(encoder: networks.BertEncoderV2, remat: str) -> None:
    """Applies a recipe's `remat` to an encoder that has been called."""
    if remat == "layer":
        for layer in encoder.transformer_layers:
            _rematerialize(layer)


def _rematerialize(layer: tf_keras.layers.Layer) -> None:
    """Changes a built layer so that in training only its inputs are kept for the backward pass.

    The backward pass computes the rest again: Chen et al., "Training Deep Nets with Sublinear
    Memory Cost", arXiv:1604.06174.

    Random layers in it must draw the same numbers in both passes (`training.dropout`).

    Args:
        layer: a layer whose only argument is a list of tensors.
    """
    call = layer.call

    def call_twice(inputs, **unused):
        arguments = call_context().call_context_args
        if not arguments.get("training"):
            return call(inputs, **unused)

        # In the backward pass no layer is being called, so Keras would not know that it is
        # training.
        def forward(*tensors):
            with call_context().enter(layer, tensors, True, arguments):
                return call(list(tensors))

        return tf.recompute_grad(forward)(*inputs)

    layer.call = call_twice


def encoder_of(model: tf_keras.Model) -> networks.BertEncoderV2:
    """The encoder in a model from `build_pretrainer` or `models.squad.build_span_labeler`."""
    (encoder,) = (layer for layer in model.layers if isinstance(layer, networks.BertEncoderV2))
    return encoder


def encoder_variables(encoder) -> dict[str, tf.Variable]:
    """The variables of a BERT encoder by name, the same for all encoders of tf-models."""
    own = r"((word|type)_embeddings|position_embedding|embeddings|transformer|pooler_transform)/.*"
    return {re.search(own, v.name.removesuffix(":0"))[0]: v for v in encoder.variables}


def build_pretrainer(
    size: Size,
    vocabulary_size: int,
    max_sequence_length: int,
    *,
    dropout: float,
    initializer_stddev: float,
    remat: str = "off",
) -> tf_keras.Model:
    """A BERT with both pre-training heads. Call it in the strategy's scope.

    Its inputs are `input_word_ids`, `input_mask`, `input_type_ids` ([B, L] int32) and
    `masked_lm_positions` ([B, P] int32); its outputs hold `mlm_logits` ([B, P, V] float) and
    `next_sentence` ([B, 2] float). `remat`: see `recipes.bert`.
    """
    initializer = tf_keras.initializers.TruncatedNormal(stddev=initializer_stddev)
    encoder = build_encoder(size, vocabulary_size, max_sequence_length, 2, dropout, initializer)
    inputs = dict(encoder.inputs)
    positions = tf_keras.Input([None], dtype=tf.int32, name="masked_lm_positions")
    encoded = encoder(inputs)
    masked_lm = layers.MaskedLM(
        encoder.get_embedding_table(),
        activation=lambda x: tf_keras.activations.gelu(x, approximate=True),
        initializer=tf_utils.clone_initializer(initializer),
        name="masked_lm",
    )
    # The input is the encoder's own pooler, as published. tf-models' ClassificationHead has another
    # pooler, and would leave the encoder's untrained.
    next_sentence = tf_keras.layers.Dense(
        2, kernel_initializer=tf_utils.clone_initializer(initializer), name="next_sentence"
    )
    model = tf_keras.Model(
        inputs | {"masked_lm_positions": positions},
        {
            "mlm_logits": masked_lm(encoded["sequence_output"], masked_positions=positions),
            "next_sentence": next_sentence(encoded["pooled_output"]),
        },
        name="bert_pretrainer",
    )
    rematerialize_layers(encoder, remat)
    return model


def pretraining_sums(model, batch, training: bool) -> dict[str, tf.Tensor]:
    """Sums of losses and correct predictions over a batch.

    Args:
        model: from `build_pretrainer`.
        batch: as `inputs.text.batches.element_spec` describes.
        training: whether dropout is on.

    Returns:
        float32 scalars. `masked_loss` and `sentence_loss`: summed cross-entropies in nats.
        `masked_accuracy` and `sentence_accuracy`: numbers of correct predictions.
    """
    outputs = model({key: batch[key] for key in model.input}, training=training)
    masked, hits = cross_entropy(
        outputs["mlm_logits"], batch["masked_lm_ids"], batch["masked_lm_weights"]
    )
    sentence, sentence_accuracy = cross_entropy(
        outputs["next_sentence"], batch["next_sentence_labels"], batch["next_sentence_weights"]
    )
    return {
        "masked_loss": masked,
        "masked_accuracy": hits,
        "sentence_loss": sentence,
        "sentence_accuracy": sentence_accuracy,
    }


def pretraining_counts(batch) -> dict[str, tf.Tensor]:
    """The divisors of `pretraining_sums`: numbers of masked tokens and of sentence pairs."""
    return {
        # Both can be 0: text of unknown words only, or sequences without a second segment.
        "masked": tf.maximum(tf.reduce_sum(batch["masked_lm_weights"]), 1e-9),
        "sentence": tf.maximum(tf.reduce_sum(batch["next_sentence_weights"]), 1e-9),
    }


def cross_entropy(logits, labels, weights):
    """Weighted sums of the cross-entropy in nats and of the correct predictions, in float32.

    If k classes share the largest logit, as happens in bfloat16, each counts as 1/k correct.
    """
    # Uses reductions only: argmax and TensorFlow's cross-entropy make a TPU write the logits of all
    # words again, in float32 and another layout.
    logits = tf.cast(logits, tf.float32)
    own = tf.reduce_sum(tf.one_hot(labels, logits.shape[-1]) * logits, axis=-1)
    best = tf.reduce_max(logits, axis=-1)
    alike = tf.reduce_sum(tf.cast(logits == best[..., None], tf.float32), axis=-1)
    hits = tf.math.divide_no_nan(tf.cast(own == best, tf.float32), alike)
    losses = tf.reduce_logsumexp(logits, axis=-1) - own
    return tf.reduce_sum(losses * weights), tf.reduce_sum(hits * weights)
