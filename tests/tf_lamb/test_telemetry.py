"""The writer and the callback write what the optimizer measured; alarms name layers."""

import contextlib
import itertools
import json
import logging
import math
import os
import pathlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from drive import LAYERS, Run, random_gradients, random_weights, run_eagerly
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tf_lamb import telemetry
from tf_lamb.telemetry import TelemetryWriter, TrustRatioAlarm, draw_heat_map, read_records

COLUMNS = ("weight_norm", "update_norm", "ratio")


def make_run(flavour, rule="LAMB", **arguments):
    make = lambda: getattr(flavour.lamb, rule)(0.05, telemetry=True, **arguments)  # noqa: E731
    return Run(flavour, make, random_weights(), compiled=False)


def records(folder):
    text = (folder / "trust_ratios.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def rows_of(record):
    return np.float32([[float(layer[c]) for c in COLUMNS] for layer in record["layers"].values()])


@pytest.mark.parametrize("rule", ["LAMB", "LARS"])
def test_records_equal_the_telemetry_of_the_optimizer(rule, flavour, tmp_path):
    run = make_run(flavour, rule, exclude_from_layer_adaptation=["conv/bias"])
    writer = TelemetryWriter(tmp_path / "new" / "folder", run.optimizer)
    kept = []
    for step, replicas in enumerate(random_gradients(1), start=1):
        run.step(replicas)
        kept.append(run.optimizer.telemetry_rows)
        writer.write(step)
    writer.close()
    written = records(tmp_path / "new" / "folder")
    assert [record["step"] for record in written] == [1, 2, 3, 4, 5]
    for record, rows in zip(written, kept, strict=True):
        assert record["skipped_steps"] == 0
        assert list(record["layers"]) == list(LAYERS)
        np.testing.assert_array_equal(rows_of(record), rows)
        said = {name: layer["adapted"] for name, layer in record["layers"].items()}
        assert said == {name: name != "conv/bias" for name in LAYERS}
    events = EventAccumulator(str(tmp_path / "new" / "folder")).Reload()
    adapted = [layer.adapted for layer in run.optimizer.layers]
    for i, name in enumerate(LAYERS):
        for column, values in zip(COLUMNS, np.transpose(kept, (1, 2, 0))[i], strict=True):
            if column == "ratio" and not adapted[i]:  # it is always 1
                assert f"ratio/{name}" not in events.Tags()["scalars"]
                continue
            scalars = events.Scalars(f"{column}/{name}")
            assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
            np.testing.assert_array_equal(np.float32([e.value for e in scalars]), values)
    histogram = tf.make_ndarray(events.Tensors("ratios")[-1].tensor_proto)
    assert histogram[:, 2].sum() == sum(adapted) == len(LAYERS) - 1
    assert histogram[-1, 1] == kept[-1][adapted, 2].max()


def test_only_every_nth_step_is_written(keras3, tmp_path):
    run = make_run(keras3)
    writer = TelemetryWriter(tmp_path, run.optimizer, every_steps=10, tensorboard=False)
    for step in range(1, 32):
        writer.write(step)
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30]
    resumed = TelemetryWriter(tmp_path, run.optimizer, every_steps=10, tensorboard=False)
    for step in range(36, 60, 4):  # four steps per execution
        resumed.write(step)
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30, 40, 52]
    assert [path.name for path in tmp_path.iterdir()] == ["trust_ratios.jsonl"]


