"""Plug-ins that stand among the options of an objective: its advantage, shapers, loss and regularizers."""

from __future__ import annotations

from typing import Any

from ttrl.config.schema import Plug

SLOTS = {"advantage": "advantage", "shape": "shaper", "loss": "loss", "regularizers": "regularizer"}
"""Option of the objective -> slot."""


def inner_plugs(objective: Plug) -> list[tuple[str, Plug]]:
    """(slot, plug-in) in the order of the options. What is no plug-in is left out: `ttrl check` says what is wrong with it."""
    found = []
    for option, slot in SLOTS.items():
        value: Any = objective.options.get(option)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, str) or (isinstance(item, dict) and isinstance(item.get("use"), str)):
                found.append((slot, Plug.model_validate(item)))
    return found


def has_reference(terms: tuple[Plug, ...], objective: Plug) -> bool:
    """A term of the loss compares with the start model, so a pass under it is needed."""
    return any(plug.use == "kl" for plug in (*terms, *(plug for _, plug in inner_plugs(objective))))
