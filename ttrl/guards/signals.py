"""Signals from the votes: pure functions of the groups of a step and of what was seen before. No labels.

Every bound is max(effect, expected + z * standard error): an effect that matters, and beyond what drawing a few votes explains.
`z` are the two multiples of the standard error for warn and alarm. A signal that cannot be computed in a step is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ttrl.guards.base import Reading, Score
from ttrl.guards.votes import Visit, Votes

Bounds = tuple[float, float]
"""(warn, alarm)"""

FLIPS: Bounds = (0.15, 0.3)
"""Share of the margin of earlier votes that went to another answer, beyond what chance explains."""
FORGOTTEN: Bounds = (0.08, 0.16)
"""Fall of the share of earlier answers."""
SHARED: Bounds = (0.2, 0.4)
"""Rise, over the start, of the share of prompts that have one and the same answer."""
FEWER_ANSWERS: Bounds = (0.5, 0.75)
"""Fall, over the start, of the number of different leading answers per prompt."""
SILENT: Bounds = (0.15, 0.3)
"""Fall, over the start, of the share of rollouts that answer."""
RARE = 0.1
"""A flip that chance makes less often than this affects its prompt."""
MIN_PROMPTS = 4
"""Fewer prompts than this say nothing about all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What is kept of the start model's groups, to compare with. Means are over prompts, `*_sd` their standard deviations."""

    prompts: int
    shared: int
    """prompts with the most common leading answer"""
    distinct: float
    """different leading answers per prompt"""
    answered: float
    answered_sd: float
    log_length: float
    log_length_sd: float
    surprise: float
    """mean -log-prob per sampled token, in nats: estimates the entropy"""
    share: float
    """votes of the leader per rollout"""
    share_sd: float
    reward: float
    reward_sd: float


def flips(now: Sequence[Votes], earlier: Mapping[str, Visit], z: Bounds, name: str) -> Reading | None:
    """Share of earlier margins whose leader is now another answer, minus what chance would flip.

    Per half of the earlier visit. Two votes of n and n' rollouts differ in their lead by chance with variance
    (p + q - (p - q)^2) (1/n + 1/n'), where p and q are the shares of the half's answer and of its rival in the other half; the
    chance to flip is that of a normal variable below minus the lead. Narrow leads flip often and weigh little. A tie, or no answer at
    all, is no flip.
    """
    pairs = [(v, earlier[v.prompt_id], v.leader) for v in now if v.prompt_id in earlier and v.leader is not None]
    if len(pairs) < MIN_PROMPTS:
        return None
    weight = excess = squares = 0.0
    who = set()
    for votes, visit, leader in pairs:
        error = 0.0
        for half in visit.halves:
            p, q = (half.votes + 0.5) / (half.size + 1), (half.rival + 0.5) / (half.size + 1)
            variance = (p + q - (p - q) ** 2) * (1 / half.size + 1 / votes.drawn)
            chance = 0.5 * math.erfc((p - q) / math.sqrt(2 * variance))
            flipped = set(leader.spellings).isdisjoint(half.spellings)
            weight += half.margin
            excess += half.margin * (flipped - chance)
            error += half.margin * math.sqrt(chance * (1 - chance))
            if flipped and chance < RARE:
                who.add(votes.prompt_id)
        squares += (
            error**2
        )  # the halves of a prompt meet the same votes of now, so their errors add up as if they were one
    spread = math.sqrt(squares) / weight
    warn, alarm = (max(e, z_ * spread) for e, z_ in zip(FLIPS, z, strict=True))
    return Reading(name=name, value=excess / weight, warn=warn, alarm=alarm, prompts=frozenset(who))


def forgotten(now: Sequence[Votes], first: Mapping[str, Visit], z: Bounds) -> tuple[Reading, Score] | None:
    """How much of the share of the first answers is gone; minus that is the score of a state.

    Per half of the first visit: the share of its answer in the other half minus that of now, weighted by its margin (see `Half` for
    why halves). Rollouts that do not answer count as lost. Binomial variances with the pooled share.
    """
    pairs = [(v, first[v.prompt_id]) for v in now if v.prompt_id in first]
    if len(pairs) < MIN_PROMPTS:
        return None
    weight = fall = squares = 0.0
    who = set()
    for votes, visit in pairs:
        lost = error = 0.0
        for half in visit.halves:
            kept = votes.votes_for(half.spellings)
            pooled = (kept + half.votes + 1) / (votes.drawn + half.size + 2)
            weight += half.margin
            lost += half.margin * (half.votes / half.size - kept / votes.drawn)
            error += half.margin * math.sqrt(pooled * (1 - pooled) * (1 / votes.drawn + 1 / half.size))
        fall += lost
        squares += error**2
        if lost > z[0] * error:
            who.add(votes.prompt_id)
    value, spread = fall / weight, math.sqrt(squares) / weight
    warn, alarm = (max(e, z_ * spread) for e, z_ in zip(FORGOTTEN, z, strict=True))
    reading = Reading(name="forgotten", value=value, warn=warn, alarm=alarm, prompts=frozenset(who))
    return reading, Score(value=-value, error=spread)


def shared_answer(now: Sequence[Votes], start: Batch, z: Bounds) -> Reading | None:
    """Rise of the share of prompts led by one and the same answer. With four options to choose from it starts high, hence the
    comparison. The standard error is that of two proportions, each with half a success and half a failure more: so small groups
    have one that is not 0."""
    leaders = _leaders(now)
    if len(leaders) < MIN_PROMPTS or start.prompts < MIN_PROMPTS:
        return None
    answer, count = _most_common(leaders)
    n, m = len(leaders), start.prompts
    p, q = (count + 0.5) / (n + 1), (start.shared + 0.5) / (m + 1)
    error = math.sqrt(p * (1 - p) / n + q * (1 - q) / m)
    warn, alarm = (max(e, z_ * error) for e, z_ in zip(SHARED, z, strict=True))
    who = frozenset(identifier for identifier, given in leaders.items() if given == answer)
    return Reading(name="shared_answer", value=count / n - start.shared / m, warn=warn, alarm=alarm, prompts=who)


def fewer_answers(now: Sequence[Votes], start: Batch) -> Reading | None:
    """Fall of the number of different leading answers per prompt, relative to the start. Only warns: with few options and few
    prompts it is noisy, and `shared_answer` tests the same."""
    leaders = _leaders(now)
    if len(leaders) < MIN_PROMPTS or start.prompts < MIN_PROMPTS:
        return None
    value = 1 - (len(set(leaders.values())) / len(leaders)) / start.distinct
    return Reading(name="fewer_answers", value=value, warn=FEWER_ANSWERS[0], alarm=None)


def silent(now: Batch, start: Batch, z: Bounds) -> Reading:
    """Fall of the share of rollouts that answer."""
    error = math.hypot(now.answered_sd / math.sqrt(now.prompts), start.answered_sd / math.sqrt(start.prompts))
    warn, alarm = (max(e, z_ * error) for e, z_ in zip(SILENT, z, strict=True))
    return Reading(name="silent", value=start.answered - now.answered, warn=warn, alarm=alarm)


def _leaders(now: Sequence[Votes]) -> dict[str, str]:
    return {votes.prompt_id: votes.leader.answer for votes in now if votes.leader is not None}


def _most_common(leaders: Mapping[str, str]) -> tuple[str, int]:
    counts: dict[str, int] = {}
    for answer in leaders.values():
        counts[answer] = counts.get(answer, 0) + 1
    answer = min(counts, key=lambda a: (-counts[a], a))
    return answer, counts[answer]
