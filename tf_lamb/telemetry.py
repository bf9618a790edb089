"""Records trust ratios during training: JSON lines, TensorBoard, a heat map and an alarm.

With `telemetry=True`, the optimizer keeps norms and ratios of its last update in a variable. This
module reads that variable when a record is due. TensorFlow and matplotlib are imported where they
are used, because the library does not depend on them.
"""

import collections
import contextlib
import functools
import importlib.util
import io
import json
import logging
import math
import os
import pathlib
import re
import reprlib
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np

from tf_lamb.arguments import check_interval
from tf_lamb.layers import VariablePlan
from tf_lamb.layerwise import Layerwise

LOG = logging.getLogger("tf_lamb")
RECORDS = "trust_ratios.jsonl"
PICTURE = "trust_ratios.png"
COLUMNS = ("weight_norm", "update_norm", "ratio")  # The values of a layer in a record.
SEGMENT_BYTES = 4_000_000  # The most that is kept in memory before a segment is written.
MAX_COLUMNS = 1500  # The maximum width of the heat map. More records are averaged.
MAX_TICKS = 10  # The maximum number of intervals between labels on the axis of the steps.
MAX_DECADES = 5  # The maximum number of labels on each side of 1 on the color bar.
TITLE_CHARACTERS = 110  # The maximum length of a line of the title.
SHARED_PREFIX = 0.8  # The share of names that a prefix must have to be left out.
MAX_NAMED = 5  # The maximum number of layers that a warning names.
# Colors of the heat map.
NOT_FINITE = "black"
NO_UPDATE = "darkgray"


class TrustRatioAlarm(RuntimeError):
    """A problem with a layer in one step. It is logged, or passed to `on_alarm`.

    It is an exception, so that `on_alarm` can raise it to stop training.

    Attributes:
        step: Integer. The step, as passed to `write`.
        layer: String. The name of the layer.
        ratio: Float. Its trust ratio.
        reason: String. A description of the problem.
    """

    def __init__(self, step: int, layer: str, ratio: float, reason: str):
        super().__init__(f"step {step}, layer {layer}: {reason}")
        self.step = step
        self.layer = layer
        self.ratio = ratio
        self.reason = reason


def _alarm_reason(layer: VariablePlan, row, max_ratio: float | None) -> str | None:
    """Returns what is wrong with a row [‖x‖, ‖u‖, ratio], or `None` if nothing is."""
    if layer.overwritten:  # The optimizer never updates it, so its row stays zero.
        return None
    x_norm, u_norm, ratio = (float(value) for value in row)
    if not all(map(math.isfinite, (x_norm, u_norm, ratio))):
        return f"not finite: ‖x‖ = {x_norm:g}, ‖u‖ = {u_norm:g}, trust ratio {ratio:g}"
    if ratio == 0:
        return "the trust ratio is 0: no update has reached this layer"
    if layer.adapted and max_ratio is not None and ratio > max_ratio:
        return f"the trust ratio is {ratio:g}, above {max_ratio:g}"
    return None


def _describe_alarms(alarms: Sequence[TrustRatioAlarm]) -> str:
    """Returns one line for the alarms of one record."""
    if len(alarms) == 1:
        return str(alarms[0])
    named = "; ".join(f"{alarm.layer}: {alarm.reason}" for alarm in alarms[:MAX_NAMED])
    more = f"; and {len(alarms) - MAX_NAMED} more" if len(alarms) > MAX_NAMED else ""
    return f"step {alarms[0].step}, {len(alarms)} layers: {named}{more}"


def _unique_labels(layers: Sequence[VariablePlan]) -> list[str]:
    """Returns the layers' names. If several layers are called "name", the second is "name#2"."""
    seen: dict[str, int] = {}
    labels = []
    for layer in layers:
        seen[layer.name] = seen.get(layer.name, 0) + 1
        labels.append(layer.name if seen[layer.name] == 1 else f"{layer.name}#{seen[layer.name]}")
    return labels


def _json_number(value):
    """Returns a float32 as its shortest decimal, or as the string "nan", "inf" or "-inf"."""
    return float(str(value)) if np.isfinite(value) else str(value)


def _import_tensorflow():
    try:
        import tensorflow as tf
    except ImportError:
        raise RuntimeError(
            "TensorFlow, which writes the files for TensorBoard, is not installed. Run "
            "`pip install tensorflow`, or pass `tensorboard=False`."
        ) from None
    return tf


