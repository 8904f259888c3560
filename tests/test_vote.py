from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.rewards.vote import decide

ballots = st.lists(st.integers(-1, 4), max_size=20)


@pytest.mark.parametrize(
    ("classes", "winner", "share", "margin", "counts"),
    [
        ([0, 0, 0, 1], 0, 0.75, 0.5, (3, 1)),
        ([1, 0, 1, 1], 1, 0.75, 0.5, (1, 3)),
        ([0, 0, 1, -1], 0, 2 / 3, 1 / 3, (2, 1)),  # no answer is no vote
        ([-1, -1, -1, 0, 0], 0, 1.0, 1.0, (2,)),
        ([0, 0], 0, 1.0, 1.0, (2,)),
        ([0, 0, 1, 1], None, 0.5, 0.0, (2, 2)),
        ([0, 1, 2, 3], None, 0.25, 0.0, (1, 1, 1, 1)),
        ([0], None, 1.0, 1.0, (1,)),  # one vote is nobody's majority
        ([-1, -1], None, 0.0, 0.0, ()),
        ([], None, 0.0, 0.0, ()),
    ],
)
def test_plurality_over_classes(
    classes: list[int], winner: int | None, share: float, margin: float, counts: tuple[int, ...]
) -> None:
    decision = decide(classes)
    assert decision.winner == winner
    assert decision.counts == counts
    assert (decision.share, decision.margin) == (pytest.approx(share), pytest.approx(margin))


@pytest.mark.parametrize(
    ("classes", "options", "reason"),
    [
        ([-1, -1], {}, "nobody answered"),
        ([0, 0, 1, 1], {}, "2 answers tie with 2 votes"),
        ([0, 1], {}, "the leading answer has 1 votes, fewer than 2"),
        ([0, 0, 1], {"min_share": 0.7}, "share 0.67 or margin 0.33 is below 0.70 / 0.00"),
        ([0, 0, 1], {"min_margin": 0.4}, "share 0.67 or margin 0.33 is below 0.00 / 0.40"),
        ([0, 0, 0, 1], {"min_votes": 4}, "the leading answer has 3 votes, fewer than 4"),
    ],
)
def test_an_abstention_says_why(classes: list[int], options: dict[str, Any], reason: str) -> None:
    decision = decide(classes, **options)
    assert decision.winner is None
    assert decision.reason == reason


def test_bounds_are_inclusive() -> None:
    assert decide([0, 0, 0, 1], min_share=0.75, min_margin=0.5, min_votes=3).winner == 0


def test_random_ties_are_drawn_by_seed_and_only_among_the_leaders() -> None:
    drawn = [decide([0, 0, 1, 1, 2, 3, 3], ties="random", tie_seed=seed).winner for seed in range(600)]
    counts = Counter(drawn)
    assert set(counts) == {0, 1, 3}
    # 200 each; five standard deviations are 58
    assert min(counts.values()) > 140
    assert drawn[5] == decide([0, 0, 1, 1, 2, 3, 3], ties="random", tie_seed=5).winner
    assert "drawn by seed from 3 answers" in decide([0, 0, 1, 1, 3, 3], ties="random").reason


def test_random_ties_do_not_touch_a_clear_vote() -> None:
    assert {decide([0, 1, 1], ties="random", tie_seed=seed).winner for seed in range(50)} == {1}


def test_random_ties_respect_the_other_bounds() -> None:
    assert decide([0, 0, 1, 1], ties="random", min_share=0.6).winner is None
    assert decide([0, 1], ties="random").winner is None
    assert decide([0, 1], ties="random", min_votes=1).winner is not None


def test_an_unknown_tie_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="'abstain' or 'random', got 'first'"):
        decide([0], ties="first")


@settings(derandomize=True, max_examples=300)
@given(ballots, st.randoms(use_true_random=False), st.sampled_from(["abstain", "random"]))
def test_the_order_of_the_votes_does_not_matter(classes: list[int], rng: random.Random, ties: str) -> None:
    shuffled = classes[:]
    rng.shuffle(shuffled)
    assert decide(classes, ties=ties, tie_seed=3) == decide(shuffled, ties=ties, tie_seed=3)


@settings(derandomize=True, max_examples=300)
@given(ballots)
def test_a_winner_is_the_only_most_frequent_class(classes: list[int]) -> None:
    decision = decide(classes)
    counts = Counter(c for c in classes if c >= 0)
    top = max(counts.values(), default=0)
    leaders = [c for c, n in counts.items() if n == top]
    assert decision.winner == (leaders[0] if len(leaders) == 1 and top >= 2 else None)
    assert 0.0 <= decision.margin <= decision.share <= 1.0
