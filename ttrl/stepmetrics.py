"""The numbers of one step that come from the votes. No labels here: everything is computed from what the model said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ttrl.metrics import MetricSet
from ttrl.types import NO_ANSWER, Finish, Group, Scored, tree_roots

SHARE_BINS = 10


def rollout_metrics(groups: Sequence[Group], votes_per_prompt: int | None = None) -> MetricSet:
    """rollout/tokens (sum), rollout/length (mean), rollout/truncated (share), rollout/votes (mean per prompt).

    Tokens are those that were sampled: what a branch of a tree shares with its parent counts once, for the parent. With the
    budget of votes also rollout/saved_votes: the share of it that was not needed. Trees add what `tree_metrics` says.
    With probes also rollout/probes and rollout/probe_tokens (sums): what they generated; their prefixes were generated, and counted,
    as part of the rollouts.
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
            metrics.sum("rollout/tokens", rollout.drawn)
            metrics.mean("rollout/length", len(rollout.token_ids))
            metrics.mean("rollout/truncated", float(rollout.finish is Finish.LENGTH))
            metrics.mean("rollout/logprob", float(rollout.logprobs.mean()) if len(rollout.logprobs) else 0.0)
        if any(rollout.fork is not None for rollout in group.rollouts):
            metrics.merge(tree_metrics(group))
    return metrics


def tree_metrics(group: Group) -> MetricSet:
    """rollout/shared_tokens (sum of what branches took over from their parents), rollout/token_ratio (tokens sampled per token of the
    leaves: 1 without sharing), rollout/trees (mean per prompt), rollout/fork_depth (mean place of forks, 0 to 1 of the parent's
    length), rollout/fork_entropy (mean, in nats, where branches leave)."""
    metrics = MetricSet()
    lengths = {rollout.index: len(rollout.token_ids) for rollout in group.rollouts}
    metrics.mean("rollout/trees", len(set(tree_roots(group.rollouts))))
    metrics.mean("rollout/token_ratio", sum(r.drawn for r in group.rollouts) / sum(lengths.values()),
                 weight=sum(lengths.values()))  # fmt: skip
    for rollout in group.rollouts:
        metrics.sum("rollout/shared_tokens", len(rollout.token_ids) - rollout.drawn)
        if rollout.fork is not None:
            metrics.mean("rollout/fork_depth", rollout.fork.at / lengths[rollout.fork.parent])
            if rollout.entropy is not None:
                metrics.mean("rollout/fork_entropy", float(rollout.entropy[rollout.fork.at]))
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
        if any(rollout.fork is not None for rollout in item.group.rollouts):
            metrics.mean("reward/answers_per_tree", _answers_per_tree(item))
        for name, value in item.metrics.items():
            metrics.mean(f"reward/{name}", value)
    for flipped in flips:
        metrics.mean("reward/flip_rate", float(flipped))
    return metrics


def agreement(scored: Sequence[Scored]) -> MetricSet:
    """reward/agreement: mean reward of the policy's answers, when others elected the label (the EMA teacher)."""
    metrics = MetricSet()
    for item in scored:
        own = item.group.trainable & (item.classes != NO_ANSWER)
        if item.label is not None and own.any():
            metrics.mean("reward/agreement", float(item.rewards[own].mean()))
    return metrics


def _answers_per_tree(item: Scored) -> float:
    """Mean number of different answers within a tree."""
    found: dict[int, set[int]] = {}
    for root, answer in zip(tree_roots(item.group.rollouts), item.classes.tolist(), strict=True):
        found.setdefault(root, set()).update({answer} - {NO_ANSWER})
    return float(np.mean([len(answers) for answers in found.values()]))


def share_histogram(scored: Sequence[Scored]) -> list[int]:
    """Groups per tenth of the vote share, [SHARE_BINS]; the last bin includes a share of 1."""
    return [int(n) for n in np.histogram([item.share for item in scored], bins=SHARE_BINS, range=(0.0, 1.0))[0]]
