"""SQuAD batches: texts are tokenised once, windows are cut on the fly.

A training example is a function of (seed, example id) alone, as in `inputs.text.examples`.
"""

import numpy as np
import tensorflow as tf

from inputs.batching import host_batches, shuffled
from inputs.errors import InputError
from inputs.squad import windows
from inputs.squad.files import Squad
from inputs.squad.offsets import OffsetTokenizer
from inputs.text import unknown
from inputs.text.vocabulary import CLS, PAD, SEP, UNK

TEXTS_PER_CALL = 4096  # tokenised at once; limits the memory


def element_spec(batch_size: int, sequence_length: int):
    """The shapes and dtypes of a batch, as a dictionary of `tf.TensorSpec`.

    Args:
        batch_size: B, examples per batch.
        sequence_length: L, tokens per example.
    """
    row = tf.TensorSpec([batch_size, sequence_length], tf.int32)
    position = tf.TensorSpec([batch_size], tf.int32)
    return {
        "input_word_ids": row,
        "input_mask": row,
        "input_type_ids": row,
        "start_positions": position,
        "end_positions": position,
        "example_weights": tf.TensorSpec([batch_size], tf.float32),
    }


class _Texts:
    """N tokenised strings, end to end.

    Attributes:
        ids: [T] int32 word pieces.
        starts, ends: [T] int32 byte offsets of each piece in its string.
        begins: [N + 1] int64, where each string begins in `ids`; the last entry is T.
    """

    def __init__(self, tokenizer: OffsetTokenizer, texts: list[str]):
        parts = [
            [tensor.numpy() for tensor in (ids.flat_values, starts.flat_values, ends.flat_values)]
            + [ids.row_lengths().numpy()]
            for i in range(0, len(texts), TEXTS_PER_CALL)
            for ids, starts, ends in [
                tokenizer.tokenize(tf.constant(texts[i : i + TEXTS_PER_CALL]))
            ]
        ]
        ids, self.starts, self.ends, lengths = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        self.ids = ids if len(ids) else np.zeros(1, np.int32)  # `windows.rows` needs at least one
        self.begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