def test_records_on_object_storage_are_segments(keras3, tmp_path):
    """One for each flush; together they are read like one file, also when copied to a disk."""
    folder = "ram://telemetry/logs"
    run = make_run(keras3)
    for steps in ((1, 2), (3, 4)):
        writer = TelemetryWriter(folder, run.optimizer)
        for step in steps:
            writer.write(step)
        assert len(tf.io.gfile.glob(f"{folder}/trust_ratios-*.jsonl")) == steps[0] - 1
        writer.flush()
        writer.write(steps[-1] + 10)
        writer.close()
    assert len(tf.io.gfile.glob(f"{folder}/trust_ratios-*.jsonl")) == 4
    expected = [1, 2, 12, 3, 4, 14]
    path = f"{folder}/trust_ratios.jsonl"
    assert [record["step"] for record in read_records(path)] == expected
    (tmp_path / "trust_ratios.jsonl").write_text('{"step": 0, "layers": {}}\nhalf a li')
    for name in tf.io.gfile.listdir(folder):
        if name.endswith(".jsonl"):
            with tf.io.gfile.GFile(f"{folder}/{name}") as file:
                (tmp_path / name).write_text(file.read())
    copied = tmp_path / "trust_ratios.jsonl"
    assert [record["step"] for record in read_records(copied)] == [0, *expected]
    TelemetryWriter(folder, run.optimizer, tensorboard=False).heat_map()
    with tf.io.gfile.GFile(f"{folder}/trust_ratios.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    assert tf.io.gfile.glob(f"{folder}/events*") and not pathlib.Path("ram:").exists()
    with pytest.raises(FileNotFoundError):
        list(read_records("ram://nowhere/trust_ratios.jsonl"))


def test_alarms_name_step_and_layer(flavour, tmp_path, caplog):
    alarms = []
    run = make_run(flavour, weight_decay=0.0, skip_nonfinite=False)
    writer = TelemetryWriter(
        tmp_path, run.optimizer, max_ratio=30.0, on_alarm=alarms.append, tensorboard=False
    )
    writer.write(0)  # before the first update every ratio is 0, without an alarm
    assert alarms == []
    gradients = random_gradients(1)
    for step in (1, 2):
        run.step(gradients[step])
        writer.write(step)
    table = list(LAYERS)[0]
    assert [(a.step, a.layer) for a in alarms] == [(1, table)]  # once, not at each step
    assert alarms[0].ratio == pytest.approx(run.optimizer.telemetry_rows[0, 2], rel=0.5)
    assert "above 30" in str(alarms[0]) and isinstance(alarms[0], TrustRatioAlarm)
    gradients[3][0][2] = np.full_like(gradients[3][0][2], np.nan)
    run.step(gradients[3])
    with caplog.at_level(logging.WARNING, "tf_lamb"):
        TelemetryWriter(tmp_path, run.optimizer, tensorboard=False).write(3)
    (message,) = caplog.messages
    assert message.startswith("step 3, layer conv/bias: not finite") and "‖u‖ = nan" in message
    assert records(tmp_path)[-1]["layers"]["conv/bias"]["update_norm"] == "nan"


def test_a_record_logs_one_warning_for_all_layers(keras3, tmp_path, caplog):
    variables = [keras.Variable(np.float32([i, 1]), name=f"layer_{i}") for i in range(1, 9)]
    optimizer = keras3.lamb.LAMB(telemetry=True)
    optimizer.build(variables)
    optimizer.apply([tf.constant([1.0, 2.0])] * 8, variables)
    writer = TelemetryWriter(tmp_path, optimizer, max_ratio=1e-6, tensorboard=False)
    with caplog.at_level(logging.WARNING, "tf_lamb"):
        writer.write(3)
        writer.write(4)  # the same layers
    (message,) = caplog.messages
    assert message.startswith("step 3, 8 layers: layer_1: the trust ratio is ")
    assert message.count("above 1e-06") == telemetry.MAX_NAMED and message.endswith("and 3 more")


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_on_alarm_may_raise_for_a_layer_without_updates(flavour, tmp_path):
    def stop(alarm):
        raise alarm

    run = make_run(flavour)
    writer = TelemetryWriter(tmp_path, run.optimizer, on_alarm=stop, tensorboard=False)
    gradients = random_gradients(1)[0][0]
    run.step([[*gradients[:-1], None]])
    with pytest.raises(TrustRatioAlarm, match="step 7, layer still/kernel: the trust ratio is 0"):
        writer.write(7)


def test_an_excluded_layer_is_not_above_the_bound(keras3, tmp_path):
    alarms = []
    run = make_run(keras3, "LARS", exclude_from_layer_adaptation=["bias"], trust_coefficient=1e-9)
    run.step(random_gradients(1)[0])
    writer = TelemetryWriter(
        tmp_path, run.optimizer, max_ratio=0.9, on_alarm=alarms.append, tensorboard=False
    )
    writer.write(1)
    # The ratio of a layer with weights or gradients of 0 is 1, far above the others.
    assert [alarm.layer for alarm in alarms] == ["zero/kernel", "still/kernel"]


def test_a_variable_that_keras_overwrites_raises_no_alarm(keras3, tmp_path):
    """For example the scale of a float8 layer: its row stays 0."""
    variables = [keras.Variable(np.float32([2, 1]), name=name) for name in ("kernel", "scale")]
    variables[1].overwrite_with_gradient = True
    optimizer = keras3.lamb.LAMB(telemetry=True)
    optimizer.build(variables)
    optimizer.apply([tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])], variables)
    assert variables[1].numpy().tolist() == [3, 4]
    assert [layer.overwritten for layer in optimizer.layers] == [False, True]
    assert not optimizer.layers[1].decayed and not optimizer.layers[1].adapted
    alarms = []
    TelemetryWriter(tmp_path, optimizer, on_alarm=alarms.append, tensorboard=False).write(1)
    assert alarms == []
    assert optimizer.telemetry_rows[0].all() and not optimizer.telemetry_rows[1].any()


