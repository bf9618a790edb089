"""The SavedModel of a pre-trained BERT: fills masks, and turns sentences into vectors."""

import functools

import tensorflow as tf
import tf_keras

from export.saved_model import Export
from inputs.squad.windows import single_rows
from inputs.text.tokenizing import make_tokenizer
from inputs.text.vocabulary import CLS, MASK, PAD, SEP
from models import bert

TOP_K = 5


class PretrainedBert(tf.Module):
    """Fills each `[MASK]` of raw strings, and encodes them, with a pre-trained BERT.

    Args:
        model: from `models.bert.build_pretrainer`.
        vocabulary: list of word pieces.
        max_sequence_length: word pieces per string; the rest is cut off.
    """

    def __init__(self, model: tf_keras.Model, vocabulary: list[str], max_sequence_length: int):
        super().__init__()
        self._length = max_sequence_length
        # Only the weights are saved; a tracked model would bring all its layers' own functions.
        self.weights = model.variables
        self._outputs = functools.partial(model, training=False)
        self._encoded = functools.partial(bert.encoder_of(model), training=False)
        self.tokenizer = make_tokenizer(vocabulary)
        self.pieces = tf.Variable(vocabulary, trainable=False, name="vocabulary")
        self._pad, self._cls, self._sep, self._mask = (
            vocabulary.index(token) for token in (PAD, CLS, SEP, MASK)
        )

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def fill(self, text):
        """The likeliest fillings of every `[MASK]`.

        Args:
            text: [N] strings; "[MASK]" stands for the missing word.

        Returns:
            `tokens`: [N, M, K] strings, K word pieces for each mask, the likeliest first ("##ing"
            goes on the word before it); M is the most masks of a string, and places beyond a
            string's own masks hold "". `probabilities`: [N, M, K] float32, 0 there. `masks`: [N]
            int32, how many masks of each string were answered; those after the first
            `max_sequence_length` - 2 pieces are not.
        """
        inputs = self._rows(text)
        ids = inputs["input_word_ids"]
        is_mask = ids == self._mask
        masks = tf.reduce_sum(tf.cast(is_mask, tf.int32), axis=1)
        most = tf.reduce_max(tf.concat([masks, [0]], axis=0))
        places = tf.argsort(tf.cast(is_mask, tf.int32), direction="DESCENDING", stable=True)
        places = places[:, : tf.maximum(most, 1)]
        outputs = self._outputs(inputs | {"masked_lm_positions": places})
        logits = tf.cast(outputs["mlm_logits"], tf.float32)
        best = tf.math.top_k(tf.nn.softmax(logits), TOP_K)
        answered = tf.sequence_mask(masks, tf.shape(places)[1])[:, :, tf.newaxis]
        tokens = tf.where(answered, tf.gather(self.pieces, best.indices), "")
        probabilities = tf.where(answered, best.values, 0.0)
        return {
            "tokens": tokens[:, :most],
            "probabilities": probabilities[:, :most],
            "masks": masks,
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def encode(self, text):
        """The vectors of whole strings and of their word pieces.

        Args:
            text: [N] strings.

        Returns:
            `pooled_output`: [N, H] float32, the pooler's. `sequence_output`: [N, L, H] float32,
            the last layer's; the first vector is that of [CLS], the last ones may be padding.
            `mask`: [N, L] int32, 0 where they are.
        """
        inputs = self._rows(text)
        encoded = self._encoded(inputs)
        vectors = {
            key: tf.cast(encoded[key], tf.float32) for key in ("pooled_output", "sequence_output")
        }
        return vectors | {"mask": inputs["input_mask"]}

    def _rows(self, text):
        # "[MASK]" is no word to the tokenizer.
        parts = tf.strings.split(text, MASK)  # [N, (parts)]
        ids = self.tokenizer.tokenize(parts.flat_values)
        # A mask before each part, then the first one of every string taken away again.
        marks = tf.fill([ids.nrows(), 1], self._mask)
        ids = tf.concat([marks, ids], axis=1)
        joined = tf.RaggedTensor.from_row_splits(
            ids.flat_values, tf.gather(ids.row_splits, parts.row_splits)
        )[:, 1:]
        return single_rows(joined, self._length, cls=self._cls, sep=self._sep, pad=self._pad)


def pretrained_export(model: tf_keras.Model, vocabulary: list[str], max_sequence_length: int):
    """The export of a model from `models.bert.build_pretrainer`.

    Its signatures are `serving_default`, which fills masks, and `encode`.
    """
    module = PretrainedBert(model, vocabulary, max_sequence_length)
    signatures = {"serving_default": module.fill, "encode": module.encode}
    return Export(module, signatures, bert.encoder_of(model), vocabulary)
