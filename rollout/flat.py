"""The flat sampler: all votes of a prompt are independent draws from the current policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ttrl.protocols import Pool
from ttrl.seeds import derive, generator
from ttrl.types import BoolArray, Group, Prompt, Request, SamplingSpec


class FlatSampler:
    """`votes` rollouts per prompt, of which `trained`, drawn by seed without replacement, may be trained on.

    All rollouts vote. The subset is uniform over the indices, so it is an exchangeable subsample of the votes.
    """

    def __init__(self, votes: int, trained: int) -> None:
        self._votes, self._trained = votes, trained

    def __call__(self, prompts: Sequence[Prompt], pool: Pool, spec: SamplingSpec, seed: int) -> list[Group]:
        requests = [
            Request(prompt=prompt, index=index, seed=derive(seed, prompt.id, index), spec=spec)
            for prompt in prompts
            for index in range(self._votes)
        ]
        rollouts = pool.generate(requests)
        return [
            Group(
                prompt=prompt,
                rollouts=tuple(rollouts[i * self._votes : (i + 1) * self._votes]),
                trainable=self.subset(seed, prompt.id),
            )
            for i, prompt in enumerate(prompts)
        ]

    def subset(self, seed: int, prompt_id: str) -> BoolArray:
        """[votes] with exactly `trained` true."""
        chosen = generator(seed, prompt_id, "trained").permutation(self._votes)[: self._trained]
        return np.isin(np.arange(self._votes), chosen)
