"""Stopping rules: golden values, the proofs against brute force, and their promises by simulation with fixed seeds."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta

from ttrl.rewards.vote import decide
from ttrl.rollout.stopping import (
    UNSEEN,
    AdaptiveConsistency,
    Certified,
    EarlyStopping,
    Lossless,
    Rule,
    e_value,
    lead,
    lead_probability,
    replay,
)
from ttrl.types import NO_ANSWER

BUDGET = 64
CONTESTED = [0.45, 0.40, 0.05, 0.05, 0.05]


def spread(share: float, others: int = 10) -> list[float]:
    """A mode, and the rest evenly over the other answers."""
    return [share, *[(1 - share) / others] * others]


def draw(law: list[float], groups: int, seed: int = 0, *, silent: float = 0.0) -> list[list[int]]:
    """Groups of BUDGET votes; each is NO_ANSWER with probability `silent`."""
    generator = np.random.default_rng(seed)
    votes = generator.choice(len(law), size=(groups, BUDGET), p=law)
    return np.where(generator.random(votes.shape) < silent, NO_ANSWER, votes).tolist()


def stop(rule: Rule, row: list[int], wave: int = 1) -> int:
    """The number of votes after which the rule stops."""
    return next(n for n in range(wave, BUDGET + 1, wave) if n == BUDGET or rule.decided(row[:n], BUDGET))


def test_lossless_agrees_with_the_full_vote_in_ten_thousand_groups() -> None:
    laws = [spread(p) for p in (0.166, 0.3, 0.5, 0.7, 0.9)] + [CONTESTED, [0.5, 0.35, 0.15], [0.5, 0.5], [0.7, 0.3]]
    rows = [row for i, law in enumerate(laws) for row in draw(law, 1112, i, silent=0.1 * (i % 3))]
    assert len(rows) >= 10_000
    rule = Lossless()
    winners = [(decide(row[: stop(rule, row, wave=4)]).winner, decide(row).winner) for row in rows]
    assert all(early == full for early, full in winners)
    assert {None} < {full for _, full in winners}  # groups that abstain were among them


# The lossless column of an independent simulation with the same shares and 64 votes; it does not say how it spread the rest,
# which moves a row by up to 3 votes when the mode is small
@pytest.mark.parametrize(
    ("law", "votes"),
    [(spread(0.3), 55.7), (spread(0.5), 48.0), (spread(0.7), 41.0), (spread(0.9), 35.5), (CONTESTED, 59.0)],
)
def test_lossless_needs_as_many_votes_as_an_independent_simulation(law: list[float], votes: float) -> None:
    used = [stop(Lossless(), row) for row in draw(law, 1000)]
    assert np.mean(used) == pytest.approx(votes, abs=1.5)


def test_lossless_savings_match_theory_when_all_agree_and_for_two_answers() -> None:
    assert stop(Lossless(), [3] * BUDGET) == 33  # 33 - 0 > 31, while 32 - 0 > 32 fails
    # Two answers with shares p and 1 - p: the vote is decided as soon as one of them has 33 votes, or never (32 : 32)
    p = 0.7
    exact = sum(
        n * comb(n - 1, 32) * (p**33 * (1 - p) ** (n - 33) + (1 - p) ** 33 * p ** (n - 33)) for n in range(33, 65)
    )
    exact += 64 * comb(64, 32) * (p * (1 - p)) ** 32
    used = np.asarray([stop(Lossless(), row) for row in draw([p, 1 - p], 4000)])
    assert abs(used.mean() - exact) < 4 * used.std() / np.sqrt(len(used))


@given(
    votes=st.lists(st.integers(-1, 2), min_size=1, max_size=6),
    left=st.integers(0, 4),
    least=st.integers(2, 4),
    share=st.sampled_from([0.0, 0.4, 0.5, 0.75, 1.0]),
    margin=st.sampled_from([0.0, 0.2, 0.5]),
)
@settings(max_examples=400)
def test_lossless_stops_only_where_no_continuation_changes_the_outcome(
    votes: list[int], left: int, least: int, share: float, margin: float
) -> None:
    thresholds = {"min_votes": least, "min_share": share, "min_margin": margin}
    if not Lossless(**thresholds).decided(votes, len(votes) + left):
        return
    now = decide(votes, **thresholds).winner
    for rest in product(range(-1, 4), repeat=left):  # seen classes, an unseen one, and silence
        assert decide([*votes, *rest], **thresholds).winner == now


@given(st.lists(st.integers(-1, 2), max_size=8), st.integers(1, 6))
def test_lossless_never_decides_before_its_lower_bound(votes: list[int], left: int) -> None:
    rule, budget = Lossless(), len(votes) + left
    for more in range(1, min(rule.least(votes, budget), left)):
        assert not any(rule.decided([*votes, *rest], budget) for rest in product(range(-1, 3), repeat=more))


def test_e_values_are_the_integral_they_claim_to_be() -> None:
    assert e_value(0, 0) == 1.0
    assert e_value(6, 0) == 127 / 7 and e_value(7, 0) == 255 / 8  # 18.1 < 20 < 31.9: eight votes certify at 0.05
    for won, lost in [(1, 0), (0, 1), (5, 3), (20, 12), (3, 9)]:
        integral = quad(lambda x, w=won, d=lost: (1 + x) ** w * (1 - x) ** d, 0, 1)[0]
        assert e_value(won, lost) == pytest.approx(integral, rel=1e-9)


def test_e_values_are_a_martingale_against_a_fair_rival() -> None:
    for won, lost in product(range(12), repeat=2):
        assert e_value(won, lost) == pytest.approx((e_value(won + 1, lost) + e_value(won, lost + 1)) / 2, rel=1e-12)


@given(st.lists(st.integers(-1, 3), max_size=30))
def test_replay_matches_the_definition(votes: list[int]) -> None:
    def bets(m: int) -> tuple[int, int]:
        """Straight from the definition: bet on whoever leads among the others; of equals, who got there first."""
        counts: dict[int, int] = {}
        leader, won, lost = None, 0, 0
        for vote in votes:
            if vote == NO_ANSWER:
                continue
            if leader is not None:
                won, lost = won + (vote == leader), lost + (vote == m)
            counts[vote] = counts.get(vote, 0) + 1
            if vote != m and (leader is None or counts[vote] > counts[leader]):
                leader = vote
        return won, lost

    leader, found = replay(votes)
    assert set(found) == {*votes, UNSEEN} - {NO_ANSWER}
    for candidate, result in found.items():
        assert sum(result) <= len(votes)
        assert result == bets(candidate)
    assert leader is None or votes.count(leader) == lead(votes)[0]


SHARES = (0.17, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LAWS = {f"{p}": spread(p) for p in SHARES} | {
    "0.45 vs 0.40": CONTESTED, "0.50 vs 0.35": [0.5, 0.35, 0.15], "0.51 vs 0.49": [0.51, 0.49],
    "0.17 against five of 0.166": [0.17, *[0.166] * 5],
}  # fmt: skip


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_certified_stops_early_on_a_wrong_class_in_at_most_epsilon_of_the_groups(law: list[float]) -> None:
    # Looked at after every vote, the hardest schedule. A group counts as wrong if it stopped before the budget, wrongly.
    rule, wrong, rows = Certified(epsilon=0.05), 0, draw(law, 1000, seed=5)
    for row in rows:
        n = stop(rule, row)
        wrong += n < BUDGET and rule.certifies(row[:n]) != 0
    assert wrong / len(rows) <= 0.05


def test_certified_holds_its_error_when_two_modes_are_all_but_equal_and_votes_never_end() -> None:
    # The worst case: the leader is chosen from the data. Exact ties have no wrong class, so the mode is 0.334 against 0.333
    # twice; 600 votes are nine times the usual budget.
    generator = np.random.default_rng(11)
    rule, wrong = Certified(epsilon=0.1), 0
    for _ in range(200):
        row = generator.choice(3, size=600, p=[0.334, 0.333, 0.333]).tolist()
        certified = (rule.certifies(row[:n]) for n in range(20, 601, 20))
        wrong += next((c for c in certified if c is not None), 0) != 0
    assert wrong / 200 <= 0.1


def test_certified_saves_forty_percent_of_the_votes_at_share_seventy() -> None:
    for wave in (1, 8):
        assert np.mean([stop(Certified(), row, wave) for row in draw(spread(0.7), 1000)]) <= 0.6 * BUDGET


def test_silence_certifies_nothing_and_costs_votes_only() -> None:
    rule = Certified()
    assert rule.certifies([NO_ANSWER] * 50) is None
    assert rule.certifies([NO_ANSWER, 4] * 8) == rule.certifies([4] * 8) == 4
    assert rule.certifies([4] * 7) is None


def test_adaptive_consistency_golden_values() -> None:
    golden = {(1, 0): 0.75, (3, 0): 0.9375, (4, 0): 0.96875, (4, 1): 0.890625, (6, 1): 0.964844, (8, 2): 0.967285}
    for (first, second), value in golden.items():
        assert lead_probability(first, second) == pytest.approx(value, abs=1e-6)
        assert lead_probability(first, second) == pytest.approx(1 - beta.cdf(0.5, first + 1, second + 1))
    assert stop(AdaptiveConsistency(), [0] * BUDGET) == 4


def test_early_stopping_wants_one_unanimous_window() -> None:
    rule = EarlyStopping(window=5)
    assert [stop(rule, row) for row in ([0] * 64, [1, *[0] * 63], [*[-1] * 5, *[0] * 59])] == [5, 10, 10]
    # Two answers: expected votes are those of a geometric number of windows, q = p^5 + (1 - p)^5, cut at the budget
    p, windows = 0.8, BUDGET // 5
    q = p**5 + (1 - p) ** 5
    exact = 5 * sum((1 - q) ** k for k in range(windows)) + (BUDGET % 5) * (1 - q) ** windows
    used = np.asarray([stop(rule, row) for row in draw([p, 1 - p], 3000)])
    assert abs(used.mean() - exact) < 4 * used.std() / np.sqrt(len(used))


@pytest.mark.parametrize("rule", [Lossless(), Certified(), EarlyStopping(), AdaptiveConsistency()])
def test_every_rule_stops_at_the_budget_and_not_before_the_first_vote(rule: Rule) -> None:
    row = [0, 1] * 4
    assert rule.decided(row, len(row))
    assert not rule.decided([], BUDGET)
    assert 1 <= rule.least([], BUDGET) <= BUDGET


def test_options_out_of_range_are_refused() -> None:
    for bad in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="epsilon must lie between 0 and 1"):
            Certified(epsilon=bad)
    with pytest.raises(ValueError, match="window must be at least 2"):
        EarlyStopping(window=1)
    with pytest.raises(ValueError, match=r"threshold must lie between 0\.5 and 1"):
        AdaptiveConsistency(threshold=0.5)
