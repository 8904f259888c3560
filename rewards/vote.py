"""Deciding which class of answers is "the answer" of a group, or that there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttrl.types import NO_ANSWER


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The outcome of a vote. `winner` is None when the group abstains; `reason` then says why."""

    winner: int | None
    share: float
    """Votes of the leading class divided by all valid votes; 0 without valid votes."""
    margin: float
    """Share of the leader minus share of the runner-up."""
    counts: tuple[int, ...]
    """Votes per class."""
    reason: str


def decide(
    classes: Sequence[int], *, ties: str = "abstain", min_votes: int = 2, min_share: float = 0.0, min_margin: float = 0.0,
    tie_seed: int = 0,
) -> Decision:  # fmt: skip
    """Plurality over equivalence classes; independent of the order of the rollouts up to the numbering of classes.

    Tie rule: `abstain` (default), or `random`: one of the tied classes by `tie_seed`, chosen among the classes in their given
    numbering, so number classes by content if the outcome must not depend on the order. NO_ANSWER never counts. The group
    abstains when nobody answered, when the leader has fewer than `min_votes` votes, or when share or margin are too low.
    """
    if ties not in ("abstain", "random"):
        raise ValueError(f"ties must be 'abstain' or 'random', got {ties!r}")
    valid = np.asarray([c for c in classes if c != NO_ANSWER], dtype=np.int64)
    if valid.size == 0:
        return Decision(winner=None, share=0.0, margin=0.0, counts=(), reason="nobody answered")
    counts = np.bincount(valid)
    ordered = np.sort(counts)[::-1]
    share = float(ordered[0] / valid.size)
    margin = float((ordered[0] - (ordered[1] if ordered.size > 1 else 0)) / valid.size)
    leaders = np.flatnonzero(counts == ordered[0])
    winner: int | None = int(leaders[0])
    reason = f"{ordered[0]} of {valid.size} valid votes"
    if ordered[0] < min_votes:
        winner, reason = None, f"the leading answer has {ordered[0]} votes, fewer than {min_votes}"
    elif len(leaders) > 1 and ties == "abstain":
        winner, reason = None, f"{len(leaders)} answers tie with {ordered[0]} votes"
    elif share < min_share or margin < min_margin:
        winner, reason = None, f"share {share:.2f} or margin {margin:.2f} is below {min_share:.2f} / {min_margin:.2f}"
    elif len(leaders) > 1:
        winner = int(leaders[np.random.Generator(np.random.Philox(key=tie_seed)).integers(len(leaders))])
        reason = f"drawn by seed from {len(leaders)} answers that tie with {ordered[0]} votes"
    return Decision(winner=winner, share=share, margin=margin, counts=tuple(int(c) for c in counts), reason=reason)