class TelemetryWriter:
    """Records the trust ratios of an optimizer, in a custom training loop.

        writer = TelemetryWriter("logs", optimizer, every_steps=100, max_ratio=10.0)
        for step, batch in enumerate(batches, start=1):
            train_step(batch)
            writer.write(step)
        writer.heat_map()
        writer.close()

    Each record is a line of `logs/trust_ratios.jsonl`, with the keys `step`, `skipped_steps` and
    `layers`. Each layer has `weight_norm`, `update_norm`, `ratio` and `adapted`. NaN and infinity
    are the strings "nan" and "inf". A resumed run appends to the file. For TensorBoard, a record
    has three scalars for each layer and a histogram of the ratios. If a variable stacks layers,
    their means are recorded. For LARS, `update_norm` is the denominator of the ratio.

    On object storage, where appending writes a file again, records are kept in memory until
    `flush`, which writes them to a new file, `trust_ratios-TIME.jsonl`.

    Args:
        log_dir: String or path. A folder, which is created if needed. A string with a scheme, such
            as "gs://bucket/logs", is a folder of TensorFlow's file systems. With several workers,
            create one writer, on the chief.
        optimizer: A `LAMB` or `LARS` with `telemetry=True`, of `tf_lamb` or `tf_lamb.tf_keras`. It
            may be wrapped in a `LossScaleOptimizer`, and must be built before the first record.
        every_steps: Integer >= 1. The interval between records. Steps in between read nothing from
            the device. A record of 206 layers takes about 10 ms and 31 kB.
        max_ratio: Float > 0 or `None`. The trust ratio of an adapted layer above which there is an
            alarm.
        on_alarm: Function that is called with a `TrustRatioAlarm`, or `None` to log a warning in
            the logger "tf_lamb", one line for each record. There is an alarm if the ratio or a norm
            of a layer is not finite, if the ratio is 0 while other layers are updated, or if it is
            above `max_ratio`. The alarm of a layer is repeated only after a record in which the
            layer had no problem.
        tensorboard: Boolean or `None`. Whether to write files for TensorBoard. `None` means only if
            Keras uses the TensorFlow backend. With other backends, TensorFlow would be loaded only
            for these files, and would take memory of the accelerator.

    Raises:
        ValueError: If an argument is out of range, or the optimizer has no telemetry.
        RuntimeError: If `tensorboard=True`, or `log_dir` has a scheme, and TensorFlow is not
            installed.
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
                "`optimizer` must be a LAMB or LARS of tf_lamb with `telemetry=True`. "
                f"Received: optimizer={optimizer!r}."
            )
        check_interval("every_steps", every_steps, 1, whole=True)
        if max_ratio is not None:
            check_interval("max_ratio", max_ratio, 0, open_low=True)
        if tensorboard is None:
            tensorboard = keras.backend.backend() == "tensorflow"
        self.log_dir = log_dir if _is_remote(log_dir) else pathlib.Path(log_dir)
        if _is_remote(log_dir):
            _import_tensorflow().io.gfile.makedirs(log_dir)
        else:
            self.log_dir.mkdir(parents=True, exist_ok=True)
        self._lines: list[str] = []  # Not written yet.
        self._optimizer = optimizer
        self._every_steps = every_steps
        self._max_ratio = max_ratio
        self._on_alarm = on_alarm
        self._events = None
        if tensorboard:
            self._events = _import_tensorflow().summary.create_file_writer(str(self.log_dir))
        self._last_step: int | None = None
        self._layers_in_alarm: set[str] = set()

    def due(self, step: int) -> bool:
        """Returns whether a record is due.

        A record is due at the first step passed to this method in each interval of `every_steps`
        steps.

        Args:
            step: Integer. The number of steps so far.
        """
        last = step - 1 if self._last_step is None else self._last_step
        self._last_step = step
        return step // self._every_steps != last // self._every_steps

    def write(self, step: int) -> None:
        """Records the last update if a record is due, and waits for the device only then.

        Args:
            step: Integer. The number of steps so far.
        """
        if self.due(step):
            self.record(step)

    def record(self, step: int) -> None:
        """Records the last update, even if no record is due.

        Args:
            step: Integer. The number of steps so far.
        """
        rows = self._optimizer.telemetry_rows
        layers = self._optimizer.layers
        labels = _unique_labels(layers)
        record = {
            "step": int(step),
            "skipped_steps": self._optimizer.skipped_steps,
            "layers": {
                label: dict(zip(COLUMNS, map(_json_number, row), strict=True))
                | {"adapted": layer.adapted}
                for label, layer, row in zip(labels, layers, rows, strict=True)
            },
        }
        self._lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        if not _is_remote(self.log_dir) or sum(map(len, self._lines)) > SEGMENT_BYTES:
            self.flush()
        if self._events is not None:
            self._write_tensorboard(step, labels, rows)
        self._raise_alarms(step, labels, rows)

    def flush(self) -> None:
        """Writes the records that are still in memory, if there are any."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        if not _is_remote(self.log_dir):
            with open(self.log_dir / RECORDS, "a", encoding="utf-8") as file:
                file.writelines(lines)
            return
        name = f"{RECORDS.removesuffix('.jsonl')}-{time.time_ns():020d}.jsonl"
        with _import_tensorflow().io.gfile.GFile(os.path.join(self.log_dir, name), "w") as file:
            file.write("".join(lines))

    def _write_tensorboard(self, step, labels, rows):
        tf = _import_tensorflow()
        # Written in one call, because each call of `tf.summary.scalar` takes 0.2 ms.
        summary = tf.compat.v1.Summary()
        adapted = [layer.adapted for layer in self._optimizer.layers]
        for label, row, has_ratio in zip(labels, rows, adapted, strict=True):
            # The ratio of a layer that is not adapted is always 1.
            for column, value in zip(COLUMNS if has_ratio else COLUMNS[:2], row, strict=False):
                summary.value.add(tag=f"{column}/{label}", simple_value=value)
        ratios = rows[adapted, 2]
        with self._events.as_default(step=step):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString())
            tf.summary.histogram("ratios", ratios[np.isfinite(ratios)])

    def _raise_alarms(self, step, labels, rows):
        """Calls `on_alarm` for each layer with a problem that the previous record did not have."""
        if not rows.any():  # No update yet: the loss scale was too large for the first steps.
            return
        alarms = {}
        for label, layer, row in zip(labels, self._optimizer.layers, rows, strict=True):
            reason = _alarm_reason(layer, row, self._max_ratio)
            if reason is not None:
                alarms[label] = TrustRatioAlarm(step, label, float(row[2]), reason)
        previous = self._layers_in_alarm
        self._layers_in_alarm = set(alarms)
        new = [alarm for label, alarm in alarms.items() if label not in previous]
        if self._on_alarm is not None:
            for alarm in new:
                self._on_alarm(alarm)
        elif new:
            LOG.warning("%s", _describe_alarms(new))

    def heat_map(self, path=None) -> None:
        """Draws the heat map of all records. See `draw_heat_map`.

        Args:
            path: Path of the PNG file. Defaults to `log_dir/trust_ratios.png`.

        Raises:
            FileNotFoundError: If there are no records.
            RuntimeError: If matplotlib is not installed.
        """
        self.flush()
        records, picture = (os.path.join(self.log_dir, name) for name in (RECORDS, PICTURE))
        draw_heat_map(records, path or picture)

    def close(self) -> None:
        """Writes the last records, and closes the file for TensorBoard."""
        self.flush()
        if self._events is not None:
            self._events.close()


