"""The model card beside an export: what was trained, on what, how well, with which versions."""

import platform
from importlib import metadata

PACKAGES = ("tensorflow", "tensorflow-text", "tf_keras", "tf-models-official", "numpy")


def make_card(task, parameters: int, results: dict[str, float], usage: str) -> str:
    """The card as Markdown.

    Args:
        task: a task of `tasks`, for its recipe, its data and its facts.
        parameters: how many the model has.
        results: as the task's `results` returns them.
        usage: Python that calls the SavedModel, `model`.
    """
    recipe = task.recipe
    versions = [("Python", platform.python_version())]
    versions += [(name, metadata.version(name)) for name in PACKAGES]
    figures = [f"- {name}: {value:.4g}" for name, value in results.items()]
    return "\n".join(
        [
            f"# {recipe.name}",
            "",
            f"{recipe.task} {recipe.model}, {parameters:,} parameters, {recipe.steps:,} steps of "
            f"{recipe.phases[-1].global_batch_size} {task.example_unit}.",
            "",
            f"- Recipe: {recipe.name}, after {recipe.reference}. As run, with every field: "
            "`recipe.json` in the run's folder.",
            f"- Data: {task.data}",
            f"- Amount: {task.amount}",
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
