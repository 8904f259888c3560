"""Metrics that carry their own reduction, so that groups, micro-batches and ranks cannot be averaged wrongly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


class MetricSet:
    """Collects numbers under names; a name keeps one reduction for life.

    Example:
        m = MetricSet(); m.mean("train/kl", 0.2, weight=10); m.mean("train/kl", 0.4, weight=30); m.values()
        -> {"train/kl": 0.35}
    """

    def __init__(self) -> None:
        self._parts: dict[str, tuple[str, float, float]] = {}

    def mean(self, name: str, value: float, weight: float = 1.0) -> None:
        """Weighted mean; entries with weight 0 leave no trace, not even a NaN."""
        if weight > 0:
            self._add(name, "mean", value * weight, weight)

    def sum(self, name: str, value: float) -> None:
        self._add(name, "sum", value, 1.0)

    def max(self, name: str, value: float) -> None:
        self._add(name, "max", value, 1.0)

    def min(self, name: str, value: float) -> None:
        self._add(name, "min", value, 1.0)

    def _add(self, name: str, rule: str, value: float, weight: float) -> None:
        held = self._parts.get(name)
        if held is None:
            self._parts[name] = (rule, value, weight)
            return
        old_rule, old_value, old_weight = held
        if old_rule != rule:
            raise ValueError(
                f"metric {name!r} was recorded as {old_rule} and now as {rule}; a name keeps one reduction"
            )
        combined = {
            "mean": old_value + value,
            "sum": old_value + value,
            "max": max(old_value, value),
            "min": min(old_value, value),
        }[rule]
        if math.isnan(old_value) or math.isnan(value):
            combined = math.nan  # max() and min() keep or lose a NaN depending on the order
        self._parts[name] = (rule, combined, old_weight + weight)

    def merge(self, other: MetricSet) -> None:
        """Add everything another set collected."""
        for name, (rule, value, weight) in other._parts.items():
            self._add(name, rule, value, weight)

    def sums(self, name: str) -> tuple[float, float]:
        """(sum of value times weight, sum of weights) of a mean, for a reduction over ranks; zeros when nothing was recorded."""
        rule, value, weight = self._parts.get(name, ("mean", 0.0, 0.0))
        assert rule == "mean", f"{name} is no mean"
        return value, weight

    def values(self) -> dict[str, float]:
        """The reduced numbers, sorted by name."""
        return {
            name: value / weight if rule == "mean" else value
            for name, (rule, value, weight) in sorted(self._parts.items())
        }


def require_finite(values: Mapping[str, float], where: str) -> None:
    """Raise FloatingPointError naming every metric that is NaN or infinite."""
    bad = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"{where}: not finite: {', '.join(bad)}")


def fraction(flags: Iterable[bool]) -> float:
    """Share of true flags; 0 for none."""
    items = list(flags)
    return sum(items) / len(items) if items else 0.0
