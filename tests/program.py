"""Runs `train.run` in this process, which saves the imports of a new one."""

import time

import tf_keras
from absl import flags, logging


def run_train(arguments: list[str]) -> int:
    """Runs train.py with these flags, and gives all flags their defaults back."""
    import train as program

    verbosity = logging.get_verbosity()
    try:
        flags.FLAGS.unparse_flags()
        program.STARTED = time.perf_counter()  # of this run, not of the tests
        return program.run(flags.FLAGS(["train.py", *arguments]))
    finally:
        for name in flags.FLAGS.get_key_flags_for_module(program):
            name.unparse()
        flags.FLAGS["set"].value = []
        tf_keras.mixed_precision.set_global_policy("float32")
        flags.FLAGS(["train.py"])
        logging.set_verbosity(verbosity)
