"""Builds the model's input rows; long contexts are cut into overlapping windows.

These are TensorFlow operations, so that training, evaluation and the exported graph share them. The
rules are those of run_squad.py in google-research/bert.
"""

import typing

import tensorflow as tf

SPECIAL = 3  # special tokens of a row: [CLS] question [SEP] context [SEP]


class Windows(typing.NamedTuple):
    """Parts of contexts, one per row. All fields are [W] int32; lengths are in word pieces.

    Attributes:
        example: index of the row's pair of question and context.
        start: where the window begins in the context.
        length: length of the window.
        question: length of the question, truncated to `max_query_length`.
        total: length of the whole context.
        room: the longest possible window.
        step: distance to the start of the next window.
    """

    example: tf.Tensor
    start: tf.Tensor
    length: tf.Tensor
    question: tf.Tensor
    total: tf.Tensor
    room: tf.Tensor
    step: tf.Tensor


def cut_windows(question, total, *, sequence_length, max_query_length, doc_stride) -> Windows:
    """The windows of each pair, in order; an empty context has one window of length 0.

    Args:
        question, total: [N] int32, the number of pieces of each question and of its context.
        sequence_length: length of a row; greater than `max_query_length` + 3.
        max_query_length: longer questions are truncated to this many pieces.
        doc_stride: distance between the starts of consecutive windows, limited to their length.
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
    """The model's inputs for windows.

    Args:
        windows: W windows.
        question_ids, context_ids: each a pair of [T] int32, the ids of all texts, T at least 1, and
            [W] int64, where each row's text begins in them.
        sequence_length: L, length of a row.
        cls, sep, pad: ids of the special tokens.

    Returns:
        `input_word_ids`, `input_mask`, `input_type_ids`: [W, L] int32.
    """
    position = tf.range(sequence_length)[tf.newaxis]
    end_a = windows.question[:, tf.newaxis] + 1  # position of the [SEP] after the question
    end_b = end_a + windows.length[:, tf.newaxis] + 1
    in_a, in_b = (position >= 1) & (position < end_a), (position > end_a) & (position < end_b)

    def gather(flat, begin, index, where):
        return tf.gather(flat, tf.where(where, begin[:, tf.newaxis] + tf.cast(index, tf.int64), 0))

    ids = tf.where((position == end_a) | (position == end_b), sep, pad)
    ids = tf.where(position == 0, cls, ids)
    ids = tf.where(in_a, gather(*question_ids, position - 1, in_a), ids)
    from_context = windows.start[:, tf.newaxis] + position - end_a - 1
    ids = tf.where(in_b, gather(*context_ids, from_context, in_b), ids)
    return {
        "input_word_ids": ids,
        "input_mask": tf.cast(position <= end_b, tf.int32),
        "input_type_ids": tf.cast((position > end_a) & (position <= end_b), tf.int32),
    }


def may_answer(windows: Windows, sequence_length):
    """Where in each row an answer may begin, and where it may end.

    A piece of the context may be in several windows. An answer may begin at it only in the window
    with the most context around it: the most pieces on the shorter side, then the longest window,
    then the first. An answer may end at any piece of the context.

    Args:
        windows: W windows.
        sequence_length: L, length of a row.

    Returns:
        Two [W, L] bool tensors.
    """
    position = tf.range(sequence_length)[tf.newaxis] - windows.question[:, tf.newaxis] - 2
    start, length, total, room, step = (
        field[:, tf.newaxis]
        for field in (windows.start, windows.length, windows.total, windows.room, windows.step)
    )

    def around(position, length):
        # google-research/bert adds 0.01 * length to the minimum; scaled by 100 to stay in integers.
        score = 100 * tf.minimum(position, length - 1 - position) + length
        return tf.where((position >= 0) & (position < length), score, -1)

    inside = (position >= 0) & (position < length)
    own = around(position, length)
    # Only the neighbors are compared, because windows beyond them have less context.
    previous = tf.where(start > 0, around(position + step, room), -1)
    next_length = tf.minimum(room, total - start - step)
    following = tf.where(start + length < total, around(position - step, next_length), -1)
    return inside & (own > previous) & (own >= following), inside


def single_rows(ids, sequence_length, *, cls, sep, pad):
    """The model's inputs for one text per row: [CLS] text [SEP].

    Args:
        ids: [N, (pieces)] int32 ragged tensor; longer texts are truncated.
        sequence_length: maximum number of pieces of a row, special ones included.
        cls, sep, pad: ids of the special tokens.

    Returns:
        `input_word_ids`, `input_mask`, `input_type_ids`: [N, L] int32, where L is the length of the
        longest row; 2 if N is 0, because a network cannot process rows of length 0.
    """
    ends = [tf.fill([ids.nrows(), 1], special) for special in (cls, sep)]
    ragged = tf.concat([ends[0], ids[:, : sequence_length - 2], ends[1]], axis=1)
    padded = ragged.to_tensor(pad)
    padded = tf.pad(padded, [[0, 0], [0, tf.maximum(2 - tf.shape(padded)[1], 0)]])
    mask = tf.sequence_mask(ragged.row_lengths(), tf.shape(padded)[1], tf.int32)
    return {
        "input_word_ids": padded,
        "input_mask": mask,
        "input_type_ids": tf.zeros_like(padded),
    }