class TelemetryCallbackMixin:
    """Records the optimizer's trust ratios during `fit`, and draws their heat map at the end.

    See `TelemetryWriter` for the files and alarms. A step is a batch. Counting starts at the
    optimizer's `iterations`, so that a resumed run continues it. Nothing is read from the device
    between records. With `steps_per_execution`, only the last step of an execution can be recorded.

    Args:
        log_dir: As in `TelemetryWriter`.
        every_steps: As in `TelemetryWriter`.
        heat_map: Boolean. Whether to draw `log_dir/trust_ratios.png` at the end of training.
        **writer_arguments: `max_ratio`, `on_alarm` and `tensorboard`, as in `TelemetryWriter`.

    Raises:
        ValueError: As in `TelemetryWriter`, when training begins.
        RuntimeError: If matplotlib or TensorFlow is needed and not installed.
    """

    def __init__(self, log_dir, *, every_steps=1, heat_map=True, **writer_arguments):
        super().__init__()
        if heat_map:
            _check_matplotlib()
        self.writer: TelemetryWriter | None = None
        self._heat_map = heat_map
        self._arguments = {"log_dir": log_dir, "every_steps": every_steps} | writer_arguments
        self._step = 0
        self._epoch_start = 0

    def on_train_begin(self, logs=None):
        """Opens the files and reads the step at which training begins."""
        self.writer = TelemetryWriter(optimizer=self.model.optimizer, **self._arguments)
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        self._step = int(keras.ops.convert_to_numpy(optimizer._iterations))

    def on_epoch_begin(self, epoch, logs=None):
        """Stores the step at which the epoch begins, because Keras numbers batches from there."""
        self._epoch_start = self._step

    def on_train_batch_end(self, batch, logs=None):
        """Records the last update if a record is due."""
        self._step = self._epoch_start + batch + 1
        if self.writer.due(self._step):
            _ = self.model  # On JAX, reading this property makes Keras update the variables.
            self.writer.record(self._step)

    def on_train_end(self, logs=None):
        """Draws the heat map and closes the files."""
        if self._heat_map:
            with contextlib.suppress(FileNotFoundError):  # Nothing was recorded.
                self.writer.heat_map()
        self.writer.close()


