"""Turning schema violations into sentences: where, which key, what is allowed, and the nearest right key."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from ttrl.config.source import KeyPath, Tree


def suggest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' or the list of what is known, ready to append to a message."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(names)}." if names else ""


def explain(error: ValidationError, tree: Tree, root: type[BaseModel]) -> str:
    """All violations of one recipe, one line each, in the order of the file."""
    lines: dict[str, tuple[str, int, int]] = {}
    for item in error.errors(include_url=False):
        path = tuple(part for part in item["loc"] if part != "function-before[_from_name(), Plug]")
        place = tree.place(path)
        dotted = ".".join(str(part) for part in path)
        message = _message(item, path, root)
        where = f"{place}: " if place else ""
        order = (str(place.file), place.line, place.column) if place else ("", 0, 0)
        lines.setdefault(f"{where}{dotted + ': ' if dotted else ''}{message}", order)
    return "\n".join(sorted(lines, key=lambda line: lines[line]))


def _message(item: Any, path: KeyPath, root: type[BaseModel]) -> str:
    kind, value = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return f"unknown key.{suggest(str(path[-1]), _keys_at(root, path[:-1]))}"
    if kind == "missing":
        return "is required"
    if kind == "literal_error":
        expected = item["ctx"]["expected"]
        return f"{value!r} is not one of {expected}." + suggest(
            str(value), expected.replace("'", "").replace(" or ", ", ").split(", ")
        )
    if kind == "value_error":
        return str(item["ctx"]["error"])
    text = item["msg"].removeprefix("Input should be ")
    return f"should be {text}, got {value!r}" if text != item["msg"] else f"{item['msg']}, got {value!r}"


def _keys_at(root: type[BaseModel], path: KeyPath) -> list[str]:
    model: type[BaseModel] | None = root
    for part in path:
        if isinstance(part, int):
            continue
        found = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None) if model else None
        model = _model_in(found.annotation) if found else None
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for found in map(_model_in, typing.get_args(annotation)) if found), None)
