"""Answers questions with an exported model: python -m export.answer DIR CONTEXT QUESTION...

It imports what serving needs and nothing else: tensorflow, and tensorflow_text for its ops.
"""

import sys

import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the tokenizer's ops


def main(export_dir: str, context: str, *questions: str) -> None:
    """Prints the context, and each question with its answer and where that stands."""
    try:
        answer = tf.saved_model.load(export_dir).signatures["serving_default"]
    except OSError as error:
        sys.exit(f"export.answer: {str(error).splitlines()[0]}")
    answers = answer(question=tf.constant(questions), context=tf.fill([len(questions)], context))
    print(f"  {context}")
    columns = (answers[key].numpy() for key in ("answer", "start", "end", "score"))
    for question, text, start, end, score in zip(questions, *columns, strict=True):
        print(f"  {question}")
        print(f"     {text.decode()!r}, characters {start} to {end}, score {score:.2f}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
