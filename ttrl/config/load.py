"""`load_recipe`: file + overrides -> a checked, frozen Recipe whose paths no longer depend on where it was written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from ttrl.config.explain import explain
from ttrl.config.schema import Recipe
from ttrl.config.source import KeyPath, Tree, load_tree
from ttrl.errors import ConfigError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
BUNDLED = "bundled:"

# Keys whose relative paths are relative to the file that states them. `output` and `model.path` are relative to the
# working folder: a run belongs to whoever started it, and a model folder is named like a hub name.
_FILE_KEYS: tuple[KeyPath, ...] = (
    ("data", "prompts"), ("eval", "labels"), ("eval", "heldout", "prompts"), ("eval", "heldout", "labels"),
)  # fmt: skip
_PLUG_KEYS = frozenset(
    (
        "use", "source", "sampler", "engine", "reward", "gates", "objective", "advantage", "loss", "stabilizers", "guards", "backend",
        "parameters", "function", "shape", "regularizers",
    )
)  # fmt: skip


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name. Raises ConfigError listing every violation with its place."""
    tree = load_tree(find_recipe(recipe), list(overrides))
    for path in _FILE_KEYS:
        _absolute(tree, path)
    _absolute_template(tree)
    _absolute_plugs(tree.data, (), tree)
    try:
        return Recipe.model_validate(tree.data)
    except ValidationError as error:
        raise ConfigError(explain(error, tree, Recipe)) from None


def find_recipe(recipe: str | Path) -> Path:
    """The file as given, or the shipped recipe of that name (`quickstart`, `cpu/smollm2-135m-topics`)."""
    given = Path(recipe)
    if given.is_file():
        return given
    name = str(recipe).removeprefix("recipes/").removesuffix(".yaml")
    shipped = RECIPES / f"{name}.yaml"
    if ".." not in Path(name).parts and not Path(name).is_absolute() and shipped.is_file():
        return shipped
    known = ", ".join(shipped_recipes())
    raise ConfigError(f"{recipe}: no such recipe file. Shipped recipes: {known}")


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with ttrl, without the bases they extend."""
    files = (file.relative_to(RECIPES) for file in RECIPES.rglob("*.yaml"))
    return sorted(file.with_suffix("").as_posix() for file in files if file.parts[0] not in ("base", "data"))


def bundled(path: str) -> Path | None:
    """The folder or file behind `bundled:NAME`; None for any other path. Raises ConfigError for an unknown name."""
    if not path.startswith(BUNDLED):
        return None
    name = path.removeprefix(BUNDLED)
    target = (ASSETS / name).resolve()
    if not target.is_relative_to(ASSETS) or not target.exists() or not name:
        known = ", ".join(sorted(BUNDLED + folder.name for folder in ASSETS.iterdir() if folder.is_dir()))
        raise ConfigError(f"{path}: nothing of that name is bundled. Bundled: {known}")
    return target


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe with every default written out; loading it gives the same Recipe."""
    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keeps the order of the schema
    writer.width = 120
    writer.dump(recipe.model_dump(mode="json", by_alias=True), stream)
    return stream.getvalue()


def _absolute(tree: Tree, path: KeyPath) -> None:
    holder: Any = tree.data
    for part in path[:-1]:
        holder = holder.get(part) if isinstance(holder, dict) else None
    value = holder.get(path[-1]) if isinstance(holder, dict) else None
    if isinstance(value, str) and value and not value.startswith(("hub:", BUNDLED)) and not Path(value).is_absolute():
        place = tree.place(path)
        assert isinstance(holder, dict) and place is not None
        holder[path[-1]] = str((place.folder / value).resolve())


def _absolute_template(tree: Tree) -> None:
    data = tree.data.get("data")
    template = data.get("template") if isinstance(data, dict) else None
    if isinstance(template, str) and template.endswith(".txt"):
        _absolute(tree, ("data", "template"))


def _absolute_plugs(node: Any, path: KeyPath, tree: Tree) -> None:
    """`./file.py:Name` is relative to the recipe that states it, as `use:` and as a bare name."""
    for key, value in enumerate(node) if isinstance(node, list) else node.items() if isinstance(node, dict) else ():
        inner = (*path, key)
        slot = key if isinstance(key, str) else path[-1]
        if isinstance(value, str):
            if slot in _PLUG_KEYS and ".py:" in value and not Path(value).is_absolute():
                place = tree.place(inner)
                assert place is not None
                node[key] = str((place.folder / value).resolve())
        else:
            _absolute_plugs(value, inner, tree)
