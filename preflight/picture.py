"""The pre-flight's findings as a picture: memory, time of a step, efficiency."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from preflight.report import GIB, efficiencies


def draw(recipe, findings, path: str) -> None:
    """Writes a PNG of three panels."""
    found = [finding for finding in findings if finding.time]
    labels = [f"{f.topology.name}\nphase {f.phase}" for f in found]
    size = (max(9, 1.2 * len(found) + 5), 9)
    figure, panels = plt.subplots(3, figsize=size, layout="constrained")
    _stack(panels[0], labels, [_gib(f.memory) for f in found])
    for place, finding in enumerate(found):
        limit = finding.topology.generation.hbm_bytes / GIB
        panels[0].hlines(limit, place - 0.4, place + 0.4, "black", label="HBM" if not place else "")
    panels[0].set_ylabel("GiB a replica")
    _stack(panels[1], labels, [_parts(f.time) for f in found])
    panels[1].set_ylabel("ms a step, estimated")
    values = efficiencies(findings)
    chips = {f.topology.name: f.topology.chips for f in found}
    for kind in sorted({name.split(":")[0] for name in values}):
        line = sorted((chips[n], 100 * v) for n, v in values.items() if n.startswith(f"{kind}:"))
        panels[2].plot(*zip(*line, strict=True), marker="o", label=kind)
    panels[2].set(xlabel="chips", ylabel="% of the smallest, a chip", xscale="log", ylim=(0, 110))
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    panels[0].set_title(f"Pre-flight {recipe.name}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _gib(memory):
    return {name: size / GIB for name, size in memory.items()}


def _parts(time):
    """Milliseconds of a step, which add up to it."""
    compute = min(time.compute, time.compiler - time.update)
    parts = {
        "compute": compute,
        "waiting for memory": time.compiler - time.update - compute,
        "optimizer": time.update,
        "all-reduce": time.all_reduce - time.hidden,
    }
    return {name: 1e3 * seconds for name, seconds in parts.items()}


def _stack(panel, labels, rows):
    bottom = [0.0] * len(rows)
    for name in rows[0] if rows else ():
        heights = [row[name] for row in rows]
        panel.bar(range(len(rows)), heights, 0.6, bottom, label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    panel.set_xticks(range(len(labels)), labels)
