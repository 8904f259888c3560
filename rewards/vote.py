"""Deciding which class of answers is "the answer" of a group, or that there is none.

Plurality and weighted votes, over all rollouts, over all others (`leave_one_out`) or over the other half (`split_vote`).
Rules that do not add up votes are in `ttrl.rewards.rules`; where weights come from in `ttrl.rewards.weights`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ttrl.rewards.mode import mode_probability
from ttrl.types import NO_ANSWER

Ties = Literal["abstain", "random", "shortest"]

TIE_TOLERANCE = 1e-9
"""Weights within this relative distance tie, so that the rounding of a sum elects nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The outcome of a vote. `winner` is None when the group abstains; `reason` then says why."""

    winner: int | None
    share: float
    """Votes (or weight) of the leading class divided by all valid votes (or their weight); 0 without valid votes."""
    margin: float
    """Share of the leader minus share of the runner-up."""
    counts: tuple[int, ...]
    """Votes per class."""
    reason: str
    scores: tuple[float, ...] = ()
    """What was compared, per class: weight, bound or mean. Empty where that is `counts`."""
    ballots: tuple[float, ...] | None = None
    """Independent votes per class that a weighted or correlated vote is worth; for weights, Kish's effective number. None where that
    is `counts`."""

    @property
    def confidence(self) -> float:
        """Posterior probability that the leading class is the population mode (`mode_probability`); 0 without valid votes.

        Calibrated for plain votes; an approximation for weighted ones. It belongs to the most voted class, which for the
        rules in `ttrl.rewards.rules` need not be the winner.
        """
        return mode_probability(self.counts if self.ballots is None else self.ballots)


def decide(
    classes: Sequence[int], *, weights: Sequence[float] | None = None, lengths: Sequence[float] | None = None,
    worth: Sequence[float] | None = None, ties: str = "abstain", min_votes: int = 2, min_share: float = 0.0, min_margin: float = 0.0,
    min_confidence: float = 0.0, tie_seed: int = 0,
) -> Decision:  # fmt: skip
    """Plurality over equivalence classes; independent of the order of the rollouts up to the numbering of classes.

    `weights` [V] >= 0: the class with the largest sum of weights wins (arXiv 2203.11171, weighted form); None: every vote is 1.
    `worth` [V]: how many independent votes each is, where votes are correlated; it bears on the confidence only.
    Tie rule: `abstain` (default); `random`: one of the tied classes by `tie_seed`, chosen among the classes in their given
    numbering, so number classes by content if the outcome must not depend on the order; `shortest`: the tied class with the
    smallest mean of `lengths` [V], and nobody if these tie too. Length never overrules votes: as a rule of its own it teaches a
    model to be brief. NO_ANSWER never counts. The group abstains when nobody answered, when the leader has fewer than `min_votes`
    votes, or when share, margin or confidence are too low (bounds are inclusive). Raises ValueError for bad weights or options.
    """
    if ties not in ("abstain", "random", "shortest"):
        raise ValueError(f"ties must be 'shortest', 'abstain' or 'random', got {ties!r}")
    valid = [i for i, c in enumerate(classes) if c != NO_ANSWER]
    if not valid:
        return Decision(winner=None, share=0.0, margin=0.0, counts=(), reason="nobody answered")
    counts = np.bincount(np.asarray([classes[i] for i in valid], np.int64))
    masses, ballots = _masses(classes, valid, counts, weights)
    total, ordered = math.fsum(masses), sorted(masses, reverse=True)
    if worth is not None and total > 0:
        ballots = tuple(mass / total * math.fsum(worth[i] for i in valid) for mass in masses)
    if total == 0:
        return Decision(winner=None, share=0.0, margin=0.0, counts=_ints(counts), reason="every answer has weight 0",
                        scores=masses, ballots=ballots)  # fmt: skip
    share, margin = ordered[0] / total, (ordered[0] - (ordered[1] if len(ordered) > 1 else 0.0)) / total
    leaders = [c for c, mass in enumerate(masses) if mass >= ordered[0] * (1 - TIE_TOLERANCE)]
    votes = max(int(counts[c]) for c in leaders)
    support = f"{votes} votes" if weights is None else f"weight {ordered[0]:.3g}"
    winner: int | None = leaders[0]
    reason = f"{votes} of {len(valid)} valid votes" + ("" if weights is None else f", {share:.2f} of the weight")
    if votes < min_votes:
        winner, reason = None, f"the leading answer has {votes} votes, fewer than {min_votes}"
    elif len(leaders) > 1 and ties == "abstain":
        winner, reason = None, f"{len(leaders)} answers tie with {support}"
    elif share < min_share or margin < min_margin:
        winner, reason = None, f"share {share:.2f} or margin {margin:.2f} is below {min_share:.2f} / {min_margin:.2f}"
    elif len(leaders) > 1 and ties == "random":
        winner = int(leaders[np.random.Generator(np.random.Philox(key=tie_seed)).integers(len(leaders))])
        reason = f"drawn by seed from {len(leaders)} answers that tie with {support}"
    elif len(leaders) > 1:
        winner = _shortest(classes, leaders, lengths)
        reason = f"{len(leaders)} answers tie with {support}, " + (
            "and in length" if winner is None else "the shortest wins"
        )
    decision = Decision(winner=winner, share=share, margin=margin, counts=_ints(counts), reason=reason,
                        scores=() if weights is None else masses, ballots=ballots)  # fmt: skip
    return decision if min_confidence <= 0.0 else hold_back(decision, min_confidence)


def hold_back(decision: Decision, min_confidence: float) -> Decision:
    """The same decision, abstaining when the leader is the population mode with less than this probability."""
    if decision.winner is None or decision.confidence >= min_confidence:
        return decision
    reason = f"the leader is the mode with probability {decision.confidence:.2f}, less than {min_confidence:.2f}"
    return Decision(winner=None, share=decision.share, margin=decision.margin, counts=decision.counts, reason=reason,
                    scores=decision.scores, ballots=decision.ballots)  # fmt: skip


def leave_one_out(
    classes: Sequence[int], *, weights: Sequence[float] | None = None, lengths: Sequence[float] | None = None, **options: Any
) -> list[Decision]:  # fmt: skip
    """[V] for every rollout the decision of all others: nobody elects its own label. Options as for `decide`."""
    return [
        decide([NO_ANSWER if j == i else c for j, c in enumerate(classes)], weights=weights, lengths=lengths, **options)
        for i in range(len(classes))
    ]


def split_vote(
    classes: Sequence[int], second_half: Sequence[bool], *, weights: Sequence[float] | None = None,
    lengths: Sequence[float] | None = None, **options: Any,
) -> list[Decision]:  # fmt: skip
    """[V] for every rollout the decision of the half it is not in. Draw the halves by rollout index and seed, not by position."""
    if len(second_half) != len(classes):
        raise ValueError(f"{len(second_half)} marks for {len(classes)} votes")
    by_half = [
        decide([c if bool(s) is half else NO_ANSWER for c, s in zip(classes, second_half, strict=True)], weights=weights,
               lengths=lengths, **options)
        for half in (False, True)
    ]  # fmt: skip
    return [by_half[not s] for s in second_half]


def _masses(
    classes: Sequence[int], valid: Sequence[int], counts: np.ndarray, weights: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Weight per class, exactly rounded (fsum) and so the same in any order, and the votes it is worth."""
    if weights is None:
        return tuple(float(c) for c in counts), None
    if len(weights) != len(classes):
        raise ValueError(f"{len(weights)} weights for {len(classes)} votes")
    used = {i: float(weights[i]) for i in valid}
    if any(not math.isfinite(w) or w < 0 for w in used.values()):
        raise ValueError(
            "weights must be finite and not negative; pass log-probs or logits through exp or a sigmoid first"
        )
    masses = tuple(math.fsum(w for i, w in used.items() if classes[i] == c) for c in range(len(counts)))
    largest = max(used.values(), default=0.0)
    # Kish: (sum w)^2 / sum w^2 equal votes carry as much information; relative weights cannot overflow when squared
    squares = math.fsum((w / largest) ** 2 for w in used.values()) if largest else 1.0
    scale = math.fsum(w / largest for w in used.values()) / squares / largest if largest else 0.0
    return masses, tuple(mass * scale for mass in masses)


def _shortest(classes: Sequence[int], leaders: Sequence[int], lengths: Sequence[float] | None) -> int | None:
    if lengths is None or len(lengths) != len(classes):
        raise ValueError("ties 'shortest' needs one length per vote")
    means = []
    for leader in leaders:
        members = [float(n) for n, c in zip(lengths, classes, strict=True) if c == leader]
        means.append(math.fsum(members) / len(members))
    best = [leader for leader, mean in zip(leaders, means, strict=True) if mean == min(means)]
    return best[0] if len(best) == 1 else None


def _ints(counts: np.ndarray) -> tuple[int, ...]:
    return tuple(int(c) for c in counts)
