"""When each step samples, trains and syncs: the rules of ttrl/flow.py on a clock.

In step, everything waits for everything. Ahead by k, sampling of step j needs weights after max(j - k, 0) steps, so at most k
steps of sampling are under way while training goes on; a sync stops both sides.

With equal steps, one step ahead is all that can be gained. Steps are not equal, so sampling takes more and less time in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ttrl.plan.speed import StepTime

UNEVEN = (1.2, 0.8)
"""Sampling time of a step over its mean, in turn: prompts differ. An assumption."""


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


def simulate(times: StepTime, steps: int, ahead: int, uneven: Sequence[float] = UNEVEN) -> Timeline:
    """A run of `steps` steps."""
    sampled, trained = 0.0, 0.0  # when each side was done last
    published = [0.0] * (steps + 1)  # when the weights after so many steps were out
    for step in range(steps):
        needed = max(step - ahead, 0)
        fetch = times.sync if ahead and needed else 0.0  # in step, the trainer's sync is the only one
        start = max(sampled, published[needed])
        sampled = start + fetch + times.sample * uneven[step % len(uneven)]
        trained = max(trained, sampled) + times.grade + times.train + times.sync
        published[step + 1] = trained
    total, half = published[-1], steps // 2 // len(uneven) * len(uneven)
    rest = (steps - half) // len(uneven) * len(uneven)  # whole rounds
    step_time = (published[half + rest] - published[half]) / rest if half and rest else total / steps
    sampling = times.sample * sum(uneven[step % len(uneven)] for step in range(steps))
    return Timeline(total, step_time, sampling / total, steps * (times.train + times.grade) / total)
