"""Published large-batch training runs as data: `RECIPES` by name, and functions to change one.

A recipe is a frozen dataclass. This package only imports the standard library. Optimizers, tasks
and models are names, which the training program looks up.
"""

from recipes.bert import BERT_RECIPES
from recipes.growing import grow_batch
from recipes.mlperf import MLPERF_RECIPES
from recipes.overrides import nearest_name, override, resized
from recipes.resnet import RESNET_RECIPES
from recipes.scaling import scale_recipe
from recipes.squad import SQUAD_RECIPES
from recipes.types import Phase, Recipe

__all__ = [
    "RECIPES",
    "Phase",
    "Recipe",
    "find_recipe",
    "grow_batch",
    "override",
    "resized",
    "scale_recipe",
]

RECIPES = {
    recipe.name: recipe
    for recipe in (*BERT_RECIPES, *SQUAD_RECIPES, *RESNET_RECIPES, *MLPERF_RECIPES)
}


def find_recipe(name: str) -> Recipe:
    """Returns the recipe called `name`.

    Raises:
        ValueError: If there is none. The message names the nearest one, or all recipes.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}. {nearest_name(name, RECIPES)}")
    return RECIPES[name]
