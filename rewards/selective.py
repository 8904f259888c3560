"""Selective rewards (SCRL, arXiv 2603.19880): a positive label only when the vote is clear, and negative ones."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.rewards.ballot import Ballot, Values, VoteRule, open_ballot
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.vote import Decision
from ttrl.rewards.weights import class_entropies
from ttrl.types import Group, Scored

SAME = 1e-9
"""Entropies and margins this close are equal."""


class Selective:
    """Positive: the plurality, if its share p >= `min_share` and its lead over the next answer > `min_margin`. Negative: answers
    with p < `rare_share` whose rollouts have a mean token entropy H(a) above H, the mean over all answered rollouts of the group.

        shaping `binary`    r_i = 1 positive, -penalty negative, 0 otherwise
        shaping `entropy`   r_i = p(a_i) positive, -penalty (rare_share - p(a_i)) negative, 0 otherwise; each minus
                            entropy_weight * (H(a_i) - H)

    Thresholds as in the published example for 32 votes (.375, .125, .125; the published code's own defaults are .5, .15, .15). With
    fewer than 9 votes no answer is rarer than .125: raise `rare_share`. Ours: shares are of valid votes (published: of all rollouts);
    an answer exactly as unsure as the group is not negative (published: it is); a rollout without an answer is paid the lowest
    reward of its group (published: -1); a group with neither kind of label abstains (published, `entropy`: trains on entropies),
    and so does one in which no two agree, where everything is rare. A tied plurality is not elected. The published code pays p to
    positive answers where its documentation says p - min_share; this follows the code.
    Golden: answers 5 5 5 5 7 7 8 9, entropy 1 but for the 9 with 3, rare_share .15 -> share .5, margin .25, rewards 1 1 1 1 0 0 0
    -1; shaped by entropy (H 1.25, weight .1): .525 x 4, .025 .025 .025, -.2.
    """

    needs = frozenset({"entropy"})
    min_votes = 4

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        truncated_votes: bool = False,
        min_share: float = 0.375,
        min_margin: float = 0.125,
        min_confidence: float = 0.0,
        rare_share: float = 0.125,
        penalty: float = 1.0,
        shaping: Literal["binary", "entropy"] = "binary",
        entropy_weight: float = 0.1,
    ) -> None:
        if not 0.0 <= rare_share < 1.0 or not 0.0 <= penalty < math.inf or not 0.0 <= entropy_weight < math.inf:
            raise ValueError(
                "selective needs 0 <= rare_share < 1, and a finite penalty and entropy_weight >= 0, got "
                f"{rare_share}, {penalty}, {entropy_weight}"
            )
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule(min_share=min_share, min_margin=min_margin, min_confidence=min_confidence)
        self._rare_share, self._penalty = rare_share, penalty
        self._shaped, self._entropy_weight = shaping == "entropy", entropy_weight

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        decision = ballot.decide(self._rule, ctx.seed)
        winner = self._clear(decision)
        terms = self._terms(ballot, decision)
        rewards = sum(terms.values(), np.zeros(len(ballot.classes)))
        negative = int((terms["rare"] < 0).sum())
        rewards[~ballot.answered] = rewards.min(initial=0.0)
        return ballot.scored(
            rewards, winner is not None or negative > 0, label=ballot.form(winner), share=decision.share, margin=decision.margin,
            trace=(decision.reason, f"{negative} answers are rare and uncertain"),
            metrics={"negative": negative / max(1, len(rewards)), "vote_confidence": decision.confidence},
        )  # fmt: skip

    def terms(self, group: Group, ctx: RewardContext) -> dict[str, Values]:
        """[V] each, before rollouts without an answer are put level with the lowest."""
        ballot = open_ballot(self.reader, self._rule, group)
        return self._terms(ballot, ballot.decide(self._rule, ctx.seed))

    def _clear(self, decision: Decision) -> int | None:
        """The elected class. The vote's own bound on the margin is inclusive, the published one is not."""
        return decision.winner if decision.margin > self._rule.min_margin + SAME else None

    def _terms(self, ballot: Ballot, decision: Decision) -> dict[str, Values]:
        names = ("elected", "rare", "entropy") if self._shaped else ("elected", "rare")
        terms = {name: np.zeros(len(ballot.classes)) for name in names}
        winner, valid = self._clear(decision), sum(decision.counts)
        agree = max(decision.counts, default=0) > 1
        unsure, everyone = class_entropies(ballot.group.rollouts, ballot.classes)
        for c, entropy in unsure.items():
            members, share = np.asarray(ballot.classes) == c, decision.counts[c] / valid
            if c == winner:
                terms["elected"][members] = share if self._shaped else 1.0
            elif agree and share < self._rare_share and entropy > everyone + SAME:
                terms["rare"][members] = -self._penalty * (self._rare_share - share if self._shaped else 1.0)
            if self._shaped:
                terms["entropy"][members] = -self._entropy_weight * (entropy - everyone)
        return terms
