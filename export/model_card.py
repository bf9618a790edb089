"""The model card of an export: model, data, results on held-out data, and versions."""

import contextlib
import platform
from importlib import metadata

import tensorflow as tf

from inputs.text.tokenization import casing

PACKAGES = ("tensorflow-text", "tf_keras", "tf-models-official", "numpy")


def make_card(
    task, parameters: int, results: dict[str, float], usage: str, steps: int | None = None
) -> str:
    """Returns the model card in Markdown.

    Args:
        task: a task of `tasks`, for its recipe, data and facts.
        parameters: number of parameters of the model.
        results: metric name -> value, from the task's `results`.
        usage: Python code that calls the SavedModel, which is in the variable `model`.
        steps: number of steps of the run; None for all of the recipe's.
    """
    recipe = task.recipe
    # A package may have another name: tensorflow-tpu on a TPU VM, or that of a nightly build.
    versions = [("Python", platform.python_version()), ("tensorflow", tf.__version__)]
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append((name, metadata.version(name)))
    lower_case = getattr(recipe, "lower_case", None)  # text only
    text = [] if lower_case is None else [f"- Text: {casing.describe(lower_case)}"]
    figures = [f"- {name}: {value:.4g}" for name, value in results.items()]
    return "\n".join(
        [
            f"# {recipe.name}",
            "",
            f"{recipe.task} {recipe.model}, {parameters:,} parameters, "
            f"{recipe.describe_steps(steps, task.example_unit)}.",
            "",
            f"- Recipe: {recipe.name}, from {recipe.reference}. `recipe.json` in the run's folder "
            "has all its fields.",
            f"- Data: {task.data}",
            f"- Amount: {task.amount}",
            *text,
            *(f"- Fingerprint of the {name}: {value}" for name, value in task.facts.items()),
            "",
            "## Results on held-out data",
            "",
            *figures,
            "",
            "## Use",
            "",
            "```python",
            "import tensorflow as tf",
            "",
            'model = tf.saved_model.load("export_dir")',
            usage,
            "```",
            "",
            "## Versions",
            "",
            *(f"- {name} {version}" for name, version in versions),
            "",
        ]
    )
