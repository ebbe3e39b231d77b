"""What every command that takes a recipe shares: its arguments, and the recipe they mean."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.recipe import Recipe


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """``RECIPE [key.path=value ...]``."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    add_overrides(parser, "change the recipe for this run, such as stages.0.steps=60 or prune=null")


def add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    """``[key=value ...]``, after flags too."""
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=text)


def load(arguments: argparse.Namespace) -> "Recipe":
    """The recipe with its overrides, after every method in it has had its options read.

    Raises:
        RecipeError: whatever is wrong with it, before anything has run.
    """
    from vlm.create import check
    from vlm.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check(recipe)
    return recipe
