"""Draws which package imports which: python docs/_ext/imports.py

Writes docs/results/imports.png from the imports of all files, also those inside functions.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
PICTURE = ROOT / "docs/results/imports.png"
PACKAGES = (
    *("tf_lamb", "recipes", "inputs", "models", "export", "tasks", "training", "preflight"),
    *("experiments", "benchmarks", "train"),
)


def imports() -> dict[str, set[str]]:
    """Returns the other packages that each package imports; `train` is train.py."""
    found = {}
    for package in PACKAGES:
        files = [*(ROOT / package).rglob("*.py")] or [ROOT / f"{package}.py"]
        names = set()
        for path in files:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names.add(node.module.split(".")[0])
        found[package] = names & {*PACKAGES} - {package}
    return found


def description(edges: dict[str, set[str]]) -> str:
    """Returns the edges as text, which the picture carries."""
    return "; ".join(f"{name}: {', '.join(sorted(edges[name]))}" for name in PACKAGES)


def draw(edges: dict[str, set[str]], path: pathlib.Path) -> None:
    """Draws each package above all that it imports."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    levels: dict[str, int] = {}

    def level(name):
        if name not in levels:
            levels[name] = 1 + max(map(level, edges[name]), default=-1)
        return levels[name]

    rows: dict[int, list[str]] = {}
    for name in PACKAGES:
        rows.setdefault(level(name), []).append(name)
    places = {
        name: (column - (len(row) - 1) / 2 + 0.25 * (number % 2), number)
        for number, row in rows.items()
        for column, name in enumerate(row)
    }
    figure, axes = pyplot.subplots(figsize=(8, 1.3 * len(rows)), layout="constrained")
    colors = dict(zip(PACKAGES, matplotlib.color_sequences["tab10"] * 2, strict=False))
    boxes = {}
    for name, (x, y) in places.items():
        label = "train.py" if name == "train" else name
        box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": colors[name]}
        text = axes.text(
            x, y, label, ha="center", va="center", bbox=box, family="monospace", zorder=3
        )
        boxes[name] = text.get_bbox_patch()
    for name, others in edges.items():
        for other in sorted(others):
            style = {
                "arrowstyle": "-|>",
                "color": colors[name],
                "patchA": boxes[name],
                "patchB": boxes[other],
                "shrinkA": 0,
                "shrinkB": 2,
                "connectionstyle": "arc3,rad=0.06",
            }
            axes.annotate("", places[other], places[name], arrowprops=style, zorder=1)
    axes.set_xlim(
        min(x for x, _ in places.values()) - 0.5, max(x for x, _ in places.values()) + 0.5
    )
    axes.set_ylim(-0.3, len(rows) - 0.7)
    axes.axis("off")
    figure.savefig(path, dpi=120, metadata={"Description": description(edges)})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(imports(), PICTURE)
    print(f"Written: {PICTURE}")