@pytest.mark.parametrize(
    "arguments", [{"every_steps": 0}, {"every_steps": 1.5}, {"max_ratio": 0.0}]
)
def test_bad_arguments_are_refused(arguments, keras3, tmp_path):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TelemetryWriter(tmp_path, keras3.lamb.LAMB(telemetry=True), **arguments)


def test_an_optimizer_without_telemetry_is_refused(keras3, tmp_path):
    for optimizer in (keras3.lamb.LAMB(), keras.optimizers.Adam()):
        with pytest.raises(ValueError, match="with `telemetry=True`"):
            TelemetryWriter(tmp_path, optimizer)


def test_a_missing_package_is_named(keras3, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(RuntimeError, match="`pip install tensorflow`"):
        TelemetryWriter(tmp_path, keras3.lamb.LAMB(telemetry=True))
    monkeypatch.setattr(telemetry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="`pip install matplotlib`"):
        telemetry.TelemetryCallback(tmp_path)
    with pytest.raises(RuntimeError, match="`pip install matplotlib`"):
        draw_heat_map(tmp_path / "x.jsonl", tmp_path / "x.png")
    telemetry.TelemetryCallback(tmp_path, heat_map=False)


def test_layers_with_the_same_name_get_a_number(keras3, tmp_path):
    variables = [keras.Variable(np.float32([i, 1]), name="w") for i in (1, 2)]
    optimizer = keras3.lamb.LAMB(telemetry=True)
    optimizer.build(variables)
    optimizer.apply([tf.constant([1.0, 2.0])] * 2, variables)
    TelemetryWriter(tmp_path, optimizer, tensorboard=False).write(1)
    (record,) = records(tmp_path)
    assert list(record["layers"]) == ["w", "w#2"]


def heat_map_records(path, steps, layers):
    """Writes a file in which log10 of layer i's ratio is i, with two lines that are not JSON."""
    with open(path, "w", encoding="utf-8") as file:
        for step in steps:
            rows = {
                name: {"weight_norm": 1.0, "update_norm": 1.0, "ratio": 10.0**i}
                for i, name in enumerate(layers)
            }
            json.dump({"step": step, "skipped_steps": 0, "layers": rows}, file)
            file.write("\n")
        file.write("[" * 100_000 + "\n")  # too deep for the parser
        file.write('{"step": 9, "lay')


def test_the_heat_map_shows_the_records(tmp_path):
    path, picture = tmp_path / "a.jsonl", tmp_path / "a.png"
    heat_map_records(path, [5, 1, 5, 3], ["bias", "a", "b"])
    labels, steps, values = telemetry._latest_values(read_records(path))
    assert (labels, steps, values.shape) == (["bias", "a", "b"], [1, 3, 5], (3, 3, 3))
    values[1, 0, 1], values[2, 2, 2] = math.nan, 0.0
    logs = telemetry._log_ratios(values[1:])
    np.testing.assert_allclose(logs, [[np.inf, 1, 1], [2, 2, np.nan]])
    figure = telemetry._new_figure(2)
    telemetry._draw_on(figure, labels[1:], steps, logs)
    _, axes = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_xticklabels()] == 2 * ["1", "2", "3", "4", "5"]
    shown, broken = (image.get_array() for image in axes.get_images())
    np.testing.assert_array_equal(shown.mask, [[True, False, False], [False, False, True]])
    np.testing.assert_array_equal(broken.mask, ~shown.mask | [[False] * 3, [True] * 3])
    draw_heat_map(path, picture)
    with Image.open(picture) as image:
        assert image.width == 13 * 120


