"""SQuAD batches: the windows are written to a file once, from which each host reads its share."""

import functools
import os

import numpy as np
import tensorflow as tf

from inputs.bad_records import BadRecords
from inputs.damage import Damage, scratch_folder
from inputs.errors import InputError
from inputs.order import Order, by_block, number_of_lanes, row_batches
from inputs.pages import PagesWriter, open_pages
from inputs.squad import windows
from inputs.squad.files import Squad
from inputs.squad.offsets import OffsetTokenizer
from inputs.text.tokenization import unknown
from inputs.text.tokenization.vocabulary import CLS, PAD, SEP, UNK

TEXTS_PER_CALL = 4096  # tokenized, or cut into windows, at once; limits the memory
ROWS = "rows"  # name of the array
BLOCK = 64  # windows read together
WINDOW_BLOCKS = 16  # whose windows are mixed
# A row of the file: the fields of `windows.Windows`; the first and the last piece of the answer;
# whether it is known; then the ids.
FIELDS = len(windows.Windows._fields) + 3


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
    """N tokenized strings, end to end.

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
        lanes: see `inputs.text.examples.Examples`.
        shared_dir: a folder that all hosts can read, for the windows and for reports of damage;
            "" for a temporary folder of this machine.

    Attributes:
        damage: the `Damage` found so far.
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
        lanes: int | None = None,
        shared_dir: str = "",
    ):
        self._lanes = lanes
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
                f"{squad.flag}: {squad.path}, the context of question {empty.id!r} has no word, "
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
        home = shared_dir or scratch_folder(self, "squad-windows-")
        folder = os.path.join(home, f"{squad.fingerprint}-{sequence_length}")
        self._write(folder)
        self._file = open_pages(folder)[0][ROWS]
        records = BadRecords(0.0, skip=False, log=print)
        self.damage = Damage(records, self.num_examples, os.path.join(folder, "damaged"))

    @property
    def files(self) -> set[str]:
        """The file of the windows; a host reads pages of it."""
        return {self._file.path}

    def _write(self, folder):
        """Writes the row of each window."""
        with PagesWriter(folder, {ROWS: np.int32}, {ROWS: FIELDS + self.sequence_length}) as writer:
            for first in range(0, self.num_examples, TEXTS_PER_CALL):
                cut = windows.Windows(
                    *(field[first : first + TEXTS_PER_CALL] for field in self._windows)
                )
                question = cut.example.numpy()
                answer = self.first_pieces[question], self.last_pieces[question]
                ids = windows.rows(
                    cut,
                    (self._questions.ids, tf.gather(self._questions.begins[:-1], question)),
                    (
                        self._contexts.ids,
                        tf.gather(self._contexts.begins[:-1][self._context_of], question),
                    ),
                    self.sequence_length,
                    **self._special,
                )["input_word_ids"]
                fields = [*(field.numpy() for field in cut), *answer, self.placed[question]]
                writer.append(**{ROWS: np.concatenate([np.stack(fields, 1), ids], axis=1)})

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

    def order(self, global_batch_size) -> Order:
        """The order of the training examples."""
        return self._order(global_batch_size, self.num_examples, self._seed)

    def training_batches(self, global_batch_size, context=None, first_step=0) -> tf.data.Dataset:
        """Infinite data set of this host's batches: one per step for each of its replicas.

        Each is a dictionary as described by `element_spec`. Where a window does not contain the
        whole answer, both positions are 0, that of [CLS]. If the place of the answer is not known,
        the weight is 0.

        See `inputs.text.examples.Examples.training_batches` for the arguments.
        """
        order = self.order(global_batch_size)
        return self._batches(order, context, first_step, self._labelled)

    def evaluation_batches(self, global_batch_size, limit, context=None) -> tf.data.Dataset:
        """Each of the first `limit` windows once.

        The last batch is filled up with examples of weight 0. See
        `inputs.text.examples.Examples.evaluation_batches` for the arguments.
        """
        total = min(limit, self.num_examples)
        order = self._order(global_batch_size, total, None)
        return self._batches(order, context, 0, self._labelled)

    def prediction_batches(self, global_batch_size, context=None) -> tf.data.Dataset:
        """Every window once, with the positions where an answer may be.

        Each batch is a dictionary of the model's inputs; `may_begin` and `may_end`: [B, L] bool,
        from `inputs.squad.windows.may_answer`; `feature`: [B] int32, the window, or -1 in the last
        batch, which is filled up; `offset`: [B] int32, a position in the row minus the word piece
        in the context.
        """
        order = self._order(global_batch_size, self.num_examples, None)
        return self._batches(order, context, 0, self._unlabelled)

    def _order(self, batch, examples, seed):
        lanes = self._lanes or number_of_lanes(batch, examples)
        return Order(examples, batch, lanes, BLOCK, WINDOW_BLOCKS, seed)

    def _batches(self, order, context, first_step, finish):
        read = functools.partial(self._read, order)
        return row_batches(order, context, first_step, read, finish).prefetch(4)

    def _read(self, order, examples, ids):
        """The rows of the file, each after its window's number; -1 for no window."""
        last = order.examples - 1

        def block_rows(block, examples, ids):
            del ids
            rows, _ = self._file.read_block(BLOCK, block, examples, self.damage)
            return rows

        width = FIELDS + self.sequence_length
        rows = by_block(BLOCK, tf.minimum(examples, last), ids, block_rows, width)
        numbers = tf.cast(tf.where(examples <= last, examples, -1), tf.int32)
        return tf.concat([numbers[:, tf.newaxis], rows], 1)

    @tf.autograph.experimental.do_not_convert
    def _labelled(self, rows):
        cut, inputs = self._inputs(rows)
        first, last, placed = tf.unstack(rows[:, FIELDS - 2 : FIELDS + 1], axis=1)
        first, last = first - cut.start, last - cut.start
        inside = (first >= 0) & (last < cut.length)
        weights = tf.where(rows[:, 0] >= 0, placed, 0)
        return inputs | {
            "start_positions": tf.where(inside, first + cut.question + 2, 0),
            "end_positions": tf.where(inside, last + cut.question + 2, 0),
            "example_weights": tf.cast(weights, tf.float32),
        }

    @tf.autograph.experimental.do_not_convert
    def _unlabelled(self, rows):
        cut, inputs = self._inputs(rows)
        may_begin, may_end = windows.may_answer(cut, self.sequence_length)
        return inputs | {
            "may_begin": may_begin,
            "may_end": may_end,
            "feature": rows[:, 0],
            "offset": cut.question + 2 - cut.start,
        }

    def _inputs(self, rows):
        """The windows of rows of `_read`, and the model's inputs."""
        cut = windows.Windows(*tf.unstack(rows[:, 1 : FIELDS - 2], axis=1))
        position = tf.range(self.sequence_length)[tf.newaxis]
        end_a = cut.question[:, tf.newaxis] + 1
        end_b = end_a + cut.length[:, tf.newaxis] + 1
        return cut, {
            "input_word_ids": rows[:, FIELDS + 1 :],
            "input_mask": tf.cast(position <= end_b, tf.int32),
            "input_type_ids": tf.cast((position > end_a) & (position <= end_b), tf.int32),
        }
