"""Draws the results of a pre-flight."""

import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from inputs.storage.files import atomic_write
from preflight.report import efficiencies, format_bytes, format_minutes, format_seconds

# Each color has one meaning in all panels.
MEMORY_COLORS = {
    "parameters": "#1f77b4",
    "slots": "#17becf",
    "batch and padding": "#9467bd",
    "activations, gradients and temporaries": "#2ca02c",
    "program": "#bcbd22",
}
TIME_COLORS = {
    "compute": "#ff7f0e",
    "waiting for memory": "#8c564b",
    "optimizer": "#e377c2",
    "all-reduce": "#404040",
}
TOTAL_COLOR = "#7f7f7f"
FAILED_COLOR = "#d62728"
FAILED = {"facecolor": "none", "edgecolor": FAILED_COLOR, "hatch": "///", "linewidth": 1.0}
MARKERS = "os^DvX"
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
BAR_WIDTH = 0.6
HIGHEST_SHARE = 120  # of HBM, in percent: a higher bar is cut off
REASON_CHARACTERS = 500
CHARACTERS_PER_INCH = 14  # of the reasons' font
INCHES_PER_LINE = 0.14


def draw(recipe, results, path: str) -> None:
    """Writes a PNG: memory as a share of HBM, time of a step, minutes, and efficiency.

    A phase that does not compile, does not fit, or has no kernel for an operation is drawn as a
    hatched bar in the panel of memory: with the memory that it needs, or with the number of another
    reason, which is below the panels. One whose data hosts could not read has a red name. The
    efficiency is drawn if there are several sizes of a generation.

    Args:
        recipe: a checked recipe.
        results: list of `preflight.run.PhaseResult`.
        path: the file to write.

    Raises:
        OSError: the file cannot be written.
    """
    panels = [_draw_memory, _draw_time, _draw_minutes]
    if _generations_of_several_sizes(results):
        panels.append(_draw_efficiency)
    width = max(9, 1.2 * len(results) + 5)
    reasons = _describe_reasons(results, round(CHARACTERS_PER_INCH * width))
    size = (width, 3.4 * len(panels) + INCHES_PER_LINE * (reasons.count("\n") + 1))
    figure, axes = plt.subplots(len(panels), figsize=size, layout="constrained")
    for panel, draw_panel in zip(axes, panels, strict=True):
        draw_panel(panel, results)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Pre-flight {recipe.name}: estimates, at the least", x=0.01, ha="left", fontsize=12
    )
    below = figure.supxlabel(reasons, x=0.01, ha="left", fontsize=8, color=FAILED_COLOR)
    below.set_parse_math(False)  # an error message can have dollar signs
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _reasons(results) -> dict[str, int]:
    """Returns the reasons why steps cannot run, other than too little memory, with a number."""
    reasons = dict.fromkeys(r.error for r in results if r.error and not _is_too_large(r))
    return {reason: number for number, reason in enumerate(reasons, 1)}


def _describe_reasons(results, width) -> str:
    """Returns the numbered reasons, in lines of at most `width` characters."""
    texts = []
    for reason, number in _reasons(results).items():
        more = " ..." if len(reason) > REASON_CHARACTERS else ""
        text = f"({number}) {reason[:REASON_CHARACTERS]}{more}"
        texts.append(textwrap.fill(text, width, subsequent_indent="      "))
    return "\n".join(texts)


def _is_too_large(result) -> bool:
    needed = result.program.get("hbm_bytes")
    return bool(result.error) and needed is not None and needed > result.topology.chip.hbm_bytes


def _draw_memory(panel, results):
    """Draws the memory of a replica as a share of its HBM."""
    reasons = _reasons(results)
    for place, result in enumerate(results):
        limit = result.topology.chip.hbm_bytes
        needed = result.program.get("hbm_bytes")
        if result.error:
            too_large = _is_too_large(result)
            share = min(100 * needed / limit, HIGHEST_SHARE) if too_large else 100
            panel.bar(place, share, BAR_WIDTH, **FAILED)
            if too_large:
                percent = f"{100 * needed / limit:.3g} %"
                if 100 * needed / limit > HIGHEST_SHARE:
                    percent += ", cut off"
                text = f"{format_bytes(needed)}\n{percent}"
                _print_above(panel, place, share, text, FAILED_COLOR)
            else:
                _print_reason(panel, place, f"({reasons[result.error]})")
            continue
        shares = {name: 100 * size / limit for name, size in result.memory.items()}
        _stack(panel, place, shares, MEMORY_COLORS)
        text = f"{format_bytes(needed)}\n{100 * needed / limit:.3g} %"
        _print_above(panel, place, sum(shares.values()), text)
    panel.axhline(100, color="black", linewidth=1)
    panel.text(len(results) - 0.5, 101, "HBM", ha="right", va="bottom", fontsize=8)
    panel.set_ylabel("memory, % of HBM")
    panel.set_ylim(0, 145)
    panel.set_yticks(range(0, 101, 25))
    failed = any(result.error for result in results)
    last = Patch(label="cannot run", **FAILED) if failed else None
    _finish(panel, results, MEMORY_COLORS, last)


