"""LAMB for Keras 2 (`tf_keras`): trains a small BERT classifier of tf-models-official.

It shows the import that Keras 2 programs need, `from tf_lamb.tf_keras import LAMB`; arguments and
results are those of `tf_lamb.LAMB`. The model is a `BertEncoder` of tf-models with random weights,
and the data is made up, so nothing is downloaded.

Install in the project's folder, and run (about half a minute on two cores):

    pip install . tf-keras tf-models-official
    python examples/tf_keras_tfmodels.py

It prints the loss and accuracy of each epoch, and how many variables LAMB adapts.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: hides its start-up messages
os.environ["KERAS_BACKEND"] = "tensorflow"  # `tf_lamb.tf_keras` runs on this backend alone

import numpy as np
import tf_keras
from official.nlp.modeling import models, networks

from tf_lamb import BERT_EXCLUSIONS
from tf_lamb.tf_keras import LAMB, WarmupPolynomialDecay

SEQUENCE_LENGTH = 16
VOCABULARY_SIZE = 50
BATCH_SIZE = 64


def make_examples(count):
    """Returns the inputs of a `BertEncoder`, and labels [count].

    The label says whether token 7 occurs in the sequence.
    """
    rng = np.random.default_rng(1)
    word_ids = rng.integers(8, VOCABULARY_SIZE, size=(count, SEQUENCE_LENGTH), dtype=np.int32)
    labels = rng.integers(2, size=count)
    (positive,) = np.nonzero(labels)
    word_ids[positive, rng.integers(1, SEQUENCE_LENGTH, size=len(positive))] = 7
    word_ids[:, 0] = 1  # stands for [CLS], whose vector is classified
    inputs = {
        "input_word_ids": word_ids,
        "input_mask": np.ones_like(word_ids),
        "input_type_ids": np.zeros_like(word_ids),
    }
    return inputs, labels


def main(epochs=4, steps_per_epoch=40):
    """Trains the classifier."""
    tf_keras.utils.set_random_seed(1)
    encoder = networks.BertEncoder(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=2,
        inner_dim=128,
        max_sequence_length=SEQUENCE_LENGTH,
    )
    model = models.BertClassifier(encoder, num_classes=2)

    total_steps = epochs * steps_per_epoch
    optimizer = LAMB(
        WarmupPolynomialDecay(0.01, warmup_steps=total_steps // 10, total_steps=total_steps),
        weight_decay=0.01,
        exclude_from_weight_decay=BERT_EXCLUSIONS,
    )
    model.compile(
        optimizer=optimizer,
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    inputs, labels = make_examples(BATCH_SIZE * steps_per_epoch)
    model.fit(inputs, labels, batch_size=BATCH_SIZE, epochs=epochs, verbose=2)

    adapted = sum(layer.adapted for layer in optimizer.layers)
    print(f"LAMB adapts {adapted} of {len(optimizer.layers)} variables.")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    main()
