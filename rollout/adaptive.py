"""The adaptive sampler: votes come in waves, and a prompt whose vote is decided gets no more of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ttrl.protocols import Classify, Pool
from ttrl.rollout.flat import trained_subset, vote_requests
from ttrl.rollout.stopping import AdaptiveConsistency, Certified, EarlyStopping, Lossless, Rule
from ttrl.types import Group, Prompt, Rollout, SamplingSpec


class AdaptiveSampler:
    """At least `trained` and at most `votes` rollouts per prompt; `rule` says when a prompt has enough.

    All prompts of a step that are still open share each wave. A wave gives a prompt `wave` votes, or as many as the rule needs
    before it could possibly decide. Rollout i of a prompt has the same random stream as with the flat sampler, so the votes
    drawn are the first ones of the flat vote, token for token.

    `min_votes`, `min_share` and `min_margin` are those of the reward; from a recipe they are taken over by themselves. A reward
    that pays shares (not labels) sees the shares of the votes drawn: stopping in a lucky moment makes them larger on average.
    """

    def __init__(
        self,
        votes: int,
        trained: int,
        classify: Classify,
        *,
        rule: Literal["lossless", "certified", "esc", "adaptive_consistency"] = "lossless",
        wave: int = 8,
        epsilon: float = 0.05,
        threshold: float = 0.95,
        window: int = 8,
        min_votes: int = 2,
        min_share: float = 0.0,
        min_margin: float = 0.0,
    ) -> None:
        if wave < 1:
            raise ValueError(f"wave must be at least 1 vote, got {wave}")
        self._votes, self._trained, self._classify, self._wave = votes, trained, classify, wave
        rules: dict[str, Rule] = {
            "lossless": Lossless(min_votes=min_votes, min_share=min_share, min_margin=min_margin),
            "certified": Certified(epsilon=epsilon),
            "esc": EarlyStopping(window=window),
            "adaptive_consistency": AdaptiveConsistency(threshold=threshold),
        }
        self._rule = rules[rule]

    def __call__(self, prompts: Sequence[Prompt], pool: Pool, spec: SamplingSpec, seed: int) -> list[Group]:
        drawn: dict[str, list[Rollout]] = {prompt.id: [] for prompt in prompts}
        wanted = {prompt.id: self.more([]) for prompt in prompts}
        while wanted:
            requests = [
                request
                for prompt in prompts
                if prompt.id in wanted
                for request in vote_requests(prompt, spec, seed, len(drawn[prompt.id]), wanted[prompt.id])
            ]
            for rollout in pool.generate(requests):
                drawn[rollout.prompt_id].append(rollout)
            counts = {identifier: self.more(self._classify(drawn[identifier])) for identifier in wanted}
            wanted = {identifier: count for identifier, count in counts.items() if count > 0}
        return [
            Group(
                prompt=prompt,
                rollouts=tuple(drawn[prompt.id]),
                trainable=trained_subset(seed, prompt.id, self._votes, self._trained, drawn=len(drawn[prompt.id])),
            )
            for prompt in prompts
        ]

    def more(self, classes: Sequence[int]) -> int:
        """How many votes to draw next for a prompt with these votes; 0 when it is done."""
        have = len(classes)
        if have >= self._votes or (have >= self._trained and self._rule.decided(classes, self._votes)):
            return 0
        # No fewer than the trainer needs, nor than the rule needs to decide at all: looking earlier would be in vain
        want = max(self._wave, self._trained - have, self._rule.least(classes, self._votes))
        return min(want, self._votes - have)
