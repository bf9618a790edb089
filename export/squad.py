"""The SavedModel of a SQuAD model: takes raw strings, returns answers and their positions."""

import functools

import tensorflow as tf
import tf_keras

from export.saved_model import Export
from inputs.squad import windows
from inputs.squad.offsets import OffsetTokenizer, sanitized
from inputs.text.vocabulary import CLS, PAD, SEP
from models import bert
from models.squad import IMPOSSIBLE, best_spans

WINDOWS_PER_CALL = 32  # batch size of the model; bounds the memory that a long context needs


class QuestionAnswerer(tf.Module):
    """Finds the answer to each question in its context, with a fine-tuned BERT.

    Args:
        model: from `models.squad.build_span_labeler`.
        vocabulary: list of word pieces.
        lower_case: see `inputs.squad.offsets.OffsetTokenizer`.
        recipe: a `recipes.squad.SquadRecipe`, for its lengths, stride and n-best.
    """

    def __init__(self, model: tf_keras.Model, vocabulary: list[str], recipe, *, lower_case: bool):
        super().__init__()
        self._recipe = recipe
        # Tracks only the weights; a tracked model would also save the functions of all its layers.
        self.weights = model.variables
        self._logits = functools.partial(model, training=False)
        self.tokenizer = OffsetTokenizer(vocabulary, lower_case=lower_case)
        self._special = {
            key: vocabulary.index(token)
            for key, token in (("cls", CLS), ("sep", SEP), ("pad", PAD))
        }

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="question"),
            tf.TensorSpec([None], tf.string, name="context"),
        ]
    )
    def answer(self, question, context):
        """The most likely answer to each question in its context.

        A context that is longer than the model's input is split into overlapping windows.

        Args:
            question: [N] strings. Malformed UTF-8 is read as U+FFFD.
            context: [N] strings, one per question; or a single one for all questions.

        Returns:
            `answer`: [N] strings, spans of the contexts. `start`, `end`: [N] int32, position of
            the answer in characters. `score`: [N] float32, sum of its start and end logits. If a
            context has no words, the answer is "", its position 0 to 0 and its score the lowest
            float.
        """
        question, context = sanitized(question), sanitized(context)
        is_shared = tf.size(context) == 1
        context = tf.repeat(context, tf.where(is_shared, tf.size(question), 1))
        same = tf.debugging.assert_equal(
            tf.size(question),
            tf.size(context),
            "Give as many contexts as questions, or one context for all of them.",
        )
        with tf.control_dependencies([same]):
            question, context = tf.identity(question), tf.identity(context)
        question_ids, _, _ = self.tokenizer.tokenize(question)
        context_ids, starts, ends = self.tokenizer.tokenize(context)
        cut = windows.cut_windows(
            tf.cast(question_ids.row_lengths(), tf.int32),
            tf.cast(context_ids.row_lengths(), tf.int32),
            sequence_length=self._recipe.sequence_length,
            max_query_length=self._recipe.max_query_length,
            doc_stride=self._recipe.doc_stride,
        )
        scores, first, last = self._best_of_windows(cut, question_ids, context_ids)
        best = _first_of_the_best(scores, cut.example, tf.size(context))
        score, first, last = (tf.gather(x, best) for x in (scores, first, last))
        found = score > 0.5 * IMPOSSIBLE
        base = context_ids.row_starts()

        def place(of_piece, index):
            index = tf.where(found, base + tf.cast(index, tf.int64), 0)
            # The extra element is for contexts without any word piece.
            return tf.where(found, tf.gather(tf.concat([of_piece.flat_values, [0]], 0), index), 0)

        start, end = place(starts, first), place(ends, last)
        return {
            "answer": tf.strings.substr(context, start, end - start),
            "start": tf.strings.length(tf.strings.substr(context, 0 * start, start), "UTF8_CHAR"),
            "end": tf.strings.length(tf.strings.substr(context, 0 * end, end), "UTF8_CHAR"),
            "score": tf.where(found, score, tf.float32.min),
        }

    def _best_of_windows(self, cut, question_ids, context_ids):
        """Score, first and last word piece of each window's best span, counted in its context."""
        # As long as the longest window, so that short contexts cost little.
        used = cut.question + cut.length + windows.SPECIAL
        length = tf.reduce_max(tf.concat([used, [windows.SPECIAL]], axis=0))
        tables = [
            (tf.concat([ids.flat_values, [self._special["pad"]]], 0), ids.row_starts())
            for ids in (question_ids, context_ids)
        ]
        count = tf.size(cut.example)
        calls = tf.maximum((count + WINDOWS_PER_CALL - 1) // WINDOWS_PER_CALL, 1)
        columns = [
            tf.TensorArray(kind, calls, element_shape=[None], infer_shape=False)
            for kind in (tf.float32, tf.int32, tf.int32)
        ]
        for call in tf.range(calls):
            low = call * WINDOWS_PER_CALL
            some = windows.Windows(*(field[low : low + WINDOWS_PER_CALL] for field in cut))
            best = self._best_spans(some, tables, length)
            columns = [c.write(call, x) for c, x in zip(columns, best, strict=True)]
        return [column.concat() for column in columns]

    def _best_spans(self, cut, tables, length):
        texts = [(flat, tf.gather(begins, cut.example)) for flat, begins in tables]
        outputs = self._logits(windows.rows(cut, *texts, length, **self._special))
        starts, ends, scores = best_spans(
            outputs["start_logits"],
            outputs["end_logits"],
            *windows.may_answer(cut, length),
            n_best=self._recipe.n_best,
            max_answer_length=self._recipe.max_answer_length,
        )
        offset = cut.question + 2 - cut.start
        return scores[:, 0], starts[:, 0] - offset, ends[:, 0] - offset


def _first_of_the_best(scores, example, examples):
    """[N] int32: the window of each example with the highest score; the first one if equal."""
    highest = tf.math.unsorted_segment_max(scores, example, examples)
    is_highest = scores == tf.gather(highest, example)
    index = tf.where(is_highest, tf.range(tf.size(scores)), tf.size(scores))
    return tf.math.unsorted_segment_min(index, example, examples)


def answering_export(
    model: tf_keras.Model, vocabulary: list[str], recipe, *, lower_case: bool
) -> Export:
    """The export of a model from `models.squad.build_span_labeler`."""
    module = QuestionAnswerer(model, vocabulary, recipe, lower_case=lower_case)
    signatures = {"serving_default": module.answer}
    return Export(module, signatures, bert.encoder_of(model), vocabulary, lower_case)
