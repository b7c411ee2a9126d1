"""Recipes: one YAML file that fully describes a run. Load, extend, override, check, build."""

from neo_components.recipe.building import build
from neo_components.recipe.faults import Fault, RecipeError
from neo_components.recipe.load import Recipe, load_recipe, validate_recipe
from neo_components.recipe.schema import (
    Checkpoint,
    Compose,
    ModelRecipe,
    PreBufferAsset,
    PretrainedLLM,
)
from neo_components.recipe.shipped import (
    Shipped,
    copy_recipe,
    find_recipe,
    import_user_modules,
    list_recipes,
)

__all__ = [
    "Checkpoint", "Compose", "Fault", "ModelRecipe", "PreBufferAsset", "PretrainedLLM", "Recipe", "RecipeError",
    "Shipped", "build", "copy_recipe", "find_recipe", "import_user_modules", "list_recipes", "load_recipe",
    "validate_recipe",
]  # fmt: skip
