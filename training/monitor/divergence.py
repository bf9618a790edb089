"""Steps that went wrong: counted on the device, judged by the host once per loop of steps."""

import numpy as np
import tensorflow as tf

NORM_X, NORM_U = 0, 1  # columns of the optimizer's telemetry


class Diverged(Exception):
    """The run cannot go on from the state it is in; the newest checkpoint is from before."""


class Watch:
    """Looks for too many skipped updates in a row, and for a loss that is too high or NaN.

    Args:
        optimizer: a built one; where it is ours, with `telemetry=True`, layers can be named.
        skipped_in_row: int64 `tf.Variable`, the updates skipped up to now without one between.
        max_skipped_in_row: how many are borne.
        max_loss: bound of a step's loss, or None.
    """

    def __init__(self, optimizer, skipped_in_row, *, max_skipped_in_row, max_loss):
        self._optimizer, self._skipped_in_row = optimizer, skipped_in_row
        self._max_skipped = max_skipped_in_row
        self._max_loss = float("inf") if max_loss is None else max_loss
        kept = (v for v in optimizer.variables if v.name.startswith("telemetry"))
        self._telemetry = next(kept, tf.zeros([0, 3]))

    def start(self):
        """What a loop of steps begins with, as `seen` returns it."""
        return {
            "skipped_in_row": tf.convert_to_tensor(self._skipped_in_row),
            "step": tf.constant(-1, tf.int64),  # the first that is beyond bearing
            "in_row": tf.constant(0, tf.int64),  # skipped up to that step
            "loss": tf.constant(0.0),  # of that step
            "rows": tf.zeros(self._telemetry.shape),  # its telemetry, [layers, 3]
        }

    def rows(self):
        """The telemetry of the update just made, in replica context: all replicas have the same."""
        return tf.convert_to_tensor(self._telemetry)

    def seen(self, before, step, loss, updated, rows):
        """Takes a step into account, on the device.

        Args:
            before: what was seen so far.
            step: int64 scalar, counted from 1.
            loss: float32 scalar, mean over the global batch.
            updated: boolean scalar; False where the update was skipped.
            rows: [layers, 3] float32, as `rows` gives it.
        """
        in_row = tf.where(updated, tf.constant(0, tf.int64), before["skipped_in_row"] + 1)
        # A skipped step's loss may well be NaN: that is what it was skipped for.
        bad_loss = tf.where(tf.math.is_finite(loss), loss > self._max_loss, updated)
        first = (bad_loss | (in_row > self._max_skipped)) & (before["step"] < 0)
        now = {"step": step, "in_row": in_row, "loss": loss, "rows": rows}
        chosen = {name: tf.where(first, value, before[name]) for name, value in now.items()}
        return chosen | {"skipped_in_row": in_row}

    def judge(self, seen) -> None:
        """Keeps the count for the next loop; raises `Diverged` if a step was beyond bearing."""
        self._skipped_in_row.assign(seen["skipped_in_row"])
        step, in_row, loss = int(seen["step"]), int(seen["in_row"]), float(seen["loss"])
        if step < 0:
            return
        if in_row > self._max_skipped:
            reason = f"the gradients were not finite in {in_row} steps in a row, up to step {step}"
        elif loss > self._max_loss:
            reason = f"the loss is {loss:.4g} at step {step}, above max_loss={self._max_loss:g}"
        else:
            reason = f"the loss is {loss} at step {step}"
        raise Diverged(reason + self._layers_at_fault(seen["rows"].numpy()))

    def _layers_at_fault(self, rows) -> str:
        if not len(rows):
            return ""
        names = [layer.name for layer in self._optimizer.layers]
        broken = [name for name, row in zip(names, rows, strict=True) if not np.isfinite(row).all()]
        if not broken:
            moved = rows[:, NORM_U] / np.maximum(rows[:, NORM_X], np.finfo(np.float32).tiny)
            return f"; the largest update beside its weights was that of {names[moved.argmax()]}"
        shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if broken[3:] else "")
        return f"; not finite in {shown}"
