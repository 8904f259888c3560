"""Soft punishment of answers that come near the length limit (DAPO, arXiv 2503.14476).

    penalty = factor * clip((max_tokens - cache - length) / cache, -1, 0)      added to the reward, before the advantage

It is 0 up to max_tokens - cache and -factor from max_tokens on, however long the answer is (verl's form has no lower end and relies
on the sampler). It is a part of the reward that depends on length alone, so a unanimous group gets advantages from it: with an
advantage that divides by the spread, however small the difference is. The gate `zero_variance` looks at the vote and drops such groups.
"""

from __future__ import annotations

import numpy as np

from ttrl.trainers.shapers.base import Floats, Shaper, masked
from ttrl.types import Finish, IntArray, Sample, Scored


def overlong_penalty(length: int, max_tokens: int, cache: int) -> float:
    """In [-1, 0]. Golden, at 20480 and 4096: 16384 -> 0, 18432 -> -0.5, 20480 -> -1."""
    return min(0.0, max(-1.0, (max_tokens - cache - length) / cache))


class Overlong(Shaper):
    """`shape: [{use: overlong, with: {max_tokens: 20480, cache: 4096}}]`; `max_tokens` is that of the rollouts.

    With `filter`, truncated rollouts get no gradient at all (overlong filtering). They still count in the group's baseline.
    """

    def __init__(self, *, max_tokens: int, cache: int, factor: float = 1.0, filter: bool = False) -> None:
        if not 0 < cache <= max_tokens:
            raise ValueError(f"cache must be in 1 .. max_tokens, got cache {cache} and max_tokens {max_tokens}")
        if factor < 0.0:
            raise ValueError(f"factor must not be negative, got {factor}: it would pay for length")
        self._max, self._cache, self._factor, self._filter = max_tokens, cache, factor, filter

    def on_rewards(self, rewards: Floats, scored: Scored, trained: IntArray) -> Floats:
        lengths = [len(scored.group.rollouts[int(index)].token_ids) for index in trained]
        penalties = [overlong_penalty(length, self._max, self._cache) for length in lengths]
        return np.asarray(rewards, np.float64) + self._factor * np.asarray(penalties)

    def on_group(self, samples: list[Sample], scored: Scored, trained: IntArray) -> list[Sample]:
        if not self._filter:
            return samples
        whole = [scored.group.rollouts[int(index)].finish is not Finish.LENGTH for index in trained]
        return [masked(sample, np.full(len(sample.weights), keep)) for sample, keep in zip(samples, whole, strict=True)]
