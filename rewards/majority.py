"""Majority-vote reward (TTRL, arXiv 2504.16084): the plurality answer is the label; whoever gave it is paid 1, the rest 0.

Differences from the reference implementation, on purpose: votes are counted over equivalence classes, not strings; no answer,
empty text and truncated text never vote; ties and groups without an answer abstain instead of electing whatever came first.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.rewards.ballot import Ballot, VoteRule, open_ballot
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.trees import TreeVotes
from ttrl.rewards.vote import Decision, leave_one_out, split_vote
from ttrl.rewards.weights import NEEDS, Weighting
from ttrl.seeds import derive
from ttrl.types import Group, Scored


class MajorityVote:
    """r_i = 1 if rollout i is in the elected class, else 0. Rollouts without an answer get 0 and are trained on.

    `electorate`: `all` (TTRL), `leave_one_out` (everybody but i elects the label of i) or `split` (the half i is not in does;
    halves are drawn by seed and rollout index), or `untrained` (those that are not trained on elect one label for all; this is how
    the votes of an EMA teacher count alone). A rollout whose electorate abstains is not trained on. `weights`: `none`,
    `logprob` exp(mean log-prob), `entropy` exp(-mean entropy), `self_certainty` (mean KL of the uniform distribution to the
    model's), `rpc` (distinct paths by probability, pruned). `tree_votes`, for the tree sampler: `leaf` (every leaf votes, as
    published), `tree` (the leaves of a tree share one vote), `effective` (the confidence counts what correlated votes are worth).
    Golden example: answers 5, 5, 5, 7 -> label 5, rewards [1, 1, 1, 0], share 0.75, margin 0.5.
    """

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
        weights: Weighting = "none",
        electorate: Literal["all", "leave_one_out", "split", "untrained"] = "all",
        tree_votes: TreeVotes = "leaf",
    ) -> None:
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule(
            ties=ties,
            weights=weights,
            trees=tree_votes,
            min_share=min_share,
            min_margin=min_margin,
            min_confidence=min_confidence,
        )
        self.electorate: Literal["all", "leave_one_out", "split", "untrained"] = electorate
        self.needs: frozenset[str] = NEEDS.get(weights, frozenset())

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        decision = (ballot.among(~group.trainable) if self.electorate == "untrained" else ballot).decide(
            self._rule, ctx.seed
        )
        label = ballot.form(decision.winner)
        metrics = {"vote_confidence": decision.confidence}
        if self.electorate in ("all", "untrained"):
            return ballot.scored(
                ballot.paid(label), label is not None, label=label, share=decision.share, margin=decision.margin,
                trace=(decision.reason,), metrics=metrics,
            )  # fmt: skip
        judges = self._judges(ballot, ctx)
        rewards = [float(j.winner is not None and c == j.winner) for c, j in zip(ballot.classes, judges, strict=True)]
        decided = np.asarray([j.winner is not None for j in judges])
        return ballot.scored(
            rewards, decided, label=label, share=decision.share, margin=decision.margin, metrics=metrics,
            trace=(decision.reason, f"{int(decided.sum())} of {len(judges)} rollouts have a label from the others"),
        )  # fmt: skip

    def _judges(self, ballot: Ballot, ctx: RewardContext) -> list[Decision]:
        """[V] the decision that holds for each rollout."""
        options = {"ties": self._rule.ties, "tie_seed": ctx.seed, **self._rule.bounds(), **ballot.arguments}
        if self.electorate == "leave_one_out":
            return leave_one_out(ballot.classes, **options)
        rollouts = ballot.group.rollouts
        order = sorted(range(len(rollouts)), key=lambda i: derive(ctx.seed, "half", rollouts[i].index))
        second = set(order[len(order) // 2 :])
        return split_vote(ballot.classes, [i in second for i in range(len(rollouts))], **options)
