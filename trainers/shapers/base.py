"""What a shaper may do. A sub-class overrides the hooks it needs; they are called in this order, shaper after shaper.

on_rewards   rewards of one group, before they become advantages
on_group     the samples of one group, with everything the reward knows about it
on_step      all samples of a step, whatever their group
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ttrl.errors import PluginError
from ttrl.metrics import MetricSet
from ttrl.objectives import Decoder
from ttrl.types import BoolArray, IntArray, Sample, Scored

Floats = npt.NDArray[np.floating]
Scope = Literal["response", "group", "step"]
"""Over which tokens a quantile is taken."""

DRAWN = "drawn"
"""Name of the extra that remembers which tokens the sampler drew, when a mask took their weight away: they are still part of the
probability of their row."""


class Shaper:
    """Changes nothing."""

    needs: frozenset[str] = frozenset()
    """{"entropy"}: of the sampler; {"tokenizer"}: `take_tokenizer` is called before the first group."""
    rescales: bool = False
    """Changes the size of advantages group by group, which a normalisation over the step would undo in part."""

    def on_rewards(self, rewards: Floats, scored: Scored, trained: IntArray) -> Floats:
        """[R] rewards of the trained rollouts -> the same. `trained` [R] are their indices in the group."""
        return rewards

    def on_group(self, samples: list[Sample], scored: Scored, trained: IntArray) -> list[Sample]:
        """[R] samples of the trained rollouts -> the same number of them."""
        return samples

    def on_step(self, samples: list[Sample], step: int, metrics: MetricSet) -> list[Sample]:
        """All samples of a step -> the same number of them, in the same order."""
        return samples

    def take_tokenizer(self, tokenizer: Decoder) -> None:
        """Only for those that need one."""

    def state(self) -> Mapping[str, Any]:
        """What has to survive a checkpoint, JSON-able."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue as the shaper that returned `state`."""


def masked(sample: Sample, keep: BoolArray) -> Sample:
    """The sample without the weight of the tokens that are not kept [T]; what was drawn is remembered."""
    drawn = sample.extras.get(DRAWN, (sample.weights > 0).astype(np.float32))
    weights = np.where(keep, sample.weights, 0.0).astype(np.float32)
    return replace(sample, weights=weights, extras={**sample.extras, DRAWN: drawn})


def entropies(sample: Sample) -> npt.NDArray[np.float64]:
    """[T] the sampler's entropies. Raises PluginError when the engine recorded none."""
    if sample.entropy is None:
        raise PluginError("the objective needs the entropies of the sampler, and this engine recorded none")
    return np.asarray(sample.entropy, np.float64)


def scopes(samples: Sequence[Sample], over: Scope) -> list[list[int]]:
    """Indices of the samples that share a quantile."""
    if over == "response":
        return [[index] for index in range(len(samples))]
    if over == "step":
        return [list(range(len(samples)))]
    members: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        members.setdefault(sample.group, []).append(index)
    return list(members.values())