@pytest.mark.parametrize(("layers", "repeats"), [(1, 11), (1, 90), (5, 11)])
def test_a_long_title_is_wrapped(layers, repeats, tmp_path):
    path = tmp_path / "a.jsonl"
    # The first layer has a ratio of 1, and is not drawn.
    heat_map_records(path, [1], [f"{'long_name_' * repeats}/{i}" for i in range(layers + 1)])
    figure = telemetry._new_figure(layers)
    draw_heat_map(path, None, figure=figure)
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert 0 < box.x0 and box.x1 < figure.bbox.width and box.y1 < figure.bbox.height
    assert figure.get_suptitle().endswith("..." if repeats == 90 else "long_name_/")
    panels = [axes.get_window_extent() for axes in figure.axes]
    assert all(panel.height > 0.05 * figure.dpi and panel.y1 < box.y0 for panel in panels)


def test_names_are_drawn_as_they_are(tmp_path):
    """A dollar sign begins no formula, and what the font lacks is escaped without a warning."""
    path, picture = tmp_path / "a.jsonl", tmp_path / "a.png"
    names = ["a$x_1$b", "c$\\frac$", "$bad{$", "Ünï/中"]
    heat_map_records(path, [1], [f"$\\frac$ 文/{name}" for name in ["of ratio 1", *names]])
    figure = telemetry._new_figure(4)
    draw_heat_map(path, picture, figure=figure)
    drawn = [text.get_text() for text in figure.axes[1].get_yticklabels()]
    assert drawn == [*names[:3], r"Ünï/\u4e2d"]
    assert figure.get_suptitle().endswith(r"names without $\frac$ \u6587/")
    assert picture.exists()


LAYER = {"weight_norm": 1.0, "update_norm": "nan", "ratio": 2.0}


@pytest.mark.parametrize(
    "line",
    [
        3,
        None,
        {"step": 1},
        {"layers": {"a": LAYER}},
        {"step": "1", "layers": {"a": LAYER}},
        {"step": 1, "layers": [LAYER]},
        {"step": 1, "layers": {"a": LAYER | {"ratio": "high"}}},
        {"step": 1, "layers": {"a": LAYER | {"ratio": None}}},
        {"step": 1, "layers": {"a": {"ratio": 2.0}}},
    ],
)
def test_a_line_that_is_not_a_record_is_named(line, tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"step": 1, "layers": {"a": LAYER}})
    path.write_text(f'{good}\n{{"step": 9, "lay\n{json.dumps(line)}\n')
    with pytest.raises(ValueError, match=rf"{path}, line 3: .*Received: .*\. Correct or delete"):
        draw_heat_map(path, tmp_path / "a.png")


