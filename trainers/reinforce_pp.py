"""REINFORCE++ (arXiv 2501.03262): advantages normalised over all tokens of a step instead of within a group.

    reinforce_pp            A_i = r_i               then whitened
    reinforce_pp_baseline   A_i = r_i - group mean  then whitened
    whiten                  (A_t - mean) / sqrt(var + 1e-8)    over the tokens of the step, unbiased variance

A long answer has many tokens and weighs accordingly. With one prompt per step the second form is GRPO up to the weighing by length.
With the first one a unanimous group trains: whatever is better than the step's mean is pushed up, on every prompt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ttrl.metrics import MetricSet
from ttrl.trainers.advantages import Rewards, dr_grpo
from ttrl.trainers.shapers.base import Shaper
from ttrl.types import Sample

EPS = 1e-8
"""Added to the variance, as in verl."""


def whiten(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """[N] -> [N] with mean 0 and unbiased variance 1; all equal gives exactly 0.

    Golden: [1, 1, 0, 0, 1, 1, 1, 0] -> 0.7246 and -1.2076.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.size < 2 or np.all(numbers == numbers[0]):
        return np.zeros_like(numbers)
    return np.asarray((numbers - numbers.mean()) / np.sqrt(numbers.var(ddof=1) + EPS))


class ReinforcePP(Shaper):
    """`advantage: reinforce_pp`."""

    def __call__(self, rewards: Rewards) -> npt.NDArray[np.float64]:
        """[R] -> [R], not normalised yet."""
        return np.asarray(rewards, np.float64)

    def on_step(self, samples: list[Sample], step: int, metrics: MetricSet) -> list[Sample]:
        """train/advantage_mean, train/advantage_std: before whitening, over tokens that train."""
        kept = [sample.weights > 0 for sample in samples]
        pooled = np.concatenate([s.advantages[mask].astype(np.float64) for s, mask in zip(samples, kept, strict=True)])
        if not pooled.size:
            return samples
        metrics.mean("train/advantage_mean", float(pooled.mean()))
        metrics.mean("train/advantage_std", float(pooled.std(ddof=1)) if pooled.size > 1 else 0.0)
        parts = np.split(whiten(pooled), np.cumsum([mask.sum() for mask in kept])[:-1])
        result = []
        for sample, mask, part in zip(samples, kept, parts, strict=True):
            advantages = np.zeros(len(mask), np.float32)
            advantages[mask] = part
            result.append(replace(sample, advantages=advantages))
        return result


class ReinforcePPBaseline(ReinforcePP):
    """`advantage: reinforce_pp_baseline`."""

    def __call__(self, rewards: Rewards) -> npt.NDArray[np.float64]:
        return dr_grpo(rewards)
