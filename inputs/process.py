"""The process of a command: its environment and its output. Import this before TensorFlow.

TensorFlow and Keras read their settings when they are imported. `tensorflow_text` and
`tf_lamb.tf_keras` import Keras 3, whose backend has to be TensorFlow here, whatever KERAS_BACKEND
or ~/.keras/keras.json select for the user's other programs.
"""

import io
import os
import sys
from collections.abc import Callable

ASKED_BACKEND = os.environ.get("KERAS_BACKEND", "")  # what the user set; ignored

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages
os.environ["KERAS_BACKEND"] = "tensorflow"


def run(main: Callable[..., int], *arguments) -> None:
    """Calls the `main` of a command, and exits with the status that it returns."""
    escape_output()
    sys.exit(main(*arguments))


def escape_output() -> None:
    r"""Lets `print` write a character that standard output cannot encode as an escape, \u4e2d.

    Otherwise a report of text or file names in another script would end with an exception, where
    the locale is C, or a file name is not UTF-8. Standard error does this by itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
