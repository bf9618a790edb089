"""Names what is in image files: python -m export.classify EXPORT_DIR FILE...

It imports what serving needs and nothing else: tensorflow.
"""

import pathlib
import sys

import tensorflow as tf


def main(export_dir: str, *paths: str) -> None:
    """Prints the likeliest classes of each file."""
    try:
        classify = tf.saved_model.load(export_dir).signatures["serving_default"]
        files = [pathlib.Path(path).read_bytes() for path in paths]
    except OSError as error:
        sys.exit(f"export.classify: {str(error).splitlines()[0]}")
    answers = classify(image=tf.constant(files))
    columns = (answers[key].numpy() for key in ("names", "probabilities", "error"))
    for path, names, probabilities, error in zip(paths, *columns, strict=True):
        best = zip(names, probabilities, strict=True)
        line = ", ".join(f"{name.decode()} {100 * p:.0f} %" for name, p in best)
        print(f"  {path}: {error.decode() or line}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
