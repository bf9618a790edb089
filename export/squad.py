"""The SavedModel of a SQuAD model: takes raw strings, returns answers and their positions."""

import functools

import tensorflow as tf
import tf_keras

from export.saved_model import Export
from inputs.squad import windows
from inputs.squad.offsets import OffsetTokenizer, sanitized
from inputs.text.tokenization.vocabulary import CLS, PAD, SEP
from models import bert
from models.squad import IMPOSSIBLE, best_spans

WINDOWS_PER_CALL = 32  # the model's batch size, which limits the memory for a long context


class QuestionAnswerer(tf.Module):
    """Finds the answer to each question in its context, with a fine-tuned BERT.

    Args:
        model: from `models.squad.build_span_labeler`.
        vocabulary: list of word pieces.
        recipe: a `recipes.squad.SquadRecipe`, for its `sequence_length`, `max_query_length`,
            `doc_stride`, `n_best` and `max_answer_length`.
        lower_case: see `inputs.squad.offsets.OffsetTokenizer`.
    """

    def __init__(self, model: tf_keras.Model, vocabulary: list[str], recipe, *, lower_case: bool):
        super().__init__()
        self._recipe = recipe
        # Track only the weights: a tracked model would also save the functions of all its layers.
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
        ],
        autograph=False,
    )
    def answer(self, question, context):
        """Returns the most likely answer to each question in its context.

        A context that is longer than the model's input is split into overlapping windows.

        Args:
            question: [N] strings. Malformed UTF-8 is read as U+FFFD, which is dropped.
            context: [N] strings, one per question; or a single one for all questions.

        Returns:
            `answer`: [N] strings, spans of the contexts. `start`, `end`: [N] int32, the positions
            in characters at which the answer starts and ends. `score`: [N] float32, the sum of its
            start and end logits. If a context has no words, the answer is "", both positions are
            0, and the score is the lowest float32.
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
        best = _best_window_of_each(scores, cut.example, tf.size(context))
        score, first, last = (tf.gather(x, best) for x in (scores, first, last))
        found = score > 0.5 * IMPOSSIBLE
        base = context_ids.row_starts()

        def offset(offsets, piece):
            """Returns the byte offset of a word piece of each context; 0 without an answer."""
            index = tf.where(found, base + tf.cast(piece, tf.int64), 0)
            # The appended element makes index 0 valid if no context has a word piece.
            return tf.where(found, tf.gather(tf.concat([offsets.flat_values, [0]], 0), index), 0)

        start = offset(starts, first)
        end = offset(ends, last)
        return {
            "answer": tf.strings.substr(context, start, end - start),
            "start": tf.strings.length(tf.strings.substr(context, 0 * start, start), "UTF8_CHAR"),
            "end": tf.strings.length(tf.strings.substr(context, 0 * end, end), "UTF8_CHAR"),
            "score": tf.where(found, score, tf.float32.min),
        }

    def _best_of_windows(self, cut, question_ids, context_ids):
        """Finds the best span of each window.

        Returns:
            A list of three tensors [windows]: the score (float32), and the first and the last word
            piece (int32), counted from the start of the context.
        """
        # The longest window sets the length of all rows, so short contexts take little time.
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

        def some_windows(call, columns):
            low = call * WINDOWS_PER_CALL
            batch = windows.Windows(*(field[low : low + WINDOWS_PER_CALL] for field in cut))
            best = self._best_spans(batch, tables, length)
            return call + 1, [c.write(call, x) for c, x in zip(columns, best, strict=True)]

        _, columns = tf.while_loop(lambda call, _: call < calls, some_windows, (0, columns))
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
        # From a position in the row, after [CLS], the question and [SEP], to one in the context.
        offset = cut.question + 2 - cut.start
        return scores[:, 0], starts[:, 0] - offset, ends[:, 0] - offset


def _best_window_of_each(scores, example, num_examples):
    """Returns the window with the highest score of each example, or the first of equal ones.

    Args:
        scores: [windows] float32.
        example: [windows] int32, the example that each window belongs to.
        num_examples: N, the number of examples.

    Returns:
        [N] int32, indices of windows.
    """
    highest = tf.math.unsorted_segment_max(scores, example, num_examples)
    is_highest = scores == tf.gather(highest, example)
    index = tf.where(is_highest, tf.range(tf.size(scores)), tf.size(scores))
    return tf.math.unsorted_segment_min(index, example, num_examples)


def answering_export(
    model: tf_keras.Model, vocabulary: list[str], recipe, *, lower_case: bool
) -> Export:
    """Returns the `Export` of a model from `models.squad.build_span_labeler`.

    Its signature is `serving_default`, which answers questions. Arguments as for
    `QuestionAnswerer`.
    """
    module = QuestionAnswerer(model, vocabulary, recipe, lower_case=lower_case)
    signatures = {"serving_default": module.answer}
    return Export(module, signatures, bert.encoder_of(model), vocabulary, lower_case)
