"""Fisher anchor: weights that the start model's answers depend on are held more tightly (EATA, arXiv 2204.02610; EWC, 1612.00796).

    omega_j = sum over rollouts of (d log pi(rollout) / d theta_j)^2 / tokens       under the start model, on its own rollouts
    loss   += coefficient * sum_j omega_j (theta_j - theta_j(start))^2

omega is the diagonal of the Fisher information per token. sum_j omega_j d_j^2 / 2 is the part of the KL divergence per token that a
diagonal can see, which is small when all weights move together (docs/stabilizers.md has a measurement).
Squares are taken per rollout; those of a batch's mean gradient, as in the reference code, are smaller by its size and no Fisher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ttrl.hooks import START, Memory, Trained
from ttrl.metrics import MetricSet

if TYPE_CHECKING:
    from torch import Tensor


class FisherAnchor:
    """`{use: fisher, with: {coefficient: 1.0, rollouts: 256}}`. Two more copies of what is trained, in float32.

    Measured once, on up to `rollouts` rollouts of the first step (which are the start model's own, of the adapted prompts, not
    of general text): one forward and backward pass each.
    """

    needs: frozenset[str] = frozenset({START})

    def __init__(self, *, coefficient: float = 1.0, rollouts: int = 256) -> None:
        if coefficient <= 0 or rollouts < 1:
            raise ValueError(
                f"fisher needs a positive coefficient and at least 1 rollout, got {coefficient} and {rollouts}"
            )
        self._coefficient, self._rollouts = coefficient, rollouts
        self._omega: dict[str, Tensor] = {}

    @property
    def rollouts_wanted(self) -> int:
        return 0 if self._omega else self._rollouts

    def take_squares(self, squares: Mapping[str, Tensor], tokens: int) -> None:
        self._omega = {name: square / max(tokens, 1) for name, square in squares.items()}

    def add_gradient(self, trained: Trained, metrics: MetricSet) -> float:
        value = 0.0
        for part in trained:
            assert part.start is not None and part.gradient is not None
            moved = part.weights - part.start
            pull = self._omega[part.name] * moved
            value += self._coefficient * float((pull * moved).sum(dtype=moved.double().dtype))
            part.gradient.add_(pull, alpha=2.0 * self._coefficient)
        metrics.mean("train/fisher", value)
        return value

    def memory(self) -> Memory:
        return Memory(tensors=self._omega)

    def recall(self, memory: Memory) -> None:
        self._omega = dict(memory.tensors)
