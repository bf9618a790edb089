"""Monitoring of a run: history, display, MFU, telemetry and profiler trace."""

import contextlib
import io
import json
import os
import pathlib
import pty
import re
import resource
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_runs import SmallTask, begin, small_recipe, small_run

from recipes.types import profile_window
from tf_lamb.telemetry import read_records
from tf_lamb.tf_keras import LAMB
from training import chips
from training.monitor import mfu, plot
from training.monitor.progress import (
    Machine,
    Progress,
    Rows,
    format_left,
    format_row,
    make_display,
    read_rows,
)
from training.monitor.run_monitor import Profiler, TelemetryRecorder, loop_lengths


class RecordingDisplay:
    def __init__(self):
        self.rows = []

    def show(self, step, row, seconds_left):
        self.rows.append((step, row, seconds_left))


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances."""
    now = types.SimpleNamespace(seconds=100.0)
    fake = types.SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr("training.monitor.progress.time", fake)
    return now


def loop_output(loss=2.0):
    return {
        "loss": loss + 0.5,
        "masked_loss": tf.constant(loss),
        "sentence_loss": tf.constant(0.5),
        "learning_rate": np.float32(0.25),
        "skipped_steps": 3,
        "input_wait_seconds": tf.constant(1.0, tf.float64),
    }


def test_a_loop_is_measured_recorded_and_passed_to_tensorboard(tmp_path, clock):
    step, display = tf.Variable(0, dtype=tf.int64), RecordingDisplay()
    progress = Progress(
        step,
        100,
        str(tmp_path),
        display,
        machine=Machine(replicas=4, peak_flops=1e6),
        flops_per_step=lambda: 5e5,
    )
    progress.begin_phase(2, 32)
    speeds = []
    for seconds in (10.0, 8.0, 4.0, 4.0):
        clock.seconds += seconds
        step.assign_add(10)
        output = loop_output()
        progress(output)
        speeds.append(progress.describe_speed())
    assert speeds[0].startswith("not measured: there was only one loop")
    assert speeds[1].startswith("40 examples/s in the second loop of steps")
    assert speeds[2:] == ["80 examples/s"] * 2
    rows = read_rows(tmp_path / "history.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    expected = {
        "step": 40,
        "phase": 2,
        "loss": 2.5,
        "learning_rate": 0.25,
        "examples_per_second": 80.0,
        "examples_per_second_per_replica": 20.0,
        "mfu": 1.25,
        "input_wait_share": 0.25,
        "skipped_steps": 3,
        "masked_loss": 2.0,
        "sentence_loss": 0.5,
    }
    assert rows[-1] == expected
    assert {"loss", "mfu", "examples_per_second", "input_wait_share"} <= set(output)
    # The first loop compiles, and the second one is slow: both are left out of the mean speed and
    # of the time left, which is not known before.
    assert progress.examples_per_second == 80.0
    assert [left for _, _, left in display.rows] == [None, 80 * 32 / 40, 70 * 32 / 80, 60 * 32 / 80]
    assert display.rows[-1][:2] == (40, expected)


def test_evaluations_are_recorded_separately_and_excluded_from_training_time(tmp_path, clock):
    step = tf.Variable(10, dtype=tf.int64)
    accuracies = ("masked_accuracy",)
    progress = Progress(step, 100, str(tmp_path), RecordingDisplay(), higher_is_better=accuracies)
    progress.begin_phase(1, 32)
    clock.seconds += 50
    progress.evaluated({"masked_loss": tf.constant(1.5)})
    clock.seconds += 1
    step.assign(20)
    progress(loop_output())
    assert read_rows(tmp_path / "evaluations.jsonl") == [
        {"step": 10, "phase": 1, "masked_loss": 1.5, "higher_is_better": ["masked_accuracy"]}
    ]
    assert read_rows(tmp_path / "history.jsonl")[0]["examples_per_second"] == 320.0


def test_unknown_peak_gives_no_mfu_and_skipped_steps_give_no_loss(tmp_path, clock):
    step = tf.Variable(0, dtype=tf.int64)
    progress = Progress(step, 100, str(tmp_path), RecordingDisplay(), flops_per_step=lambda: 1 / 0)
    progress.begin_phase(1, 32)
    clock.seconds += 1
    step.assign(1)
    progress(loop_output(float("nan")))
    (row,) = read_rows(tmp_path / "history.jsonl")
    assert "mfu" not in row and row["loss"] is None


def test_history_is_strict_json_and_drops_repeated_steps(tmp_path):
    path = tmp_path / "history.jsonl"
    Rows(path).append({"step": 1, "loss": float("nan")})
    Rows(path).append({"step": 2, "loss": 1.0})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')  # the process was killed here
    for line in path.read_text().splitlines()[:2]:
        json.loads(line, parse_constant=pytest.fail)
    assert read_rows(path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}]
    Rows(path).drop_after(1)
    assert path.read_text() == '{"step": 1, "loss": null}\n'


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e400"])
def test_a_value_that_is_not_finite_is_read_as_null(value, tmp_path):
    """Python's `json` and other programs write them; a resumed run wrote them again and failed."""
    path = tmp_path / "history.jsonl"
    path.write_text(
        f'{{"step": 1, "loss": {value}}}\n{"[" * 100_000}\n{{"step": 2, "loss": 2.5}}\n'
    )
    assert read_rows(path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 2.5}]
    Rows(path).drop_after(1)
    assert path.read_text() == '{"step": 1, "loss": null}\n'


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"loss": 3}', "a row must be an object with an integer step. Received: {'loss': 3}"),
        ('{"step": "1"}', "a row must be an object with an integer step. Received: {'step': '1'}"),
        ("null", "a row must be an object with an integer step. Received: None"),
        (f'{{"step": 1{"0" * 20}}}', f"step must be below 2**63. Received: 1{'0' * 20}"),
        ('{"step": 10, "loss": "abc"}', "loss must be a number or null. Received: 'abc'"),
        (
            '{"step": 10, "higher_is_better": 1}',
            "higher_is_better must be a list of names. Received: 1",
        ),
    ],
)
def test_a_line_that_is_not_a_row_is_named(line, wrong, tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    path.write_text(f'{{"step": 1, "loss": 3}}\n{{"step": 2, "lo\n{line}\n')
    assert plot.main([str(tmp_path)]) == 1
    said = f"training.monitor.plot: {path}, line 3: {wrong}. Correct or delete this line.\n"
    assert capsys.readouterr().err == said


ROW = {
    "loss": 2.5,
    "learning_rate": 0.25,
    "examples_per_second": 1600.0,
    "examples_per_second_per_replica": 400.0,
    "mfu": 0.413,
    "input_wait_share": 0.02,
    "skipped_steps": 3,
}
LINE = "loss 2.5000  lr 2.500e-01  1,600 examples/s (400 per replica)  MFU 41.3%  "
LINE += "input wait 2.0%  skipped 3"


def test_a_file_gets_a_line_every_few_seconds_and_the_last_one(clock):
    lines = []
    with make_display(30, lines.append, io.StringIO()) as shown:
        for step in (10, 20, 30):
            shown.show(step, ROW, 3661.0)
            clock.seconds += 1
    assert lines == [f"step {step}/30  {LINE}  time left: 1:01:01" for step in (10, 30)]
    shortest = {"loss": 1.0, "learning_rate": 0.5, "examples_per_second": 7.0}
    assert format_row(shortest) == "loss 1.0000  lr 5.000e-01  7 examples/s"


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with make_display(30, pytest.fail, stream) as shown:
        shown.show(15, ROW, 3661.0)
    printed = stream.getvalue()
    assert "15/30" in printed and "50%" in printed and "1:01:01" in printed
    assert "1,600 examples/s" in printed
    assert format_left(None) == "time left: unknown"


LINES_ON_A_TERMINAL = """
import logging, os, sys, time
log = logging.getLogger("made before the bar")
log.addHandler(logging.StreamHandler())
from training.monitor.progress import make_display
row = {"loss": 1.0, "learning_rate": 0.5, "examples_per_second": 7.0}
with make_display(30, print, sys.stderr) as shown:
    shown.show(3, row, None)
    log.warning("a line of a logger")
    os.write(2, b"a line of C++\\n")
    time.sleep(0.5)
    shown.show(6, row, 61.0)
    if sys.argv[1:]:
        os.write(2, b"the last words\\n")
        os.abort()
print("after the bar", file=sys.stderr)
"""


@pytest.mark.parametrize("crash", [False, True])
def test_lines_of_libraries_appear_above_the_bar(crash):
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", LINES_ON_A_TERMINAL, *["crash"] * crash],
        cwd=pathlib.Path(__file__).parents[3],
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        stderr=end,
    ) as child:
        os.close(end)
        printed = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while data := os.read(terminal, 65536):
                printed += data
    os.close(terminal)
    assert child.returncode == (-signal.SIGABRT if crash else 0)
    plain = re.sub(r"\x1b\[[\d;?]*\w", "", printed.decode())
    lines = re.split("[\r\n]+", plain)
    for whole in ("a line of a logger", "a line of C++"):
        assert whole in lines  # alone: neither after the bar nor after its values
    last = "the last words" if crash else "after the bar"
    assert any(line.endswith(last) for line in lines)
    assert printed.rindex(b"\x1b[?25h") > printed.rindex(b"\x1b[?25l")  # the cursor is shown


