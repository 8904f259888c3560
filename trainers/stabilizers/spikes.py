"""Gradient-norm filter: an update whose gradient is far larger than usual is left out (after SAR, arXiv 2302.12400).

    veto if  norm > factor * quantile(norms of the last `window` updates)      once `warmup` norms are known

SAR found that samples with large, noisy gradients cause collapse, and filters samples by a proxy. Here the norm itself is known,
of a whole update; which of its prompts was to blame is not. Norms of updates that were vetoed enter the window too, so that a
lasting change of scale ends the filter's objection instead of the training.
"""

from __future__ import annotations

import math

import numpy as np

from ttrl.hooks import Memory, Trained, Update
from ttrl.metrics import MetricSet


class GradNormFilter:
    """`{use: grad_norm, with: {quantile: 0.95, factor: 2.0}}`. Costs nothing. `factor: 1.0` drops the top 5 % of updates for good."""

    needs: frozenset[str] = frozenset()

    def __init__(self, *, quantile: float = 0.95, factor: float = 2.0, window: int = 64, warmup: int = 8) -> None:
        if not 0.0 < quantile <= 1.0 or not factor > 0.0:
            raise ValueError(f"grad_norm needs 0 < quantile <= 1 and factor > 0, got {quantile} and {factor}")
        if not 1 <= warmup <= window:
            raise ValueError(f"grad_norm needs 1 <= warmup <= window, got warmup={warmup}, window={window}")
        self._quantile, self._factor, self._window, self._warmup = quantile, factor, window, warmup
        self._norms: list[float] = []

    @property
    def bound(self) -> float:
        """Largest norm that passes now."""
        if len(self._norms) < self._warmup:
            return math.inf
        return self._factor * float(np.quantile(self._norms, self._quantile))

    def at_start(self, trained: Trained) -> None:
        self._norms = []

    def before_update(self, update: Update, metrics: MetricSet) -> bool:
        passes = update.grad_norm <= self.bound
        self._norms = [*self._norms, update.grad_norm][-self._window :]
        metrics.mean("train/vetoed", float(not passes))
        return passes

    def memory(self) -> Memory:
        return Memory(numbers={"norms": self._norms})

    def recall(self, memory: Memory) -> None:
        self._norms = [float(norm) for norm in memory.numbers["norms"]]
