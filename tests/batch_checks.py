"""Checks for all pre-training batches, and corpora for them."""

import numpy as np
import pytest

from inputs.bad_records import BadRecords
from inputs.text.corpus import load_prepared
from inputs.text.prepare import prepare_documents
from inputs.text.tokenization import vocabulary


def corpora(documents, pieces, folder, **changes):
    """(training, held-out) corpus of documents, lists of paragraphs, prepared in a folder."""
    prepare_documents(
        lambda advance: iter(documents),
        inputs=["documents of a test"],
        size=len(documents),
        vocabulary=pieces,
        output=str(folder),
        **{
            "records": BadRecords(0.0, skip=False, log=print),
            "flag": "--output",
            "workers": 0,
            "lower_case": True,
        }
        | changes,
    )
    return load_prepared(str(folder), "", BadRecords(0.0, skip=False, log=print))[:2]


def document_tokens(corpus):
    """The ids of each document, with its [SEP]."""
    tokens = corpus.tokens.all()
    bounds = corpus.sentences.all()[corpus.documents.all()]
    return [tokens[i:j] for i, j in zip(bounds[:-1], bounds[1:], strict=True)]


def joined(batches):
    """Batches as one dictionary of arrays."""
    batches = list(batches)
    return {key: np.concatenate([b[key].numpy() for b in batches]) for key in batches[0]}


def original(batch):
    """The ids before masking."""
    ids = batch["input_word_ids"].copy()
    rows, picks = np.nonzero(batch["masked_lm_weights"])
    ids[rows, batch["masked_lm_positions"][rows, picks]] = batch["masked_lm_ids"][rows, picks]
    return ids


def check_statistics(batch, pieces, next_sentence_error=0.01):
    """15 % are masked, of these 80/10/10 %; half of the pairs are random; no special tokens."""
    _, unk, cls, sep, mask = map(pieces.index, vocabulary.SPECIAL_TOKENS)
    weights = batch["masked_lm_weights"] > 0
    labels = batch["masked_lm_ids"][weights]
    shown = np.take_along_axis(batch["input_word_ids"], batch["masked_lm_positions"], 1)[weights]
    before = original(batch)
    text_tokens = batch["input_mask"].sum() - np.isin(before, [unk, cls, sep]).sum()
    assert weights.sum() / text_tokens == pytest.approx(0.15, abs=0.003)
    # A random piece is sometimes the right one.
    assert np.mean(shown == mask) == pytest.approx(0.8, abs=0.01)
    assert np.mean(shown == labels) == pytest.approx(0.1, abs=0.01)
    if batch["next_sentence_weights"].any():
        random = batch["next_sentence_labels"].mean()
        assert random == pytest.approx(0.5, abs=next_sentence_error)
        assert ((before == sep).sum(1) == 2).all()
    special = {pieces.index(token) for token in vocabulary.SPECIAL_TOKENS}
    assert not special.intersection(labels.tolist())
    assert (batch["input_word_ids"][:, 0] == cls).all()