def test_training_flops_are_three_times_those_of_the_forward_pass():
    inputs = tf_keras.Input([8, 16, 3], batch_size=2)
    x = tf_keras.layers.Conv2D(5, 3, padding="same", use_bias=False)(inputs)
    x = tf_keras.layers.Reshape([128, 5])(x)
    x = tf_keras.layers.EinsumDense("abc,cd->abd", [128, 7])(x)
    x = tf.matmul(x, x, transpose_a=True)  # [2, 7, 7]
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(4)(tf_keras.layers.Flatten()(x)))
    counted = mfu.training_flops(model, tf.TensorSpec([2, 8, 16, 3]))
    convolution, einsum = 2 * (2 * 128) * 5 * (3 * 3 * 3), 2 * (2 * 128) * 5 * 7
    products, dense = 2 * 2 * 7 * 7 * 128, 2 * 2 * 49 * 4
    assert counted == 3 * (convolution + einsum + products + dense)


def test_flops_of_bert_are_close_to_the_usual_formula():
    """6 N + 12 L H S per token, as in PaLM's appendix B, and the heads."""
    from models import bert

    size, length, batch, predictions, words = bert.SIZES["mini"], 64, 4, 8, 100
    model = bert.build_pretrainer(size, words, length, dropout=0.0, initializer_stddev=0.02)
    row = tf.TensorSpec([batch, length], tf.int32)
    names = ("input_word_ids", "input_mask", "input_type_ids")
    spec = dict.fromkeys(names, row) | {
        "masked_lm_positions": tf.TensorSpec([batch, predictions], tf.int32)
    }
    counted = mfu.training_flops(lambda inputs: model(inputs, training=False), spec)
    width, tokens = size.width, batch * length
    encoder = 6 * tokens * size.layers * (12 * width**2 + 2 * length * width)
    heads = 6 * batch * (width**2 + 2 * width + predictions * (width**2 + width * words))
    assert counted == pytest.approx(encoder + heads, rel=0.01)