@pytest.mark.parametrize("folder", [None, "ram://pictures"])
def test_a_picture_that_cannot_be_written_leaves_the_earlier_one(folder, tmp_path, monkeypatch):
    path = f"{folder or tmp_path}/a.png"
    tf.io.gfile.makedirs(folder or str(tmp_path))
    figure = telemetry._new_figure(2)

    def full(*unused, **options):
        raise OSError(28, "No space left on device")

    for _ in range(2):
        telemetry.save_figure(figure, path)
    with tf.io.gfile.GFile(path, "rb") as file:
        earlier = file.read()
    assert earlier.startswith(b"\x89PNG")
    figure.suptitle("changed")
    monkeypatch.setattr(*((tf.io.gfile, "rename") if folder else (os, "replace")), full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        telemetry.save_figure(figure, path)
    with tf.io.gfile.GFile(path, "rb") as file:
        assert file.read() == earlier
    assert tf.io.gfile.listdir(os.path.dirname(path)) == ["a.png"]


def test_a_layer_that_is_not_adapted_is_not_drawn_even_if_an_update_was_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    layers = {"a": (0.5, True), "b": (0.0, False), "c": (1.0, False)}
    rows = {
        name: {"weight_norm": 1.0, "update_norm": 1.0, "ratio": ratio, "adapted": adapted}
        for name, (ratio, adapted) in layers.items()
    }
    some = {name: rows[name] for name in "ab"}  # c is new in the second record
    lines = (
        json.dumps({"step": step, "skipped_steps": 0, "layers": layers})
        for step, layers in ((1, some), (2, rows))
    )
    path.write_text("\n".join(lines))
    figure = telemetry._new_figure(2)
    draw_heat_map(path, None, figure=figure)
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["a"]
    assert figure.get_suptitle() == (
        "Trust ratio of 1 layer (without 2 that are not adapted or have a ratio of 1)"
    )


def test_the_scale_is_centered_on_1_and_an_outlier_does_not_flatten_the_rest():
    logs = np.tile(np.linspace(-0.8, 0.3, 20), (12, 1))
    logs[3] = 6.0  # a layer with a ratio of 1e6
    logs[4, 5] = np.inf
    figure = telemetry._new_figure(12)
    telemetry._draw_on(figure, [f"layer_{i}" for i in range(12)], list(range(1, 21)), logs)
    bar, axes = figure.axes
    image = axes.get_images()[0]
    low, high = image.get_clim()
    assert low == -high and 1 <= high < 1.7
    np.testing.assert_allclose(image.cmap(image.norm(0.0))[:3], 0.97, atol=0.03)  # white
    assert [label.get_text() for label in bar.get_xticklabels()] == ["0.1", "1", "10"]


@pytest.mark.parametrize("decades", [3, 5, 7, 20, 30])
def test_the_labels_of_the_color_bar_do_not_overlap(decades):
    figure = telemetry._new_figure(2)
    logs = np.array([[-decades, decades], [0.0, decades]])
    telemetry._draw_on(figure, ["a", "b"], [1, 2], logs)
    figure.draw_without_rendering()
    bar, _ = figure.axes
    places = bar.get_xticks()
    np.testing.assert_array_equal(places, -places[::-1])
    assert 0 in places and 5 <= len(places) <= 11 and places[-1] > decades / 2
    labels = [label.get_text() for label in bar.get_xticklabels()]
    np.testing.assert_allclose([float(label) for label in labels], 10.0**places)
    boxes = [label.get_window_extent() for label in bar.get_xticklabels()]
    assert all(left.x1 + 2 < right.x0 for left, right in itertools.pairwise(boxes))


def test_ticks_are_round_steps():
    ticks, places = telemetry._tick_steps(list(range(7, 1000, 7)), 142)
    assert ticks == list(range(100, 1000, 100))
    assert places == pytest.approx([(tick - 7) / 7 for tick in ticks])
    assert telemetry._tick_steps([5], 1) == ([5], [0.0])


@pytest.mark.parametrize(
    "steps",
    [
        [1, 2, 3, 1_000, 100_000],
        [*range(100), *range(10**6, 10**8, 10**6)],
        [*range(0, 10**9, 10**6), 10**10],
        [5, 10**6],
    ],
)
def test_labels_of_uneven_steps_do_not_overlap(steps):
    figure = telemetry._new_figure(2)
    logs = np.zeros((2, len(steps)))
    telemetry._draw_on(figure, ["a" * 60, "b"], steps, logs)
    figure.draw_without_rendering()
    axes = figure.axes[1]
    boxes = [t.label2.get_window_extent() for t in axes.xaxis.get_major_ticks()]
    assert all(left.x1 + 2 < right.x0 for left, right in itertools.pairwise(boxes))
    edges = axes.get_window_extent()
    centers = [edges.x0, *[(box.x0 + box.x1) / 2 for box in boxes], edges.x1]
    assert max(np.diff(centers)) < 0.55 * edges.width  # no large part is without a label


def test_prefixes_that_nearly_all_names_share_are_left_out():
    names = [f"model/encoder/layer_{i}/kernel" for i in range(24)] + ["model/pooler/kernel", "head"]
    shorter = [f"layer_{i}/kernel" for i in range(24)] + ["pooler/kernel", "head"]
    assert telemetry._shorten_names(names) == (shorter, ["model/", "encoder/"])
    equal = ["a/kernel", "a/bias", "bias"]  # without "a/", two names would be the same
    assert telemetry._shorten_names(equal) == (equal, [])
    assert telemetry._shorten_names(["kernel", "bias"]) == (["kernel", "bias"], [])
    # Six of ten names begin with layer_0; without it, they would not be told from others.
    layers = [f"layer_0/{i}/kernel" for i in range(6)] + [f"layer_1/{i}/kernel" for i in range(4)]
    assert telemetry._shorten_names(layers) == (layers, [])


def test_a_long_run_is_averaged_and_keeps_a_nan():
    values = np.full((2, 10 * telemetry.MAX_COLUMNS, 3), 100.0)
    values[0, ::2, 2] = 1.0
    values[1, 4321, 1] = np.nan
    logs = telemetry._log_ratios(values)
    assert logs.shape == (2, telemetry.MAX_COLUMNS)
    np.testing.assert_allclose(logs[0], 1.0)
    assert np.flatnonzero(np.isinf(logs[1])).tolist() == [432]


def test_199_layers_have_readable_labels(tmp_path):
    names = ["model/bias"] + [f"model/encoder/layer_{i}/kernel" for i in range(199)]
    rows = np.ones((200, 3, 3))
    rows[1:, :, 2] = 0.1
    figure = telemetry._new_figure(len(names) - 1)
    telemetry._draw_on(figure, names[1:], [1, 2, 3], telemetry._log_ratios(rows[1:]))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[1].get_yticklabels()]
    assert len(boxes) == 199
    assert all(upper.y0 >= lower.y1 - 0.5 for upper, lower in zip(boxes, boxes[1:], strict=False))
    assert min(box.x0 for box in boxes) >= 0
    with pytest.raises(ValueError, match="no records"):
        (tmp_path / "empty.jsonl").write_text("")
        draw_heat_map(tmp_path / "empty.jsonl", tmp_path / "no.png")


