"""A stop of all workers at the same step, whichever of them got the signal."""

import os
import signal
from collections.abc import Callable

import tensorflow as tf

from training.checkpoint.signals import Interrupted, StopRequest
from training.strategy import is_multi_worker


def stop_together(strategy, request: StopRequest, save: Callable, folder: str) -> Callable:
    """An action of Orbit's that raises `Interrupted` if a signal has come, to any worker.

    Args:
        strategy: a `tf.distribute.Strategy`. Where there is one worker, it is the request itself.
        request: this process's.
        save: function without arguments that all workers call together before they stop.
        folder: of this process's own, for TensorFlow's handler.
    """
    if not is_multi_worker(strategy):
        return request

    def leave():
        raise Interrupted(request.number or signal.SIGTERM)

    handler = tf.distribute.experimental.PreemptionCheckpointHandler(
        strategy.cluster_resolver,
        # What it restores and counts is its own; the run's state is saved by `save`.
        tf.train.Checkpoint(),
        os.path.join(folder, "preemption"),
        tf.distribute.experimental.TerminationConfig(
            termination_watcher_fn=lambda: request.number is not None,
            exit_fn=leave,
            save_fn=save,
        ),
    )

    def action(output=None):
        del output
        handler.save_checkpoint_if_preempted()

    return action
