"""Recipes: the YAML file that determines a run, read strictly and without running anything in it."""

from vlm.recipe.errors import RecipeError
from vlm.recipe.load import load_recipe
from vlm.recipe.schema import Recipe
from vlm.recipe.section import Method

__all__ = ["Method", "Recipe", "RecipeError", "load_recipe"]