class Features:
    """The windows of all questions of a SQuAD file, which run_squad.py calls features.

    Args:
        squad: from `inputs.squad.files.read_squad`.
        vocabulary: word pieces.
        lower_case: see `inputs.squad.offsets.OffsetTokenizer`.
        sequence_length, max_query_length, doc_stride: see `inputs.squad.windows.cut_windows`.
        seed: int, decides the order in training.

    Attributes:
        squad: as given.
        num_examples: number of windows.
        question_of: [num_examples] int32, the question of each window, in ascending order.
        first_pieces, last_pieces: [questions] int64, the first and last word piece, in the context,
            of the question's first answer whose place is known.
        placed: [questions] bool, whether there is such an answer. If not, the question's windows
            have weight 0 in the loss.

    Raises:
        InputError: a context has no word.
    """

    def __init__(
        self,
        squad: Squad,
        vocabulary: list[str],
        *,
        lower_case: bool,
        sequence_length: int,
        max_query_length: int,
        doc_stride: int,
        seed: int,
    ):
        self.squad = squad
        self.sequence_length = sequence_length
        self._seed = seed
        tokenizer = OffsetTokenizer(vocabulary, lower_case=lower_case)
        self._contexts = _Texts(tokenizer, squad.contexts)
        self._questions = _Texts(tokenizer, [question.text for question in squad.questions])
        self._lower_case = lower_case
        self._vocabulary = vocabulary
        self._special = {
            key: vocabulary.index(token)
            for key, token in (("cls", CLS), ("sep", SEP), ("pad", PAD))
        }
        self._context_of = np.array([question.context for question in squad.questions])
        totals = np.diff(self._contexts.begins)[self._context_of]
        if not totals.all():
            empty = squad.questions[int(np.argmin(totals))]
            raise InputError(
                f"--data_dir: {squad.path}, the context of question {empty.id!r} has no word, "
                "only spaces or control characters. Remove it from the file."
            )
        self._windows = windows.cut_windows(
            tf.constant(np.diff(self._questions.begins), tf.int32),
            tf.constant(totals, tf.int32),
            sequence_length=sequence_length,
            max_query_length=max_query_length,
            doc_stride=doc_stride,
        )
        self.question_of = self._windows.example.numpy()
        self.num_examples = len(self.question_of)
        self.placed = np.array([question.placed is not None for question in squad.questions])
        self.first_pieces, self.last_pieces = self._answer_pieces()
        self._tables = {
            "question": tf.constant(self._questions.ids),
            "question_begin": tf.constant(self._questions.begins[:-1]),
            "context": tf.constant(self._contexts.ids),
            "context_begin": tf.constant(self._contexts.begins[:-1][self._context_of]),
            "first": tf.constant(self.first_pieces, tf.int32),
            "last": tf.constant(self.last_pieces, tf.int32),
            "placed": tf.constant(self.placed),
        }

    def _answer_pieces(self):
        """The first and last word piece of each question's answer in its context: [Q] int64."""
        contexts = self._contexts
        sizes = [len(context.encode()) for context in self.squad.contexts]
        # Byte offsets over all contexts together ascend, so one search finds all answers.
        base = np.concatenate([[0], np.cumsum(np.add(sizes, 1))])[:-1]
        of_piece = np.repeat(base, np.diff(contexts.begins))
        spans = [self._answer_bytes(question) for question in self.squad.questions]
        spans = np.array(spans) + base[self._context_of][:, np.newaxis]
        first = np.searchsorted(contexts.ends + of_piece, spans[:, 0], side="right")
        last = np.searchsorted(contexts.starts + of_piece, spans[:, 1], side="left") - 1
        begin = contexts.begins[:-1][self._context_of]
        end = contexts.begins[1:][self._context_of]
        # An answer that consists of characters that BERT drops, such as accents, has no piece.
        first = np.minimum(first, end - 1)
        return first - begin, np.maximum(last, first) - begin

    def _answer_bytes(self, question):
        context = self.squad.contexts[question.context]
        start, text = question.placed or (0, "")
        if context.isascii():
            return start, start + len(text)
        first = len(context[:start].encode())
        return first, first + len(text.encode())

    def report_unknown(self) -> str:
        """Formats a line about the share of [UNK] in the contexts, with `unknown.report`."""
        contexts = self._contexts
        places = np.flatnonzero(contexts.ids == self._vocabulary.index(UNK))
        found = np.unique(np.searchsorted(contexts.begins, places, "right") - 1)
        texts = [self.squad.contexts[i].encode() for i in found]
        count = unknown.UnknownCharacters(self._vocabulary, lower_case=self._lower_case)
        return unknown.report(len(places), int(contexts.begins[-1]), count(texts))

    def text_of(self, question: int, first: int, last: int) -> str:
        """The text of a question's context from piece `first` to `last`, inclusive."""
        context = self._context_of[question]
        begin = self._contexts.begins[context]
        start = self._contexts.starts[begin + first]
        end = self._contexts.ends[begin + last]
        return self.squad.contexts[context].encode()[start:end].decode()

    def training_batches(self, global_batch_size, context=None, first_step=0) -> tf.data.Dataset:
        """Infinite data set of this host's batches: one per step for each of its replicas.

        See `inputs.text.examples.Examples.training_batches` for the arguments.
        """
        local, ids_of = host_batches(global_batch_size, context)

        def batch(k):
            ids = ids_of(k)
            feature = shuffled(ids, self.num_examples, self._seed)
            return self.batch(feature, tf.ones_like(ids, tf.float32))

        indices = tf.data.Dataset.range(first_step * local, np.iinfo(np.int64).max)
        return indices.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(4)

    def evaluation_batches(self, global_batch_size, limit, context=None) -> tf.data.Dataset:
        """Each of the first `limit` windows once.

        The last batch is filled up with examples of weight 0. See
        `inputs.text.examples.Examples.evaluation_batches` for the arguments.
        """
        total = min(limit, self.num_examples)
        return self._once(self.batch, total, global_batch_size, context)

    def prediction_batches(self, global_batch_size, context=None) -> tf.data.Dataset:
        """Every window once, in batches of `question_batch`.

        The last batch is filled up with windows whose `feature` is -1.
        """
        return self._once(self.question_batch, self.num_examples, global_batch_size, context)

    def _once(self, make, total, global_batch_size, context):
        local, ids_of = host_batches(global_batch_size, context)

        def batch(k):
            ids = ids_of(k)
            return make(tf.minimum(ids, total - 1), tf.cast(ids < total, tf.float32))

        steps = -(-total // global_batch_size)
        indices = tf.data.Dataset.range(steps * local)
        return indices.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(4)

    def batch(self, feature, weights):
        """Makes a batch of windows with the positions of their answers.

        Args:
            feature: [B] int64, indices of windows.
            weights: [B] float32, 0 for an example that does not count.

        Returns:
            A dictionary as described by `element_spec`. Where the window does not contain the whole
            answer, both positions are 0, that of [CLS]. If the place of the answer is not known,
            the weight is 0.
        """
        cut = self._cut(feature)
        first = tf.gather(self._tables["first"], cut.example) - cut.start
        last = tf.gather(self._tables["last"], cut.example) - cut.start
        inside = (first >= 0) & (last < cut.length)
        return self._rows(cut) | {
            "start_positions": tf.where(inside, first + cut.question + 2, 0),
            "end_positions": tf.where(inside, last + cut.question + 2, 0),
            "example_weights": tf.where(tf.gather(self._tables["placed"], cut.example), weights, 0),
        }

    def question_batch(self, feature, weights):
        """Makes a batch of windows with the positions where an answer may be.

        See `batch` for the arguments.

        Returns:
            The model's inputs; `may_begin` and `may_end`: [B, L] bool, from
            `inputs.squad.windows.may_answer`; `feature`: [B] int32, -1 where the weight is 0;
            `offset`: [B] int32, a position in the row minus the word piece in the context.
        """
        cut = self._cut(feature)
        may_begin, may_end = windows.may_answer(cut, self.sequence_length)
        return self._rows(cut) | {
            "may_begin": may_begin,
            "may_end": may_end,
            "feature": tf.where(weights > 0, tf.cast(feature, tf.int32), -1),
            "offset": cut.question + 2 - cut.start,
        }

    def _cut(self, feature):
        return windows.Windows(*(tf.gather(field, feature) for field in self._windows))

    def _rows(self, cut):
        tables = self._tables
        made = windows.rows(
            cut,
            (tables["question"], tf.gather(tables["question_begin"], cut.example)),
            (tables["context"], tf.gather(tables["context_begin"], cut.example)),
            self.sequence_length,
            **self._special,
        )
        return {key: tf.ensure_shape(x, [None, self.sequence_length]) for key, x in made.items()}