class TelemetryCallback(TelemetryCallbackMixin, keras.callbacks.Callback):  # noqa: D101
    __doc__ = TelemetryCallbackMixin.__doc__


def draw_heat_map(records_path, picture_path=None, *, figure=None) -> None:
    """Draws the trust ratios, layers x steps, from the records of `TelemetryWriter`.

    The logarithmic scale is centered on a ratio of 1. A few ratios far beyond the others are
    clipped to the ends of the color scale. Prefixes that nearly all names share are left out, as
    are layers that are not adapted or whose ratio is 1 in all steps. If a step was recorded twice
    because a run was resumed, the later record is drawn.

    Args:
        records_path: Path of the JSON lines, `trust_ratios.jsonl`. Beside it there may be files
            with further records, `trust_ratios-TIME.jsonl`, or only these.
        picture_path: Path of the PNG file to write, or `None`. Each layer is a row of 0.15 inches.
        figure: matplotlib `Figure` or `SubFigure` to draw on. `None` creates a figure.

    Raises:
        FileNotFoundError: If there is no file with records.
        ValueError: If there is no complete record in it, or a line that is not a record.
        RuntimeError: If matplotlib is not installed.
    """
    _check_matplotlib()
    records = [*read_records(records_path)]
    labels, steps, values = _latest_values(records)
    if not labels:
        raise ValueError(f"There are no records to draw yet. Received: {str(records_path)!r}.")
    adapted = adapted_layers(records)
    rows = [i for i, label in enumerate(labels) if label in adapted] or range(len(labels))
    drawn, prefixes = _shorten_names([labels[i] for i in rows])
    names = [escape_missing(name, "monospace") for name in drawn]
    title = f"Trust ratio of {len(rows)} layer{'s' if len(rows) > 1 else ''}"
    if len(rows) < len(labels):
        title += f" (without {len(labels) - len(rows)} that are not adapted or have a ratio of 1)"
    if prefixes:
        title += f"; names without {', '.join(prefixes)}"
    lines = textwrap.wrap(escape_missing(title), TITLE_CHARACTERS)
    if len(lines) > 2:  # A third line would take the room of a single layer.
        lines[1:] = [f"{lines[1][: TITLE_CHARACTERS - 4]} ..."]
    figure = figure or _new_figure(len(rows))
    _draw_on(figure, names, steps, _log_ratios(values[rows]))
    figure.suptitle("\n".join(lines), fontsize=11, parse_math=False)
    if picture_path is not None:
        save_figure(figure, picture_path)


def save_figure(figure, path) -> None:
    """Writes a figure as a PNG file, also to a path with a scheme.

    If it cannot be written, an earlier file of this name is left as it was.

    Raises:
        OSError: It cannot be written. `filename` is `path`.
    """
    path = os.fspath(path)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=os.path.splitext(path)[1][1:] or "png")
    new = f"{path}.new"
    create: Callable
    replace: Callable
    create, remove, replace = open, os.remove, os.replace
    if _is_remote(path):
        gfile = _import_tensorflow().io.gfile
        create, remove = gfile.GFile, gfile.remove
        replace = functools.partial(gfile.rename, overwrite=True)
    try:
        with create(new, "wb") as file:
            file.write(picture.getvalue())
        replace(new, path)
    except BaseException as error:
        with contextlib.suppress(Exception):
            remove(new)
        if isinstance(error, OSError):  # That of a full disk has no name, or that of the new file.
            raise OSError(error.errno, error.strerror, path) from error
        raise


