"""Signals from the shape of a step: length and entropy against the vote share, jumps of the reward, groups that teach nothing.

Values are compared with the start model's batch, and the reward with the steps before. Same rules as in `signals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ttrl.guards.base import Reading
from ttrl.guards.signals import Batch, Bounds
from ttrl.guards.votes import votes_of
from ttrl.types import NO_ANSWER, Scored

SHORTER: Bounds = (math.log(1.5), math.log(2.0))
"""Fall of the mean log length."""
LONGER: float = math.log(2.0)
SURER: float = math.log(4.0)
"""Fall of the log of the entropy."""
NOISIER: Bounds = (math.log(2.0), math.log(4.0))
REWARD_JUMP: float = 0.15
NO_ADVANTAGE: float = 0.9
"""Share of groups whose rewards are all equal."""
GRADIENT_JUMP: float = math.log(5.0)
WINDOW = 5
"""Steps before this one that the reward and the gradient norm are compared with."""


def batch_of(scored: Sequence[Scored]) -> Batch:
    """The figures of a step. `scored` is not empty."""
    votes = [votes_of(item) for item in scored]
    leaders = [v.leader.answer for v in votes if v.leader is not None]
    answered = [float(np.mean(item.classes != NO_ANSWER)) for item in scored]
    lengths = [float(np.mean([math.log(max(len(r.token_ids), 1)) for r in item.group.rollouts])) for item in scored]
    surprise = -np.concatenate([r.logprobs for item in scored for r in item.group.rollouts])
    share = [(v.camps[0].votes if v.camps else 0) / v.drawn for v in votes]
    rewards = [float(item.rewards.mean()) for item in scored]
    return Batch(
        prompts=len(scored), shared=max((leaders.count(a) for a in set(leaders)), default=0),
        distinct=len(set(leaders)) / max(len(leaders), 1), answered=_mean(answered), answered_sd=_sd(answered),
        log_length=_mean(lengths), log_length_sd=_sd(lengths), surprise=float(surprise.mean()) if surprise.size else 0.0,
        share=_mean(share), share_sd=_sd(share), reward=_mean(rewards), reward_sd=_sd(rewards),
    )  # fmt: skip


def length_against_share(now: Batch, start: Batch, z: Bounds) -> list[Reading]:
    """`shorter` alarms when answers are half as long while the vote share did not fall: being brief is not being right.
    `longer` and `surer` only warn, since honest training may do both; `noisier` alarms: nothing in voting raises the entropy."""
    error = math.hypot(now.log_length_sd / math.sqrt(now.prompts), start.log_length_sd / math.sqrt(start.prompts))
    slack = math.hypot(now.share_sd / math.sqrt(now.prompts), start.share_sd / math.sqrt(start.prompts))
    confident = now.share >= start.share - 2 * slack
    warn, alarm = (max(e, z_ * error) for e, z_ in zip(SHORTER, z, strict=True))
    fall = start.log_length - now.log_length
    ratio = math.log(max(now.surprise, 1e-6) / max(start.surprise, 1e-6))
    return [
        Reading(name="shorter", value=fall, warn=warn, alarm=alarm if confident else None),
        Reading(name="longer", value=-fall, warn=max(LONGER, z[0] * error), alarm=None),
        Reading(name="surer", value=-ratio, warn=SURER, alarm=None),
        Reading(name="noisier", value=ratio, warn=NOISIER[0], alarm=NOISIER[1]),
    ]


def reward_jump(now: Batch, before: Sequence[tuple[float, float]], z: Bounds) -> Reading | None:
    """Rise of the mean reward over that of the last steps, each given as (mean, standard error). Only warns: learning rises too."""
    if not before:
        return None
    level = float(np.mean([mean for mean, _ in before]))
    error = math.hypot(now.reward_sd / math.sqrt(now.prompts), math.sqrt(sum(e * e for _, e in before)) / len(before))
    return Reading(name="reward_jump", value=now.reward - level, warn=max(REWARD_JUMP, z[0] * error), alarm=None)


def nothing_to_learn(scored: Sequence[Scored], grad_norm: float | None, before: Sequence[float]) -> list[Reading]:
    """`no_advantage`: share of groups whose trained rewards are all equal, or that train nothing. `gradient_jump`: log of the last
    gradient norm over the median of those before. Both only warn."""
    flat = [not item.train.any() or bool(np.ptp(item.rewards[item.train]) == 0) for item in scored]
    readings = [Reading(name="no_advantage", value=float(np.mean(flat)), warn=NO_ADVANTAGE, alarm=None)]
    if grad_norm is not None and grad_norm > 0 and len(before) >= 2 and (usual := float(np.median(before))) > 0:
        jump = math.log(grad_norm / usual)
        readings.append(Reading(name="gradient_jump", value=jump, warn=GRADIENT_JUMP, alarm=None))
    return readings


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _sd(values: Sequence[float]) -> float:
    """Of the sample; 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