def make_callback(flavour, *arguments, **keywords):
    """The callback with the base class of the flavour's Keras."""
    bases = (telemetry.TelemetryCallbackMixin, flavour.keras.callbacks.Callback)
    return type("TelemetryCallback", bases, {})(*arguments, **keywords)


def fit(flavour, callback, optimizer=None, compiled=False, **compiling):
    rng = np.random.default_rng(0)
    layers = flavour.keras.layers
    model = flavour.keras.Sequential([layers.Input((4,)), layers.Dense(3), layers.Dense(1)])
    model.compile(optimizer or flavour.lamb.LAMB(telemetry=True), loss="mse", **compiling)
    x, y = rng.normal(size=(24, 4)), rng.normal(size=(24, 1))
    arguments = {"batch_size": 4, "shuffle": False, "verbose": 0, "callbacks": [callback]}
    with contextlib.nullcontext() if compiled else run_eagerly():
        model.fit(x, y, epochs=2, **arguments)
    return model, lambda: model.fit(x, y, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_callback_writes_records_pictures_and_events(wrapped, flavour, tmp_path):
    optimizer = flavour.lamb.LAMB(telemetry=True)
    if wrapped:
        home = flavour.keras.optimizers
        home = home if flavour.name == "keras3" else flavour.keras.mixed_precision
        optimizer = home.LossScaleOptimizer(optimizer, initial_scale=4.0)
    model, again = fit(flavour, make_callback(flavour, tmp_path, every_steps=5), optimizer)
    assert [record["step"] for record in records(tmp_path)] == [5, 10]
    assert (tmp_path / "trust_ratios.png").exists()
    names = [layer.name for layer in getattr(optimizer, "inner_optimizer", optimizer).layers]
    assert list(records(tmp_path)[-1]["layers"]) == names
    with run_eagerly():
        again()  # starts at step 12
    assert [record["step"] for record in records(tmp_path)] == [5, 10, 15]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars(f"ratio/{names[0]}")] == [5, 10, 15]


def test_the_callback_runs_after_each_execution(flavour, tmp_path):
    callback = make_callback(flavour, tmp_path, every_steps=5, heat_map=False)
    fit(flavour, callback, compiled=True, steps_per_execution=3)
    assert [record["step"] for record in records(tmp_path)] == [6, 12]
    assert not (tmp_path / "trust_ratios.png").exists()
    fit(flavour, make_callback(flavour, tmp_path / "rare", every_steps=100))
    assert not list((tmp_path / "rare").glob("trust_ratios.*"))
    with pytest.raises(ValueError, match="telemetry=True"):
        fit(flavour, make_callback(flavour, tmp_path), flavour.lamb.LAMB())


def test_telemetry_callback_is_a_keras_3_callback(keras3, tmp_path):
    fit(keras3, telemetry.TelemetryCallback(tmp_path), compiled=True)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))


def test_the_callback_writes_to_object_storage(keras3):
    folder = "ram://callback/logs"
    fit(keras3, telemetry.TelemetryCallback(folder), compiled=True)
    steps = [record["step"] for record in read_records(f"{folder}/trust_ratios.jsonl")]
    assert steps == list(range(1, 13))
    assert tf.io.gfile.exists(f"{folder}/trust_ratios.png")
    fit(keras3, telemetry.TelemetryCallback("ram://callback/rare", every_steps=100), compiled=True)
    assert not tf.io.gfile.exists("ram://callback/rare/trust_ratios.png")
