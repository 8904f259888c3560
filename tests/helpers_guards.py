"""Groups drawn from known answer distributions, judged step after step: what a sentinel sees of a policy, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from helpers import make_prompt, make_rollout

from ttrl.guards.base import Judgement, View
from ttrl.guards.sentinel import Sentinel
from ttrl.types import NO_ANSWER, Finish, Group, Scored

Law = Mapping[str, float]
"""answer -> probability; the answer "" is a rollout that does not answer"""
Policy = Callable[[int, int], Law]
"""(step, prompt) -> law"""


def scored_from(identifier: str, answers: Sequence[str], *, tokens: int = 12, logprob: float = -0.5) -> Scored:
    """A group of these answers under a majority vote; ties and groups without an answer abstain."""
    rollouts = [
        make_rollout(a or "?", i, prompt_id=identifier, tokens=tokens, finish=Finish.STOP)
        for i, a in enumerate(answers)
    ]
    rollouts = [_with_logprob(rollout, logprob) for rollout in rollouts]
    names = sorted(set(answers) - {""})
    counts = sorted(((answers.count(a), a) for a in names), reverse=True) + [(0, "")] * 2
    label = counts[0][1] if counts[0][0] > counts[1][0] else None
    classes = [names.index(a) if a else NO_ANSWER for a in answers]
    valid = max(sum(n for n, _ in counts), 1)
    return Scored(
        group=Group(prompt=make_prompt(identifier), rollouts=tuple(rollouts), trainable=np.ones(len(answers), np.bool_)),
        rewards=np.asarray([float(label is not None and a == label) for a in answers], np.float32),
        train=np.full(len(answers), label is not None), classes=np.asarray(classes, np.int32),
        answers=tuple(a or None for a in answers), label=label, share=counts[0][0] / valid,
        margin=(counts[0][0] - counts[1][0]) / valid,
    )  # fmt: skip


def _with_logprob(rollout, logprob):
    from dataclasses import replace

    return replace(rollout, logprobs=np.full(len(rollout.token_ids), logprob, np.float32))


def draw(
    policy: Policy, step: int, prompts: Sequence[int], votes: int, rng: np.random.Generator, **shape: float
) -> list[Scored]:
    """One step of groups."""
    groups = []
    for prompt in prompts:
        law = policy(step, prompt)
        names = list(law)
        answers = [names[i] for i in rng.choice(len(names), size=votes, p=list(law.values()))]
        groups.append(scored_from(f"p{prompt}", answers, **shape))  # type: ignore[arg-type]
    return groups


def view(step: int, scored: Sequence[Scored], **fields) -> View:
    """Log-probs of texts are all -1 unless told otherwise."""
    defaults = {
        "grad_norm": 1.0, "score": lambda ids: np.full(len(ids) - 1, -1.0, np.float32), "decode": lambda ids: "x" * len(ids),
    }  # fmt: skip
    return View(step=step, scored=scored, **{**defaults, **fields})


def judge(
    policy: Policy, steps: int, *, prompts: int = 16, per_step: int = 8, votes: int = 8, seed: int = 0,
    shape: Callable[[int], dict[str, float]] = lambda step: {}, sentinel: Sentinel | None = None,
) -> list[Judgement]:  # fmt: skip
    """Judgements of all steps; prompts come in turn. An action would change the policy, so only the first alarm counts."""
    sentinel, rng = sentinel or Sentinel(), np.random.default_rng(seed)
    return [
        sentinel.judge(view(s, draw(policy, s, [(s * per_step + i) % prompts for i in range(per_step)], votes, rng, **shape(s))))
        for s in range(steps)
    ]  # fmt: skip


def mixed(right: str, share: float, others: Sequence[str], silent: float = 0.0) -> dict[str, float]:
    """`share` for one answer, the rest evenly over others."""
    law = {right: share, **{other: (1 - share - silent) / len(others) for other in others}}
    return {**law, "": silent} if silent else law
