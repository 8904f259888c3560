"""The flat sampler: all votes of a prompt are independent draws from the current policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ttrl.protocols import Classify, Pool
from ttrl.seeds import derive, generator
from ttrl.types import BoolArray, Group, Prompt, Request, SamplingSpec


class FlatSampler:
    """`votes` rollouts per prompt, of which `trained`, drawn by seed without replacement, may be trained on.

    All rollouts vote. The subset is uniform over the indices, so it is an exchangeable subsample of the votes. `classify` is
    what every sampler is given; this one does not look at answers.
    """

    def __init__(self, votes: int, trained: int, classify: Classify) -> None:
        self._votes, self._trained = votes, trained

    def __call__(self, prompts: Sequence[Prompt], pool: Pool, spec: SamplingSpec, seed: int) -> list[Group]:
        rollouts = pool.generate([r for p in prompts for r in vote_requests(p, spec, seed, 0, self._votes)])
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
        return trained_subset(seed, prompt_id, self._votes, self._trained, drawn=self._votes)


def vote_requests(prompt: Prompt, spec: SamplingSpec, seed: int, start: int, count: int) -> list[Request]:
    """Requests for votes start, start + 1, ... of a prompt. The stream of vote i depends on seed, prompt id and i only."""
    return [
        Request(prompt=prompt, index=index, seed=derive(seed, prompt.id, index), spec=spec)
        for index in range(start, start + count)
    ]


def trained_subset(seed: int, prompt_id: str, votes: int, trained: int, *, drawn: int) -> BoolArray:
    """[drawn] with exactly `trained` true, uniform over the subsets of the votes drawn.

    One permutation of all `votes` indices decides: those drawn keep their order in it. So a sampler that stops early trains
    on as many of the flat sampler's rollouts as it has drawn.
    """
    order = generator(seed, prompt_id, "trained").permutation(votes)
    return np.isin(np.arange(drawn), order[order < drawn][:trained])
