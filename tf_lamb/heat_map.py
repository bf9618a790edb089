"""A picture of a run's trust ratios, layers x steps, from the JSON lines of `telemetry`."""

import importlib.util
import json

import numpy as np

COLUMNS = ("weight_norm", "update_norm", "ratio")  # of a layer in a record
MAX_COLUMNS = 1500  # of the picture; more records are averaged, a pixel shows no more


def check_matplotlib():
    """Raises `RuntimeError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(
            "The heat map is drawn with matplotlib, which is not installed. "
            "`pip install matplotlib`, or pass `heat_map=False`."
        )


def _read(records_path):
    """`(labels, steps, values)`, the last record of each step; values are float [layers, steps, 3].

    A layer that a record does not name, and a line that was cut off, are NaN and nothing.
    """
    by_step = {}
    with open(records_path, encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the run was killed as it wrote
                continue
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
    """[layers, columns] log10 of the ratio: +inf where a figure was not finite, NaN where it was 0.

    Neighbouring steps are averaged where there are more than a picture shows; inf outlives that.
    """
    ratios = values[:, :, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(ratios > 0, np.log10(ratios), np.nan)
        logs = np.where(np.isfinite(values).all(axis=2), logs, np.inf)
        columns = np.array_split(logs, min(MAX_COLUMNS, logs.shape[1]), axis=1)
        known = [np.sum(~np.isnan(column), axis=1) for column in columns]
        sums = [np.nansum(column, axis=1) for column in columns]
        return np.stack(sums, axis=1) / np.stack(known, axis=1)  # 0/0 is NaN


def draw_heat_map(records_path, picture_path) -> None:
    """Draws log10 of the trust ratios, layers x steps, from `TelemetryWriter`'s JSON lines.

    Layers whose ratio was 1 at every step, those that are not adapted, are left out. A step that
    stands there twice (a run was resumed) counts once, the later time.

    Args:
        records_path: the JSON lines.
        picture_path: where the PNG goes; a row is 0.15 inches, a name 7 points high.

    Raises:
        ValueError: there are no records.
        RuntimeError: matplotlib is not installed.
    """
    check_matplotlib()
    labels, steps, values = _read(records_path)
    if not labels:
        raise ValueError(f"There are no records to draw yet. Received: {str(records_path)!r}.")
    adapted = [i for i in range(len(labels)) if np.any(values[i, :, 2] != 1.0)]
    rows = adapted or list(range(len(labels)))
    figure = _figure([labels[i] for i in rows], steps, _log_ratios(values[rows]))
    title = f"Trust ratio of {len(rows)} layers"
    if len(rows) < len(labels):
        title += f" ({len(labels) - len(rows)} more are not adapted)"
    figure.suptitle(title, fontsize=11)
    figure.savefig(picture_path, dpi=120)


def _figure(labels, steps, logs):
    """A matplotlib figure without a window (Agg), whatever the program's own backend."""
    from matplotlib import colors
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inches = 0.15 * len(labels)
    figure = Figure(figsize=(13, inches + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    bar_axes, axes = figure.subplots(2, 1, height_ratios=[0.15, inches])
    finite = logs[np.isfinite(logs)]
    low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (-1.0, 1.0)
    settings = {"aspect": "auto", "interpolation": "nearest"}
    shown = np.ma.masked_invalid(logs)
    image = axes.imshow(shown, cmap="viridis", vmin=low, vmax=max(high, low + 0.01), **settings)
    axes.set_facecolor("lightgrey")
    broken = np.ma.masked_where(~np.isinf(logs), np.ones_like(logs))
    axes.imshow(broken, cmap=colors.ListedColormap(["red"]), **settings)
    axes.set_yticks(range(len(labels)), labels, fontsize=7, family="monospace")
    columns = np.unique(np.linspace(0, logs.shape[1] - 1, 11).astype(int))
    first_steps = [steps[i * len(steps) // logs.shape[1]] for i in columns]
    axes.set_xticks(columns, [f"{step:,}" for step in first_steps], fontsize=8)
    axes.tick_params(axis="x", top=True, labeltop=True)
    axes.set_xlabel("step", fontsize=9)
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal", extend="both")
    bar.ax.tick_params(labelsize=8)
    bar.set_label("log10 of the trust ratio; red: not finite, grey: no update", fontsize=9)
    return figure