def _draw_time(panel, results):
    """Draws the parts of a step in milliseconds. They add up to its time."""
    tallest = max((result.time.step for result in results if result.time), default=None)
    for place, result in enumerate(results):
        time = result.time
        if time is None:
            _print_above(panel, place, 0, "cannot\nrun", FAILED_COLOR)
            continue
        compute = min(time.compute, time.work - time.update)
        parts = {
            "compute": compute,
            "waiting for memory": time.work - time.update - compute,
            "optimizer": time.update,
            "all-reduce": time.all_reduce - time.hidden,
        }
        _stack(panel, place, {name: 1e3 * part for name, part in parts.items()}, TIME_COLORS)
        _print_above(panel, place, 1e3 * time.step, format_seconds(time.step))
    panel.set_ylabel("ms per step")
    _scale(panel, tallest and 1e3 * tallest)
    _finish(panel, results, TIME_COLORS)


def _draw_minutes(panel, results):
    """Draws the time of each phase."""
    longest = max((result.minutes for result in results if result.time), default=None)
    in_seconds = longest is not None and longest < 1
    factor = 60 if in_seconds else 1
    for place, result in enumerate(results):
        if result.time is None:
            _print_above(panel, place, 0, "cannot\nrun", FAILED_COLOR)
            continue
        panel.bar(place, factor * result.minutes, BAR_WIDTH, color=TOTAL_COLOR)
        _print_above(panel, place, factor * result.minutes, format_minutes(result.minutes))
    panel.set_ylabel("seconds of the phase" if in_seconds else "minutes of the phase")
    _scale(panel, longest and factor * longest)
    _finish(panel, results, {})


def _generations_of_several_sizes(results) -> dict[str, list[tuple[int, float]]]:
    """Returns the (chips, efficiency) of each generation that compiles in several sizes."""
    chips = {result.topology.name: result.topology.chips for result in results}
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, efficiency in efficiencies(results).items():
        lines.setdefault(name.split(":")[0], []).append((chips[name], efficiency))
    return {
        kind: sorted(line) for kind, line in lines.items() if len({size for size, _ in line}) > 1
    }


def _draw_efficiency(panel, results):
    """Draws the speed per chip relative to the smallest slice, where there are several slices."""
    lines = _generations_of_several_sizes(results)
    sizes = sorted({chips for line in lines.values() for chips, _ in line})
    for marker, style, (kind, line) in zip(MARKERS, LINES, lines.items(), strict=False):
        points = [(chips, 100 * efficiency) for chips, efficiency in line]
        chips, percent = points[-1]
        panel.plot(
            *zip(*points, strict=True),
            marker=marker,
            linestyle=style,
            color="black",
            lw=1,
            label=f"{kind}: {percent:.1f} % on {chips:,} chips",
        )
    panel.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, handlelength=4
    )
    panel.set(xlabel="chips", ylabel="speed per chip, %", xscale="log", ylim=(0, 119))
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_major_formatter(FixedFormatter([f"{size:,}" for size in sizes]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(axis="y", alpha=0.3)


def _scale(panel, highest: float | None):
    """Sets the scale of the times of the results; without any, there is no scale."""
    if highest is None:
        panel.set_yticks([])
    panel.set_ylim(0, 1.2 * (highest or 1))


def _print_reason(panel, place, text):
    """Prints the number of the reason why a step cannot run in the middle of its bar."""
    panel.text(
        place,
        50,
        text,
        ha="center",
        va="center",
        fontsize=10,
        color=FAILED_COLOR,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )


def _stack(panel, place, parts, colors):
    """Draws one stacked bar; `parts` has the height of each part."""
    bottom = 0.0
    for name, height in parts.items():
        panel.bar(place, height, BAR_WIDTH, bottom, color=colors[name])
        bottom += height


def _print_above(panel, place, height, text, color="black"):
    panel.annotate(
        text,
        (place, height),
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
        color=color,
    )


def _finish(panel, results, colors, last=None):
    """Adds the names of topologies and phases, and a legend of the colors."""
    several = len({result.phase for result in results}) > 1
    labels = [
        f"{result.topology.name}\nphase {result.phase}" if several else result.topology.name
        for result in results
    ]
    refused = [bool(result.data and result.data.problems) for result in results]
    labels = [
        f"{label}\ndata: see report" if bad else label
        for label, bad in zip(labels, refused, strict=True)
    ]
    panel.set_xticks(range(len(results)), labels, fontsize=9)
    for text, bad in zip(panel.get_xticklabels(), refused, strict=True):
        text.set_color(FAILED_COLOR if bad else "black")
    panel.set_xlim(-0.6, len(results) - 0.4)
    handles = [Patch(color=color, label=name) for name, color in reversed(colors.items())]
    if last is not None:
        handles.append(last)
    if handles:
        panel.legend(
            handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8
        )
