"""Recipes: the schema, and reading them from YAML with the place of every key remembered."""

from ttrl.config.load import load_recipe, recipe_to_yaml
from ttrl.config.schema import Plug, Recipe

__all__ = ["Plug", "Recipe", "load_recipe", "recipe_to_yaml"]
