"""Guards: they watch a run without labels, and say when the weights it has are not to be trusted."""

from __future__ import annotations

from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.guards.base import Guard
from ttrl.guards.keeper import Keeper
from ttrl.registry import build

__all__ = ["Keeper", "build_guards"]

PARTS = ("policy", "judge", "inspect", "went_back", "state", "load_state")


def build_guards(recipe: Recipe) -> dict[str, Guard]:
    """By their names in the recipe. Raises ConfigError for what cannot be guarded as asked."""
    guards: dict[str, Guard] = {}
    for plug in recipe.guards:
        if plug.use in guards:
            raise ConfigError(f"guards: {plug.use!r} is named twice; give it once, with the options of both")
        guard: Guard = build("guard", plug)
        missing = [name for name in PARTS if not hasattr(guard, name)]
        if missing:
            raise ConfigError(
                f"guard {plug.use!r} must have {', '.join(missing)}; see ttrl/guards/base.py for what they do"
            )
        if guard.policy.action == "rollback" and recipe.rollout.ahead:
            raise ConfigError(
                f"guards: {plug.use!r} with action rollback needs rollout.ahead: 0, because groups that were drawn ahead come from "
                "weights that a rollback takes back, and would be trained on after it; use action lower_lr, stop, abstain or warn"
            )
        guards[plug.use] = guard
    return guards
