"""Calls an exported model: python -m export.client EXPORT_DIR INPUT...

The inputs depend on the model. Its signature tells which kind it is:

    a pre-trained BERT     TEXT...              fills the [MASK]s of each text
    a SQuAD model          CONTEXT QUESTION...  answers each question about the context
    an image classifier    FILE...              classifies each image file

This file imports only tensorflow, and tensorflow_text, which text models need.
"""

import contextlib
import os
import pathlib
import signal
import sys


def stop(signum, frame) -> None:
    """The handler of Ctrl-C, which ends the process without a traceback."""
    os.write(2, b"export.client: stopped.\n")
    os._exit(128 + signum)  # the shells' convention


if __name__ == "__main__":  # before TensorFlow, whose import takes seconds
    signal.signal(signal.SIGINT, stop)

# As inputs/process.py, which a copy of this file does not have.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages; read at import
os.environ["KERAS_BACKEND"] = "tensorflow"  # tensorflow_text imports Keras

import tensorflow as tf

with contextlib.suppress(ImportError):
    import tensorflow_text  # noqa: F401  registers the tokenizers' ops

SIGNATURE = "serving_default"


class ClientError(Exception):
    """The input cannot be used; the message is one sentence for the user."""


def load_signature(export_dir: str):
    """Returns the default signature of a SavedModel.

    Args:
        export_dir: folder of the SavedModel.

    Raises:
        ClientError: the folder does not exist, is not a SavedModel that can be loaded, or has no
            default signature.
    """
    try:
        # `isdir` is False, too, if the storage cannot be asked; `exists` raises.
        if not tf.io.gfile.exists(export_dir) or not tf.io.gfile.isdir(export_dir):
            raise ClientError(f"{export_dir} is not a folder.")
        if not tf.saved_model.contains_saved_model(export_dir):
            raise ClientError(f"{export_dir} is not a SavedModel: it has no saved_model.pb.")
        signatures = tf.saved_model.load(export_dir).signatures
    except (OSError, ValueError, tf.errors.OpError) as error:
        reason = str(error).strip().splitlines()[0]
        if "tensorflow_text" not in sys.modules:
            reason += " (tensorflow_text is not installed; text models need it)"
        raise ClientError(f"{export_dir} cannot be loaded: {reason}") from None
    if SIGNATURE not in signatures:
        raise ClientError(
            f"{export_dir} has no signature {SIGNATURE!r}. Its signatures: "
            f"{', '.join(signatures) or 'none'}."
        )
    return signatures[SIGNATURE]


def utf8(text: str) -> bytes:
    """An argument of the command line in UTF-8, also where the locale cannot decode it."""
    try:
        return text.encode()
    except UnicodeEncodeError:  # Python has kept its bytes
        return os.fsencode(text)


def fill_masks(signature, *texts: str) -> None:
    """Prints each text and, for each of its masks, the most likely word pieces.

    A model reads a limited number of word pieces. A last line counts the masks after them.
    """
    outputs = signature(text=tf.constant([*map(utf8, texts)]))
    columns = (outputs[key].numpy() for key in ("tokens", "probabilities", "masks"))
    for text, tokens, probabilities, masks in zip(texts, *columns, strict=True):
        print(f"  {text}")
        for mask in range(masks):
            best = zip(tokens[mask], probabilities[mask], strict=True)
            print("     " + ", ".join(f"{t.decode()} {100 * p:.0f} %" for t, p in best))
        beyond = text.count("[MASK]") - masks
        if beyond:
            print(f"     not filled: {beyond} [MASK], after the last word that the model can read")


def answer_questions(signature, context: str, *questions: str) -> None:
    """Prints the context, and each question with its answer and the answer's position."""
    if not questions:
        raise ClientError("this model answers questions about a context. Give CONTEXT QUESTION...")
    # One for each question: exports of earlier versions do not repeat a single context.
    contexts = tf.fill([len(questions)], utf8(context))
    outputs = signature(question=tf.constant([*map(utf8, questions)]), context=contexts)
    columns = (outputs[key].numpy() for key in ("answer", "start", "end", "score"))
    print(f"  {context}")
    for question, answer, start, end, score in zip(questions, *columns, strict=True):
        print(f"  {question}")
        if score == tf.float32.min:  # of a context without words
            print("     no answer: the context has no words")
        else:
            print(f"     {answer.decode()!r}, characters {start} to {end}, score {score:.2f}")


def read_file(path: str) -> bytes:
    """The content of a file on a disk or of another file system of TensorFlow."""
    try:
        if "://" in path:
            with tf.io.gfile.GFile(path, "rb") as file:
                return file.read()
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ClientError(f"{path} cannot be read: {error.strerror}.") from None
    except tf.errors.OpError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClientError(f"{path} cannot be read: {reason}.") from None


def classify_images(signature, *paths: str) -> None:
    """Prints the most likely classes of each image file."""
    files = [read_file(path) for path in paths]
    outputs = signature(image=tf.constant(files))
    columns = (outputs[key].numpy() for key in ("names", "probabilities", "error"))
    for path, names, probabilities, error in zip(paths, *columns, strict=True):
        best = zip(names, probabilities, strict=True)
        line = ", ".join(f"{name.decode()} {100 * p:.0f} %" for name, p in best)
        print(f"  {path}: {error.decode() or line}")


# Arguments of a signature -> the function that calls it, and the outputs that it needs.
TASKS = {
    frozenset({"text"}): (fill_masks, {"tokens", "probabilities", "masks"}),
    frozenset({"question", "context"}): (answer_questions, {"answer", "start", "end", "score"}),
    frozenset({"image"}): (classify_images, {"names", "probabilities", "error"}),
}


def check_kind(export_dir: str, signature):
    """The function that calls a signature.

    Raises:
        ClientError: it has other arguments, other outputs or other types than an export.
    """
    arguments = signature.structured_input_signature[1]
    names = frozenset(arguments)
    if names not in TASKS:
        raise ClientError(
            f"{export_dir} takes {', '.join(sorted(names)) or 'nothing'}. This client calls "
            "models that take text, question and context, or image."
        )
    function, needed = TASKS[names]
    others = sorted(name for name in names if arguments[name].dtype != tf.string)
    missing = sorted(needed - set(signature.structured_outputs))
    if others or missing:
        problem = (
            f"takes {others[0]} as {arguments[others[0]].dtype.name}"
            if others
            else f"does not return {', '.join(missing)}"
        )
        raise ClientError(
            f"{export_dir} {problem}: it was not exported by train.py, or by another version of it."
        )
    return function


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: the command's arguments.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 1
    export_dir, *inputs = arguments
    try:
        signature = load_signature(export_dir)
        check_kind(export_dir, signature)(signature, *inputs)
    except ClientError as error:
        print(f"export.client: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if sys.stdout is None:
        sys.exit(
            "export.client: standard output is closed. Redirect it to a file, or to /dev/null."
        )
    sys.stdout.reconfigure(errors="backslashreplace")  # where it cannot encode a character
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:
        print(
            f"export.client: standard output cannot be written ({error.strerror}).", file=sys.stderr
        )
        os._exit(1)  # else Python would flush it again
    sys.exit(status)
