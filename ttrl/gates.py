"""Gates: which scored groups may train. They look at the vote, never at a shaped reward sum.

A shaped reward has variance even when every answer is wrong, and a filter on it lets such groups through.
"""

from __future__ import annotations

import numpy as np

from ttrl.types import NO_ANSWER, Scored


class VoteShare:
    """Keep groups whose label has a share in [low, high] of the valid votes."""

    def __init__(self, *, low: float = 0.0, high: float = 1.0) -> None:
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"vote_share needs 0 <= low <= high <= 1, got low={low}, high={high}")
        self._low, self._high = low, high

    def __call__(self, scored: Scored) -> str | None:
        if scored.share < self._low:
            return "share_low"
        return "share_high" if scored.share > self._high else None


class Answered:
    """Keep groups in which at least this fraction of the rollouts gave an answer."""

    def __init__(self, *, low: float = 0.5) -> None:
        if not 0.0 <= low <= 1.0:
            raise ValueError(f"answered needs 0 <= low <= 1, got {low}")
        self._low = low

    def __call__(self, scored: Scored) -> str | None:
        return "answered_low" if float(np.mean(scored.classes != NO_ANSWER)) < self._low else None


class ZeroVariance:
    """Drop groups whose trained rollouts all have the same reward: their advantages are zero."""

    def __call__(self, scored: Scored) -> str | None:
        rewards = scored.rewards[scored.train]
        return "zero_variance" if rewards.size and np.all(rewards == rewards[0]) else None
