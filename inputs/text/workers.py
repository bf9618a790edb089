"""Tokenising on all cores: processes that take batches of documents and give them back in order."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

from inputs.errors import InputError
from inputs.text.batches import batches

AHEAD = 3  # batches for each worker that are on their way


def tokenized_batches(
    documents: Iterable[list[str]], vocabulary: list[str], workers: int, skip: int = 0
) -> Iterator:
    """Yields the `tokenizing.Tokenized` of each batch of documents but the first `skip`, in order.

    Args:
        documents: lists of paragraphs.
        vocabulary: word pieces, ids by position.
        workers: processes; 0 for this one.
        skip: batches that are read but not tokenised.

    Raises:
        InputError: as `documents` raises it, or a worker died.
    """
    rest = itertools.islice(batches(documents), skip, None)
    if workers == 0:
        from inputs.text.tokenizing import Tokenizer

        yield from map(Tokenizer(vocabulary), rest)
        return
    # Workers are forked from a process that has imported TensorFlow but never run it: that is
    # safe, unlike forking this one, and they share the memory and the seconds of the import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "tensorflow_text"])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (vocabulary,))
    try:
        waiting: collections.deque = collections.deque()
        for batch in rest:
            waiting.append(pool.submit(_tokenize, batch))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, most often because memory ran out. Give the same "
            "command again with fewer --workers; it goes on after the last finished shard."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(vocabulary):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import tensorflow as tf

    from inputs.text.tokenizing import Tokenizer

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    global _tokenize_batch
    _tokenize_batch = Tokenizer(vocabulary)


def _end_with_parent():
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _tokenize(batch):
    return _tokenize_batch(batch)
