"""The checkpoint with the best evaluation so far, in MODEL_DIR/best."""

import contextlib
import glob
import json
import math
import os
import shutil

from training.checkpoint.manager import Manager, name_newest


class Best:
    """An evaluation action of Orbit's: keeps the state of the best evaluation.

    Its files are hard links to those of a checkpoint of that step, where the file system has them.

    Args:
        manager: saves the checkpoint.
        metric: which of the evaluation's figures counts; the least where it ends in "_loss", else
            the largest.
        is_chief: whether this process writes; the others save along.
    """

    def __init__(self, manager: Manager, metric: str, is_chief: bool = True):
        self._manager, self._metric, self._is_chief = manager, metric, is_chief
        self._sign = -1 if metric.endswith("_loss") else 1
        self._folder = os.path.join(manager.directory, "best")
        self._best = -math.inf
        with contextlib.suppress(OSError, ValueError, KeyError):
            with open(os.path.join(self._folder, "metrics.json"), encoding="utf-8") as file:
                self._best = self._sign * json.load(file)[metric]

    def __call__(self, metrics):
        """Takes the means of an evaluation."""
        figures = {name: float(value) for name, value in metrics.items()}
        value = self._sign * figures[self._metric]
        if not value > self._best:
            return
        self._best = value
        self._manager.save(check_interval=False)
        if self._is_chief:
            self._keep(self._manager.latest_checkpoint, figures)

    def _keep(self, prefix: str, figures) -> None:
        os.makedirs(self._folder, exist_ok=True)
        name = os.path.basename(prefix)
        old = set(glob.glob(os.path.join(glob.escape(self._folder), "ckpt-*")))
        new = set()
        for path in sorted(glob.glob(glob.escape(prefix) + ".*")):
            copy = os.path.join(self._folder, os.path.basename(path))
            new.add(copy)
            with contextlib.suppress(FileNotFoundError):
                os.remove(copy)
            try:
                os.link(path, copy)
            except OSError:
                shutil.copyfile(path, copy)
        name_newest(self._folder, [name])
        metrics = os.path.join(self._folder, "metrics.json")
        with open(f"{metrics}.new", "w", encoding="utf-8") as file:
            json.dump({"step": int(name.rpartition("-")[2])} | figures, file)
        os.replace(f"{metrics}.new", metrics)
        for path in old - new:
            os.remove(path)
