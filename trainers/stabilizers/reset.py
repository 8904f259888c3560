"""Full reset: when the policy's entropy has collapsed, start again from the start weights (SAR, arXiv 2302.12400).

    e <- decay * e + (1 - decay) * entropy      per update; the first one sets e
    e < below  ->  start weights, new optimizer, and e is forgotten (as are the EMA teacher and the norms of `grad_norm`)

SAR averages its loss, which is an entropy; a policy-gradient loss says nothing, so the mean token entropy of the trained
rollouts takes its place. The reference code keeps the old average after a reset and goes on resetting; here it starts anew.
"""

from __future__ import annotations

from ttrl.hooks import START, Memory, Trained, Update
from ttrl.metrics import MetricSet


class FullReset:
    """`{use: reset, with: {below: 0.05}}`. `below` is in nats per token: look at `train/entropy` of the first steps, take a fifth.

    Keeps the start weights: one more copy of what is trained, in float32. It may reset any number of times; each is a metric.
    """

    needs: frozenset[str] = frozenset({START})

    def __init__(self, *, below: float, decay: float = 0.9) -> None:
        if not below > 0.0 or not 0.0 <= decay < 1.0:
            raise ValueError(f"reset needs below > 0 and a decay in [0, 1), got {below} and {decay}")
        self._below, self._decay = below, decay
        self.average: float | None = None

    def at_start(self, trained: Trained) -> None:
        self.average = None

    def after_update(self, update: Update, trained: Trained, metrics: MetricSet) -> None:
        held = self.average
        self.average = update.entropy if held is None else self._decay * held + (1 - self._decay) * update.entropy
        metrics.mean("train/entropy_average", self.average)
        collapsed = self.average < self._below
        metrics.mean("train/reset", float(collapsed))
        if collapsed:
            trained.reset()

    def memory(self) -> Memory:
        return Memory(numbers={"average": self.average})

    def recall(self, memory: Memory) -> None:
        self.average = memory.numbers["average"]
