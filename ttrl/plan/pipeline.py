"""When each step samples, trains and syncs: the rules of ttrl/flow.py on a clock.

In step, everything waits for everything. Ahead by k, sampling of step j needs weights after max(j - k, 0) steps, so at most k
steps of sampling are under way while training goes on; a sync stops both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from ttrl.plan.speed import StepTime


@dataclass(frozen=True, slots=True)
class Timeline:
    """Seconds."""

    total: float
    """of the whole run"""
    step: float
    """of one step, once the pipeline is full"""
    sampling_busy: float
    """share of the time in which the sampling side works; the same for the training side below"""
    training_busy: float


def simulate(times: StepTime, steps: int, ahead: int) -> Timeline:
    """A run of `steps` equal steps."""
    if ahead == 0:
        return _timeline([(step + 1) * times.total for step in range(steps)], times, steps)
    published = [0.0] * (steps + 1)  # when the weights after so many steps are out
    sampled, trained = 0.0, 0.0
    ends = []
    for step in range(steps):
        needed = max(step - ahead, 0)
        start = max(sampled, published[needed])
        sampled = start + (times.sync if needed else 0.0) + times.sample
        trained = max(trained, sampled) + times.grade + times.train + times.sync
        published[step + 1] = trained
        ends.append(trained)
    return _timeline(ends, times, steps)


def _timeline(ends: list[float], times: StepTime, steps: int) -> Timeline:
    total = ends[-1]
    half = steps // 2
    step = (ends[-1] - ends[half]) / (steps - 1 - half) if steps - 1 > half else total / steps
    return Timeline(total, step, steps * times.sample / total, steps * (times.train + times.grade) / total)
