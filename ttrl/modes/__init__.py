"""Loops other than training on a set: `per_prompt` (adapt, answer, restore) and `stream` (answer, then learn).

A mode is a source that brings its own loop: `data.source: stream` in a recipe says both which prompts come next and what is
done with them. Sources without one are trained on by `ttrl.loop.train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ttrl.config.schema import Recipe
    from ttrl.journal import Journal, Progress
    from ttrl.parts import Parts


@runtime_checkable
class Mode(Protocol):
    """A Source with a loop of its own. It answers every prompt it is given, and `answers.jsonl` holds the answers.

    A mode that remembers something across steps is Stateful too, as any part of a run.
    """

    def batch(self, step: int) -> Sequence[str]:
        """As every source: ids of the prompts of step 0, 1, 2, ..."""
        ...

    def total(self, recipe: Recipe) -> int:
        """Steps of the loop: what `Progress.step` is at the end."""
        ...

    def check(self, recipe: Recipe) -> None:
        """Raises ConfigError for a recipe the loop cannot run."""
        ...

    def run(self, parts: Parts, journal: Journal, progress: Progress) -> None:
        """The remaining steps, as `ttrl.loop.train`: `progress` says where to start and is moved along."""
        ...
