"""What the writer and the callback put on disk is what the optimizer kept; alarms name layers."""

import json
import logging
import math
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from drive import LAYERS, Run, random_gradients, random_weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tf_lamb import telemetry
from tf_lamb.telemetry import TelemetryWriter, TrustRatioAlarm, draw_heat_map

COLUMNS = ("weight_norm", "update_norm", "ratio")


def make_run(flavour, rule="LAMB", **arguments):
    make = lambda: getattr(flavour.lamb, rule)(0.05, telemetry=True, **arguments)  # noqa: E731
    return Run(flavour, make, random_weights())


def records(folder):
    text = (folder / "trust_ratios.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def rows_of(record):
    return np.float32([[float(layer[c]) for c in COLUMNS] for layer in record["layers"].values()])


@pytest.mark.parametrize("rule", ["LAMB", "LARS"])
def test_records_are_what_the_optimizer_kept(rule, flavour, tmp_path):
    run = make_run(flavour, rule)
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
    events = EventAccumulator(str(tmp_path / "new" / "folder")).Reload()
    for i, name in enumerate(LAYERS):
        for column, values in zip(COLUMNS, np.transpose(kept, (1, 2, 0))[i], strict=True):
            scalars = events.Scalars(f"{column}/{name}")
            assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
            np.testing.assert_array_equal(np.float32([e.value for e in scalars]), values)
    histogram = tf.make_ndarray(events.Tensors("ratios")[-1].tensor_proto)
    assert histogram[:, 2].sum() == len(LAYERS)
    assert histogram[-1, 1] == kept[-1][:, 2].max()


def test_only_due_steps_are_read(keras3, tmp_path):
    run = make_run(keras3)
    writer = TelemetryWriter(tmp_path, run.optimizer, every_steps=10, tensorboard=False)
    for step in range(1, 32):
        writer.write(step)
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30]
    resumed = TelemetryWriter(tmp_path, run.optimizer, every_steps=10, tensorboard=False)
    for step in range(36, 60, 4):  # four steps in one execution
        resumed.write(step)
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30, 40, 52]
    assert [path.name for path in tmp_path.iterdir()] == ["trust_ratios.jsonl"]


def test_alarms_name_step_and_layer(flavour, tmp_path, caplog):
    heard = []
    run = make_run(flavour, weight_decay=0.0, skip_nonfinite=False)
    writer = TelemetryWriter(
        tmp_path, run.optimizer, max_ratio=30.0, on_alarm=heard.append, tensorboard=False
    )
    writer.write(0)  # no update yet: every ratio is 0, and that is no alarm
    assert heard == []
    gradients = random_gradients(1)
    for step in (1, 2):
        run.step(gradients[step])
        writer.write(step)
    table = list(LAYERS)[0]
    assert [(a.step, a.layer) for a in heard] == [(1, table)]  # once, not at each step
    assert heard[0].ratio == pytest.approx(run.optimizer.telemetry_rows[0, 2], rel=0.5)
    assert "above 30" in str(heard[0]) and isinstance(heard[0], TrustRatioAlarm)
    gradients[3][0][2] = np.full_like(gradients[3][0][2], np.nan)
    run.step(gradients[3])
    with caplog.at_level(logging.WARNING, "tf_lamb"):
        TelemetryWriter(tmp_path, run.optimizer, tensorboard=False).write(3)
    (message,) = caplog.messages
    assert message.startswith("step 3, layer conv/bias: not finite") and "‖u‖ = nan" in message
    assert records(tmp_path)[-1]["layers"]["conv/bias"]["update_norm"] == "nan"


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_layer_that_is_never_updated_and_a_hook_that_stops(flavour, tmp_path):
    def stop(alarm):
        raise alarm

    run = make_run(flavour)
    writer = TelemetryWriter(tmp_path, run.optimizer, on_alarm=stop, tensorboard=False)
    gradients = random_gradients(1)[0][0]
    run.step([[*gradients[:-1], None]])
    with pytest.raises(TrustRatioAlarm, match="step 7, layer still/kernel: the trust ratio is 0"):
        writer.write(7)


