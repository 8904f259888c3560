"""EMA teacher: an average over the weights of the run, under which the votes can be drawn (CoTTA, arXiv 2203.13591).

    teacher <- decay * teacher + (1 - decay) * weights        once per update, from the start weights on

Labels then come from a model that moves slowly, while the rollouts that are trained on stay those of the policy itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttrl.hooks import Memory, Trained, Update
from ttrl.metrics import MetricSet

if TYPE_CHECKING:
    from torch import Tensor


class EMATeacher:
    """`{use: ema, with: {decay: 0.99}}`. One more copy of the trained weights in float32.

    With `votes: true` every step draws `votes_per_prompt` votes under the teacher and `train_per_prompt` rollouts under the
    policy, which costs one weight sync and the policy's rollouts on top; the reward must be
    `{use: majority_vote, with: {electorate: untrained}}`. With `votes: false` the average is kept and nothing uses it.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, *, decay: float = 0.99, votes: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema needs a decay in [0, 1), got {decay}; 0.99 averages over about the last 100 updates")
        self._decay, self.votes = decay, votes
        self._held: dict[str, Tensor] = {}

    def at_start(self, trained: Trained) -> None:
        self._held = {part.name: part.weights.clone() for part in trained}

    def after_update(self, update: Update, trained: Trained, metrics: MetricSet) -> None:
        for part in trained:
            held = self._held[part.name]
            held.lerp_(part.weights, 1.0 - self._decay)
            gap = float((held - part.weights).square().mean()) if held.numel() else 0.0
            metrics.mean("train/teacher_gap", gap, held.numel())

    def teacher_weights(self, name: str) -> Tensor:
        return self._held[name]

    def memory(self) -> Memory:
        return Memory(tensors=self._held)

    def recall(self, memory: Memory) -> None:
        for name, tensor in memory.tensors.items():
            self._held[name].copy_(tensor)
