"""Reading YAML into a plain tree while remembering where every key stands, and merging trees along `extends`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ttrl.errors import ConfigError

KeyPath = tuple[str | int, ...]
MAX_EXTENDS = 10
MAX_RECIPE_BYTES = 1_000_000
MAX_RECIPE_KEYS = 10_000
"""Bounds what aliases may unfold to."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written: a file with line and column, or the command line."""

    file: Path | None
    line: int = 0
    column: int = 0
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.file else f"command line ({self.text})"

    @property
    def folder(self) -> Path:
        """What relative paths written at this place are relative to."""
        return self.file.parent if self.file else Path.cwd()


@dataclass(slots=True)
class Tree:
    """A plain nested value and the place of each of its keys."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place | None:
        """The place of the nearest key at or above `path`."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return None


def read_tree(file: Path) -> Tree:
    """Parse one YAML file (YAML 1.2, safe types only). Raises ConfigError with file:line:column."""
    parser = YAML(typ="rt", pure=True)
    parser.allow_duplicate_keys = False
    try:
        if file.stat().st_size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_RECIPE_BYTES} bytes; this is not a recipe")
        node = parser.load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        problem = (error.problem or "broken YAML").split("\n")[0]
        raise ConfigError(f"{where}: {problem}") from None
    except YAMLError as error:
        raise ConfigError(f"{file}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    if not isinstance(node, CommentedMap):
        raise ConfigError(f"{file}:1:1: a recipe is a mapping of keys to values")
    tree = Tree(places={(): Place(file, 1, 1)})
    try:
        tree.data = _plain(node, (), file, tree.places)
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    return tree


def _plain(node: Any, path: KeyPath, file: Path, places: dict[KeyPath, Place]) -> Any:
    if len(places) > MAX_RECIPE_KEYS:
        raise ConfigError(f"{file}: more than {MAX_RECIPE_KEYS} keys; this is not a recipe")
    if isinstance(node, CommentedMap):
        result: dict[str, Any] = {}
        for key, value in node.items():
            inner = (*path, str(key))
            line, column = node.lc.key(key) if key in node.lc.data else (node.lc.line, node.lc.col)
            places[inner] = Place(file, line + 1, column + 1)
            result[str(key)] = _plain(value, inner, file, places)
        return result
    if isinstance(node, CommentedSeq):
        items = []
        for index, value in enumerate(node):
            line, column = node.lc.item(index)
            places[(*path, index)] = Place(file, line + 1, column + 1)
            items.append(_plain(value, (*path, index), file, places))
        return items
    return _scalar(node)


def _scalar(node: Any) -> Any:
    # The round-trip loader returns subclasses that remember their notation (1e-6, 0x10); the schema wants the bare types.
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def parse_override(text: str) -> Tree:
    """`rollout.votes_per_prompt=16` as a tree. The value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(
            f"command line: {text!r} is not of the form key.path=value, for example rollout.votes_per_prompt=16"
        )
    try:
        parsed = YAML(typ="safe", pure=True).load(value)
    except (YAMLError, RecursionError):
        raise ConfigError(f"command line: the value of {text!r} is not valid YAML") from None
    tree = Tree()
    keys = key.split(".")
    data: Any = parsed
    for end in range(len(keys), 0, -1):
        tree.places[tuple(keys[:end])] = Place(None, text=text)
        data = {keys[end - 1]: data}
    tree.data = data
    return tree


def merge(base: Tree, over: Tree) -> Tree:
    """`over` wins key by key; lists and plug-ins with another `use` are replaced whole, not mixed."""
    merged = Tree(dict(base.data), dict(base.places))
    merged.data = _merge(base.data, over.data, (), merged.places)
    merged.places.update(over.places)
    return merged


def _merge(
    base: Mapping[str, Any], over: Mapping[str, Any], path: KeyPath, places: dict[KeyPath, Place]
) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        inner = (*path, key)
        held = result.get(key)
        other_plug = (
            isinstance(value, dict)
            and "use" in value
            and (not isinstance(held, dict) or held.get("use") != value["use"])
        )
        if isinstance(held, dict) and isinstance(value, dict) and not other_plug:
            result[key] = _merge(held, value, inner, places)
        else:
            for stale in [p for p in places if p[: len(inner)] == inner]:
                del places[stale]
            result[key] = value
    return result


def load_tree(file: Path, overrides: list[str]) -> Tree:
    """The recipe with its `extends` chain and the overrides applied; `extends` itself is consumed."""
    chain: list[Tree] = []
    seen: list[Path] = []
    current: Path | None = file
    while current is not None:
        resolved = current.resolve()
        if resolved in seen or len(seen) >= MAX_EXTENDS:
            raise ConfigError(
                f"{chain[-1].place(('extends',))}: extends runs in a circle or is deeper than {MAX_EXTENDS}: {current}"
            )
        if chain and not current.is_file():
            raise ConfigError(f"{chain[-1].place(('extends',))}: extends: no such file: {current}")
        seen.append(resolved)
        tree = read_tree(current)
        parent = tree.data.pop("extends", None)
        if parent is not None and not isinstance(parent, str):
            raise ConfigError(f"{tree.place(('extends',))}: extends names one file")
        chain.append(tree)
        current = current.parent / parent if parent is not None else None
    result = chain[-1]
    for tree in reversed(chain[:-1]):
        result = merge(result, tree)
    for text in overrides:
        result = merge(result, parse_override(text))
    return result
