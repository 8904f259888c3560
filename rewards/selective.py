"""Selective rewards in the manner of SCRL (arXiv 2603.19880): a positive label only when the vote is clear, and negative ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.rewards.ballot import Ballot, Values, VoteRule, open_ballot
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.weights import mean_entropies
from ttrl.types import NO_ANSWER, Group, Scored


class Selective:
    """r_i = 1[a_i is elected] - penalty * 1[a_i is rare and uncertain].

    Elected: the plurality, if its share >= `min_share` and its lead >= `min_margin`; else there is no positive label.
    Rare and uncertain: share of the class <= `rare_share`, it is not the elected one, and the mean token entropy of its rollouts is
    above the mean over the answered rollouts of the group. All other answers are paid 0 and serve as the baseline.
    A group with neither kind of label abstains, and so does one in which no two agree: there everything is rare. A rollout
    without an answer is paid the lowest reward of its group. The thresholds are ours (the paper's are not known to us); tie
    rule: a tied plurality is not elected.
    Golden: answers 5 5 5 5 7 7 8 9, entropy 1 but for the 9 with 3 -> share .5, margin .25, rewards 1 1 1 1 0 0 0 -1.
    """

    needs = frozenset({"entropy"})
    min_votes = 4

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        truncated_votes: bool = False,
        min_share: float = 0.4,
        min_margin: float = 0.15,
        min_confidence: float = 0.0,
        rare_share: float = 0.15,
        penalty: float = 1.0,
    ) -> None:
        if not 0.0 <= rare_share < 1.0 or not 0.0 <= penalty < float("inf"):
            raise ValueError(
                f"selective needs 0 <= rare_share < 1 and a finite penalty >= 0, got {rare_share}, {penalty}"
            )
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule(min_share=min_share, min_margin=min_margin, min_confidence=min_confidence)
        self._rare_share, self._penalty = rare_share, penalty

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        decision = ballot.decide(self._rule, ctx.seed)
        label = ballot.form(decision.winner)
        terms = self._terms(ballot, label)
        rewards = terms["elected"] + terms["rare"]
        rare = int((terms["rare"][ballot.answered] < 0).sum())
        rewards[~ballot.answered] = rewards.min(initial=0.0)
        return ballot.scored(
            rewards, label is not None or rare > 0, label=label, share=decision.share, margin=decision.margin,
            trace=(decision.reason, f"{rare} answers are rare and uncertain"),
            metrics={"negative": rare / max(1, len(rewards)), "vote_confidence": decision.confidence},
        )  # fmt: skip

    def terms(self, group: Group, ctx: RewardContext) -> dict[str, Values]:
        """[V] each, before rollouts without an answer are put level with the lowest."""
        ballot = open_ballot(self.reader, self._rule, group)
        return self._terms(ballot, ballot.form(ballot.decide(self._rule, ctx.seed).winner))

    def _terms(self, ballot: Ballot, label: str | None) -> dict[str, Values]:
        elected, rare = ballot.paid(label), np.zeros(len(ballot.classes))
        classes = np.asarray(ballot.classes)
        valid = int(ballot.answered.sum())
        if self._penalty and max(ballot.decide(self._rule, 0).counts, default=0) > 1:
            # Sorted sums: the order of the rollouts must not decide a comparison of means
            entropies = mean_entropies(ballot.group.rollouts)
            everyone = float(np.sort(entropies[ballot.answered]).sum()) / valid
            for c in set(ballot.classes) - {NO_ANSWER}:
                members = classes == c
                own = float(np.sort(entropies[members]).sum()) / int(members.sum())
                if ballot.forms[c] != label and members.sum() / valid <= self._rare_share and own > everyone + 1e-9:
                    rare[members] = -self._penalty
        return {"elected": elected, "rare": rare}