def test_an_excluded_layer_is_not_above_the_bound(keras3, tmp_path):
    heard = []
    run = make_run(keras3, "LARS", exclude_from_layer_adaptation=["bias"], trust_coefficient=1e-9)
    run.step(random_gradients(1)[0])
    writer = TelemetryWriter(
        tmp_path, run.optimizer, max_ratio=0.9, on_alarm=heard.append, tensorboard=False
    )
    writer.write(1)
    # Without weights, or without gradients, LARS's ratio is 1: far above the others'.
    assert [alarm.layer for alarm in heard] == ["zero/kernel", "still/kernel"]


def test_what_keras_overwrites_raises_no_alarm(keras3, tmp_path):
    """The scale of a float8 layer is no layer's: its row stays zero."""
    variables = [keras.Variable(np.float32([2, 1]), name=name) for name in ("kernel", "scale")]
    variables[1].overwrite_with_gradient = True
    optimizer = keras3.lamb.LAMB(telemetry=True)
    optimizer.build(variables)
    optimizer.apply([tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])], variables)
    assert variables[1].numpy().tolist() == [3, 4]
    assert [layer.overwritten for layer in optimizer.layers] == [False, True]
    assert not optimizer.layers[1].decayed and not optimizer.layers[1].adapted
    heard = []
    TelemetryWriter(tmp_path, optimizer, on_alarm=heard.append, tensorboard=False).write(1)
    assert heard == []
    assert optimizer.telemetry_rows[0].all() and not optimizer.telemetry_rows[1].any()


@pytest.mark.parametrize("arguments", [{"every_steps": 0}, {"max_ratio": 0.0}])
def test_wrong_arguments(arguments, keras3, tmp_path):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TelemetryWriter(tmp_path, keras3.lamb.LAMB(telemetry=True), **arguments)


def test_wrong_optimizers(keras3, tmp_path):
    for optimizer in (keras3.lamb.LAMB(), keras.optimizers.Adam()):
        with pytest.raises(ValueError, match="with `telemetry=True`"):
            TelemetryWriter(tmp_path, optimizer)


def test_what_is_missing_is_said_in_a_sentence(keras3, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(RuntimeError, match="`pip install tensorflow`"):
        TelemetryWriter(tmp_path, keras3.lamb.LAMB(telemetry=True))
    monkeypatch.setattr(telemetry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="`pip install matplotlib`"):
        telemetry.TelemetryCallback(tmp_path)
    with pytest.raises(RuntimeError, match="`pip install matplotlib`"):
        draw_heat_map(tmp_path / "x.jsonl", tmp_path / "x.png")
    telemetry.TelemetryCallback(tmp_path, heat_map=False)


def test_layers_of_one_name_are_told_apart(keras3, tmp_path):
    variables = [keras.Variable(np.float32([i, 1]), name="w") for i in (1, 2)]
    optimizer = keras3.lamb.LAMB(telemetry=True)
    optimizer.build(variables)
    optimizer.apply([tf.constant([1.0, 2.0])] * 2, variables)
    TelemetryWriter(tmp_path, optimizer, tensorboard=False).write(1)
    (record,) = records(tmp_path)
    assert list(record["layers"]) == ["w", "w#2"]


def heat_map_records(path, steps, layers):
    """A file in which log10 of layer i's ratio is i, and layer 0 is not adapted."""
    with open(path, "w", encoding="utf-8") as file:
        for step in steps:
            rows = {
                name: {"weight_norm": 1.0, "update_norm": 1.0, "ratio": 10.0**i}
                for i, name in enumerate(layers)
            }
            json.dump({"step": step, "skipped_steps": 0, "layers": rows}, file)
            file.write("\n")
        file.write('{"step": 9, "lay')


def test_the_heat_map_shows_what_is_written(tmp_path):
    path, picture = tmp_path / "a.jsonl", tmp_path / "a.png"
    heat_map_records(path, [5, 1, 5, 3], ["bias", "a", "b"])
    labels, steps, values = telemetry._read_records(path)
    assert (labels, steps, values.shape) == (["bias", "a", "b"], [1, 3, 5], (3, 3, 3))
    values[1, 0, 1], values[2, 2, 2] = math.nan, 0.0
    logs = telemetry._log_ratios(values[1:])
    np.testing.assert_allclose(logs, [[np.inf, 1, 1], [2, 2, np.nan]])
    figure = telemetry._draw_figure(labels[1:], steps, logs)
    _, axes = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_xticklabels()] == 2 * ["1", "3", "5"]
    shown, broken = (image.get_array() for image in axes.get_images())
    np.testing.assert_array_equal(shown.mask, [[True, False, False], [False, False, True]])
    np.testing.assert_array_equal(broken.mask, ~shown.mask | [[False] * 3, [True] * 3])
    draw_heat_map(path, picture)
    with Image.open(picture) as image:
        assert image.width == 13 * 120


