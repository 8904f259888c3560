"""DARE (arXiv 2601.21804): rewards from the whole distribution of answers, how sure the model was of each included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.rewards.ballot import Ballot, Values, VoteRule, open_ballot
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.soft import teaches
from ttrl.rewards.weights import class_entropies
from ttrl.types import NO_ANSWER, Group, Scored

EPS = 1e-8


class DistributionAware:
    """r_i = p(a_i) + explore * (1 - n(a_i) / N) (1 - u(a_i)); 0 for an answer that was pruned.

        q(a) = n(a) / (u(a) + 1e-8), divided by the sum over all answers     u(a): mean token entropy of its rollouts, in nats
        p(a) = q(a) over the answers with q >= prune, divided by their sum   N: their votes; the bonus counts only these

    The bonus goes to answers that are rare and sure; with u > 1 it is a fine, as published. A rollout without an answer is paid the
    lowest reward of its group and never more than 0. A group in which no two agree abstains (ours). `explore` (alpha) and `prune`
    (tau) have no published values that we know: the defaults are ours, and so is the reading that N is counted after pruning.
    Golden: answers 5 5 5 7 8, u .5 .5 .5 .25 2, explore .1, prune .1 -> q .571429 .380952 .047619; 5: .6125, 7: .45625, 8: 0.
    """

    needs = frozenset({"entropy"})
    min_votes = 2

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        truncated_votes: bool = False,
        explore: float = 0.1,
        prune: float = 0.05,
    ) -> None:
        if not 0.0 <= explore <= 1.0 or not 0.0 <= prune < 1.0:
            raise ValueError(f"distribution needs explore in [0, 1] and prune in [0, 1), got {explore}, {prune}")
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule()
        self._explore, self._prune = explore, prune

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        decision = ballot.decide(self._rule, ctx.seed)
        terms = self._terms(ballot)
        rewards = terms["probability"] + terms["bonus"]
        rewards[~ballot.answered] = rewards.min(initial=0.0)
        pruned = int((terms["probability"][ballot.answered] == 0).sum())
        return ballot.scored(
            rewards, teaches(decision, self._rule), label=ballot.form(decision.winner), share=decision.share,
            margin=decision.margin, trace=(decision.reason, f"{pruned} answers pruned"),
            metrics={"pruned": pruned / max(1, len(rewards)), "vote_confidence": decision.confidence},
        )  # fmt: skip

    def terms(self, group: Group, ctx: RewardContext) -> dict[str, Values]:
        """[V] each, before rollouts without an answer are put level with the lowest."""
        return self._terms(open_ballot(self.reader, self._rule, group))

    def _terms(self, ballot: Ballot) -> dict[str, Values]:
        probability, bonus = np.zeros(len(ballot.classes)), np.zeros(len(ballot.classes))
        unsure, _ = class_entropies(ballot.group.rollouts, ballot.classes)
        votes = {c: ballot.classes.count(c) for c in unsure}
        masses = {c: votes[c] / (unsure[c] + EPS) for c in unsure}
        total = math.fsum(masses.values())
        kept = {c: mass for c, mass in masses.items() if mass >= self._prune * total}
        left, count = math.fsum(kept.values()), sum(votes[c] for c in kept)
        for i, c in enumerate(ballot.classes):
            if c != NO_ANSWER and c in kept:
                probability[i] = kept[c] / left
                bonus[i] = self._explore * (1 - votes[c] / count) * (1 - unsure[c])
        return {"probability": probability, "bonus": bonus}
