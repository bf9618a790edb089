"""Runs `train.run` in this process, which saves the imports of a new one."""

import contextlib
import time
from unittest import mock

import tf_keras
from absl import flags, logging


def run_train(arguments: list[str], demonstrate: bool = False) -> int:
    """Runs train.py with these flags, and gives all flags their defaults back.

    The process that shows examples of the SavedModel is started only with `demonstrate`: it takes
    a third of the time of a small run.
    """
    import train as program
    from tasks import bert, resnet, squad

    tasks = (bert.BertPretraining, resnet.ImageClassification, squad.SquadFineTuning)
    verbosity = logging.get_verbosity()
    try:
        flags.FLAGS.unparse_flags()
        program.STARTED = time.perf_counter()  # of this run, not of the tests
        with contextlib.ExitStack() as patches:
            for task in () if demonstrate else tasks:
                patches.enter_context(mock.patch.object(task, "demonstrate"))
            return program.run(flags.FLAGS(["train.py", *arguments]))
    finally:
        for name in flags.FLAGS.get_key_flags_for_module(program):
            name.unparse()
        flags.FLAGS["set"].value = []
        tf_keras.mixed_precision.set_global_policy("float32")
        flags.FLAGS(["train.py"])
        logging.set_verbosity(verbosity)
