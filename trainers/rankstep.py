"""What one rank knows of a step, and the step as the loop sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ttrl.metrics import MetricSet
from ttrl.types import StepStats


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """One rank's part. Losses, norms and the rate are those of all ranks together and equal on each of them."""

    metrics: MetricSet
    """Of this rank's micro-batches only."""
    tokens: int
    """Computed by this rank; padding is not counted."""
    losses: tuple[float, ...]
    """Per update, summed over micro-batches and ranks."""
    grad_norm: float
    lr: float
    may_stand: bool = False
    """As in StepStats."""


def merge(parts: Sequence[RankStep]) -> StepStats:
    """The ranks of one step, in order."""
    metrics = MetricSet()
    for part in parts:
        metrics.merge(part.metrics)
    first = parts[0]
    for loss in first.losses:
        metrics.mean("train/loss", loss)
    return StepStats(
        metrics=metrics.values(),
        tokens=sum(part.tokens for part in parts),
        grad_norm=first.grad_norm,
        lr=first.lr,
        updates=len(first.losses),
        may_stand=any(part.may_stand for part in parts),
    )
