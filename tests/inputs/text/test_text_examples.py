"""Pre-training batches from installed text: statistics, pairs, order."""

import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from batch_checks import check_statistics, corpora, document_tokens, joined, original

from inputs.bad_records import BadRecords
from inputs.batching import synthetic_batches
from inputs.errors import InputError
from inputs.order import row_batches
from inputs.pages import PAGE_BYTES
from inputs.shards import FRAME_BYTES
from inputs.text import examples as text
from inputs.text.batches import element_spec
from inputs.text.tokenization import installed_text, vocabulary

LENGTH, PREDICTIONS, BATCH = 64, 12, 32


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """(vocabulary, training corpus, held-out corpus) of some installed text."""
    found = list(itertools.islice(installed_text.read_installed_text(), 1500))
    few = itertools.chain.from_iterable(found[:300])  # learning is slow
    pieces = vocabulary.learn_vocabulary(few, 1500, lower_case=True)
    return pieces, *corpora(found, pieces, tmp_path_factory.mktemp("words") / "shards")


def make(words, seed=1, whole_word=False, held_out=False, **more):
    return text.Examples(
        words[2 if held_out else 1],
        words[0],
        sequence_length=LENGTH,
        predictions=PREDICTIONS,
        whole_word=whole_word,
        seed=seed,
        **more,
    )


@pytest.mark.slow
def test_statistics(words):
    batch = joined(make(words).training_batches(BATCH).take(300))
    check_statistics(batch, words[0], next_sentence_error=0.02)


