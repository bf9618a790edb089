"""Pre-trains KerasHub's BERT as a masked language model with LAMB, through `model.compile`.

It shows where LAMB goes in an ordinary Keras program: the optimizer with its learning-rate
schedule and its exclusions is passed to `compile`, and `fit` does the rest. The model has random
weights and two small layers, and the text is made up, so nothing is downloaded.

Install in the project's folder, and run (under a minute on two cores):

    pip install . tensorflow keras-hub
    python examples/masked_lm.py

It prints the loss and the masked-token accuracy of each epoch, and the words that the trained
model puts in place of two `[MASK]`s.
"""

import argparse
import os
import random

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: hides its start-up messages

import keras
import keras_hub
import numpy as np

import tf_lamb

SEQUENCE_LENGTH = 12
BATCH_SIZE = 32

# Each animal has one verb and one place, so most masked words follow from the words around them.
ANIMALS = {
    "fish": ("swims", "sea"),
    "bird": ("sings", "tree"),
    "cat": ("sleeps", "house"),
    "cow": ("stands", "field"),
}
ADJECTIVES = ("old", "young", "small", "quick")


def make_sentences(count):
    """Returns a list of `count` random sentences."""
    sentences = []
    for _ in range(count):
        animal = random.choice(list(ANIMALS))
        verb, place = ANIMALS[animal]
        sentences.append(f"the {random.choice(ADJECTIVES)} {animal} {verb} in the {place} .")
    return sentences


def make_preprocessor(sentences):
    """Returns what turns strings into token ids, some of them masked, and the ids to predict."""
    words = sorted(set(" ".join(sentences).split()))
    tokenizer = keras_hub.tokenizers.BertTokenizer(
        vocabulary=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words],
        special_tokens_in_strings=True,  # so that "[MASK]" in a string is the mask token
    )
    return keras_hub.models.BertMaskedLMPreprocessor(
        tokenizer,
        sequence_length=SEQUENCE_LENGTH,
        mask_selection_rate=0.15,
        mask_selection_length=3,  # at most this many masks per sentence
    )


def fill_mask(masked_lm, sentence):
    """Returns the most likely word for the `[MASK]` of a sentence."""
    tokenizer = masked_lm.preprocessor.tokenizer
    ids = np.array(tokenizer(f"[CLS] {sentence} [SEP]"))
    mask_position = int(np.argmax(ids == tokenizer.mask_token_id))
    logits = masked_lm(
        {
            "token_ids": ids[np.newaxis],
            "segment_ids": np.zeros_like(ids)[np.newaxis],
            "padding_mask": np.ones_like(ids)[np.newaxis],
            "mask_positions": np.array([[mask_position]]),
        }
    )  # [batch, masks, vocabulary]
    return tokenizer.id_to_token(int(np.argmax(logits[0, 0])))


def main(epochs=5, steps_per_epoch=40):
    """Trains the model, then fills two masks."""
    keras.utils.set_random_seed(1)
    sentences = make_sentences(BATCH_SIZE * steps_per_epoch)
    preprocessor = make_preprocessor(sentences)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
        num_layers=2,
        num_heads=2,
        hidden_dim=64,
        intermediate_dim=128,
        max_sequence_length=SEQUENCE_LENGTH,
    )
    backbone.get_layer("pooled_dense").trainable = False  # the masked-LM head does not use it
    preprocessor.build(None)  # has no weights, but Keras 3.15 warns where it is not built
    masked_lm = keras_hub.models.BertMaskedLM(backbone, preprocessor)

    total_steps = epochs * steps_per_epoch
    schedule = tf_lamb.WarmupPolynomialDecay(
        peak_learning_rate=0.02,  # a small model; the paper takes 0.005 for BERT-Large at 32K
        warmup_steps=total_steps // 10,
        total_steps=total_steps,
    )
    masked_lm.compile(
        optimizer=tf_lamb.LAMB(
            schedule,
            weight_decay=0.01,
            # Biases and layer normalization are neither decayed nor adapted.
            exclude_from_weight_decay=tf_lamb.BERT_EXCLUSIONS,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # "Weighted": the preprocessor gives weight 0 to unused places among the masks.
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    masked_lm.fit(sentences, batch_size=BATCH_SIZE, epochs=epochs, verbose=2, shuffle=False)

    for sentence in ("the old fish swims in the [MASK] .", "the quick [MASK] sings in the tree ."):
        print(f"{sentence}  ->  {fill_mask(masked_lm, sentence)}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    main()
