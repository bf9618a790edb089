"""Pre-training batches from installed text: statistics, pairs, order."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from batch_checks import check_statistics, joined, original

from inputs.batching import shuffled, synthetic_batches
from inputs.errors import InputError
from inputs.text import corpus, installed_text, vocabulary
from inputs.text import examples as text

LENGTH, PREDICTIONS, BATCH = 64, 12, 32


@pytest.fixture(scope="module")
def words():
    """(vocabulary, training corpus, held-out corpus) of some installed text."""
    found = list(itertools.islice(installed_text.read_installed_text(), 1500))
    few = itertools.chain.from_iterable(found[:300])  # learning is slow
    pieces = vocabulary.learn_vocabulary(few, 1500, lower_case=True)
    return pieces, *corpus.split_held_out(corpus.tokenize(found, pieces, lower_case=True))


def make(words, seed=1, whole_word=False, held_out=False):
    return text.Examples(
        words[2 if held_out else 1],
        words[0],
        sequence_length=LENGTH,
        predictions=PREDICTIONS,
        whole_word=whole_word,
        seed=seed,
    )


def test_statistics(words):
    batch = joined(make(words).training_batches(BATCH).take(300))
    check_statistics(batch, words[0], next_sentence_error=0.02)


def test_next_sentences_are_consecutive_in_the_text(words):
    """A true pair is consecutive in one document; a random one comes from two documents."""
    training = words[1]
    bounds = training.sentences[training.documents]
    documents = [training.tokens[i:j].tobytes() for i, j in itertools.pairwise(bounds)]

    def documents_with(tokens):
        """The documents that contain these tokens consecutively."""
        run = tokens.tobytes()
        return {number for number, document in enumerate(documents) if run in document}

    batch = joined(make(words).training_batches(BATCH).take(8))
    ids, types, shown = original(batch), batch["input_type_ids"], batch["input_mask"] > 0
    for row, is_random in enumerate(batch["next_sentence_labels"]):
        a = ids[row][shown[row] & (types[row] == 0)][1:-1]
        b = ids[row][types[row] == 1][:-1]
        assert len(a) and len(b)
        if is_random:
            # Short runs occur in several documents; the pair must not be from only one.
            assert documents_with(a) and documents_with(b)
            assert len(documents_with(a) | documents_with(b)) > 1
        else:
            assert documents_with(np.concatenate([a, b]))
    assert 0.3 < batch["next_sentence_labels"].mean() < 0.7


def test_a_batch_is_a_function_of_seed_and_step(words):
    examples = make(words)
    first = joined(examples.training_batches(BATCH).skip(7).take(2))
    straight = joined(examples.training_batches(BATCH, first_step=7).take(2))
    tf.nest.map_structure(np.testing.assert_array_equal, first, straight)
    other = joined(make(words, seed=2).training_batches(BATCH, first_step=7).take(2))
    assert (other["input_word_ids"] != first["input_word_ids"]).any(axis=1).mean() > 0.9


def test_hosts_and_replicas_share_the_global_batch(words):
    """2 hosts of 2 replicas together see what a single replica sees, in the same order."""
    examples = make(words)
    alone = joined(examples.training_batches(BATCH).take(2))["input_word_ids"]
    hosts = [
        list(examples.training_batches(BATCH, tf.distribute.InputContext(2, host, 4)).take(4))
        for host in range(2)
    ]
    together = [hosts[host][2 * step + i] for step in (0, 1) for host in (0, 1) for i in (0, 1)]
    np.testing.assert_array_equal(joined(together)["input_word_ids"], alone)


def test_every_epoch_has_each_chunk_once_in_a_new_order(words):
    examples = make(words)
    numbers = tf.range(2 * examples.num_examples, dtype=tf.int64)
    order = shuffled(numbers, examples.num_examples, examples.seed).numpy().reshape(2, -1)
    for epoch in order:
        assert sorted(epoch) == list(range(examples.num_examples))
    assert (order[0] != order[1]).mean() > 0.9


def test_an_evaluation_counts_each_example_once(words):
    examples = make(words, held_out=True)
    total = examples.num_examples
    assert total % BATCH, "a last batch that is not full"
    batch = joined(examples.evaluation_batches(BATCH, limit=10**9))
    assert batch["example_weights"].sum() == total
    assert (batch["masked_lm_weights"][total:] == 0).all()
    hosts = [
        joined(examples.evaluation_batches(BATCH, 10**9, tf.distribute.InputContext(2, host, 2)))
        for host in range(2)
    ]
    assert sum(host["example_weights"].sum() for host in hosts) == total
    assert joined(examples.evaluation_batches(BATCH, limit=5))["example_weights"].sum() == 5


def test_whole_words_are_masked_whole(words):
    pieces = words[0]
    batch = joined(make(words, whole_word=True).training_batches(BATCH).take(100))
    ids, weights = original(batch), batch["masked_lm_weights"] > 0
    parted = words_masked = 0
    for row in range(len(ids)):
        chosen = set(batch["masked_lm_positions"][row][weights[row]].tolist())
        starts = [i for i, piece in enumerate(ids[row]) if not pieces[piece].startswith("##")]
        for start, end in itertools.pairwise([*starts, LENGTH]):
            inside = chosen.intersection(range(start, end))
            words_masked += bool(inside)
            parted += 0 < len(inside) < end - start
    # Only a word longer than all masks of a short text is cut.
    assert words_masked > 5000 and parted / words_masked < 0.005
    tokens = batch["input_mask"].sum() - 3 * len(ids)
    assert weights.sum() / tokens == pytest.approx(0.15, abs=0.005)


@pytest.mark.parametrize("whole_word", [False, True])
def test_text_of_unknown_words_is_not_masked(words, whole_word):
    documents = [["\U0001f600 \U0001f601 " * (3 + i)] for i in range(20)]
    unknown = corpus.tokenize(documents, words[0], lower_case=True)
    examples = make((words[0], unknown), whole_word=whole_word)
    batch = joined(examples.training_batches(BATCH).take(3))
    unk, cls, sep = map(words[0].index, ("[UNK]", "[CLS]", "[SEP]"))
    assert not batch["masked_lm_weights"].any()
    assert set(batch["input_word_ids"].ravel().tolist()) == {0, unk, cls, sep}


def test_held_out_documents_are_new(words):
    def as_set(part):
        bounds = part.sentences[part.documents]
        return {part.tokens[i:j].tobytes() for i, j in itertools.pairwise(bounds)}

    _, training, held_out = words
    assert len(as_set(training)) == len(training.documents) - 1
    assert not as_set(training) & as_set(held_out)
    assert len(as_set(held_out)) == pytest.approx(0.02 * 1500, abs=3)


def test_a_repeated_document_is_dropped(words):
    twice = [["The same words here."], ["Others stand there."], ["the  same words HERE."]]
    assert len(corpus.tokenize(twice, words[0], lower_case=True).documents) - 1 == 2


def test_too_few_documents_are_refused(words):
    with pytest.raises(InputError, match="3 different documents, but at least 4"):
        three = [["a b."], ["c d."], ["e f."]]
        corpus.split_held_out(corpus.tokenize(three, words[0], lower_case=True))


def test_synthetic_batches_have_the_same_spec(words):
    spec = text.element_spec(BATCH, LENGTH, PREDICTIONS)
    real = make(words).training_batches(BATCH)
    for key, tensor in next(iter(real)).items():
        assert (tensor.shape, tensor.dtype) == (spec[key].shape, spec[key].dtype), key
    made_up = synthetic_batches(spec, {"input_word_ids": 100}, seed=1)
    assert made_up.element_spec == spec
    assert int(tf.reduce_max(next(iter(made_up))["input_word_ids"])) < 100


def test_shapes_are_static(words):
    """A TPU program is compiled for one shape, known before the first batch."""
    spec = make(words).training_batches(BATCH).element_spec
    assert spec == text.element_spec(BATCH, LENGTH, PREDICTIONS)
