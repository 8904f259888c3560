"""Advantages reshaped by the entropy of their response (ETTRL, arXiv 2508.11356): EAR, and the clip it was compared with.

    H_i   mean entropy of the tokens of response i, under the sampler
    Y_i   = 1 + (mean_j H_j - H_i) / mean_j H_j           over the trained responses of the group; mean_i Y_i = 1
    EAR   A_i <- Y_i A_i                                  confident responses count more, uncertain ones less

As published, Y_i is negative for a response with more than twice the mean entropy: a right answer would be punished because it
was hesitant. Here Y_i is clamped to [0, 2] unless the recipe says `clamp: null`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ttrl.metrics import MetricSet
from ttrl.trainers.shapers.base import Shaper, entropies
from ttrl.types import IntArray, Sample, Scored


def ear_factors(
    entropy: Sequence[float] | npt.NDArray[np.floating], clamp: tuple[float, float] | None = (0.0, 2.0)
) -> npt.NDArray[np.float64]:
    """[R] response entropies -> [R] factors Y. A group without any entropy gets 1.

    Golden: [.2, .4, .6] -> [1.5, 1, .5]; [.1, .1, 1] -> [1.75, 1.75, -.5] before clamping.
    """
    values = np.asarray(entropy, np.float64)
    mean = values.mean()
    if mean <= 0.0:
        return np.ones_like(values)
    factors = 1.0 + (mean - values) / mean
    return np.asarray(factors if clamp is None else np.clip(factors, *clamp))


class EntropyAdvantage(Shaper):
    """`shape: [ear]` or `{use: ear, with: {clamp: null}}`. Advantages of a group no longer sum to zero."""

    needs = frozenset({"entropy"})
    rescales = True

    def __init__(self, *, clamp: tuple[float, float] | None = (0.0, 2.0)) -> None:
        if clamp is not None and not clamp[0] <= 1.0 <= clamp[1]:
            raise ValueError(f"clamp must be [low, high] around 1, or null for the published form, got {list(clamp)}")
        self._clamp = clamp

    def on_group(self, samples: list[Sample], scored: Scored, trained: IntArray) -> list[Sample]:
        factors = ear_factors([float(entropies(sample).mean()) for sample in samples], self._clamp)
        return [
            replace(sample, advantages=(factor * sample.advantages).astype(np.float32))
            for sample, factor in zip(samples, factors, strict=True)
        ]

    def on_step(self, samples: list[Sample], step: int, metrics: MetricSet) -> list[Sample]:
        """train/response_entropy: mean over responses, what the factors are made of."""
        for sample in samples:
            metrics.mean("train/response_entropy", float(entropies(sample).mean()))
        return samples


class AdvantageClip(Shaper):
    """`shape: [{use: adv_clip, with: {beta: 2.0}}]`: A <- clip(A, -beta, beta).

    Tames rare hits: of 32 rollouts with three hits, 3.06 becomes 2 and -0.317 stays.
    """

    rescales = True

    def __init__(self, *, beta: float = 2.0) -> None:
        if beta <= 0.0:
            raise ValueError(f"beta must be positive, got {beta}")
        self._beta = beta

    def on_group(self, samples: list[Sample], scored: Scored, trained: IntArray) -> list[Sample]:
        return [replace(s, advantages=np.clip(s.advantages, -self._beta, self._beta)) for s in samples]
