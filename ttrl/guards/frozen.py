"""The frozen view: a few rollouts of the start model's majorities, kept with their log-probs and scored again in every step.

If the start model said something often and the weights now find it unlikely, they have moved away from what they were confident
of. Nothing is sampled for this: the same texts are scored under both weights, so there is no sampling noise, and the cost is that
of one forward pass over a handful of texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttrl.guards.base import Decode, Reading, ScoreText
from ttrl.guards.signals import MIN_PROMPTS, Bounds
from ttrl.guards.votes import votes_of
from ttrl.types import Scored

UPDATE_DROP: Bounds = (0.02, 0.04)
"""Fall of the log-prob per token of what the start model's majorities said, by one update, in nats."""
PROBE_Z = 2.0
"""Standard errors over probes that both bounds need. Nothing is sampled, so this is not about chance: a few probes shall not decide."""
UNLIKELY: Bounds = (0.15, 0.3)
"""The same since the start. Wider: a long run may find other words for the same answers."""
SHORTCUT: float = math.log(10.0)
"""Log of the KL per answer token over the KL per token of the reasoning."""
ANSWER_KL: float = 0.05
"""Below this nothing has happened to the answers, and the ratio means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One rollout of the start model."""

    prompt_id: str
    token_ids: tuple[int, ...]
    """prompt and completion"""
    start: int
    """where the completion begins"""
    answer: tuple[int, int]
    """where the answer begins and ends; equal when it was not found as text"""
    logprobs: tuple[float, ...]
    """of the completion, under the start model"""


def choose(
    scored: Sequence[Scored], count: int, max_tokens: int, score: ScoreText, decode: Decode
) -> tuple[Probe, ...]:
    """At most `count` probes from the groups of the start model: the clearest leads, of each the shortest complete rollout that
    gave the leading answer; prompts whose shortest one is longer than `max_tokens` (prompt included) are left out, and so are
    prompts with pictures, since a text is all that is scored."""
    texts = [item for item in scored if not item.group.prompt.images]
    led = [(votes, item) for item in texts if (votes := votes_of(item)).leader is not None]
    led.sort(key=lambda pair: (-pair[0].lead / pair[0].drawn, pair[0].prompt_id))
    probes: list[Probe] = []
    for votes, item in led:
        if len(probes) == count:
            break
        spellings = set(votes.camps[0].spellings)
        own = [(r, a) for r, a in zip(item.group.rollouts, item.answers, strict=True) if a in spellings]
        own = [(r, a) for r, a in own if r.finish.is_complete()] or own
        rollout, answer = min(own, key=lambda pair: (len(pair[0].token_ids), pair[0].index))
        start = len(item.group.prompt.token_ids)
        tokens = np.concatenate([item.group.prompt.token_ids, rollout.token_ids]).astype(np.int32)
        if len(tokens) > max_tokens or not len(rollout.token_ids) or not start:
            continue
        span = answer_span(rollout.token_ids.tolist(), answer or "", decode)
        probes.append(
            Probe(
                prompt_id=votes.prompt_id, token_ids=tuple(tokens.tolist()), start=start, answer=span,
                logprobs=tuple(float(x) for x in score(tokens)[start - 1 :]),
            )
        )  # fmt: skip
    return tuple(probes)


def answer_span(token_ids: Sequence[int], answer: str, decode: Decode) -> tuple[int, int]:
    """[begin, end) of the tokens that hold the last occurrence of the answer; (0, 0) when the text does not contain it.

    By bisection over prefixes: a tokenizer cannot say where in the text a token lies, but the text of a prefix only grows.
    """
    place = decode(token_ids).rfind(answer) if answer else -1
    if place < 0:
        return (0, 0)

    def tokens_for(characters: int) -> int:
        """The fewest tokens whose text has at least so many characters."""
        low, high = 0, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(decode(token_ids[:middle])) >= characters else (middle + 1, high)
        return low

    return (tokens_for(place + 1) - 1, tokens_for(place + len(answer)))


def falls_of(probes: Sequence[Probe], score: ScoreText) -> tuple[tuple[float, ...], list[Reading]]:
    """Per probe the mean fall of the log-prob of its tokens since the start, and `shortcut`: how much more the answers moved than
    the reasoning (k3 estimate of KL(start || now) per token, on the start model's own tokens), which only warns."""
    falls, of_answer, of_reasoning = [], [], []
    for probe in probes:
        now = np.asarray(score(np.asarray(probe.token_ids, np.int32))[probe.start - 1 :], np.float64)
        change = now - np.asarray(probe.logprobs)
        falls.append(-float(change.mean()))
        k3 = np.expm1(np.minimum(change, 20.0)) - change
        begin, end = probe.answer
        if 0 < begin < end:
            of_answer.append(float(k3[begin:end].mean()))
            of_reasoning.append(float(np.delete(k3, slice(begin, end)).mean()))
    if not of_answer:
        return tuple(falls), []
    answer, reasoning = float(np.mean(of_answer)), float(np.mean(of_reasoning))
    ratio = math.log(max(answer, 1e-9) / max(reasoning, 1e-9)) if answer > ANSWER_KL else 0.0
    return tuple(falls), [Reading(name="shortcut", value=ratio, warn=SHORTCUT, alarm=None)]


def frozen_view(probes: Sequence[Probe], falls: Sequence[float], before: Sequence[float]) -> list[Reading]:
    """`update_drop` and `unlikely`: mean of the falls over those `before` the update, and over the start; standard errors over
    probes."""
    if len(probes) < MIN_PROMPTS:
        return []
    readings = []
    for name, effect, values in (
        ("update_drop", UPDATE_DROP, np.asarray(falls) - np.asarray(before)),
        ("unlikely", UNLIKELY, np.asarray(falls)),
    ):
        error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
        warn, alarm = (max(e, PROBE_Z * error) for e in effect)
        who = frozenset(p.prompt_id for p, value in zip(probes, values, strict=True) if value > effect[0])
        readings.append(Reading(name=name, value=float(values.mean()), warn=warn, alarm=alarm, prompts=who))
    return readings
