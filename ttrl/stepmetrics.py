"""The numbers of one step that come from the votes. No labels here: everything is computed from what the model said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ttrl.metrics import MetricSet
from ttrl.types import NO_ANSWER, Finish, Group, Scored

SHARE_BINS = 10


def rollout_metrics(groups: Sequence[Group], votes_per_prompt: int | None = None) -> MetricSet:
    """rollout/tokens (sum), rollout/length (mean), rollout/truncated (share), rollout/votes (mean per prompt).

    With the budget of votes also rollout/saved_votes: the share of it that was not needed. With probes also rollout/probes and
    rollout/probe_tokens (sums): what they generated; their prefixes were generated, and counted, as part of the rollouts.
    """
    metrics = MetricSet()
    for group in groups:
        metrics.mean("rollout/votes", len(group.rollouts))
        if votes_per_prompt is not None:
            metrics.mean("rollout/saved_votes", 1 - len(group.rollouts) / votes_per_prompt)
        if group.probes:
            metrics.sum("rollout/probes", len(group.probes))
            metrics.sum("rollout/probe_tokens", sum(len(probe.token_ids) for probe in group.probes))
        for rollout in group.rollouts:
            metrics.sum("rollout/tokens", len(rollout.token_ids))
            metrics.mean("rollout/length", len(rollout.token_ids))
            metrics.mean("rollout/truncated", float(rollout.finish is Finish.LENGTH))
            metrics.mean("rollout/logprob", float(rollout.logprobs.mean()) if len(rollout.logprobs) else 0.0)
    return metrics


def reward_metrics(scored: Sequence[Scored], flips: Sequence[bool]) -> MetricSet:
    """Means over groups: majority_share, margin, answered, labelled, unique_answers, flip_rate; over rollouts: mean."""
    metrics = MetricSet()
    for item in scored:
        metrics.mean("reward/majority_share", item.share)
        metrics.mean("reward/margin", item.margin)
        metrics.mean("reward/answered", float(np.mean(item.classes != NO_ANSWER)))
        metrics.mean("reward/labelled", float(item.label is not None))
        metrics.mean("reward/unique_answers", len(set(item.classes.tolist()) - {NO_ANSWER}))
        metrics.mean("reward/mean", float(item.rewards.mean()))
        for name, value in item.metrics.items():
            metrics.mean(f"reward/{name}", value)
    for flipped in flips:
        metrics.mean("reward/flip_rate", float(flipped))
    return metrics


def share_histogram(scored: Sequence[Scored]) -> list[int]:
    """Groups per tenth of the vote share, [SHARE_BINS]; the last bin includes a share of 1."""
    return [int(n) for n in np.histogram([item.share for item in scored], bins=SHARE_BINS, range=(0.0, 1.0))[0]]
