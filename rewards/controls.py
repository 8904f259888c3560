"""Controls: rewards that should not work, or should work best. A gain that a control shows too is not a gain of the method.

`random` teaches nothing about answers, `incorrect` teaches the runner-up, `frozen` never updates its labels, and `gold` uses the
reference answers: the ceiling that a label-free run can be compared with, and no label-free run itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ttrl.protocols import RewardContext
from ttrl.rewards.ballot import VoteRule, open_ballot
from ttrl.rewards.reader import AnswerReader
from ttrl.seeds import generator
from ttrl.types import Group, Scored


class Random:
    """r_i = 1 with probability p, whatever rollout i says (spurious rewards, arXiv 2506.10947). Drawn by seed and rollout index.

    No label; share and margin are those of the vote, for comparison. Every group trains.
    """

    needs: frozenset[str] = frozenset()
    min_votes = 2

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        truncated_votes: bool = False,
        p: float = 0.5,
    ) -> None:
        if not 0.0 < p < 1.0:
            raise ValueError(f"p must lie between 0 and 1, got {p}")
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._p = p

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, VoteRule(), group)
        decision = ballot.decide(VoteRule(), ctx.seed)
        rewards = [float(generator(ctx.seed, "random", r.index).random() < self._p) for r in group.rollouts]
        return ballot.scored(
            rewards, True, label=None, share=decision.share, margin=decision.margin, trace=("drawn at random",)
        )


class Incorrect:
    """r_i = 1 for the second most frequent class. Abstains unless first and second place are both clear.

    `share` and `margin` belong to the label, so the margin is negative. Golden: 5 5 5 7 7 9 -> label 7, rewards 0 0 0 1 1 0.
    """

    needs: frozenset[str] = frozenset()
    min_votes = 3

    def __init__(
        self, *, extractor: str = "math", options: dict[str, Any] | None = None, truncated_votes: bool = False
    ) -> None:
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, VoteRule(), group)
        counts = ballot.decide(VoteRule(), ctx.seed).counts
        places = [*sorted(counts, reverse=True), 0, 0]
        clear = places[0] > places[1] > places[2]
        label = ballot.forms[counts.index(places[1])] if clear else None
        share, margin = ballot.share_of(label)
        reason = f"second place has {places[1]} votes" if clear else "there is no clear second place"
        return ballot.scored(
            ballot.paid(label), label is not None, label=label, share=share, margin=margin, trace=(reason,)
        )


class Frozen:
    """The majority vote of the first visit to each prompt, kept for ever: how far do the labels of the start model carry?

    A prompt whose first vote abstained never trains. The labels are state, stored in checkpoints. `share` and `margin` are those
    of the frozen label among today's votes.
    """

    needs: frozenset[str] = frozenset()
    min_votes = 2

    def __init__(
        self,
        *,
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        truncated_votes: bool = False,
        min_share: float = 0.0,
        min_margin: float = 0.0,
    ) -> None:
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule(min_share=min_share, min_margin=min_margin)
        self._labels: dict[str, str | None] = {}

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        new = group.prompt.id not in self._labels
        if new:
            self._labels[group.prompt.id] = ballot.form(ballot.decide(self._rule, ctx.seed).winner)
        label = self._labels[group.prompt.id]
        if label is not None:  # a class may be named after another of its members today
            label = self.reader.match_form(ballot.forms, label) or label
        share, margin = ballot.share_of(label)
        reason = "elected at this first visit" if new else "elected at the first visit"
        return ballot.scored(
            ballot.paid(label), label is not None, label=label, share=share, margin=margin,
            trace=(reason if label is not None else "the first visit elected nobody",),
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Prompt id -> label or None."""
        return {"labels": dict(self._labels)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Back to what `state` returned."""
        self._labels = dict(state["labels"])


class Gold:
    """r_i = 1 if rollout i gives the reference answer, else 0. An upper bound, not a label-free method.

    Needs {"labels"}: runs only under a recipe that says `allow_labels: true`; `ttrl.setup` then hands over the label file through
    `take_labels`, and the run is marked in summary.json and in the report.
    """

    needs = frozenset({"labels"})
    min_votes = 2

    def __init__(
        self, *, extractor: str = "math", options: dict[str, Any] | None = None, truncated_votes: bool = False
    ) -> None:
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._labels: dict[str, str] | None = None

    def take_labels(self, labels: Mapping[str, str]) -> None:
        """Prompt id -> reference answer. Called once, before the first group."""
        self._labels = {identifier: self.reader.form(answer) for identifier, answer in labels.items()}

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        if self._labels is None:
            raise RuntimeError("gold was given no labels; it runs only under a recipe with allow_labels: true")
        ballot = open_ballot(self.reader, VoteRule(), group)
        label = self._labels[group.prompt.id]
        label = self.reader.match_form(ballot.forms, label) or label
        share, margin = ballot.share_of(label)
        rewards = ballot.paid(label)
        return ballot.scored(
            rewards, bool(np.any(ballot.answered)), label=label, share=share, margin=margin, trace=("reference answer",)
        )
