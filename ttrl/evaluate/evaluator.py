"""Sampling a prompt set under a fixed protocol and turning the samples into numbers with intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ttrl.answers import Vote, count_votes
from ttrl.evaluate.estimators import bootstrap, maj_at_k, pass_at_k
from ttrl.evaluate.labels import read_labels
from ttrl.protocols import Pool
from ttrl.rewards.reader import AnswerReader
from ttrl.seeds import derive
from ttrl.types import Prompt, Request, Rollout, SamplingSpec

GRADER = "keys-2"
"""Version of the answer comparison; numbers under different graders are not comparable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Everything that must agree before two evaluations may be compared."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    template: str
    extractor: str
    """kind and options of the extractor"""
    prompts: int
    prompt_set: str = ""
    """hash of ids and texts, whatever their order"""
    labels: str = ""
    """hash of the reference answers; empty without"""
    grader: str = GRADER


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts and its 95 % bootstrap interval (None with fewer than two prompts)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """What the samples of one prompt said."""

    id: str
    samples: int
    answers: Mapping[str, int]
    """canonical answer -> number of samples that gave it"""
    no_answer: int
    majority: str | None
    share: float
    length: float
    """mean completion tokens"""
    correct: int | None
    """samples that match the label; None without labels"""
    right: str | None
    """the canonical answer that matches the label, if it was ever given"""

    @property
    def majority_correct(self) -> bool:
        return self.majority is not None and self.majority == self.right


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation of one prompt set."""

    step: int
    split: str
    protocol: Protocol
    results: tuple[PromptResult, ...]
    per_prompt: Mapping[str, tuple[float, ...]]
    """metric -> one number per prompt, in the order of `results`"""
    estimates: Mapping[str, Estimate]

    def record(self) -> dict[str, Any]:
        """The line of eval.jsonl."""
        metrics = {name: asdict(estimate) for name, estimate in self.estimates.items()}
        return {"step": self.step, "split": self.split, "protocol": asdict(self.protocol), **metrics}


class Evaluator:
    """Evaluates one prompt set. Opens the labels itself; whoever holds an Evaluator sees only results.

    The random numbers of an evaluation depend on the prompt and the sample's index, not on the step, so before and after are
    compared under common random numbers.
    """

    def __init__(
        self, split: str, prompts: Sequence[Prompt], labels: str | None, reader: AnswerReader, spec: SamplingSpec,
        *, samples: int, ks: Sequence[int], template: str, seed: int, by: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.split = split
        self.labelled = labels is not None
        self._prompts, self._reader, self._spec = tuple(prompts), reader, spec
        self._labels = read_labels(labels, [p.id for p in prompts]) if labels is not None else None
        self._samples, self._ks, self._seed, self._by = samples, tuple(ks), seed, tuple(by)
        self.protocol = Protocol(
            samples=samples, temperature=spec.temperature, top_p=spec.top_p, max_new_tokens=spec.max_new_tokens,
            template=template, extractor=reader.description, prompts=len(prompts),
            prompt_set=_hash((p.id, [(m.role, m.content) for m in p.messages]) for p in prompts),
            labels=_hash(self._labels.items()) if self._labels is not None else "",
        )  # fmt: skip

    def __call__(self, step: int, pool: Pool) -> Evaluation:
        requests = [
            Request(
                prompt=prompt,
                index=index,
                seed=derive(self._seed, "eval", self.split, prompt.id, index),
                spec=self._spec,
            )
            for prompt in self._prompts
            for index in range(self._samples)
        ]
        rollouts = pool.generate(requests)
        size = self._samples
        results = tuple(self._result(p, rollouts[i * size : (i + 1) * size]) for i, p in enumerate(self._prompts))
        per_prompt = self._accuracies(results) if self.labelled else {}
        return summarise(
            step, self.split, self.protocol, results, {**per_prompt, **label_free(results)}, seed=self._seed,
            parts=self._parts(),
        )  # fmt: skip

    def _parts(self) -> dict[str, list[int]]:
        """Prompts per combination of the `by` columns, such as "web/icon"."""
        parts: dict[str, list[int]] = {}
        for place, prompt in enumerate(self._prompts if self._by else ()):
            parts.setdefault("/".join(str(prompt.meta[column]) for column in self._by), []).append(place)
        return dict(sorted(parts.items()))

    def _result(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> PromptResult:
        label = self._labels[prompt.id] if self._labels is not None else None
        return graded(prompt.id, count_votes(self._reader, rollouts), label, self._reader)

    def _accuracies(self, results: Sequence[PromptResult]) -> dict[str, tuple[float, ...]]:
        return accuracies(results, self._ks)


def graded(prompt_id: str, vote: Vote, label: str | None, reader: AnswerReader) -> PromptResult:
    """A vote held against the label of its prompt, if there is one."""
    right = None if label is None else reader.match(vote.answers, label)
    correct = None if label is None else (vote.answers[right] if right is not None else 0)
    return PromptResult(
        id=prompt_id, samples=vote.samples, answers=vote.answers, no_answer=vote.no_answer, majority=vote.answer,
        share=vote.share, length=vote.length, correct=correct, right=right,
    )  # fmt: skip


def accuracies(results: Sequence[PromptResult], ks: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """pass@k and maj@k of every prompt [P]; for results with labels."""
    return passes(results, ks) | {f"maj@{k}": tuple(_maj(r, k) for r in results) for k in ks if k > 1}


def passes(results: Sequence[PromptResult], ks: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """pass@k of every prompt [P]; for results with labels."""
    return {f"pass@{k}": tuple(pass_at_k(r.samples, r.correct or 0, k) for r in results) for k in ks}


def label_free(results: Sequence[PromptResult]) -> dict[str, tuple[float, ...]]:
    """What can be said of every prompt [P] without labels."""
    return {
        "majority_share": tuple(r.share for r in results),
        "answered": tuple(1 - r.no_answer / r.samples for r in results),
        "length": tuple(r.length for r in results),
    }


def summarise(
    step: int, split: str, protocol: Protocol, results: Sequence[PromptResult],
    per_prompt: Mapping[str, tuple[float, ...]], *, seed: int, parts: Mapping[str, Sequence[int]] | None = None,
) -> Evaluation:  # fmt: skip
    """Means over prompts with their intervals; accuracies also over each of the `parts`, which name places of prompts."""

    def estimate(values: Sequence[float]) -> Estimate:
        low, high = bootstrap(np.asarray(values), derive(seed, "bootstrap")) or (None, None)
        return Estimate(value=float(np.mean(values)), low=low, high=high)

    estimates = {name: estimate(values) for name, values in per_prompt.items()}
    for part, members in (parts or {}).items():
        estimates |= {
            f"{name} [{part}]": estimate([values[i] for i in members])
            for name, values in per_prompt.items()
            if name.startswith(("pass@", "maj@"))
        }
    return Evaluation(
        step=step, split=split, protocol=protocol, results=tuple(results), per_prompt=per_prompt, estimates=estimates
    )


def _hash(parts: Iterable[object]) -> str:
    return hashlib.sha256("\n".join(sorted(map(repr, parts))).encode()).hexdigest()[:16]


def _maj(result: PromptResult, k: int) -> float:
    names = list(result.answers)
    right = names.index(result.right) if result.right is not None else None
    return maj_at_k(list(result.answers.values()), right, result.no_answer, k)


def check_labels(path: str, prompt_ids: Sequence[str]) -> None:
    """Raises ConfigError unless the file has a label for every prompt. Returns nothing, on purpose."""
    read_labels(path, prompt_ids)


def change(before: Evaluation, after: Evaluation, metric: str, seed: int) -> Estimate | None:
    """Paired difference over prompts with its interval; None when the metric is missing.

    Raises ValueError when the two evaluations were not made under one protocol.
    """
    if before.protocol != after.protocol or before.split != after.split:
        raise ValueError(
            f"evaluations under different protocols cannot be compared: {before.protocol} and {after.protocol}"
        )
    return paired(before, metric, after, metric, seed)


def paired(before: Evaluation, metric: str, after: Evaluation, other: str, seed: int) -> Estimate | None:
    """`other` after minus `metric` before, prompt by prompt; None when one is missing. The caller compares the protocols."""
    if metric not in before.per_prompt or other not in after.per_prompt:
        return None
    assert [r.id for r in before.results] == [r.id for r in after.results]
    differences = np.asarray(after.per_prompt[other]) - np.asarray(before.per_prompt[metric])
    low, high = bootstrap(differences, derive(seed, "bootstrap")) or (None, None)
    return Estimate(value=float(differences.mean()), low=low, high=high)
