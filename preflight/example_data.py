"""Writes small example data in the format of a recipe, to check its input graph without its own."""

import json
import os
import random

import numpy as np
import tensorflow as tf

from inputs.images import cifar, shards
from inputs.images.prepare import encode
from inputs.images.sources import Class, Item
from inputs.shards import IMAGES as IMAGE_FORMAT
from inputs.text.prepare import prepare as prepare_text
from inputs.text.tokenization.vocabulary import save_vocabulary
from tasks.squad import PUBLISHED_VOCABULARY_SIZE
from tasks.synthetic import synthetic_vocabulary

DOCUMENTS = 400  # enough that some of them are held out
SENTENCES = 8  # of a document
WORDS = 12  # of a sentence
IMAGES = 32  # of each split
CLASSES = [Class(name, name) for name in ("even", "odd")]


def write_example_data(recipe, folder: str) -> dict[str, str]:
    """Writes data of a few words or images.

    Args:
        recipe: a checked recipe.
        folder: an existing folder.

    Returns:
        `data_dir` and `vocab` of the task.
    """
    return _WRITERS[recipe.task](recipe, folder)


def _text(recipe, folder):
    vocab = _vocabulary(recipe.vocabulary_size, folder)
    documents = ("\n".join(_sentences(recipe.vocabulary_size, i)) for i in range(DOCUMENTS))
    text = os.path.join(folder, "text.txt")
    _write(text, "\n\n".join(documents))
    data_dir = os.path.join(folder, "prepared")
    prepare_text(text, vocab, data_dir, workers=0)
    return {"data_dir": data_dir, "vocab": ""}


def _squad(recipe, folder):
    del recipe
    vocab = _vocabulary(PUBLISHED_VOCABULARY_SIZE, folder)
    data_dir = os.path.join(folder, "squad")
    os.makedirs(data_dir)
    for split in ("train", "dev"):
        questions = []
        for i in range(DOCUMENTS):
            context = " ".join(_sentences(PUBLISHED_VOCABULARY_SIZE, i))
            answer = {"text": context.split()[0], "answer_start": 0}
            asked = {"id": f"{split}{i}", "question": "word1 word2 ?", "answers": [answer]}
            questions.append({"context": context, "qas": [asked]})
        content = {"version": "1.1", "data": [{"title": "example", "paragraphs": questions}]}
        _write(os.path.join(data_dir, f"{split}.json"), json.dumps(content))
    return {"data_dir": data_dir, "vocab": vocab}


def _images(recipe, folder):
    shape = [recipe.image_size] * 2 + [3]
    is_pixels = tuple(shape) == cifar.SHAPE
    numbers = np.random.default_rng(0)
    data_dir = os.path.join(folder, "images")
    for split in ("train", "validation"):
        where = os.path.join(data_dir, split)
        shards.begin(where, {})
        records = []
        for i in range(IMAGES):
            image = numbers.integers(0, 256, shape, np.uint8)
            data = image.tobytes() if is_pixels else tf.io.encode_jpeg(image).numpy()
            records.append(encode(Item(str(i), data, i % len(CLASSES)), *shape[:2]))
        shards.finish(
            where,
            [shards.write_shard(where, f"{split}-00000", records, {})],
            kind=IMAGE_FORMAT[1],
            pixels=shape if is_pixels else None,
            classes=CLASSES,
            notes={},
        )
    return {"data_dir": data_dir, "vocab": ""}


def _vocabulary(size, folder):
    path = os.path.join(folder, "vocab.txt")
    save_vocabulary(synthetic_vocabulary(size), path)
    return path


def _sentences(vocabulary_size, seed):
    """Sentences of the words of `synthetic_vocabulary`."""
    numbers = random.Random(seed)
    most = min(vocabulary_size // 2, 1_000)
    for _ in range(SENTENCES):
        yield " ".join(f"word{numbers.randrange(most)}" for _ in range(WORDS)) + "."


def _write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


_WRITERS = {"bert": _text, "squad": _squad, "resnet": _images}
