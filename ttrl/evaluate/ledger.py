"""What happened to each prompt between the first and the last evaluation, with a test behind every verdict."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Any

from ttrl.evaluate.estimators import wilson
from ttrl.evaluate.evaluator import Estimate, Evaluation, PromptResult

SIGNIFICANCE = 0.05
TOP_ANSWERS = 5


class Verdict(enum.Enum):
    """learned: the start majority was not right and right answers rose. sharpened: it was right, and right answers rose.
    corrupted: right answers fell. unchanged: the change could be chance (two-sided Fisher exact test, p >= 0.05)."""

    LEARNED = "learned"
    SHARPENED = "sharpened"
    CORRUPTED = "corrupted"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One prompt, before and after."""

    before: PromptResult
    after: PromptResult
    verdict: Verdict
    p_value: float

    def record(self) -> dict[str, Any]:
        """The line of ledger.jsonl."""
        return {
            "id": self.before.id, "verdict": self.verdict.value, "p_value": round(self.p_value, 6),
            "before": _side(self.before), "after": _side(self.after),
        }  # fmt: skip


def ledger(before: Evaluation, after: Evaluation) -> list[LedgerEntry]:
    """One entry per prompt; empty without labels. Golden: 2 of 16 -> 14 of 16 with a wrong start majority is `learned`."""
    entries = []
    for first, last in zip(before.results, after.results, strict=True):
        assert first.id == last.id
        if first.correct is None or last.correct is None:
            return []
        p_value = _fisher(first.correct, first.samples, last.correct, last.samples)
        entries.append(LedgerEntry(before=first, after=last, verdict=_verdict(first, last, p_value), p_value=p_value))
    return entries


def totals(entries: Sequence[LedgerEntry]) -> Mapping[str, int]:
    """How many prompts got which verdict."""
    counts = Counter(entry.verdict for entry in entries)
    return {verdict.value: counts[verdict] for verdict in Verdict}


def shares(entries: Sequence[LedgerEntry]) -> Mapping[str, Estimate]:
    """Per verdict its share of the prompts, with a 95 % interval over prompts (Wilson)."""
    counted, n = totals(entries), len(entries)
    found = {}
    for name, count in counted.items():
        low, high = wilson(count, n)
        found[name] = Estimate(value=count / n, low=low, high=high)
    return found


def by_chance(entries: Sequence[LedgerEntry]) -> float:
    """How many verdicts other than `unchanged` to expect if no prompt had changed at all.

    Per prompt the size of its test: the chance of p < 0.05 when both evaluations draw from one urn with the right answers of both.
    """
    return sum(
        _size(e.before.samples, e.after.samples, (e.before.correct or 0) + (e.after.correct or 0)) for e in entries
    )


@lru_cache(maxsize=4096)
def _size(first: int, last: int, right: int) -> float:
    """Golden: 16 and 16 samples, 16 right: p < 0.05 for 4 or fewer, or 12 or more, of them in the first -> 0.01211."""
    total = comb(first + last, right)
    chances = [
        comb(first, x) * comb(last, right - x) / total for x in range(max(0, right - last), min(first, right) + 1)
    ]
    # As in the two-sided test, everything at most as likely as what was seen counts; ties only differ by rounding
    return sum(c for c in chances if sum(other for other in chances if other <= c * (1 + 1e-7)) < SIGNIFICANCE)


def _verdict(first: PromptResult, last: PromptResult, p_value: float) -> Verdict:
    assert first.correct is not None and last.correct is not None
    if p_value >= SIGNIFICANCE:
        return Verdict.UNCHANGED
    if last.correct / last.samples < first.correct / first.samples:
        return Verdict.CORRUPTED
    return Verdict.SHARPENED if first.majority_correct else Verdict.LEARNED


def _fisher(first: int, first_samples: int, last: int, last_samples: int) -> float:
    from scipy.stats import fisher_exact

    return float(fisher_exact([[first, first_samples - first], [last, last_samples - last]]).pvalue)


def _side(result: PromptResult) -> dict[str, Any]:
    return {
        "correct": result.correct, "samples": result.samples, "majority": result.majority, "share": round(result.share, 4),
        "majority_correct": result.majority_correct, "no_answer": result.no_answer,
        "answers": dict(list(result.answers.items())[:TOP_ANSWERS]),
    }  # fmt: skip
