"""Fills `[MASK]`s with an exported model: python -m export.fill_mask EXPORT_DIR TEXT...

It imports what serving needs and nothing else: tensorflow, and tensorflow_text for its ops.
"""

import sys

import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the tokenizer's ops


def main(export_dir: str, *texts: str) -> None:
    """Prints each text and, for each of its masks, the likeliest fillings."""
    fill = tf.saved_model.load(export_dir).signatures["serving_default"]
    answers = fill(text=tf.constant(texts))
    for text, tokens, probabilities, masks in zip(
        texts, *(answers[key].numpy() for key in ("tokens", "probabilities", "masks")), strict=True
    ):
        print(f"  {text}")
        for mask in range(masks):
            best = zip(tokens[mask], probabilities[mask], strict=True)
            print("     " + ", ".join(f"{t.decode()} {100 * p:.0f} %" for t, p in best))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
