"""Trust ratios out of the running training: JSON lines, TensorBoard, a heat map, an alarm.

The optimizer keeps the norms and ratios of its last update inside the compiled step
(`telemetry=True`); here they come to the host, when asked, and nothing comes between.
TensorFlow and matplotlib are imported where they are used: neither is a dependency of the library.
"""

import json
import logging
import math
import pathlib
from collections.abc import Callable, Sequence

import keras
import numpy as np

from tf_lamb.arguments import check_interval
from tf_lamb.heat_map import COLUMNS, check_matplotlib, draw_heat_map
from tf_lamb.layers import VariablePlan
from tf_lamb.layerwise import Layerwise

LOG = logging.getLogger("tf_lamb")
RECORDS = "trust_ratios.jsonl"
PICTURE = "trust_ratios.png"


class TrustRatioAlarm(RuntimeError):
    """What is wrong with one layer in one step. It is logged, or handed to `on_alarm`.

    It is an exception so that `on_alarm` may raise it, and stop the training.

    step: int, as given to `write`.
    layer: the layer's name.
    ratio: its trust ratio, a float.
    reason: why, in words.
    """

    def __init__(self, step: int, layer: str, ratio: float, reason: str):
        super().__init__(f"step {step}, layer {layer}: {reason}")
        self.step, self.layer, self.ratio, self.reason = step, layer, ratio, reason


def _trouble(layer: VariablePlan, row, max_ratio: float | None) -> str | None:
    """What is wrong with [‖x‖, ‖u‖, ratio], or None."""
    if layer.overwritten:  # the optimizer never updates it, so its row stays zero
        return None
    x_norm, u_norm, ratio = (float(value) for value in row)
    if not all(map(math.isfinite, (x_norm, u_norm, ratio))):
        return f"not finite: ‖x‖ = {x_norm:g}, ‖u‖ = {u_norm:g}, trust ratio {ratio:g}"
    if ratio == 0:
        return "the trust ratio is 0: no update has reached this layer"
    if layer.adapted and max_ratio is not None and ratio > max_ratio:
        return f"the trust ratio is {ratio:g}, above {max_ratio:g}"
    return None


def _labels(layers: Sequence[VariablePlan]) -> list[str]:
    """The layers' names; of those that bear the same name, the second is "name#2"."""
    seen: dict[str, int] = {}
    labels = []
    for layer in layers:
        seen[layer.name] = seen.get(layer.name, 0) + 1
        labels.append(layer.name if seen[layer.name] == 1 else f"{layer.name}#{seen[layer.name]}")
    return labels


def _plain(value):
    """The shortest decimal that is this float32; JSON has no NaN, so "nan", "inf" or "-inf"."""
    return float(str(value)) if np.isfinite(value) else str(value)


def _tensorflow():
    try:
        import tensorflow as tf
    except ImportError:
        raise RuntimeError(
            "TensorBoard's files are written with TensorFlow, which is not installed. "
            "`pip install tensorflow`, or pass `tensorboard=False`."
        ) from None
    return tf


