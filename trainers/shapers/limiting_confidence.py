"""Stop pushing where a vote is already clear ("limiting confidence", direct coverage optimisation, arXiv 2502.07154).

The loss -ln(1 - (1 - p)^N), the miss rate of N attempts that succeed with probability p, has the gradient F(N, p) grad(-ln p) with

    F(N, p) = N (1 - p)^(N - 1) p / (1 - (1 - p)^N)         1 for p -> 0, 0 once p is well above 1/N; F(1, p) = 1

Here p is the share of the label among the votes, and the advantages of the group are multiplied by F. N is how many answers will be
drawn when the model is used: with N = 1 nothing changes, with N = 64 a prompt with a clear vote hardly trains.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ttrl.metrics import MetricSet
from ttrl.trainers.shapers.base import Shaper
from ttrl.types import IntArray, Sample, Scored


def limiting_factor(budget: int, p: float) -> float:
    """F(N, p), exact to rounding for every p in [0, 1] (the plain formula loses eleven digits at p = 1e-12).

    Golden: F(4, .05) = .92442, F(4, .25) = .61714, F(4, .5) = .26667, F(16, .25) = .05400, F(64, .05) = .13132.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if budget == 1 or p == 0.0:
        return 1.0
    if p == 1.0:
        return 0.0
    miss = math.log1p(-p)
    return budget * p * math.exp((budget - 1) * miss) / -math.expm1(budget * miss)


class LimitingConfidence(Shaper):
    """`shape: [{use: limiting_confidence, with: {budget: 16}}]`. A smooth form of dropping groups with a high vote share."""

    rescales = True

    def __init__(self, *, budget: int) -> None:
        if budget < 1:
            raise ValueError(f"budget must be at least 1, got {budget}")
        self._budget = budget

    def on_group(self, samples: list[Sample], scored: Scored, trained: IntArray) -> list[Sample]:
        factor = limiting_factor(self._budget, scored.share)
        return [replace(s, advantages=(factor * s.advantages).astype(np.float32)) for s in samples]

    def on_step(self, samples: list[Sample], step: int, metrics: MetricSet) -> list[Sample]:
        """train/advantage_size: mean absolute advantage over tokens, to see how much of the signal is left."""
        for sample in samples:
            metrics.mean("train/advantage_size", float(np.abs(sample.advantages).mean()), len(sample.advantages))
        return samples
