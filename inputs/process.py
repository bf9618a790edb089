"""Sets up the process of a command: environment and output. Import this before TensorFlow.

TensorFlow and Keras read environment variables when they are imported. `tensorflow_text` and
`tf_lamb.tf_keras` import Keras 3, whose backend must be TensorFlow here, whatever KERAS_BACKEND or
~/.keras/keras.json selects for the user's other programs.
"""

import gc
import io
import itertools
import os
import re
import sys
from collections.abc import Callable

ASKED_BACKEND = os.environ.get("KERAS_BACKEND", "")  # what the user set; ignored

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages
os.environ["KERAS_BACKEND"] = "tensorflow"

# Imports and graphs create millions of objects that stay. Scanning them as often as Python does by
# default takes 7 % of the processor time of a small run.
gc.set_threshold(50_000, 10, 10)


INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell


def run(main: Callable[..., int], *arguments) -> None:
    """Calls the `main` function of a command and exits with the status that it returns.

    An empty argument or flag, usually from a shell variable that is not set, is refused: it would
    be taken for the default. Ctrl-C ends a command that does not handle it in one line,
    without a traceback.
    """
    escape_output()
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = (spec.name if spec else os.path.basename(sys.argv[0])).removesuffix(".__main__")
    for before, argument in itertools.pairwise(sys.argv):
        if re.fullmatch(r"(--?[\w-]+=)?\s*", argument):
            flag = before if re.fullmatch(r"--?[\w-]+", before) else "an argument"
            what = argument.strip().removesuffix("=") or flag
            print(
                f"{name}: {what} is empty, perhaps because a shell variable is not set. Give a "
                "value, or leave it out.",
                file=sys.stderr,
            )
            sys.exit(1)
    try:
        status = main(*arguments)
    except KeyboardInterrupt:
        print(f"{name}: stopped.", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def escape_output() -> None:
    r"""Makes `print` escape characters that standard output cannot encode, for example as \u4e2d.

    By default `print` raises `UnicodeEncodeError` for them, as for Chinese text in the C locale or
    for a file name that is not UTF-8. Standard error escapes them by default.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
