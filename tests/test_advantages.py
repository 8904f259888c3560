"""Advantages of one group, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttrl.trainers.advantages import dr_grpo, grpo

BOTH = [grpo, dr_grpo]


def test_three_of_four() -> None:
    # Mean 3/4; unbiased variance (3/16 + 9/16) / 3 = 1/4, so the standard deviation is 1/2
    np.testing.assert_allclose(grpo(np.array([1, 1, 1, 0])), [0.5, 0.5, 0.5, -1.5], atol=4e-6)
    np.testing.assert_allclose(dr_grpo(np.array([1, 1, 1, 0])), [0.25, 0.25, 0.25, -0.75], atol=1e-15)


@pytest.mark.parametrize(
    ("size", "ones", "positive", "negative"),
    [(8, 2, 1.62019, -0.54006), (32, 3, 3.06016, -0.31657)],
)
def test_rare_hits_get_large_advantages(size: int, ones: int, positive: float, negative: float) -> None:
    # std^2 = k (n - k) / (n (n - 1)): for n = 8, k = 2 that is 12/56, and 0.75 / 0.46291 = 1.62019
    advantages = grpo(np.array([1.0] * ones + [0.0] * (size - ones)))
    np.testing.assert_allclose(advantages[:ones], positive, atol=1e-5)
    np.testing.assert_allclose(advantages[ones:], negative, atol=1e-5)


def test_the_deviation_is_unbiased_and_epsilon_is_added_to_it() -> None:
    # Of two rewards 1 and 0: mean 1/2, std sqrt(1/2); A = 0.5 / (0.7071068 + 1e-6)
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    np.testing.assert_allclose(grpo(np.array([1.0, 0.0])), [expected, -expected], rtol=1e-14)


@pytest.mark.parametrize("advantage", BOTH)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.3, 1e9])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 32])
def test_equal_rewards_give_exactly_zero(advantage: type, value: float, size: int) -> None:
    # In floating point the mean of three times 0.1 is not 0.1, and a division by the spread would blow that up
    result = advantage(np.full(size, value))
    assert result.shape == (size,) and (result == 0).all()


@pytest.mark.parametrize("advantage", BOTH)
@pytest.mark.parametrize("rewards", [[], [[1.0, 0.0]], [1.0, math.nan], [math.inf, 0.0]])
def test_rewards_without_a_meaning_are_refused(advantage: type, rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="finite rewards"):
        advantage(np.array(rewards))


REWARDS = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=20).map(np.array)


@given(REWARDS, st.integers(-4, 4))
def test_a_constant_added_to_a_group_changes_nothing(rewards: np.ndarray, shift: int) -> None:
    for advantage in BOTH:
        np.testing.assert_allclose(advantage(rewards + shift), advantage(rewards), atol=1e-12)


@given(REWARDS)
def test_advantages_sum_to_zero_and_keep_the_order(rewards: np.ndarray) -> None:
    for advantage in BOTH:
        result = advantage(rewards)
        assert abs(result.sum()) < 1e-9
        assert result.dtype == np.float64
        bigger = rewards[:, None] > rewards[None, :]
        assert (result[:, None] > result[None, :])[bigger].all()


@given(REWARDS, st.integers(2, 50))
def test_the_scale_of_rewards_cancels_only_with_the_deviation(rewards: np.ndarray, factor: int) -> None:
    np.testing.assert_allclose(grpo(rewards * factor), grpo(rewards), rtol=1e-4)
    np.testing.assert_allclose(dr_grpo(rewards * factor), factor * dr_grpo(rewards), atol=1e-12)
