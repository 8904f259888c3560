"""TTRL end to end on a softmax bandit: votes, label, rewards and advantages are the shipped ones, the policy is ten numbers."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import boxed, context, make_group, make_prompt, make_rollout, make_scored
from scipy.stats import chi2

from ttrl.rewards.majority import MajorityVote
from ttrl.rollout.flat import FlatSampler
from ttrl.seeds import generator
from ttrl.trainers.grpo import GRPO
from ttrl.types import Group

ARMS = 10
REWARD, OBJECTIVE = MajorityVote(), GRPO()
ANSWERS = [make_rollout(text) for text in boxed(range(ARMS))]


def spread(*modes: float) -> np.ndarray:
    """The modes, and what is left evenly over the other answers."""
    return np.asarray([*modes, *[(1 - sum(modes)) / (ARMS - len(modes))] * (ARMS - len(modes))])


def step(logits: np.ndarray, votes: int, trained: int, seed: int, number: int, lr: float) -> np.ndarray:
    """One exact TTRL update: the gradient of sum A log p(a) at the sampling policy."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    drawn = generator(seed, number).choice(ARMS, size=votes, p=p)
    kept = FlatSampler(votes, trained, lambda _: []).subset(seed * 1000 + number, "p")
    group = Group(prompt=make_prompt(), rollouts=tuple(ANSWERS[arm] for arm in drawn), trainable=kept)
    scored = REWARD(group, context())
    if not scored.train.any():
        return logits
    samples = OBJECTIVE.samples(scored)
    arms = drawn[np.flatnonzero(scored.train)]
    advantages = np.asarray([float(sample.advantages[0]) for sample in samples])
    gradient = (np.eye(ARMS)[arms] - p) * advantages[:, None]
    return np.asarray(logits + lr * gradient.mean(axis=0))


def winner(law: np.ndarray, votes: int, trained: int, seed: int, *, steps: int, lr: float) -> tuple[int, float]:
    """The answer the policy ends with, and its probability."""
    logits = np.log(law)
    for number in range(steps):
        logits = step(logits, votes, trained, seed, number, lr)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return int(p.argmax()), float(p.max())


def test_a_clear_mode_takes_over() -> None:
    for seed in range(3):
        assert winner(spread(0.4), 64, 32, seed, steps=60, lr=1.0) == (0, pytest.approx(1.0, abs=0.02))


def test_with_four_votes_the_winner_between_close_modes_varies_by_seed() -> None:
    ends = [winner(spread(0.30, 0.28), 4, 4, seed, steps=60, lr=1.0)[0] for seed in range(24)]
    assert len(set(ends)) >= 2 and ends.count(0) <= 18


def test_with_a_thousand_votes_it_is_almost_always_the_larger_one() -> None:
    ends = [winner(spread(0.30, 0.28), 1024, 32, seed, steps=6, lr=1.0)[0] for seed in range(8)]
    assert ends.count(0) >= 7


def test_thirty_two_of_sixty_four_are_a_uniform_subset_and_the_label_uses_all() -> None:
    sampler, draws = FlatSampler(64, 32, lambda _: []), 10_000
    kept = np.stack([sampler.subset(seed, "p") for seed in range(draws)])
    assert (kept.sum(axis=1) == 32).all()
    # Inclusion counts of draws without replacement: variance n q (1 - q), negatively correlated, so the sum has 63 degrees
    statistic = ((kept.sum(axis=0) - draws / 2) ** 2 / (draws / 4)).sum() * 63 / 64
    assert chi2.sf(statistic, 63) > 1e-3
    group = make_group(boxed([5] * 33 + [7] * 31), trainable=[False] * 32 + [True] * 32)
    scored = REWARD(group, context())
    assert scored.label == "5" and scored.train.sum() == 32 and scored.rewards[32:].sum() == 1  # 7 leads among the kept


def test_rewards_stand_on_the_last_token_of_their_own_rollout() -> None:
    group = make_group(["ab", "abcd"])  # 3 and 5 tokens with the end
    last = tuple(np.eye(len(r.token_ids), dtype=np.float32)[-1] for r in group.rollouts)
    samples = OBJECTIVE.samples(make_scored([0, 0], [1, 1], group=group, token_rewards=last))
    assert [np.flatnonzero(sample.advantages).tolist() for sample in samples] == [[2], [4]]
    ungraded = OBJECTIVE.samples(make_scored([0, 1], [1, 0], group=group))
    assert [len(sample.advantages) for sample in ungraded] == [3, 5]
    assert (ungraded[0].advantages > 0).all() and (ungraded[1].advantages < 0).all()
