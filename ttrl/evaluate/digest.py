"""What the evaluations of a run come to, as it stands in summary.json: before, after, the line to beat, the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ttrl.evaluate.book import EvaluationBook
from ttrl.evaluate.evaluator import Estimate, Evaluation, change, paired
from ttrl.evaluate.ledger import LedgerEntry, by_chance, ledger, shares, totals


@dataclass(frozen=True, slots=True, kw_only=True)
class LineToBeat:
    """The vote of the start model: what its samples give without any training."""

    metric: str
    """maj@k with the largest k that was measured"""
    start: Estimate
    final_pass1_above_it: Estimate | None
    """final pass@1 minus the line, paired by prompt; None before there is a final evaluation"""

    @property
    def verdict(self) -> str:
        """beaten | missed | open: whether the interval of the difference excludes 0."""
        margin = self.final_pass1_above_it
        if margin is None or margin.low is None or margin.high is None:
            return "open"
        return "beaten" if margin.low > 0 else "missed" if margin.high < 0 else "open"


def line_to_beat(before: Evaluation | None, after: Evaluation | None, seed: int) -> LineToBeat | None:
    """None without labels, or when no k above 1 was asked for."""
    metric = largest_vote(before.estimates) if before is not None else None
    if before is None or metric is None:
        return None
    above = paired(before, metric, after, "pass@1", seed) if after is not None else None
    return LineToBeat(metric=metric, start=before.estimates[metric], final_pass1_above_it=above)


def largest_vote(names: Iterable[str]) -> str | None:
    """The `maj@k` of all prompts with the largest k; those of parts of the prompts (`eval.by`) are not meant."""
    sizes = [int(k) for name in names if name.startswith("maj@") and (k := name.removeprefix("maj@")).isdigit()]
    return f"maj@{max(sizes)}" if sizes else None


def entries(book: EvaluationBook, split: str) -> list[LedgerEntry]:
    """The ledger of a split; empty without labels or a second evaluation."""
    before, after = book.before(split), book.after(split)
    return ledger(before, after) if before is not None and after is not None else []


def digest(book: EvaluationBook, split: str, seed: int) -> dict[str, Any]:
    """JSON-able. What was not measured is None."""
    before, after = book.before(split), book.after(split)
    changes = None
    if before is not None and after is not None:
        found = {name: change(before, after, name, seed) for name in before.estimates}
        changes = {name: asdict(difference) for name, difference in found.items() if difference is not None}
    return {
        "protocol": asdict(before.protocol) if before is not None else None,
        "initial": estimates(before),
        "final": estimates(after),
        "change": changes,
        "measured_after_steps": [evaluation.step for evaluation in (before, after) if evaluation is not None],
        "line_to_beat": _line(line_to_beat(before, after, seed)),
        **_ledger(entries(book, split)),
    }


def _ledger(found: Sequence[LedgerEntry]) -> dict[str, Any]:
    if not found:
        return {"ledger": None, "ledger_shares": None, "ledger_by_chance": None}
    return {
        "ledger": totals(found),
        "ledger_shares": {name: asdict(share) for name, share in shares(found).items()},
        "ledger_by_chance": round(by_chance(found), 2),
    }


def _line(line: LineToBeat | None) -> dict[str, Any] | None:
    if line is None:
        return None
    above = line.final_pass1_above_it
    return {
        "metric": line.metric, "start": asdict(line.start), "verdict": line.verdict,
        "final_pass@1_above_it": asdict(above) if above is not None else None,
    }  # fmt: skip


def estimates(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Metric -> value, low, high."""
    return None if evaluation is None else {name: asdict(estimate) for name, estimate in evaluation.estimates.items()}