@pytest.mark.slow
def test_next_sentences_are_consecutive_in_the_text(words):
    """A true pair is consecutive in one document; a random one comes from two documents."""
    documents = [tokens.tobytes() for tokens in document_tokens(words[1])]

    def documents_with(tokens):
        """The documents that contain these tokens consecutively."""
        run = tokens.astype(np.uint16).tobytes()
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
    """Also at a batch that does not divide the epoch, and that has several lanes."""
    examples = make(words)
    order = examples.order(24)
    assert order.lanes > 1 and examples.num_examples % 24
    count = examples.num_examples
    rows = row_batches(order, None, 0, lambda chunks, ids: tf.stack([chunks, ids], 1))
    rows = np.concatenate(list(rows.take(2 * count // 24 + 2).as_numpy_iterator()))
    assert rows[:, 1].tolist() == list(range(len(rows)))  # the ids of the examples
    first, second = rows[:count, 0], rows[count : 2 * count, 0]
    assert sorted(first) == sorted(second) == list(range(count))
    assert (first != second).mean() > 0.9


def test_an_evaluation_counts_each_example_once(words):
    examples = make(words, held_out=True)
    total = examples.num_examples
    assert total % BATCH, "a last batch that is not full"
    batch = joined(examples.evaluation_batches(BATCH, limit=10**9))
    assert batch["example_weights"].sum() == total
    assert not batch["masked_lm_weights"][batch["example_weights"] == 0].any()
    # Another batch size shows the same examples, masked in the same way.
    other = joined(examples.evaluation_batches(8, limit=10**9))
    rows = [
        sorted(row.tobytes() for row in found["input_word_ids"][found["example_weights"] > 0])
        for found in (batch, other)
    ]
    assert rows[0] == rows[1]
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


@pytest.mark.slow
@pytest.mark.parametrize("whole_word", [False, True])
def test_text_of_unknown_words_is_not_masked(words, whole_word, tmp_path):
    documents = [["\U0001f600 \U0001f601 " * (3 + i)] for i in range(20)]
    examples = make((words[0], *corpora(documents, words[0], tmp_path)), whole_word=whole_word)
    batch = joined(examples.training_batches(BATCH).take(3))
    unk, cls, sep = map(words[0].index, ("[UNK]", "[CLS]", "[SEP]"))
    assert not batch["masked_lm_weights"].any()
    assert set(batch["input_word_ids"].ravel().tolist()) == {0, unk, cls, sep}


def test_held_out_documents_are_new(words):
    training, held_out = (
        {tokens.tobytes() for tokens in document_tokens(part)} for part in words[1:]
    )
    assert len(training) == len(words[1].documents) - 1
    assert not training & held_out
    assert len(held_out) == pytest.approx(0.02 * 1500, abs=3)


def test_a_repeated_document_is_dropped(words, tmp_path):
    others = [[f"Number {'one ' * i} is here."] for i in range(1, 5)]
    twice = [["The same words here."], ["the  same words HERE."], *others]
    sides = corpora(twice, words[0], tmp_path)
    assert sum(len(side.documents) - 1 for side in sides) == 5


def test_too_few_documents_are_refused(words, tmp_path):
    with pytest.raises(InputError, match="3 different documents, but at least 4"):
        corpora([["a b."], ["c d."], ["e f."]], words[0], tmp_path)


def test_a_long_document_is_paired_with_another(words, tmp_path):
    """Where a block of chunks has one document only, segment B is of the next one."""
    rng = np.random.default_rng(0)
    pieces = words[0]
    plain = [piece for piece in pieces if piece.isalpha() and piece.isascii()]
    texts = [[" ".join(rng.choice(plain, 60_000)) + "."] for _ in range(3)]
    texts += [["one short text."], ["another short one."], ["and a third."]]
    training, _ = corpora(texts, pieces, tmp_path)
    batch = joined(make((pieces, training)).training_batches(BATCH).take(20))
    assert 0.4 < batch["next_sentence_labels"].mean() < 0.6
    documents = [tokens.tobytes() for tokens in document_tokens(training)]
    ids, types, shown = original(batch), batch["input_type_ids"], batch["input_mask"] > 0
    for row in np.flatnonzero(batch["next_sentence_labels"])[:50]:
        segments = ids[row][shown[row] & (types[row] == 0)][1:-1], ids[row][types[row] == 1][:-1]
        of = [
            {i for i, text in enumerate(documents) if part.astype(np.uint16).tobytes() in text}
            for part in segments
        ]
        assert of[0] and of[1] and len(of[0] | of[1]) > 1


def test_damaged_pages_cost_their_examples_and_are_named(words, tmp_path):
    pieces = words[0]
    documents = [[f"word {'the ' * (i % 30)} number {i}." for _ in range(5)] for i in range(400)]
    training, _ = corpora(documents, pieces, tmp_path / "shards")
    path = pathlib.Path(training.tokens.path)
    content = bytearray(path.read_bytes())
    places = [page * (PAGE_BYTES + FRAME_BYTES) for page in (1, 3)]
    for place in places:
        content[place + 500] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=f"InputError: --data_dir: {path}, byte ({places[0]}|{places[1]}): damaged",
    ):
        joined(make((pieces, training)).training_batches(BATCH).take(100))
    said = []
    records = BadRecords(0.9, skip=True, log=said.append)
    examples = make((pieces, training), bad_records=records)
    steps = examples.num_examples // BATCH
    batch = joined(examples.training_batches(BATCH).take(steps))
    examples.damage.end()
    lost = batch["example_weights"] == 0
    assert 0 < lost.sum() <= records.bad < len(lost)
    assert not batch["masked_lm_weights"][lost].any()
    assert sorted(said[:-1]) == [
        f"Skipped: {path}, byte {place}: damaged or missing." for place in places
    ]
    total = f"{records.bad:,} of {examples.num_examples:,} records"
    assert said[-1] == f"{total} were damaged and skipped"


def test_synthetic_batches_have_the_same_spec(words):
    spec = element_spec(BATCH, LENGTH, PREDICTIONS)
    real = make(words).training_batches(BATCH)
    for key, tensor in next(iter(real)).items():
        assert (tensor.shape, tensor.dtype) == (spec[key].shape, spec[key].dtype), key
    made_up = synthetic_batches(spec, {"input_word_ids": 100}, seed=1)
    assert made_up.element_spec == spec
    assert int(tf.reduce_max(next(iter(made_up))["input_word_ids"])) < 100


def test_shapes_are_static(words):
    """A TPU program is compiled for one shape, known before the first batch."""
    spec = make(words).training_batches(BATCH).element_spec
    assert spec == element_spec(BATCH, LENGTH, PREDICTIONS)
