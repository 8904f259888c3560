"""Sampling a prompt set under a fixed protocol and turning the samples into numbers with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ttrl.evaluate.estimators import bootstrap, maj_at_k, pass_at_k
from ttrl.evaluate.labels import read_labels
from ttrl.protocols import Pool
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.vote import decide
from ttrl.seeds import derive
from ttrl.types import NO_ANSWER, Prompt, Request, Rollout, SamplingSpec

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
    prompts: int
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
            template=template, extractor=reader.kind, prompts=len(prompts),
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
        per_prompt = self._per_prompt(results)
        estimates = {name: self._estimate(values) for name, values in per_prompt.items()}
        for name, members in self._parts().items():
            estimates |= {
                f"{metric} [{name}]": self._estimate([values[i] for i in members])
                for metric, values in per_prompt.items()
                if metric.startswith(("pass@", "maj@"))
            }
        return Evaluation(
            step=step,
            split=self.split,
            protocol=self.protocol,
            results=results,
            per_prompt=per_prompt,
            estimates=estimates,
        )

    def _estimate(self, values: Sequence[float]) -> Estimate:
        low, high = bootstrap(np.asarray(values), derive(self._seed, "bootstrap")) or (None, None)
        return Estimate(value=float(np.mean(values)), low=low, high=high)

    def _parts(self) -> dict[str, list[int]]:
        """Prompts per combination of the `by` columns, such as "web/icon"."""
        parts: dict[str, list[int]] = {}
        for place, prompt in enumerate(self._prompts if self._by else ()):
            parts.setdefault("/".join(str(prompt.meta[column]) for column in self._by), []).append(place)
        return dict(sorted(parts.items()))

    def _result(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> PromptResult:
        numbered, forms = self._reader.classes(self._reader.read(rollouts))
        decision = decide(numbered, min_votes=1)
        right = None
        if self._labels is not None:
            right = self._reader.match(forms, self._labels[prompt.id])
        counts = {form: numbered.count(c) for c, form in enumerate(forms)}
        return PromptResult(
            id=prompt.id,
            samples=len(rollouts),
            answers=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            no_answer=numbered.count(NO_ANSWER),
            majority=None if decision.winner is None else forms[decision.winner],
            share=decision.share,
            length=float(np.mean([len(r.token_ids) for r in rollouts])),
            correct=None if self._labels is None else (counts[right] if right is not None else 0),
            right=right,
        )

    def _per_prompt(self, results: Sequence[PromptResult]) -> dict[str, tuple[float, ...]]:
        table = pass_metrics(results, self._ks) if self.labelled else {}
        if self.labelled:
            table |= {f"maj@{k}": tuple(_maj(r, k) for r in results) for k in self._ks if k > 1}
        return {**table, **vote_metrics(results)}


def pass_metrics(results: Sequence[PromptResult], ks: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """pass@k per prompt."""
    return {f"pass@{k}": tuple(pass_at_k(r.samples, r.correct or 0, k) for r in results) for k in ks}


def vote_metrics(results: Sequence[PromptResult]) -> dict[str, tuple[float, ...]]:
    """What can be said without labels, per prompt."""
    return {
        "majority_share": tuple(r.share for r in results),
        "answered": tuple(1 - r.no_answer / r.samples for r in results),
        "length": tuple(r.length for r in results),
    }


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
    if metric not in before.per_prompt or metric not in after.per_prompt:
        return None
    differences = np.asarray(after.per_prompt[metric]) - np.asarray(before.per_prompt[metric])
    low, high = bootstrap(differences, derive(seed, "bootstrap")) or (None, None)
    return Estimate(value=float(differences.mean()), low=low, high=high)