def escape_missing(text: str, family: str | None = None) -> str:
    r"""Returns a text for a picture, with characters escaped that the font lacks, as \u4e2d.

    matplotlib would draw boxes for them, and warn.

    Args:
        text: The text.
        family: Family of the font, as in matplotlib. `None` means its default.
    """
    from matplotlib import font_manager

    properties = font_manager.FontProperties(family=family)
    known = font_manager.get_font(font_manager.findfont(properties)).get_charmap()
    return "".join(
        character if ord(character) in known else character.encode("unicode_escape").decode()
        for character in text
    )


def _check_matplotlib():
    """Raises `RuntimeError` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(
            "matplotlib, which draws the heat map, is not installed. Run "
            "`pip install matplotlib`, or pass `heat_map=False` to `TelemetryCallback`."
        )


def _is_remote(path) -> bool:
    """Whether a path has a scheme, such as gs://."""
    return "://" in os.fspath(path)


def read_records(records_path) -> Iterator[dict]:
    """Yields the records of `TelemetryWriter`, in the order in which they were written.

    A line that is not valid JSON is skipped, because a killed run may leave an incomplete line.

    Args:
        records_path: As in `draw_heat_map`.

    Raises:
        FileNotFoundError: If there are no records.
        ValueError: If a line is valid JSON, but not a record.
    """
    folder, name = os.path.split(os.fspath(records_path))
    stem, suffix = os.path.splitext(name)
    segment = re.compile(rf"{re.escape(stem)}(-\d+)?{re.escape(suffix)}")
    remote = _is_remote(records_path)
    if remote:
        gfile = _import_tensorflow().io.gfile
        names = gfile.listdir(folder) if gfile.isdir(folder) else []
    else:
        names = os.listdir(folder or os.curdir) if os.path.isdir(folder or os.curdir) else []
    names = [name for name in names if segment.fullmatch(name)]
    if not names:
        raise FileNotFoundError(2, "There are no records", os.fspath(records_path))
    # The name without a number sorts first: a run on a disk was moved to object storage.
    for name in sorted(names, key=lambda name: (len(name), name)):
        path = os.path.join(folder, name)
        with gfile.GFile(path, "rb") if remote else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if not _is_record(record):
                    raise ValueError(
                        f"{path}, line {number}: a record must have an integer step, and "
                        f"{', '.join(COLUMNS)} of its layers. Received: {reprlib.repr(record)}. "
                        "Correct or delete this line."
                    )
                yield record


def _is_record(record) -> bool:
    """Returns whether a value has the steps and numbers that are drawn."""
    try:
        for layer in record["layers"].values():
            for column in COLUMNS:
                float(layer[column])  # "nan" and "inf" are strings.
        return type(record["step"]) is int
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError):
        return False


def adapted_layers(records) -> set[str]:
    """Returns the names of the layers that are adapted, and have a ratio other than 1 in a record.

    Args:
        records: From `read_records`. Those of 0.1.0 do not say whether a layer is adapted.
    """
    return {
        name
        for record in records
        for name, layer in record["layers"].items()
        if layer.get("adapted", True) and layer["ratio"] != 1.0
    }


def _latest_values(records):
    """Takes the last record of each step.

    Returns:
        A tuple `(labels, steps, values)`: list of strings, list of integers, and float array
        [layers, steps, 3], with zeros for a layer that a record does not have.
    """
    by_step = {}
    for record in records:
        by_step[record["step"]] = record["layers"]
    steps = sorted(by_step)
    labels = list(dict.fromkeys(label for step in steps for label in by_step[step]))
    empty = dict.fromkeys(COLUMNS, 0.0)
    values = [
        [[float(by_step[step].get(label, empty)[c]) for c in COLUMNS] for step in steps]
        for label in labels
    ]
    return labels, steps, np.reshape(np.asarray(values, float), (len(labels), len(steps), 3))


