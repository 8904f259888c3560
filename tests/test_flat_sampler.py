"""The flat sampler: all rollouts vote, and a uniform subset by seed is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from helpers_torch import prompt
from scipy.stats import chisquare

from ttrl.rollout.flat import FlatSampler
from ttrl.types import Finish, Request, Rollout, SamplingSpec, WeightStamp

SPEC = SamplingSpec(max_new_tokens=3)


def no_answers(rollouts: Sequence[Rollout]) -> list[int]:
    raise AssertionError("the flat sampler has no business with answers")


class Recorder:
    """A pool that answers every request with its own index and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        self.requests += requests
        return [
            Rollout(
                prompt_id=item.prompt.id, index=item.index, token_ids=np.array([item.index], np.int32),
                logprobs=np.zeros(1, np.float32), entropy=None, text=f"{item.prompt.id}{item.index}", finish=Finish.STOP,
                weights=WeightStamp(version=0, fingerprint="x"),
            )
            for item in requests
        ]  # fmt: skip


def test_groups_hold_all_votes_of_their_prompt_in_order() -> None:
    groups = FlatSampler(5, 3, no_answers)([prompt("a"), prompt("b")], Recorder(), SPEC, seed=1)
    assert [group.prompt.id for group in groups] == ["a", "b"]
    assert [[r.text for r in group.rollouts] for group in groups] == [
        [f"{name}{i}" for i in range(5)] for name in ("a", "b")
    ]
    assert all(group.trainable.sum() == 3 and group.trainable.shape == (5,) for group in groups)


def test_seeds_differ_between_rollouts_prompts_and_steps_and_nothing_else() -> None:
    pool, again, later = Recorder(), Recorder(), Recorder()
    sampler = FlatSampler(4, 2, no_answers)
    sampler([prompt("a"), prompt("b")], pool, SPEC, seed=1)
    sampler([prompt("b"), prompt("c"), prompt("a")], again, SPEC, seed=1)
    sampler([prompt("a"), prompt("b")], later, SPEC, seed=2)
    seeds = {(q.prompt.id, q.index): q.seed for q in pool.requests}
    assert len({*seeds.values(), *(q.seed for q in later.requests)}) == 16
    for item in again.requests:
        assert (
            seeds.get((item.prompt.id, item.index), item.seed) == item.seed
        )  # other prompts in the step change nothing


def test_the_trained_subset_does_not_depend_on_other_prompts() -> None:
    sampler = FlatSampler(16, 8, no_answers)
    alone = sampler([prompt("b")], Recorder(), SPEC, seed=3)[0].trainable
    among = sampler([prompt("a"), prompt("b"), prompt("c")], Recorder(), SPEC, seed=3)
    assert np.array_equal(among[1].trainable, alone)
    assert not np.array_equal(among[0].trainable, among[2].trainable)


@pytest.mark.parametrize(("votes", "trained"), [(1, 1), (6, 6), (64, 32), (7, 1)])
def test_exactly_the_wanted_number_is_trained_on(votes: int, trained: int) -> None:
    sampler = FlatSampler(votes, trained, no_answers)
    for seed in range(50):
        subset = sampler.subset(seed, "p")
        assert subset.shape == (votes,) and subset.dtype == np.bool_ and subset.sum() == trained


def test_every_subset_is_equally_likely() -> None:
    # 10,000 draws over the 10 subsets of 2 out of 5; seeds of consecutive steps, as a run uses them
    sampler = FlatSampler(5, 2, no_answers)
    seen = Counter(tuple(np.flatnonzero(sampler.subset(seed, "p"))) for seed in range(10_000))
    observed = [seen[pair] for pair in combinations(range(5), 2)]
    assert sum(observed) == 10_000
    assert chisquare(observed).pvalue > 1e-3


def test_subsets_of_different_prompts_are_independent() -> None:
    sampler = FlatSampler(4, 2, no_answers)
    pairs = Counter((bool(sampler.subset(seed, "p")[0]), bool(sampler.subset(seed, "q")[0])) for seed in range(4_000))
    assert chisquare([pairs[a, b] for a in (False, True) for b in (False, True)]).pvalue > 1e-3
