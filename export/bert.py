"""The SavedModel of a pre-trained BERT: fills masks and encodes sentences."""

import functools

import tensorflow as tf
import tf_keras

from export.saved_model import Export
from inputs.squad.offsets import sanitized
from inputs.squad.windows import single_rows
from inputs.text.tokenization.vocabulary import CLS, MASK, PAD, SEP
from inputs.text.tokenization.word_pieces import WordPieces
from models import bert

TOP_K = 5


class PretrainedBert(tf.Module):
    """Fills the `[MASK]`s of raw strings and encodes strings, with a pre-trained BERT.

    Args:
        model: from `models.bert.build_pretrainer`.
        vocabulary: list of word pieces.
        max_sequence_length: maximum number of word pieces per string, with [CLS] and [SEP]. Longer
            strings are truncated.
        lower_case: see `inputs.text.tokenization.word_pieces.WordPieces`.
    """

    def __init__(
        self,
        model: tf_keras.Model,
        vocabulary: list[str],
        max_sequence_length: int,
        *,
        lower_case: bool,
    ):
        super().__init__()
        self._length = max_sequence_length
        # Track only the weights: a tracked model would also save the functions of all its layers.
        self.weights = model.variables
        self._outputs = functools.partial(model, training=False)
        self._encoded = functools.partial(bert.encoder_of(model), training=False)
        self.tokenizer = WordPieces(vocabulary, lower_case=lower_case)
        self.pieces = tf.Variable(vocabulary, trainable=False, name="vocabulary")
        self._pad = vocabulary.index(PAD)
        self._cls = vocabulary.index(CLS)
        self._sep = vocabulary.index(SEP)
        self._mask = vocabulary.index(MASK)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")], autograph=False)
    def fill(self, text):
        """Returns the most likely word pieces for every `[MASK]`.

        Args:
            text: [N] strings; "[MASK]" stands for the missing word.

        Returns:
            `tokens`: [N, M, K] strings, the K most likely word pieces for each mask in descending
            order ("##ing" continues the preceding word). M is the largest number of masks in a
            string; strings with fewer masks are padded with "". `probabilities`: [N, M, K]
            float32, padded with 0. `masks`: [N] int32, the number of masks filled in each string.
            Masks after the first `max_sequence_length` - 2 word pieces are ignored.
        """
        inputs = self._rows(text)
        ids = inputs["input_word_ids"]
        is_mask = ids == self._mask
        masks = tf.reduce_sum(tf.cast(is_mask, tf.int32), axis=1)
        max_masks = tf.reduce_max(tf.concat([masks, [0]], axis=0))  # 0 for an empty batch
        # A stable sort puts the positions of the masks first, in their order.
        positions = tf.argsort(tf.cast(is_mask, tf.int32), direction="DESCENDING", stable=True)
        positions = positions[:, : tf.maximum(max_masks, 1)]
        outputs = self._outputs(inputs | {"masked_lm_positions": positions})
        logits = tf.cast(outputs["mlm_logits"], tf.float32)
        best = tf.math.top_k(tf.nn.softmax(logits), TOP_K)
        is_filled = tf.sequence_mask(masks, tf.shape(positions)[1])[:, :, tf.newaxis]
        tokens = tf.where(is_filled, tf.gather(self.pieces, best.indices), "")
        probabilities = tf.where(is_filled, best.values, 0.0)
        return {
            "tokens": tokens[:, :max_masks],
            "probabilities": probabilities[:, :max_masks],
            "masks": masks,
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")], autograph=False)
    def encode(self, text):
        """Returns vectors for strings and for their word pieces.

        Args:
            text: [N] strings.

        Returns:
            `pooled_output`: [N, H] float32, the output of the pooler. `sequence_output`: [N, L, H]
            float32, the output of the last layer; the first vector is that of [CLS], and the last
            ones may be padding. `mask`: [N, L] int32, 1 at word pieces and 0 at padding.
        """
        inputs = self._rows(text)
        encoded = self._encoded(inputs)
        vectors = {
            key: tf.cast(encoded[key], tf.float32) for key in ("pooled_output", "sequence_output")
        }
        return vectors | {"mask": inputs["input_mask"]}

    def _rows(self, text):
        """Returns the encoder's inputs for [N] strings."""
        text = sanitized(text)
        # The tokenizer does not know "[MASK]", so split the strings there.
        parts = tf.strings.split(text, MASK)  # [N, (parts)]
        ids = self.tokenizer.tokenize(parts.flat_values)
        # Put a mask before each part, then remove the first mask of every string.
        mask_ids = tf.fill([ids.nrows(), 1], self._mask)
        ids = tf.concat([mask_ids, ids], axis=1)
        joined = tf.RaggedTensor.from_row_splits(
            ids.flat_values, tf.gather(ids.row_splits, parts.row_splits)
        )[:, 1:]
        return single_rows(joined, self._length, cls=self._cls, sep=self._sep, pad=self._pad)


def pretrained_export(
    model: tf_keras.Model, vocabulary: list[str], max_sequence_length: int, *, lower_case: bool
) -> Export:
    """Returns the `Export` of a model from `models.bert.build_pretrainer`.

    Its signatures are `serving_default`, which fills masks, and `encode`. Arguments as for
    `PretrainedBert`.
    """
    module = PretrainedBert(model, vocabulary, max_sequence_length, lower_case=lower_case)
    signatures = {"serving_default": module.fill, "encode": module.encode}
    return Export(module, signatures, bert.encoder_of(model), vocabulary, lower_case)
