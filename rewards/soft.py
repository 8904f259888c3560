"""Soft votes: every answer is paid by how often it was given, so a group need not agree on one label to teach something."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.rewards.ballot import Ballot, Values, VoteRule, open_ballot
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.trees import TreeVotes
from ttrl.rewards.vote import Decision
from ttrl.rewards.weights import NEEDS, Weighting
from ttrl.types import NO_ANSWER, Group, Scored


def shares(ballot: Ballot, *, without_own: bool = False) -> Values:
    """[V] share of votes (or weight) of each rollout's class, 0 without an answer; optionally among all other rollouts only."""
    weights = np.asarray(ballot.arguments.get("weights", np.ones(len(ballot.classes))), np.float64)
    weights = np.where(ballot.answered, weights, 0.0)
    classes = np.asarray(ballot.classes)
    # Sums over sorted values, so that the order of the rollouts cannot reach the last bits
    of_class = {c: float(np.sort(weights[classes == c]).sum()) for c in set(ballot.classes) - {NO_ANSWER}}
    total = float(np.sort(weights).sum())
    own = weights if without_own else np.zeros_like(weights)
    return np.asarray(
        [
            0.0 if c == NO_ANSWER or total - o <= 0 else max(0.0, of_class[c] - o) / (total - o)
            for c, o in zip(ballot.classes, own, strict=True)
        ]
    )


def teaches(decision: Decision, rule: VoteRule, min_votes: int = 2) -> bool:
    """Soft rewards need two votes that agree and the rule's bounds, but no winner: tied answers share the pay."""
    return (
        max(decision.counts, default=0) >= min_votes
        and decision.share >= rule.min_share
        and decision.margin >= rule.min_margin
        and decision.confidence >= rule.min_confidence
    )


class SoftVote:
    """r_i = p(a_i), the share of valid votes for the answer of rollout i; 0 without an answer (EMPO, arXiv 2504.05812, by classes).

    `leave_one_out`: p among the other rollouts, (n - 1) / (V - 1): an unbiased estimate of how often the model agrees with i.
    `tree_votes`: as for the majority vote; `tree` makes p the share of trees.
    Golden: answers 5, 5, 7, none -> [2/3, 2/3, 1/3, 0]; leave-one-out [1/2, 1/2, 0, 0].
    """

    min_votes = 2

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        truncated_votes: bool = False,
        min_share: float = 0.0,
        min_margin: float = 0.0,
        min_confidence: float = 0.0,
        weights: Weighting = "none",
        leave_one_out: bool = False,
        tree_votes: TreeVotes = "leaf",
    ) -> None:
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule(
            weights=weights, trees=tree_votes, min_share=min_share, min_margin=min_margin, min_confidence=min_confidence
        )
        self._leave_one_out = leave_one_out
        self.needs: frozenset[str] = NEEDS.get(weights, frozenset())

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        decision = ballot.decide(self._rule, ctx.seed)
        return ballot.scored(
            shares(ballot, without_own=self._leave_one_out), teaches(decision, self._rule),
            label=ballot.form(decision.winner), share=decision.share, margin=decision.margin, trace=(decision.reason,),
            metrics={"vote_confidence": decision.confidence},
        )  # fmt: skip


class FrequencyEntropy:
    """TTRV (arXiv 2510.06783): frequency of the answer minus alpha times the entropy of the group's answers.

        R_i = p(a_i) - alpha * H        H = -sum_a p(a) ln p(a); `normalised`: H / ln(number of answers), as in the released code

    As published, H is one number per group: under a group-relative advantage it cancels exactly and changes nothing. With
    `leave_one_out` the entropy term is what rollout i itself contributes to agreement, so that it acts:

        R_i = p(a_i) + alpha * (H without i - H)

    positive for those whose answer concentrates the group, negative for those whose answer scatters it. A rollout without an
    answer gets the lowest term of its group: silence never pays more than a rare answer.
    Golden, A A B C, alpha .75: H 1.03972; R -.27979 -.27979 -.52979 -.52979; normalised -.20980 -.20980 -.45980 -.45980.
    """

    needs: frozenset[str] = frozenset()
    min_votes = 2

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        truncated_votes: bool = False,
        alpha: float = 0.75,
        normalised: bool = True,
        leave_one_out: bool = False,
    ) -> None:
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule()
        self._alpha, self._normalised, self._leave_one_out = alpha, normalised, leave_one_out

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        decision = ballot.decide(self._rule, ctx.seed)
        terms = self._terms(ballot)
        return ballot.scored(
            terms["frequency"] + terms["entropy"], teaches(decision, self._rule), label=ballot.form(decision.winner),
            share=decision.share, margin=decision.margin, trace=(decision.reason,),
            metrics={"answer_entropy": entropy(decision.counts)},
        )  # fmt: skip

    def terms(self, group: Group, ctx: RewardContext) -> dict[str, Values]:
        """[V] each; they add up to the rewards."""
        return self._terms(open_ballot(self.reader, self._rule, group))

    def _terms(self, ballot: Ballot) -> dict[str, Values]:
        counts = np.bincount([c for c in ballot.classes if c != NO_ANSWER], minlength=len(ballot.forms))
        whole = entropy(counts, normalised=self._normalised)
        if not self._leave_one_out:
            return {"frequency": shares(ballot), "entropy": np.full(len(ballot.classes), -self._alpha * whole)}
        gains = {}
        for c in set(ballot.classes) - {NO_ANSWER}:
            others = counts - (np.arange(len(counts)) == c)
            gains[c] = self._alpha * (entropy(others, normalised=self._normalised) - whole)
        lowest = min(gains.values(), default=0.0)
        return {"frequency": shares(ballot), "entropy": np.asarray([gains.get(c, lowest) for c in ballot.classes])}


def entropy(counts: Any, *, normalised: bool = False) -> float:
    """Shannon entropy in nats of vote counts; `normalised` divides by ln(classes with a vote) and gives 0 for one class."""
    votes = np.sort(np.asarray(counts, np.float64))
    votes = votes[votes > 0]
    if votes.size <= 1:
        return 0.0
    p = votes / votes.sum()
    value = float(-(p * np.log(p)).sum())
    return value / float(np.log(votes.size)) if normalised else value
