"""Calls a SavedModel that `train.py` exported, with TensorFlow alone.

It shows what a serving program needs: `tf.saved_model.load`, the signature `serving_default`, and
raw strings or image files as its inputs. Neither tf_lamb nor Keras is imported. The folder is the
`export` in a run's folder; `make demo` writes runs/bert-mini-demo/export.

Install and run:

    pip install tensorflow tensorflow-text
    python examples/savedmodel_client.py runs/bert-mini-demo/export "The [MASK] of the array."
    python examples/savedmodel_client.py SQUAD_EXPORT "Ada wrote it in 1843." "Who wrote it?"
    python examples/savedmodel_client.py RESNET_EXPORT photo.jpg

It prints the likeliest word pieces for each `[MASK]`, the answer to each question about a text, or
the likeliest classes of each image, depending on what the model was trained for.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: hides its start-up messages

import tensorflow as tf
import tensorflow_text  # noqa: F401  the tokenizer's operations; image models do not need it


def fill_masks(signature, *texts):
    """Prints the likeliest word pieces for each `[MASK]` in each text."""
    answers = signature(text=tf.constant(texts))
    for row, text in enumerate(texts):
        print(text)
        for mask in range(int(answers["masks"][row])):  # "tokens" is [texts, masks, 5]
            print("  " + ranked(answers["tokens"][row, mask], answers["probabilities"][row, mask]))


def answer_questions(signature, context, *questions):
    """Prints the part of the context that answers each question."""
    answers = signature(question=tf.constant(questions), context=tf.fill([len(questions)], context))
    for row, question in enumerate(questions):
        start, end = int(answers["start"][row]), int(answers["end"][row])
        print(f"{question}\n  {text_of(answers['answer'][row])!r}, characters {start} to {end}")


def classify_images(signature, *paths):
    """Prints the likeliest classes of each image file."""
    answers = signature(image=tf.stack([tf.io.read_file(path) for path in paths]))
    for row, path in enumerate(paths):
        error = text_of(answers["error"][row])  # "" for a file that is an image
        print(f"{path}\n  {error or ranked(answers['names'][row], answers['probabilities'][row])}")


def text_of(string):
    """Returns a scalar string tensor as a Python string."""
    return string.numpy().decode()


def ranked(names, probabilities):
    """Returns "first 90 %, second 5 %, ..." for two tensors of one length."""
    pairs = zip(names, probabilities, strict=True)
    return ", ".join(f"{text_of(name)} {100 * float(p):.0f} %" for name, p in pairs)


# The function that serves a model, by the names of its signature's inputs.
CLIENTS = {
    ("text",): fill_masks,
    ("context", "question"): answer_questions,
    ("image",): classify_images,
}


def main(export_dir, *arguments):
    """Loads the SavedModel and calls it."""
    if not tf.saved_model.contains_saved_model(export_dir):
        sys.exit(f"{export_dir} holds no SavedModel. Give the `export` folder of a run.")
    model = tf.saved_model.load(export_dir)
    signature = model.signatures.get("serving_default")
    inputs = tuple(sorted(signature.structured_input_signature[1])) if signature else ()
    if inputs not in CLIENTS:
        sys.exit(
            f"{export_dir} is no export of train.py: it takes {', '.join(inputs) or 'nothing'}."
        )
    if inputs == ("context", "question") and len(arguments) < 2:
        sys.exit("This model answers questions about a context: give the context and a question.")
    try:
        CLIENTS[inputs](signature, *arguments)
    except tf.errors.NotFoundError as error:  # an image file
        sys.exit(error.message)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("export_dir", metavar="EXPORT_DIR")
    parser.add_argument("inputs", metavar="INPUT", nargs="+")
    arguments = parser.parse_args()
    main(arguments.export_dir, *arguments.inputs)
