"""Detection of divergence: recorded on the device, checked on the host once per loop of steps."""

import numpy as np
import tensorflow as tf

# Columns of the optimizer's telemetry.
NORM_X = 0
NORM_U = 1


class Diverged(Exception):
    """Training cannot continue from the current state, which has not been saved."""


class DivergenceMonitor:
    """Detects divergence: skipped updates, a bad loss, or a gradient that is not finite.

    Skipped updates count if there are too many in a row, a loss if it is too high or not finite,
    and a gradient that is not finite if the optimizer does not skip its update.

    Args:
        optimizer: a built optimizer. If it is one of `tf_lamb` with `telemetry=True`, messages name
            the layers.
        skipped_in_row: int64 `tf.Variable`, consecutive updates skipped up to now.
        max_skipped_in_row: the largest accepted value of `skipped_in_row`.
        max_loss: the largest accepted loss of a step; None for no limit.
    """

    def __init__(self, optimizer, skipped_in_row, *, max_skipped_in_row, max_loss):
        self._optimizer = optimizer
        self._skipped_in_row = skipped_in_row
        self._max_skipped = max_skipped_in_row
        self._max_loss = float("inf") if max_loss is None else max_loss
        telemetry = (v for v in optimizer.variables if v.name.startswith("telemetry"))
        self._telemetry = next(telemetry, tf.zeros([0, 3]))

    def initial(self):
        """Returns the record at the start of a loop of steps, for `update`."""
        return {
            "skipped_in_row": tf.convert_to_tensor(self._skipped_in_row),
            "step": tf.constant(-1, tf.int64),  # the first step that diverged; -1: none
            "in_row": tf.constant(0, tf.int64),  # updates skipped in a row up to that step
            "loss": tf.constant(0.0),  # of that step
            "rows": tf.zeros(self._telemetry.shape),  # its telemetry, [layers, 3]
        }

    def telemetry_rows(self):
        """Returns the last update's telemetry, [layers, 3] float32. Call it in replica context."""
        return tf.convert_to_tensor(self._telemetry)

    def update(self, record, step, loss, updated, rows, nonfinite):
        """Returns the record after one more step, computed on the device.

        Args:
            record: from `initial` or `update`.
            step: int64 scalar, counted from 1.
            loss: float32 scalar, the mean over the global batch.
            updated: boolean scalar; False if the update was skipped.
            rows: [layers, 3] float32, from `telemetry_rows`.
            nonfinite: boolean scalar; True if a gradient was not finite and the update was done
                nevertheless: the loss shows it one step later only, when it may have been saved.
        """
        in_row = tf.where(updated, tf.constant(0, tf.int64), record["skipped_in_row"] + 1)
        # A non-finite loss is accepted if the update was skipped: it can be the reason for that.
        bad_loss = tf.where(tf.math.is_finite(loss), loss > self._max_loss, updated)
        first = (bad_loss | nonfinite | (in_row > self._max_skipped)) & (record["step"] < 0)
        now = {"step": step, "in_row": in_row, "loss": loss, "rows": rows}
        chosen = {name: tf.where(first, value, record[name]) for name, value in now.items()}
        return chosen | {"skipped_in_row": in_row}

    def check(self, record) -> None:
        """Checks a loop's record, and stores the number of skipped updates for the next loop.

        Raises:
            Diverged: a step of the loop diverged; the message names it, and its layers if known.
        """
        self._skipped_in_row.assign(record["skipped_in_row"])
        step = int(record["step"])
        in_row = int(record["in_row"])
        loss = float(record["loss"])
        if step < 0:
            return
        if in_row > self._max_skipped:
            reason = f"the gradients were not finite in {in_row} steps in a row, up to step {step}"
        elif loss > self._max_loss:
            reason = f"the loss is {loss:.4g} at step {step}, above max_loss={self._max_loss:g}"
        elif np.isfinite(loss):
            reason = f"a gradient was not finite at step {step}, and the optimizer skips no update"
        else:
            reason = f"the loss is {loss} at step {step}"
        raise Diverged(reason + self._describe_layers(record["rows"].numpy()))

    def _describe_layers(self, rows) -> str:
        if not len(rows):
            return ""
        names = [layer.name for layer in self._optimizer.layers]
        nonfinite = [n for n, row in zip(names, rows, strict=True) if not np.isfinite(row).all()]
        if not nonfinite:
            ratios = rows[:, NORM_U] / np.maximum(rows[:, NORM_X], np.finfo(np.float32).tiny)
            return (
                f"; the largest update relative to its weights was that of {names[ratios.argmax()]}"
            )
        more = f" and {len(nonfinite) - 3} more" if nonfinite[3:] else ""
        return f"; not finite in {', '.join(nonfinite[:3])}{more}"
