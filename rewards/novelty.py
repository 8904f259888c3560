"""Novelty bands (EVOL-RL, arXiv 2509.15194): the vote decides the sign, being unlike the others the size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ttrl.protocols import RewardContext
from ttrl.rewards.ballot import Ballot, Values, VoteRule, open_ballot
from ttrl.rewards.reader import AnswerReader
from ttrl.types import Group, Rollout, Scored

SAME = 1e-9
"""Novelties this close do not differ; min-max scaling would blow their rounding up to a whole band."""


class Novelty:
    """r_i = 0.5 + 0.5 n_i for the elected answer, -1 + 0.5 n_i for any other one, -1 without an answer.

        u_i = 1 - (mean similarity to one's own side + largest similarity to anybody) / 2
        n_i = (u_i - min) / (max - min) over one's own side: the elected answer, or all other answers

    A side whose u are all equal has n = 1/2; the only member of a side has n = 1, its mean taken over everybody. Bands, halves and
    these two cases are those of the published code. Similarity is ours: there it is the cosine of an embedding model, here the
    share of common token n-grams (`overlap`), which sees wording and not meaning. Without an elected answer the group abstains.
    It pays for something other than the answer, on purpose, also where all agree: `terms` shows how much.
    Golden, n-grams of 1: {1 2} {1 2} {1 3} {1 2 3} elected, {4 5} {1 2} not -> .5 .5 1 .8, -.5 -1.
    """

    needs: frozenset[str] = frozenset()
    min_votes = 2

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        ties: Literal["abstain", "random", "shortest"] = "abstain",
        truncated_votes: bool = False,
        min_share: float = 0.0,
        min_margin: float = 0.0,
        min_confidence: float = 0.0,
        ngram: int = 2,
    ) -> None:
        if ngram < 1:
            raise ValueError(f"ngram counts tokens and must be at least 1, got {ngram}")
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule(ties=ties, min_share=min_share, min_margin=min_margin, min_confidence=min_confidence)
        self._ngram = ngram

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        decision = ballot.decide(self._rule, ctx.seed)
        label = ballot.form(decision.winner)
        terms = self._terms(ballot, label)
        return ballot.scored(
            terms["band"] + terms["novelty"], label is not None, label=label, share=decision.share, margin=decision.margin,
            trace=(decision.reason,), metrics={"vote_confidence": decision.confidence},
        )  # fmt: skip

    def terms(self, group: Group, ctx: RewardContext) -> dict[str, Values]:
        """[V] each; they add up to the rewards. All 0 where the group abstains."""
        ballot = open_ballot(self.reader, self._rule, group)
        return self._terms(ballot, ballot.form(ballot.decide(self._rule, ctx.seed).winner))

    def _terms(self, ballot: Ballot, label: str | None) -> dict[str, Values]:
        band, position = np.zeros(len(ballot.classes)), np.zeros(len(ballot.classes))
        if label is None:
            return {"band": band, "novelty": position}
        elected = ballot.paid(label) > 0
        similarity = overlap(ballot.group.rollouts, self._ngram)
        for side in (elected, ballot.answered & ~elected):
            position[side] = _positions(similarity, np.flatnonzero(side), np.flatnonzero(ballot.answered))
        band[:] = np.where(elected, 0.5, -1.0)
        return {"band": band, "novelty": 0.5 * position}


def overlap(rollouts: Sequence[Rollout], ngram: int) -> Values:
    """[V, V] Jaccard index of the sets of token n-grams: |A and B| / |A or B|, in [0, 1].

    A rollout shorter than n tokens is one shorter n-gram; two rollouts without any token are equal.
    """
    grams = []
    for rollout in rollouts:
        ids = rollout.token_ids.tolist()
        size = min(ngram, len(ids))
        grams.append(set(zip(*(ids[start:] for start in range(size)), strict=False)))
    similarity = np.ones((len(grams), len(grams)))
    for i, one in enumerate(grams):
        for j in range(i):
            common = len(one & grams[j])
            whole = len(one) + len(grams[j]) - common
            similarity[i, j] = similarity[j, i] = common / whole if whole else 1.0
    return similarity


def _positions(similarity: Values, side: npt.NDArray[np.intp], everybody: npt.NDArray[np.intp]) -> Values:
    """[len(side)] how novel each of a side is, from 0 (its least novel member) to 1."""
    if len(side) < 2:
        return np.ones(len(side))
    novelty = []
    for i in side:
        # fsum rounds once, so that the order of the rollouts cannot reach the last bits
        mean = math.fsum(similarity[i, j] for j in side if j != i) / (len(side) - 1)
        novelty.append(1.0 - (mean + max(similarity[i, j] for j in everybody if j != i)) / 2)
    values = np.asarray(novelty)
    low, high = float(values.min()), float(values.max())
    return np.full(len(side), 0.5) if high - low <= SAME else (values - low) / (high - low)