def test_waiting_for_input_is_measured(two_cpus, tmp_path):
    """A batch takes 50 ms to produce, and a step takes almost no time."""

    def slow(number):
        time.sleep(0.05)
        return number

    def made(number):
        return {"x": tf.ensure_shape(tf.numpy_function(slow, [number], tf.float32), [])}

    where = tf.distribute.OneDeviceStrategy("/cpu:0")
    task = SmallTask(
        small_recipe(jit_compile=True),
        lambda: tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=[1])]),
        lambda model, batch, training: tf.reduce_sum(model(batch["x"][None, None])),
        tf.data.Dataset.range(10**6, output_type=tf.float32).map(made),
    )
    run = begin(small_run(task, where, tmp_path))
    run.train(tf.constant(1))
    begun = time.perf_counter()
    waited = float(run.train(tf.constant(20))["input_wait_seconds"])
    assert 0.5 < waited < time.perf_counter() - begun  # a few batches may be prefetched


@pytest.mark.parametrize(
    ("peak", "teraflops"),
    [
        (chips.gpu_peak_flops("NVIDIA H200", "bfloat16"), 989.4),
        (chips.gpu_peak_flops("NVIDIA H100 PCIe", "float32"), 378.0),
        (chips.gpu_peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16"), 312.0),
        (chips.gpu_peak_flops("Tesla V100-SXM2-16GB", "bfloat16"), None),
        (chips.gpu_peak_flops("A card of tomorrow", "float32"), None),
        (chips.tpu_peak_flops("v3-8"), 4 * 123),
        (chips.tpu_peak_flops("v5litepod-4"), 4 * 197),
        (chips.tpu_peak_flops("v5e-16"), 16 * 197),
        (chips.tpu_peak_flops("v2-8"), 4 * 45),
        (chips.tpu_peak_flops("v9-8"), None),
        (chips.tpu_peak_flops(""), None),
    ],
)
def test_peak_flops(peak, teraflops):
    assert peak == (teraflops and pytest.approx(teraflops * 1e12))


def test_loops_end_at_the_profile_window_and_a_trace_is_written(tmp_path):
    window = profile_window("100:110")
    length = loop_lengths(50, window)
    step, ends = 0, []
    while step < 200:
        step += length(step)
        ends.append(step)
    assert ends == [50, 100, 110, 160, 210]
    variable = tf.Variable(99, dtype=tf.int64)
    profiler = Profiler(variable, window, str(tmp_path))
    profiler.begin_phase()
    assert not list(tmp_path.iterdir())
    for step in (100, 105, 110):
        variable.assign(step)
        profiler({})
    profiler.close()
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


@pytest.mark.parametrize("text", ["100", "a:b", "110:100", "5:5", "-1:4", "1:2:3"])
def test_an_invalid_profile_is_refused(text):
    with pytest.raises(ValueError, match=f"Received: profile={text}"):
        profile_window(text)


def test_trust_ratios_and_weights_are_recorded_and_plotted(tmp_path):
    model = tf_keras.Sequential([tf_keras.layers.Dense(3, name="only", input_shape=[4])])
    optimizer = LAMB(0.1, telemetry=True)
    optimizer.build(model.trainable_variables)
    ratios = TelemetryRecorder(
        optimizer.iterations, optimizer, model.trainable_variables, str(tmp_path), 3
    )
    for step in range(1, 5):
        gradients = [tf.ones(v.shape) for v in model.trainable_variables]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        ratios({})
        Rows(tmp_path / "history.jsonl").append(
            {"step": step, "loss": 1.0, "learning_rate": 0.1, "examples_per_second": 5.0},
        )
    ratios.close()
    records = read_records(tmp_path / "telemetry" / "trust_ratios.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    (events,) = (tmp_path / "weights").iterdir()
    found = [
        (event.step, value.tag)
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
    ]
    assert [step for step, tag in found if tag == "weights/only/kernel"] == [1, 3]
    assert plot.main([str(tmp_path)]) == 0
    alone = (tmp_path / "history.png").read_bytes()
    assert plot.main([str(tmp_path), str(tmp_path)]) == 0
    for picture in ("history.png", "telemetry/trust_ratios.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "history.png").read_bytes() != alone  # without the heat map


def write_run(folder, losses, accuracies=(), speeds=None, rate=0.1):
    """Writes a history of a row every 10 steps, and evaluations every 20 steps."""
    folder.mkdir(parents=True)
    for i, loss in enumerate(losses):
        row = {"step": 10 * (i + 1), "phase": 1, "loss": loss, "learning_rate": rate}
        row["examples_per_second"] = (speeds or [5.0] * len(losses))[i]
        Rows(folder / "history.jsonl").append(row | ({"input_wait_share": 0.1} if i else {}))
    for i, accuracy in enumerate(accuracies):
        row = {"step": 20 * (i + 1), "loss": losses[-1], "masked_accuracy": accuracy}
        Rows(folder / "evaluations.jsonl").append(row | {"masked_loss": losses[-1]})
    return str(folder)


@pytest.fixture
def figures(monkeypatch):
    """The figures that `plot` draws, which stay open until the end of the test."""
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(plot.plt, "close", drawn.append)
        yield drawn
    for figure in drawn:
        plot.plt.close(figure)


def test_curves_are_readable(tmp_path, figures):
    losses = [100.0, 3.0, 2.9, *[2.5 - 0.01 * i for i in range(37)]]
    speeds = [0.1, 2.0, *[50.0] * 38]
    run = write_run(tmp_path / "run", losses, [0.1, 0.2], speeds)
    assert plot.main([run]) == 0
    (figure,) = figures
    loss, accuracy, rate, speed = figure.axes
    assert figure.get_suptitle() == "run: 400 steps"
    # The scale is that of the losses after the first 5 % of the steps.
    low, high = loss.get_ylim()
    assert 2.0 < low < 2.14 and 2.9 < high < 3.1
    assert speed.lines[0].get_ydata()[2:].tolist() == [50.0] * 38
    assert np.isnan(speed.lines[0].get_ydata()[:2]).all()  # they compile, or are slow
    (points,) = accuracy.lines
    assert points.get_ydata().tolist() == [0.1, 0.2] and points.get_label() == "masked accuracy"
    assert accuracy.get_ylabel() == "held-out accuracy" and rate.get_ylabel() == "learning rate"


def test_a_late_divergence_does_not_flatten_the_losses_before_it(tmp_path, figures):
    losses = [9.0, *[3.0 - 0.01 * i for i in range(30)], 40.0, 5_000.0]
    plot.draw([write_run(tmp_path / "run", losses)], str(tmp_path / "picture.png"))
    low, high = figures[0].axes[0].get_ylim()
    assert 2.2 < low < 2.71 and 9.0 < high < 9.5
    # A run that begins with the lowest loss.
    plot.draw([write_run(tmp_path / "other", [2.0, 3.0, 4.0])], str(tmp_path / "picture.png"))
    low, high = figures[1].axes[0].get_ylim()
    assert low < 3.0 and high > 4.0


def test_two_runs_of_one_name_are_told_apart(tmp_path, figures):
    folders = [write_run(tmp_path / side / "run", [3.0, 2.0]) for side in ("left", "right")]
    plot.draw(folders, str(tmp_path / "picture.png"))
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["left/run", "right/run"]
    assert figures[0].get_suptitle() == "2 runs: 20 steps"
    assert plot.distinct_names([*folders, folders[0]]) == ["left/run", "right/run", "left/run"]
    assert plot.distinct_names(["a/x", "b/y/"]) == ["x", "y"]


def test_runs_of_different_size_have_a_scale_of_factors(tmp_path, figures):
    first = write_run(tmp_path / "lamb", [9.0, 7.0, 6.0])
    higher = write_run(tmp_path / "sgd", [50.0, 2_000.0, 40.0], rate=3.0)
    alike = write_run(tmp_path / "adamw", [10.0, 8.0, 7.0], rate=0.3)
    plot.draw([first, higher], str(tmp_path / "picture.png"))
    loss, rate, speed = figures[0].axes
    assert (loss.get_yscale(), rate.get_yscale(), speed.get_yscale()) == ("log", "log", "linear")
    assert loss.get_ylim()[0] < 6 and 50 < loss.get_ylim()[1] < 60  # where both runs begin
    assert rate.get_ylim()[0] < 0.1 and 3 < rate.get_ylim()[1]
    figures[0].canvas.draw()
    ticks = [text.get_text() for text in rate.get_yticklabels()]
    assert {"0.05", "0.1", "1"} <= set(ticks) and not any("^" in text for text in ticks)
    for folders in ([first, alike], [higher]):
        plot.draw(folders, str(tmp_path / "picture.png"))
        assert {axes.get_yscale() for axes in figures[-1].axes} == {"linear"}


def legend_of(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_where_a_loss_is_no_longer_finite_is_marked(tmp_path, figures):
    nan = float("nan")
    runs = [
        write_run(tmp_path / "diverged", [3.0, 2.0, nan, 1.9, nan, nan]),
        write_run(tmp_path / "never", [nan] * 4, [nan, nan]),
    ]
    for folders in ([runs[0]], [runs[1]], runs):
        plot.draw(folders, str(tmp_path / "picture.png"))
    loss, *_ = figures[0].axes
    assert legend_of(loss) == ["training; not finite from step 50"]
    assert loss.lines[-1].get_xdata() == [50, 50]
    loss, accuracy, *_ = figures[1].axes
    assert legend_of(loss)[0] == "training; not finite from step 10"
    assert legend_of(accuracy) == ["masked accuracy; not finite from step 20"]
    assert not [*loss.get_yticks(), *accuracy.get_yticks()]
    (legend,) = figures[2].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["diverged; not finite from step 50", "never; not finite from step 10"]


def test_long_names_and_many_runs_leave_room_for_the_curves(tmp_path, figures):
    names = [f"{'a-long-name-' * 11}{i}" for i in range(2)]
    long = [write_run(tmp_path / name, [3.0, 2.0], [0.7]) for name in names]
    many = [write_run(tmp_path / f"_run{i}$", [3.0, 2.0], [0.7]) for i in range(14)]
    for folders in ([long[0]], long, many):
        plot.draw(folders, str(tmp_path / "picture.png"))
        figure = figures[-1]
        boxes = [figure._suptitle, *figure.legends, *(axes for axes in figure.axes)]
        boxes = [box.get_window_extent() for box in boxes]
        width, height = figure.canvas.get_width_height()
        for box in boxes:
            assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height
        panels = boxes[-len(figure.axes) :]
        assert all(box.width > 0.85 * width and box.height > 150 for box in panels)
    (legend,) = figures[-1].legends
    assert [text.get_text() for text in legend.get_texts()][:2] == [r"./_run0\$", r"./_run1\$"]
    assert legend_of(figures[-1].axes[1]) == ["masked accuracy"]


def test_characters_that_the_font_lacks_are_escaped(tmp_path, figures):
    runs = [write_run(tmp_path / name, [3.0, 2.0]) for name in ("Ünï 中文", "b")]
    for folders in (runs[:1], runs):
        plot.draw(folders, str(tmp_path / "picture.png"))
    assert figures[0].get_suptitle() == r"Ünï \u4e2d\u6587: 20 steps"
    assert figures[1].legends[0].get_texts()[0].get_text() == r"Ünï \u4e2d\u6587"


def test_a_metric_is_drawn_if_a_higher_value_is_better_whatever_its_name(tmp_path, figures):
    run = write_run(tmp_path / "run", [3.0, 2.0, 1.0])
    for step, found in ((10, 0.7), (20, 0.704)):
        row = {"step": step, "loss": 2.0, "recall": found, "accuracy_gap": 9.0}
        Rows(tmp_path / "run/evaluations.jsonl").append(row | {"higher_is_better": ["recall"]})
    plot.draw([run], str(tmp_path / "picture.png"))
    _, accuracy, *_ = figures[0].axes
    assert legend_of(accuracy) == ["recall"]
    assert accuracy.get_ylim() == pytest.approx((0, 1.05 * 0.704))  # room for the last marker


def test_a_run_of_one_loop_is_drawn(tmp_path, figures):
    plot.draw([write_run(tmp_path / "run", [3.0])], str(tmp_path / "picture.png"))
    loss, rate, speed = figures[0].axes
    assert all(axes.lines[0].get_marker() == "." for axes in (loss, rate, speed))
    assert speed.lines[0].get_ydata().tolist() == [5.0]


def test_a_full_disk_leaves_the_earlier_picture(tmp_path, capsys):
    run = write_run(tmp_path / "run", [3.0, 2.0])
    picture = tmp_path / "run/history.png"
    assert plot.main([run]) == 0
    earlier = picture.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, unlimited[1]))
    try:
        assert plot.main([run]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    said = capsys.readouterr().err
    assert said == f"training.monitor.plot: {picture} cannot be written (File too large).\n"
    assert picture.read_bytes() == earlier
    assert {path.name for path in picture.parent.iterdir()} == {"history.jsonl", "history.png"}


def test_a_finite_value_between_others_is_a_point(tmp_path, figures):
    nan = float("nan")
    runs = [
        ([5.0, 4.0, 3.0], [[], [], [2]]),  # the speeds of the first two loops are left out
        ([11.2, nan], [[0], [], []]),
        ([5.0, nan, 4.0, nan, nan, 3.0, 2.9, nan, 2.0], [[0, 2, 8], [], []]),
        ([9.0, *[nan] * 40], [[0], [], []]),  # in the first 5 % of the steps
    ]
    for number, (losses, points) in enumerate(runs):
        plot.draw([write_run(tmp_path / f"{number}", losses)], str(tmp_path / "picture.png"))
        for axes, places in zip(figures[-1].axes, points, strict=True):
            line = axes.lines[0]
            drawn = np.flatnonzero(line.get_markevery()) if line.get_marker() == "." else []
            assert list(drawn) == places
            low, high = axes.get_ylim()
            assert all(low < value < high for value in line.get_ydata()[places])
        assert len(figures[-1].axes[0].get_yticks())


def test_an_evaluation_without_a_loss_is_left_out(tmp_path, figures):
    run = write_run(tmp_path / "run", [3.0, 2.0, 1.5, 1.0])
    evaluations = Rows(tmp_path / "run/evaluations.jsonl")
    evaluations.append({"step": 20, "masked_accuracy": 0.5})
    plot.draw([run], str(tmp_path / "picture.png"))
    assert legend_of(figures[0].axes[0]) == ["training"]
    evaluations.append({"step": 40, "masked_loss": 1.5, "sentence_loss": 0.5})  # no accuracy
    plot.draw([run], str(tmp_path / "picture.png"))
    held_out = figures[1].axes[0].lines[1]
    assert list(held_out.get_xdata()) == [40] and list(held_out.get_ydata()) == [2.0]
    assert legend_of(figures[1].axes[1]) == ["masked accuracy"]


def test_a_run_without_a_finite_rate_is_drawn(tmp_path, figures):
    lost = write_run(tmp_path / "lost", [3.0, 2.0], rate=float("nan"))
    others = [write_run(tmp_path / f"{rate}", [3.0, 2.0], rate=rate) for rate in (0.1, 9.0)]
    plot.draw([lost], str(tmp_path / "picture.png"))
    plot.draw([lost, *others], str(tmp_path / "picture.png"))
    assert [figure.axes[1].get_yscale() for figure in figures] == ["linear", "log"]


def test_a_line_that_is_not_a_record_of_telemetry_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "run", [3.0, 2.0])
    path = tmp_path / "run/telemetry/trust_ratios.jsonl"
    path.parent.mkdir()
    path.write_text("3\n")
    for folders in ([run], [run, run]):
        assert plot.main(folders) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"training.monitor.plot: {path}, line 1: ") and "Received: 3" in said


def test_the_help_of_the_plot_command_is_a_usage_text(capsys):
    with pytest.raises(SystemExit) as end:
        plot.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m training.monitor.plot")
    with pytest.raises(SystemExit) as end:
        plot.main([])
    assert end.value.code == 2 and "MODEL_DIR" in capsys.readouterr().err


def test_the_plot_of_a_folder_on_an_unknown_storage_is_one_sentence(capsys):
    assert plot.main(["foo://bucket/run"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("training.monitor.plot: foo://bucket/run/") and "Errno" not in said
    assert "no file system for foo://" in said
