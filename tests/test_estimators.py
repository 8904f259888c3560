from __future__ import annotations

import itertools
from collections import Counter
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.evaluate.estimators import CONFIDENCE, bootstrap, maj_at_k, pass_at_k


def enumerated_maj(counts: list[int], correct: int | None, no_answer: int, k: int) -> float:
    """The slow twin: every way to draw k samples, ties shared evenly."""
    samples = [c for c, n in enumerate(counts) for _ in range(n)] + [-1] * no_answer
    favourable = 0.0
    for draw in itertools.combinations(samples, k):
        votes = Counter(c for c in draw if c != -1)
        leaders = [c for c, n in votes.items() if n == max(votes.values())]
        favourable += (correct in leaders) / len(leaders) if leaders else 0.0
    return favourable / comb(len(samples), k)


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [
        (50, 5, 10, 0.689437),  # 1 - C(45, 10) / C(50, 10)
        (4, 1, 2, 0.5),  # 1 - C(3, 2) / C(4, 2) = 1 - 3/6
        (4, 1, 1, 0.25),
        (4, 1, 4, 1.0),
        (4, 3, 2, 1.0),  # two samples cannot miss three of four
        (16, 0, 8, 0.0),
        (16, 16, 1, 1.0),
        (1, 1, 1, 1.0),
        # exact where floats of the two binomials would be rounded: one right sample of 1000, 500 drawn
        (1000, 1, 500, 0.5),
    ],
)
def test_pass_at_k(n: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_must_lie_within_the_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be between 1 and the number of samples 4, got {k}"):
        pass_at_k(4, 2, k)
    with pytest.raises(ValueError, match=f"k must be between 1 and the number of samples 4, got {k}"):
        maj_at_k([2, 1], 0, 1, k)


@settings(derandomize=True, max_examples=100)
@given(st.integers(1, 9), st.data())
def test_pass_at_k_equals_the_share_of_draws_with_a_right_one(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


@pytest.mark.parametrize(
    ("counts", "correct", "no_answer", "k", "expected"),
    [
        ([3, 1], 0, 0, 1, 0.75),  # one sample is pass@1
        ([3, 1], 0, 0, 3, 1.0),
        ([2, 2], 0, 0, 4, 0.5),  # a tie of two
        ([1, 1, 1], 0, 0, 3, 1 / 3),  # a tie of three
        ([2, 2], 0, 0, 2, 0.5),  # 1/6 both right, 4/6 a tie
        ([1], 0, 3, 4, 1.0),  # those without an answer do not vote
        ([1], 0, 3, 1, 0.25),
        ([5, 3], None, 0, 4, 0.0),
        ([], None, 4, 2, 0.0),
    ],
)
def test_maj_at_k(counts: list[int], correct: int | None, no_answer: int, k: int, expected: float) -> None:
    assert maj_at_k(counts, correct, no_answer, k) == pytest.approx(expected)
    assert enumerated_maj(counts, correct, no_answer, k) == pytest.approx(expected)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3), st.data())
def test_maj_at_k_equals_the_enumeration_of_all_draws(counts: list[int], no_answer: int, data: st.DataObject) -> None:
    while sum(counts) + no_answer > 11:
        counts = counts[1:]
    correct = data.draw(st.integers(0, len(counts) - 1))
    k = data.draw(st.integers(1, sum(counts) + no_answer))
    assert maj_at_k(counts, correct, no_answer, k) == pytest.approx(enumerated_maj(counts, correct, no_answer, k))


@pytest.mark.parametrize("k", [1, 7, 32, 64])
def test_the_right_answer_wins_somewhere_in_every_draw(k: int) -> None:
    # some class is elected in every draw with an answer, so the chances of all classes add up to 1
    counts = [20, 20, 10, 9, 5]
    assert sum(maj_at_k(counts, c, 0, k) for c in range(len(counts))) == pytest.approx(1.0)
    assert maj_at_k(counts, 0, 0, k) == pytest.approx(maj_at_k(counts, 1, 0, k))


def test_the_interval_of_equal_values_is_a_point_and_of_one_value_is_none() -> None:
    assert bootstrap(np.full(10, 0.25), seed=0) == (0.25, 0.25)
    assert bootstrap(np.asarray([0.5]), seed=0) is None
    assert bootstrap(np.asarray([]), seed=0) is None


def test_the_interval_is_a_function_of_the_seed_and_contains_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=40)
    low, high = bootstrap(values, seed=1) or (0.0, 0.0)
    assert (low, high) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert low < values.mean() < high
    # a normal interval of 95 % is 2 * 1.96 standard errors wide
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(40), rel=0.05)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    trials, covered = 200, 0
    for trial in range(trials):
        low, high = bootstrap(rng.binomial(16, 0.3, size=60) / 16, seed=trial) or (0.0, 0.0)
        covered += low <= 0.3 <= high
    # 200 trials have a standard deviation of 1.5 %, and the percentile bootstrap covers a little less than it says
    assert covered / trials == pytest.approx(CONFIDENCE, abs=0.04)
