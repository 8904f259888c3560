"""What a model answered, without labels: the lines of `answers.jsonl`, which modes write and the evaluator reads.

The file is the whole interface between a mode and the evaluator: nothing of a judgement comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.vote import decide
from ttrl.types import NO_ANSWER, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """The decision about one prompt: the answer most samples agree on."""

    answer: str | None
    """Canonical text; None when nobody answered or the leading answers tie."""
    share: float
    """Of the samples with an answer."""
    margin: float
    samples: int
    answers: Mapping[str, int]
    """canonical answer -> number of samples that gave it"""
    no_answer: int
    length: float
    """mean completion tokens"""
    weights: str
    """fingerprint of the weights that voted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One line of answers.jsonl."""

    step: int
    prompt_id: str
    before: Vote
    """Before anything was learned from this prompt."""
    after: Vote | None = None
    """`per_prompt`: by the model adapted to this prompt. None where the mode answers once."""


def count_votes(reader: AnswerReader, rollouts: Sequence[Rollout]) -> Vote:
    """Plurality over equivalence classes; ties abstain. Independent of the order of the rollouts."""
    numbered, forms = reader.classes(reader.read(rollouts))
    decision = decide(numbered, min_votes=1)
    counts = {form: numbered.count(c) for c, form in enumerate(forms)}
    return Vote(
        answer=None if decision.winner is None else forms[decision.winner], share=decision.share, margin=decision.margin,
        samples=len(rollouts), answers=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        no_answer=numbered.count(NO_ANSWER), length=float(np.mean([len(r.token_ids) for r in rollouts])),
        weights=rollouts[0].weights.fingerprint,
    )  # fmt: skip


_ANSWERED = TypeAdapter(Answered)


def to_json(answered: Answered) -> dict[str, Any]:
    """A line of answers.jsonl; `after` only where there is one."""
    record = dict(_ANSWERED.dump_python(answered, mode="json"))
    return record if answered.after is not None else {k: v for k, v in record.items() if k != "after"}


def from_json(record: Mapping[str, Any]) -> Answered:
    """What `to_json` wrote."""
    return _ANSWERED.validate_python(record)
