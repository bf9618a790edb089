"""Tokenised texts as the model's rows; long contexts are cut into striding windows.

Pure TensorFlow on flat tensors, so that training, evaluation and the exported graph cut alike.
The rules are those of google-research/bert, run_squad.py.
"""

import typing

import tensorflow as tf

SPECIAL = 3  # [CLS] question [SEP] context [SEP]


class Windows(typing.NamedTuple):
    """Stretches of contexts, one a row; all [W] int32 and counted in word pieces.

    `example` is the row's pair of question and context; `start` where the window begins in the
    context and `length` its own; `question` the question's length, cut to what is allowed;
    `total` the whole context's; `room` the longest window's and `step` the way to the next one.
    """

    example: tf.Tensor
    start: tf.Tensor
    length: tf.Tensor
    question: tf.Tensor
    total: tf.Tensor
    room: tf.Tensor
    step: tf.Tensor


def cut_windows(question, total, *, sequence_length, max_query_length, doc_stride) -> Windows:
    """The windows of each pair, in order; an empty context has one, of length 0.

    Args:
        question, total: [N] int32, pieces of each question and of its context.
        sequence_length: of a row, above `max_query_length` + 3.
        max_query_length: pieces of a question that are kept.
        doc_stride: pieces from one window's start to the next one's, less where the room is less.
    """
    question = tf.minimum(question, max_query_length)
    room = sequence_length - SPECIAL - question
    step = tf.minimum(room, doc_stride)
    beyond = tf.maximum(total - room, 0)
    counts = 1 + (beyond + step - 1) // step
    example = tf.repeat(tf.range(tf.size(counts)), counts)
    before = tf.cumsum(counts, exclusive=True)
    index = tf.range(tf.size(example)) - tf.gather(before, example)
    question, total, room, step = (tf.gather(x, example) for x in (question, total, room, step))
    start = index * step
    return Windows(example, start, tf.minimum(room, total - start), question, total, room, step)


def rows(windows: Windows, question_ids, context_ids, sequence_length, *, cls, sep, pad):
    """The model's inputs.

    Args:
        windows: W of them.
        question_ids, context_ids: ([T] int32 ids of all texts, T at least 1; [W] int64, where in
            them each row's text begins).
        sequence_length: L, of a row.
        cls, sep, pad: ids of the special tokens.

    Returns:
        `input_word_ids`, `input_mask`, `input_type_ids`: [W, L] int32.
    """
    place = tf.range(sequence_length)[tf.newaxis]
    end_a = windows.question[:, tf.newaxis] + 1  # of the [SEP] behind the question
    end_b = end_a + windows.length[:, tf.newaxis] + 1
    in_a, in_b = (place >= 1) & (place < end_a), (place > end_a) & (place < end_b)

    def picked(flat, begin, index, where):
        return tf.gather(flat, tf.where(where, begin[:, tf.newaxis] + tf.cast(index, tf.int64), 0))

    ids = tf.where((place == end_a) | (place == end_b), sep, pad)
    ids = tf.where(place == 0, cls, ids)
    ids = tf.where(in_a, picked(*question_ids, place - 1, in_a), ids)
    from_context = windows.start[:, tf.newaxis] + place - end_a - 1
    ids = tf.where(in_b, picked(*context_ids, from_context, in_b), ids)
    return {
        "input_word_ids": ids,
        "input_mask": tf.cast(place <= end_b, tf.int32),
        "input_type_ids": tf.cast((place > end_a) & (place <= end_b), tf.int32),
    }


def may_answer(windows: Windows, sequence_length):
    """Where in each row an answer may begin, and where it may end.

    It may begin in the window that shows most of the context around that piece: of those that hold
    it, the one with the most pieces on the lesser side, then the longest, then the first. It may
    end anywhere in the context.

    Returns:
        Two [W, L] bool tensors.
    """
    place = tf.range(sequence_length)[tf.newaxis] - windows.question[:, tf.newaxis] - 2
    start, length, total, room, step = (
        field[:, tf.newaxis]
        for field in (windows.start, windows.length, windows.total, windows.room, windows.step)
    )

    def around(place, length):
        # google-research/bert adds a hundredth of the length, here in whole hundredths.
        score = 100 * tf.minimum(place, length - 1 - place) + length
        return tf.where((place >= 0) & (place < length), score, -1)

    inside = (place >= 0) & (place < length)
    own = around(place, length)
    # Farther windows than the neighbours show less of it.
    previous = tf.where(start > 0, around(place + step, room), -1)
    next_length = tf.minimum(room, total - start - step)
    following = tf.where(start + length < total, around(place - step, next_length), -1)
    return inside & (own > previous) & (own >= following), inside


def single_rows(ids, sequence_length, *, cls, sep, pad):
    """The model's inputs for one text a row: [CLS] text [SEP].

    Args:
        ids: [N, (pieces)] int32 ragged tensor; what goes beyond the row is cut off.
        sequence_length: the most pieces of a row, special ones included.
        cls, sep, pad: ids of the special tokens.

    Returns:
        `input_word_ids`, `input_mask`, `input_type_ids`: [N, L] int32, L the longest row's length.
    """
    ends = [tf.fill([ids.nrows(), 1], special) for special in (cls, sep)]
    ragged = tf.concat([ends[0], ids[:, : sequence_length - 2], ends[1]], axis=1)
    padded = ragged.to_tensor(pad)
    mask = tf.sequence_mask(ragged.row_lengths(), tf.shape(padded)[1], tf.int32)
    return {
        "input_word_ids": padded,
        "input_mask": mask,
        "input_type_ids": tf.zeros_like(padded),
    }
