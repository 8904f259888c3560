"""Two wordings of one question label each other (Self-Harmony, arXiv 2511.01191; Co-rewarding-I, arXiv 2508.00410)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ttrl.protocols import RewardContext
from ttrl.rewards.ballot import Ballot, VoteRule, open_ballot
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.rules import harmonic_mean
from ttrl.rewards.vote import Decision
from ttrl.sources import partners
from ttrl.types import Group, Scored


class Views:
    """r_i = 1 if rollout i gave the label of its question, else 0. `label`:

    - `harmonic`: both views share one label, the answer with the largest harmonic mean 2 p q / (p + q) of its shares in the two
      views (`ttrl.rewards.rules.harmonic_mean`): an answer that only one wording produces is never elected (Self-Harmony);
    - `cross`: the majority answer of the other view (Co-rewarding-I). It may be an answer that nobody gave here: all are paid 0.

    Which prompts are views of one question their ids say, see `ttrl.sources.ViewSource`; `score_step` sees them together. A prompt
    alone, as in `ttrl solve`, is labelled by its own majority; training without a second view is refused before it starts.
    `share` and `margin` are those of the label among the view's own votes, `min_share` and `min_margin` bound the vote that elects.
    Golden: 5 5 5 7 7 and 5 7 7 7 7 -> harmonic 7 for both; cross: 7 for the first, 5 for the second.
    """

    needs: frozenset[str] = frozenset()
    min_votes = 2

    def __init__(
        self,
        *,
        label: Literal["harmonic", "cross"] = "harmonic",
        extractor: str = "math",
        options: dict[str, Any] | None = None,
        truncated_votes: bool = False,
        min_share: float = 0.0,
        min_margin: float = 0.0,
    ) -> None:
        self.reader = AnswerReader(extractor, options or {}, truncated_votes=truncated_votes)
        self._rule = VoteRule(min_share=min_share, min_margin=min_margin)
        self._label = label

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        ballot = open_ballot(self.reader, self._rule, group)
        decision = ballot.decide(self._rule, ctx.seed)
        return self._paid(ballot, ballot.form(decision.winner), f"one view: {decision.reason}")

    def score_step(self, groups: Sequence[Group], contexts: Sequence[RewardContext]) -> list[Scored]:
        """One Scored per group, in order. Raises ConfigError for a group whose other view is not among them."""
        ballots = [open_ballot(self.reader, self._rule, group) for group in groups]
        seeds = [context.seed for context in contexts]
        others = partners([group.prompt.id for group in groups])
        return [self._scored(ballots[i], ballots[other], seeds[other]) for i, other in enumerate(others)]

    def _scored(self, ballot: Ballot, other: Ballot, seed: int) -> Scored:
        """The group of `ballot`; `seed` is that of the other view, for its vote."""
        if self._label == "cross":
            decision = other.decide(self._rule, seed)
            return self._paid(ballot, other.form(decision.winner), f"the other view: {decision.reason}")
        joint = self.reader.grade([*ballot.answers, *other.answers])
        size = len(ballot.answers)
        found: Decision = harmonic_mean(
            joint.classes[:size], joint.classes[size:], min_share=self._rule.min_share, min_margin=self._rule.min_margin
        )
        return self._paid(ballot, None if found.winner is None else joint.forms[found.winner], found.reason)

    def _paid(self, ballot: Ballot, label: str | None, reason: str) -> Scored:
        if label is not None:  # a class may be named after another of its members in the other view
            label = self.reader.match_form(ballot.forms, label) or label
        share, margin = ballot.share_of(label)
        return ballot.scored(
            ballot.paid(label), label is not None, label=label, share=share, margin=margin, trace=(reason,)
        )