def test_a_long_run_is_averaged_and_a_nan_outlives_it():
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
    figure = telemetry._draw_figure(names[1:], [1, 2, 3], telemetry._log_ratios(rows[1:]))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[1].get_yticklabels()]
    assert len(boxes) == 199
    assert all(upper.y0 >= lower.y1 - 0.5 for upper, lower in zip(boxes, boxes[1:], strict=False))
    assert min(box.x0 for box in boxes) >= 0
    with pytest.raises(ValueError, match="no records"):
        (tmp_path / "empty.jsonl").write_text("")
        draw_heat_map(tmp_path / "empty.jsonl", tmp_path / "no.png")


def make_callback(flavour, *arguments, **keywords):
    """The callback of the flavour: the same rule before that Keras's own base class."""
    bases = (telemetry.TelemetryCallbackMixin, flavour.keras.callbacks.Callback)
    return type("TelemetryCallback", bases, {})(*arguments, **keywords)


def fit(flavour, callback, optimizer=None, **compiling):
    rng = np.random.default_rng(0)
    layers = flavour.keras.layers
    model = flavour.keras.Sequential([layers.Input((4,)), layers.Dense(3), layers.Dense(1)])
    model.compile(optimizer or flavour.lamb.LAMB(telemetry=True), loss="mse", **compiling)
    x, y = rng.normal(size=(24, 4)), rng.normal(size=(24, 1))
    arguments = {"batch_size": 4, "shuffle": False, "verbose": 0, "callbacks": [callback]}
    model.fit(x, y, epochs=2, **arguments)
    return model, lambda: model.fit(x, y, **arguments)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_callback(wrapped, flavour, tmp_path):
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
    again()  # goes on at step 12
    assert [record["step"] for record in records(tmp_path)] == [5, 10, 15]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars(f"ratio/{names[0]}")] == [5, 10, 15]


def test_the_callback_sees_ends_of_executions_and_no_step_at_all(flavour, tmp_path):
    callback = make_callback(flavour, tmp_path, every_steps=5, heat_map=False)
    fit(flavour, callback, steps_per_execution=3)
    assert [record["step"] for record in records(tmp_path)] == [6, 12]
    assert not (tmp_path / "trust_ratios.png").exists()
    fit(flavour, make_callback(flavour, tmp_path / "rare", every_steps=100))
    assert not list((tmp_path / "rare").glob("trust_ratios.*"))
    with pytest.raises(ValueError, match="telemetry=True"):
        fit(flavour, make_callback(flavour, tmp_path), flavour.lamb.LAMB())


def test_it_is_the_callback_of_keras_3(keras3, tmp_path):
    fit(keras3, telemetry.TelemetryCallback(tmp_path))
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))