class TelemetryWriter:
    """Writes an optimizer's trust ratios; for loops of one's own, once per step.

        writer = TelemetryWriter("logs", optimizer, every_steps=100, max_ratio=10.0)
        for step, batch in enumerate(batches, start=1):
            train_step(batch)
            writer.write(step)
        writer.heat_map()
        writer.close()

    `logs/trust_ratios.jsonl` gets one line per record (`step`, `skipped_steps`, and under `layers`
    each layer's `weight_norm`, `update_norm` and `ratio`; "nan" and "inf" are strings). It is
    appended to, so a resumed run goes on in it. TensorBoard gets three scalars per layer and a
    histogram of the ratios. Of a variable that stacks layers the figures are means; LARS's
    `update_norm` is its ratio's divisor.

    Args:
        log_dir: local folder, made if it is not there. In a multi-worker run make one writer,
            on the chief.
        optimizer: a `LAMB` or `LARS` of either flavour with `telemetry=True`, or a
            `LossScaleOptimizer` around it. It may be built later, before the first `write`.
        every_steps: int >= 1; of the steps given to `write`, the first in every so many is
            recorded, the others touch nothing. A record of 199 layers takes about 10 ms and
            29 kB.
        max_ratio: float > 0, above which the ratio of an adapted layer raises the alarm; or None.
        on_alarm: function of a `TrustRatioAlarm`, instead of a warning in the log "tf_lamb". It
            is called when a layer's ratio (or a norm) is not finite, is 0 where other layers are
            updated, or is above `max_ratio`; again only after the layer was well in between.
        tensorboard: whether to write TensorBoard's files. None: where Keras runs on TensorFlow;
            on JAX and torch TensorFlow would be loaded for them, and take the accelerator's memory.

    Raises:
        ValueError: an argument outside its range; an optimizer without telemetry.
        RuntimeError: `tensorboard=True` without TensorFlow.
    """

    def __init__(
        self,
        log_dir,
        optimizer,
        *,
        every_steps: int = 1,
        max_ratio: float | None = None,
        on_alarm: Callable[[TrustRatioAlarm], object] | None = None,
        tensorboard: bool | None = None,
    ):
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(optimizer, Layerwise) or not optimizer.telemetry:
            raise ValueError(
                "`optimizer` must be a LAMB or LARS of tf_lamb, made with `telemetry=True`. "
                f"Received: optimizer={optimizer!r}."
            )
        check_interval("every_steps", every_steps, 1)
        if max_ratio is not None:
            check_interval("max_ratio", max_ratio, 0, open_low=True)
        if tensorboard is None:
            tensorboard = keras.backend.backend() == "tensorflow"
        self.log_dir = pathlib.Path(log_dir)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._optimizer = optimizer
        self._every_steps = every_steps
        self._max_ratio = max_ratio
        self._on_alarm = on_alarm or (lambda alarm: LOG.warning("%s", alarm))
        self._events = None
        if tensorboard:
            self._events = _tensorflow().summary.create_file_writer(str(self.log_dir))
        self._last_step: int | None = None
        self._alarmed: dict[str, TrustRatioAlarm] = {}

    def due(self, step: int) -> bool:
        """Whether this step is the first that was asked about in its `every_steps`."""
        last = step - 1 if self._last_step is None else self._last_step
        self._last_step = step
        return step // self._every_steps != last // self._every_steps

    def write(self, step: int) -> None:
        """Records the last update, if this step is due; waits for the device only then."""
        if self.due(step):
            self.record(step)

    def record(self, step: int) -> None:
        """Records the last update, whatever the step."""
        rows = self._optimizer.telemetry_rows
        labels = _labels(self._optimizer.layers)
        record = {
            "step": int(step),
            "skipped_steps": self._optimizer.skipped_steps,
            "layers": {
                label: dict(zip(COLUMNS, map(_plain, row), strict=True))
                for label, row in zip(labels, rows, strict=True)
            },
        }
        with open(self.log_dir / RECORDS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        if self._events is not None:
            self._write_events(step, labels, rows)
        self._sound_alarms(step, labels, rows)

    def _write_events(self, step, labels, rows):
        tf = _tensorflow()
        summary = tf.compat.v1.Summary()  # all scalars at once; tf.summary.scalar takes 0.2 ms each
        for label, row in zip(labels, rows, strict=True):
            for column, value in zip(COLUMNS, row, strict=True):
                summary.value.add(tag=f"{column}/{label}", simple_value=value)
        ratios = rows[:, 2]
        with self._events.as_default(step=step):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString())
            tf.summary.histogram("ratios", ratios[np.isfinite(ratios)])

    def _sound_alarms(self, step, labels, rows):
        if not rows.any():  # no update yet: a loss scale skipped the first steps
            return
        layers = self._optimizer.layers
        before, self._alarmed = self._alarmed, {}
        for label, layer, row in zip(labels, layers, rows, strict=True):
            reason = _trouble(layer, row, self._max_ratio)
            if reason is not None:
                self._alarmed[label] = TrustRatioAlarm(step, label, float(row[2]), reason)
        for label, alarm in self._alarmed.items():
            if label not in before:
                self._on_alarm(alarm)

    def heat_map(self, path=None) -> None:
        """Draws all records as a PNG; `path` is `log_dir/trust_ratios.png` unless given.

        Raises:
            ValueError: nothing is recorded yet.
            RuntimeError: matplotlib is not installed.
        """
        draw_heat_map(self.log_dir / RECORDS, path or self.log_dir / PICTURE)

    def close(self) -> None:
        """Writes out what TensorBoard's writer still holds."""
        if self._events is not None:
            self._events.close()


class TelemetryCallbackRule:
    """Writes the optimizer's trust ratios during `fit`, and draws their heat map at its end.

    The files and the alarm are `TelemetryWriter`'s. A step is a batch; counting starts at the
    optimizer's `iterations`, so a resumed run goes on where it was. Between two records nothing
    is read from the device. With `steps_per_execution` only an execution's last step is seen.

    Args:
        log_dir, every_steps, max_ratio, on_alarm, tensorboard: as in `TelemetryWriter`.
        heat_map: whether to draw `log_dir/trust_ratios.png` when training ends.

    Raises:
        ValueError: when training begins; see `TelemetryWriter`.
        RuntimeError: matplotlib or TensorFlow is asked for and not installed.
    """

    def __init__(self, log_dir, *, every_steps=1, heat_map=True, **writer_arguments):
        super().__init__()
        if heat_map:
            check_matplotlib()
        self.writer: TelemetryWriter | None = None
        self._heat_map = heat_map
        self._arguments = {"log_dir": log_dir, "every_steps": every_steps} | writer_arguments
        self._step = self._epoch_start = 0

    def on_train_begin(self, logs=None):
        """Opens the files, and finds out at which step training begins."""
        self.writer = TelemetryWriter(optimizer=self.model.optimizer, **self._arguments)
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        self._step = int(keras.ops.convert_to_numpy(optimizer._iterations))

    def on_epoch_begin(self, epoch, logs=None):
        """Batches are numbered anew in each epoch."""
        self._epoch_start = self._step

    def on_train_batch_end(self, batch, logs=None):
        """Records the last update, if the step is due."""
        self._step = self._epoch_start + batch + 1
        if self.writer.due(self._step):
            _ = self.model  # read, it makes Keras on JAX bring the state back into the variables
            self.writer.record(self._step)

    def on_train_end(self, logs=None):
        """Draws the heat map and closes the files."""
        if self._heat_map and (self.writer.log_dir / RECORDS).exists():
            self.writer.heat_map()
        self.writer.close()


class TelemetryCallback(TelemetryCallbackRule, keras.callbacks.Callback):  # noqa: D101
    __doc__ = TelemetryCallbackRule.__doc__
