"""Gates: which scored groups may train. They look at the vote, never at a shaped reward sum.

A shaped reward has variance even when every answer is wrong, and a filter on it lets such groups through.
"""

from __future__ import annotations

import math

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


class Reliable:
    """Keep prompts whose vote is neither settled nor hopeless: low < H <= high * ln V (EATA, arXiv 2204.02610).

    H is the entropy, in nats, of the answers that the V rollouts of the group gave. EATA's high is 0.4; its lower bound is here
    because a unanimous group teaches nothing. With `weigh`, the advantages of what is kept are multiplied by
    exp(high * ln V - H), which is 1 at the upper bound: nearly unanimous prompts then count most.
    Example, V = 8 (bound 0.832): 6/2 votes pass with H = 0.562, 5/3 with 0.662, 5/2/1 do not (0.900).
    """

    def __init__(self, *, low: float = 0.0, high: float = 0.4, weigh: bool = False) -> None:
        if not 0.0 <= low < high:
            raise ValueError(
                f"reliable needs 0 <= low (nats) < high (share of the largest entropy), got low={low}, high={high}"
            )
        self._low, self._high, self._weigh = low, high, weigh

    def __call__(self, scored: Scored) -> str | None:
        entropy = vote_entropy(scored)
        if entropy <= self._low:
            return "vote_entropy_low"
        return "vote_entropy_high" if entropy > self._high * math.log(len(scored.classes)) else None

    def weight(self, scored: Scored) -> float:
        """What the advantages of a group that was kept are multiplied by."""
        return math.exp(self._high * math.log(len(scored.classes)) - vote_entropy(scored)) if self._weigh else 1.0


def vote_entropy(scored: Scored) -> float:
    """In nats, of the distribution over answer classes; 0 when nobody answered."""
    valid = scored.classes[scored.classes != NO_ANSWER]
    if not valid.size:
        return 0.0
    shares = np.bincount(valid) / valid.size
    shares = shares[shares > 0]
    return max(0.0, float(-(shares * np.log(shares)).sum()))


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
