"""Pre-training batches from prepared shards of Wikipedia: statistics, pairs, order."""

import gzip
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from batch_checks import check_statistics, document_tokens, joined, original

from inputs.bad_records import BadRecords
from inputs.text import examples as text
from inputs.text import prepare
from inputs.text.corpus import load_prepared

SHARED = pathlib.Path(__file__).parents[4] / "shared/data"
ARTICLES = 1_200  # of 20,136
CASES = {
    "pairs-128": (128, 20, "pairs", False),
    "pairs-512": (512, 80, "pairs", False),
    "full-128": (128, 20, "full-sentences", False),
    "full-512": (512, 76, "full-sentences", False),
    "whole-words-128": (128, 20, "pairs", True),
}

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not here")


@pytest.fixture(scope="module")
def wikipedia(tmp_path_factory):
    """(training corpus, held-out corpus, vocabulary) of some articles."""
    folder = tmp_path_factory.mktemp("wikipedia")
    with gzip.open(SHARED / "text/enwiki-articles.jsonl.gz") as file:
        (folder / "a.jsonl").write_bytes(b"".join(itertools.islice(file, ARTICLES)))
    shards = str(folder / "shards")
    prepare.prepare(str(folder / "a.jsonl"), str(SHARED / "bert/vocab.txt"), shards, workers=0)
    return load_prepared(shards, "", BadRecords(0, skip=False, log=print))[:3]


def make(wikipedia, case, seed=3):
    length, predictions, packing, whole_word = CASES[case]
    return text.Examples(
        wikipedia[0],
        wikipedia[2],
        sequence_length=length,
        predictions=predictions,
        packing=packing,
        whole_word=whole_word,
        seed=seed,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_statistics(wikipedia, case):
    batch = joined(make(wikipedia, case).training_batches(64).take(200))
    check_statistics(batch, wikipedia[2])
    if CASES[case][2] == "full-sentences":
        assert batch["input_mask"].mean() >= 0.95
        assert not batch["next_sentence_weights"].any() and not batch["input_type_ids"].any()


def test_a_true_pair_is_consecutive_in_one_document(wikipedia):
    documents = [tokens[:-1].tobytes() for tokens in document_tokens(wikipedia[0])]
    batch = joined(make(wikipedia, "pairs-128").training_batches(64).take(4))
    ids, shown = original(batch), batch["input_mask"] > 0
    found = {0: 0, 1: 0}
    for row, is_random in enumerate(batch["next_sentence_labels"]):
        in_b = batch["input_type_ids"][row] == 1
        a, b = ids[row][shown[row] & ~in_b][1:-1], ids[row][in_b][:-1]
        run = np.concatenate([a, b]).astype(np.uint16).tobytes()
        found[int(is_random)] += any(run in document for document in documents)
    assert found == {0: (batch["next_sentence_labels"] == 0).sum(), 1: 0}


def test_full_sequences_keep_every_token_in_order(wikipedia):
    """An epoch of full sequences, concatenated, is the text itself without [SEP]."""
    training, _, pieces = wikipedia
    examples = make(wikipedia, "full-512")
    batch = joined(examples.evaluation_batches(1, limit=examples.num_examples))
    ids = original(batch)[: examples.num_examples]
    special = [pieces.index(token) for token in ("[PAD]", "[CLS]", "[SEP]")]
    tokens = training.tokens.all()
    expected = tokens[tokens != special[2]]
    np.testing.assert_array_equal(ids[~np.isin(ids, special)], expected)


@pytest.mark.slow
def test_resumed_and_divided_streams_equal_the_whole(wikipedia):
    examples = make(wikipedia, "pairs-128")
    whole = list(examples.training_batches(8).take(40))
    for step in (1, 17, 39):
        again = next(iter(examples.training_batches(8, first_step=step)))
        tf.nest.map_structure(np.testing.assert_array_equal, again, whole[step])
    hosts = [
        list(examples.training_batches(8, tf.distribute.InputContext(2, host, 4)).take(4))
        for host in range(2)
    ]
    together = joined(
        hosts[host][2 * step + i] for step in (0, 1) for host in (0, 1) for i in (0, 1)
    )
    tf.nest.map_structure(np.testing.assert_array_equal, together, joined(whole[:2]))


def test_held_out_articles_are_new(wikipedia):
    training, held_out = (
        {tokens.tobytes() for tokens in document_tokens(part)} for part in wikipedia[:2]
    )
    assert len(held_out) == round(0.02 * ARTICLES) and not training & held_out
    assert len(training) + len(held_out) == ARTICLES
