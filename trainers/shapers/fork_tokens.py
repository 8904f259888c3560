"""Train on forking tokens only: those with the highest entropy (SPINE, arXiv 2511.17938).

    m_t = 1 for the ceil(fraction n) tokens of highest entropy among the n candidates of a scope, else 0

The entropies are the sampler's own, recorded when the token was drawn, so the mask does not move while the policy does. Ties
go to the earlier token, and always exactly ceil(fraction n) tokens are taken. Tokens left out have weight 0: no policy gradient, no
KL term, no place in the denominator. The loss is then a mean over forks, and the effective step is not divided by five.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ttrl.metrics import MetricSet
from ttrl.trainers.shapers.base import Scope, Shaper, entropies, masked, scopes
from ttrl.types import BoolArray, Sample


def fork_mask(entropy: npt.NDArray[np.floating], fraction: float = 0.2) -> BoolArray:
    """[n] entropies -> [n] True at the ceil(fraction n) largest; ties go to the earlier token.

    Golden: .1, .2, ..., 1 at 0.2 -> the last two, which are those above the interpolated 0.8 quantile of 0.82.
    """
    chosen = np.zeros(len(entropy), np.bool_)
    count = math.ceil(round(fraction * len(entropy), 9))  # 0.07 * 100 is a little more than 7
    chosen[np.argsort(-np.asarray(entropy, np.float64), kind="stable")[:count]] = True
    return chosen


class ForkTokens(Shaper):
    """`shape: [{use: fork_tokens, with: {fraction: 0.2, over: response}}]`.

    `over`: the tokens that compete with each other are those of a response, of a group or of a whole step. The paper does not say
    which; `response` gives every answer its share, `step` lets certain answers train on nothing.
    """

    needs = frozenset({"entropy"})

    def __init__(self, *, fraction: float = 0.2, over: Scope = "response") -> None:
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        self._fraction, self._over = fraction, over

    def on_step(self, samples: list[Sample], step: int, metrics: MetricSet) -> list[Sample]:
        """train/fork_share: of candidate tokens; train/fork_entropy and train/follower_entropy: means over tokens."""
        result = list(samples)
        for members in scopes(samples, self._over):
            candidates = [samples[index].weights > 0 for index in members]
            values = [entropies(samples[index])[mask] for index, mask in zip(members, candidates, strict=True)]
            pooled = np.concatenate(values)
            chosen = fork_mask(pooled, self._fraction)
            metrics.mean("train/fork_share", float(chosen.mean()) if len(chosen) else 0.0, len(chosen))
            for name, part in (("fork", pooled[chosen]), ("follower", pooled[~chosen])):
                metrics.mean(f"train/{name}_entropy", float(part.mean()) if len(part) else 0.0, len(part))
            ends = np.cumsum([len(part) for part in values])[:-1]
            for index, mask, picked in zip(members, candidates, np.split(chosen, ends), strict=True):
                keep = np.zeros(len(mask), np.bool_)
                keep[mask] = picked
                result[index] = masked(samples[index], keep)
        return result