def _log_ratios(values):
    """Returns log10 of the trust ratios, averaged over neighboring steps if there are many.

    Args:
        values: Float array [layers, steps, 3].

    Returns:
        A float array [layers, columns]. It is infinite where a value is not finite in one of the
        steps, and NaN where the ratio is 0 in all of them.
    """
    ratios = values[:, :, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(ratios > 0, np.log10(ratios), np.nan)
        logs = np.where(np.isfinite(values).all(axis=2), logs, np.inf)
        columns = np.array_split(logs, min(MAX_COLUMNS, logs.shape[1]), axis=1)
        known = [np.sum(~np.isnan(column), axis=1) for column in columns]
        sums = [np.nansum(column, axis=1) for column in columns]
        return np.stack(sums, axis=1) / np.stack(known, axis=1)  # 0/0 is NaN.


def _new_figure(layers):
    """Returns a matplotlib figure without a window, whatever backend the program uses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 0.15 * layers + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_on(figure, labels, steps, logs):
    """Draws the heat map and its color bar on a figure or subfigure."""
    from matplotlib import colors

    bar_axes, axes = figure.subplots(2, 1, height_ratios=[0.15, 0.15 * len(labels)])
    end = _scale_end(logs)
    settings = {"aspect": "auto", "interpolation": "nearest"}
    shown = np.ma.masked_invalid(logs)
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-end, vmax=end, **settings)
    axes.set_facecolor(NO_UPDATE)
    broken = np.ma.masked_where(~np.isinf(logs), np.ones_like(logs))
    axes.imshow(broken, cmap=colors.ListedColormap([NOT_FINITE]), **settings)
    style = {"fontsize": 7, "family": "monospace", "parse_math": False}
    axes.set_yticks(range(len(labels)), labels, **style)
    tick_steps, places = _tick_steps(steps, logs.shape[1])
    axes.set_xticks(places, [f"{step:,}" for step in tick_steps], fontsize=8)
    axes.tick_params(axis="x", top=True, labeltop=True)
    axes.set_xlabel("step", fontsize=9)
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal", extend="both")
    decades = np.arange(-int(end) - 1, int(end) + 1)
    each = math.ceil(int(end) / MAX_DECADES)
    powers = [power * each for power in range(-(int(end) // each), int(end) // each + 1)]
    bar.set_ticks(powers, labels=[f"{10.0**power:g}" for power in powers])
    between = decades if each > 1 else np.add.outer(decades, np.log10(np.arange(2, 10)))
    bar.set_ticks(between[np.abs(between) < end], minor=True)
    bar.ax.set_xlim(-end, end)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(f"trust ratio; {NOT_FINITE}: not finite, gray: no update", fontsize=9)


def _scale_end(logs) -> float:
    """Returns log10 of the ratio at the upper end of the color scale. The lower end is -1 times it.

    The end is at least 1, a ratio of 10. It is not far above the upper quartile, so that a few
    layers or steps with extreme ratios do not take the color from the others.
    """
    sizes = np.abs(logs[np.isfinite(logs)])
    if not sizes.size:
        return 1.0
    return float(max(1.0, min(sizes.max(), 2 * np.percentile(sizes, 75))))


def _tick_steps(steps, columns):
    """Returns steps to label, and their places on the axis of the columns.

    They are round numbers, unless the steps are so uneven that their labels would overlap, or leave
    a part of the axis without labels. Then they are the first steps of columns at equal distances.
    """
    from matplotlib.ticker import MaxNLocator

    firsts = [steps[i * len(steps) // columns] for i in range(columns)]
    if len(firsts) < 2:
        return firsts, [0.0]
    locator = MaxNLocator(nbins=MAX_TICKS, integer=True, steps=[1, 2, 5, 10])
    ticks = locator.tick_values(firsts[0], firsts[-1])
    ticks = [int(tick) for tick in ticks if firsts[0] <= tick <= firsts[-1]]
    places = list(np.interp(ticks, firsts, range(columns)))
    distances = np.diff([-0.5, *places, columns - 0.5]) / columns
    if len(ticks) > 1 and distances[1:-1].min() > 0.6 / MAX_TICKS and distances.max() < 0.5:
        return ticks, places
    chosen = range(0, columns, -(-columns // MAX_TICKS))
    return [firsts[i] for i in chosen], [float(i) for i in chosen]


def _shorten_names(names):
    """Removes leading parts of names, such as "model/", that nearly all of the names share.

    Returns:
        A tuple: the list of shorter names, which are as different as before, and the list of the
        prefixes that were removed.
    """
    removed = []
    while True:
        heads = collections.Counter(name.partition("/")[0] for name in names if "/" in name)
        head, count = max(heads.items(), key=lambda item: item[1], default=("", 0))
        shorter = [name.removeprefix(f"{head}/") for name in names]
        if count < SHARED_PREFIX * len(names) or len(set(shorter)) < len(set(names)):
            return names, removed
        names = shorter
        removed.append(f"{head}/")
