"""Writes small example data in the format of a recipe, to check its input graph without its own."""

import json
import os
import random

import numpy as np
import tensorflow as tf

from inputs.errors import InputError, first_line
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
SIDE = 64  # of a JPEG, in pixels
CLASSES = [Class(name, name) for name in ("even", "odd")]


def write_example_data(recipe, folder: str) -> dict[str, str]:
    """Writes prepared text, questions, or images: CIFAR-10's pixels for 32 pixels, else JPEGs.

    Args:
        recipe: a checked recipe.
        folder: an existing temporary folder.

    Returns:
        `data_dir` and `vocab` of the task.

    Raises:
        InputError: the data cannot be written.
    """
    fix = "Set the environment variable TMPDIR to another folder."
    if "," in folder:  # `--data_dir` can be several files
        raise InputError(f"{folder}: the name of a temporary folder has a comma. {fix}")
    try:
        return _WRITERS[recipe.task](recipe, folder)
    except (OSError, InputError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, (OSError, tf.errors.OpError)):  # not a matter of the folder
            raise
        reason = getattr(cause, "strerror", None) or first_line(cause)
        raise InputError(f"{folder} cannot be written ({reason}). {fix}") from None


def _text(recipe, folder):
    vocab = _vocabulary(recipe.vocabulary_size, folder)
    documents = ("\n".join(_sentences(recipe.vocabulary_size, i)) for i in range(DOCUMENTS))
    text = os.path.join(folder, "text.txt")
    _write(text, "\n\n".join(documents))
    data_dir = os.path.join(folder, "prepared")
    prepare_text(text, vocab, data_dir, workers=0, lower_case=recipe.lower_case)
    return {"data_dir": data_dir, "vocab": ""}


def _squad(recipe, folder):
    del recipe
    vocab = _vocabulary(PUBLISHED_VOCABULARY_SIZE, folder)
    data_dir = os.path.join(folder, "squad")
    os.makedirs(data_dir)
    for split in ("train", "dev"):
        paragraphs = []
        for i in range(DOCUMENTS):
            context = " ".join(_sentences(PUBLISHED_VOCABULARY_SIZE, i))
            answer = {"text": context.split()[0], "answer_start": 0}
            question = {"id": f"{split}{i}", "question": "word1 word2 ?", "answers": [answer]}
            paragraphs.append({"context": context, "qas": [question]})
        content = {"version": "1.1", "data": [{"title": "example", "paragraphs": paragraphs}]}
        _write(os.path.join(data_dir, f"{split}.json"), json.dumps(content))
    return {"data_dir": data_dir, "vocab": vocab}


def _images(recipe, folder):
    is_pixels = recipe.image_size == cifar.SHAPE[0]
    shape = list(cifar.SHAPE) if is_pixels else [SIDE, SIDE, 3]
    generator = np.random.default_rng(0)
    data_dir = os.path.join(folder, "images")
    for split in ("train", "validation"):
        split_dir = os.path.join(data_dir, split)
        shards.begin(split_dir, {})
        records = []
        for i in range(IMAGES):
            image = generator.integers(0, 256, shape, np.uint8)
            data = image.tobytes() if is_pixels else tf.io.encode_jpeg(image).numpy()
            records.append(encode(Item(str(i), data, i % len(CLASSES)), *shape[:2]))
        shards.finish(
            split_dir,
            [shards.write_shard(split_dir, f"{split}-00000", records, {})],
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
    generator = random.Random(seed)
    words = min(vocabulary_size // 2, 1_000)
    for _ in range(SENTENCES):
        yield " ".join(f"word{generator.randrange(words)}" for _ in range(WORDS)) + "."


def _write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


_WRITERS = {"bert": _text, "squad": _squad, "resnet": _images}
