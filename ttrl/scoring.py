"""What a step makes of its groups before anything is trained: labels and rewards, and which groups may go on."""

from __future__ import annotations

from collections.abc import Sequence

from ttrl.contract import Blame, check_scored
from ttrl.errors import PluginError
from ttrl.metrics import MetricSet
from ttrl.parts import Parts
from ttrl.protocols import RewardContext
from ttrl.rewards.probes import judged
from ttrl.rewards.reader import reader_of
from ttrl.seeds import derive
from ttrl.together import StepReward
from ttrl.types import Group, Scored


def score_all(parts: Parts, groups: Sequence[Group], step: int) -> list[Scored]:
    """Every group of a step; together, where the reward wants to see them so."""
    if not isinstance(parts.reward, StepReward):
        return [score(parts, group, step) for group in groups]
    with Blame("reward", parts.recipe.reward.use, "any of the step"):
        together = parts.reward.score_step(groups, [reward_context(parts, group, step) for group in groups])
        if len(together) != len(groups):
            raise PluginError(f"score_step returned {len(together)} results for {len(groups)} groups")
    for scored, group in zip(together, groups, strict=True):
        with Blame("reward", parts.recipe.reward.use, group.prompt.id):
            check_scored(scored, group)
    return [judged(scored, reader_of(parts.reward, parts.reader)) for scored in together]


def reward_context(parts: Parts, group: Group, step: int) -> RewardContext:
    """What the reward may know besides the group."""
    return RewardContext(step=step, seed=derive(parts.recipe.seed, "reward", step, group.prompt.id))


def score(parts: Parts, group: Group, step: int) -> Scored:
    """Pseudo-label and rewards of one group, checked against the contract of the slot; its probes judged by the same reader."""
    with Blame("reward", parts.recipe.reward.use, group.prompt.id):
        scored = parts.reward(group, reward_context(parts, group, step))
        check_scored(scored, group)
    return judged(scored, reader_of(parts.reward, parts.reader))


def admit(parts: Parts, scored: Sequence[Scored], metrics: MetricSet) -> list[Scored]:
    """Groups that may train. Every group left out is counted under dropped/<reason>."""
    kept = []
    for item in scored:
        reason = turned_away(parts, item)
        if reason is None:
            kept.append(item)
        else:
            metrics.sum(f"dropped/{reason}", 1)
    return kept


def turned_away(parts: Parts, item: Scored) -> str | None:
    """Why a group may not train: it has nothing to train on, or what the first gate that objects says. None: it may."""
    if not item.train.any():
        return "abstained"
    with Blame("gates", ", ".join(plug.use for plug in parts.recipe.gates), item.group.prompt.id):
        return next((reason for gate in parts.gates if (reason := gate(item)) is not None), None)
