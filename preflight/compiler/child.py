"""Runs a function of the pre-flight in its own process.

    python -m preflight.compiler.child NAME JOB ANSWER

NAME is a function with its module, such as preflight.compiler.compile.compile_file. JOB is a file
with its keyword arguments, pickled; what it returns is written to the file ANSWER, as JSON.
"""

import importlib
import json
import os
import pickle
import sys
import threading


def main(name: str, job_path: str, answer_path: str) -> None:
    """Runs the function. See above for the arguments."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, function = name.rpartition(".")
    run = getattr(importlib.import_module(module), function)
    with open(job_path, "rb") as file:
        answer = run(**pickle.load(file))
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answer, file)


def _end_with_parent() -> None:
    """Standard input ends when the process that started this one has ended, also by a kill."""
    os.read(0, 1)  # not `sys.stdin`, whose lock Python needs when it exits
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # `compile.count_file` leaves a thread of the compiler behind
