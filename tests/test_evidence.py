"""The e-processes behind the commit gate: golden values, exact expectations, error rates under continued looking."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from ttrl.modes.evidence import GRID, weigh

CANARIES = 16


def slow(disagreeing: int, votes: int, bound: Fraction) -> tuple[float, float]:
    """Both e-values in exact arithmetic."""

    def mean(rates: list[Fraction]) -> Fraction:
        terms = [(q / bound) ** disagreeing * ((1 - q) / (1 - bound)) ** (votes - disagreeing) for q in rates]
        return sum(terms, Fraction(0)) / len(terms)

    middles = [Fraction(2 * i + 1, 2 * GRID) for i in range(GRID)]
    return float(mean([bound * m for m in middles])), float(mean([bound + (1 - bound) * m for m in middles]))


@pytest.mark.parametrize(("disagreeing", "votes"), [(0, 0), (0, 10), (3, 10), (10, 10), (7, 64), (40, 64)])
@pytest.mark.parametrize("bound", [Fraction(1, 5), Fraction(1, 2), Fraction(9, 10)])
def test_evidence_is_the_mixture_of_likelihood_ratios(disagreeing, votes, bound):
    below, above = slow(disagreeing, votes, bound)
    found = weigh(disagreeing, votes, float(bound))
    assert found.below == pytest.approx(math.log(below), abs=1e-9)
    assert found.above == pytest.approx(math.log(above), abs=1e-9)


def test_golden_value_and_no_overflow():
    # the integral of (2 (1 - q))^10 over (0, 0.5), times 2: 2^11 (1 - 0.5^11) / 11
    assert weigh(0, 10, 0.5).below == pytest.approx(math.log(2**11 * (1 - 0.5**11) / 11), abs=1e-3)
    assert weigh(0, 100_000, 0.5).below > 60_000
    assert math.isfinite(weigh(50_000, 100_000, 0.5).below)


def count_distribution(rates: list[float], votes: int) -> np.ndarray:
    """[len(rates) * votes + 1] probability of each number of disagreeing votes."""
    total = np.ones(1)
    for rate in rates:
        for _ in range(votes):
            total = np.convolve(total, [1 - rate, rate])
    return total


def expectation(rates: list[float], votes: int, bound: float, side: str) -> float:
    chances = count_distribution(rates, votes)
    n = len(rates) * votes
    return sum(float(p) * math.exp(getattr(weigh(s, n, bound), side)) for s, p in enumerate(chances))


def test_expected_evidence_is_one_at_the_bound_and_less_beyond_it():
    for side, beyond in (("below", 0.35), ("above", 0.25)):
        assert expectation([0.3] * 4, 5, 0.3, side) == pytest.approx(1.0, abs=1e-9)
        assert expectation([beyond] * 4, 5, 0.3, side) < 0.8


@pytest.mark.parametrize("rates", [[0.0, 0.0, 0.6, 0.6], [0.0, 0.1, 0.1, 1.0], [0.29, 0.3, 0.3, 0.31]])
def test_canaries_of_different_rates_earn_no_more_than_their_mean(rates):
    """The step of the proof that a plain coin-tossing argument does not cover: votes are not drawn from one rate."""
    bound = sum(rates) / len(rates)
    for side in ("below", "above"):
        assert expectation(rates, 5, bound, side) <= 1.0 + 1e-9


def limits(looks: int, votes: int, bound: float, level: float) -> list[tuple[int, int]]:
    """Per look: up to how many disagreeing votes commit, from how many the update is called harmful."""
    found, needed = [], math.log(1 / level)
    for look in range(1, looks + 1):
        n = look * votes
        commits = [s for s in range(n + 1) if weigh(s, n, bound).below >= needed]
        harmful = [s for s in range(n + 1) if weigh(s, n, bound).above >= needed]
        found.append((max(commits, default=-1), min(harmful, default=n + 1)))
    return found


def ends(rates: np.ndarray, bounds: list[tuple[int, int]], runs: int, seed: int) -> dict[str, float]:
    """Shares of simulated updates by how they ended: votes of canaries with these rates, a look after every vote of each."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    counts = rng.binomial(1, rates, size=(runs, len(bounds), len(rates))).sum(axis=2).cumsum(axis=1)
    kept = counts <= np.asarray([b[0] for b in bounds])
    lost = counts >= np.asarray([b[1] for b in bounds])
    never = len(bounds)
    first_kept = np.where(kept.any(axis=1), kept.argmax(axis=1), never)
    first_lost = np.where(lost.any(axis=1), lost.argmax(axis=1), never)
    return {"kept": float((first_kept < first_lost).mean()), "lost": float((first_lost < first_kept).mean())}


MIXED = np.asarray([0.0] * 4 + [0.1] * 4 + [0.3] * 4 + [0.4] * 4)


@pytest.mark.parametrize("rates", [np.full(CANARIES, 0.2), MIXED], ids=["equal", "mixed"])
def test_both_errors_stay_below_the_level_however_often_one_looks(rates):
    """At the bound itself either outcome is an error; looking 40 times must not add up."""
    level, runs = 0.1, 4000
    found = ends(rates, limits(40, CANARIES, 0.2, level), runs, seed=1)
    slack = 3 * math.sqrt(level * (1 - level) / runs)
    assert found["kept"] <= level + slack
    assert found["lost"] <= level + slack
    if rates is not MIXED:  # a bound that is never used up proves nothing
        assert found["kept"] + found["lost"] > level / 3


def test_the_simulation_would_notice_a_test_that_is_only_valid_for_one_look():
    """The same counts against the limits of single exact binomial tests at that level: looking 40 times does add up."""
    level, single = 0.1, []
    for look in range(1, 41):
        cdf = np.cumsum(count_distribution([0.2], look * CANARIES))
        single.append((int((cdf <= level).sum()) - 1, look * CANARIES + 1))
    assert ends(np.full(CANARIES, 0.2), single, 4000, seed=1)["kept"] > 2 * level


@pytest.mark.parametrize(("rate", "outcome"), [(0.1, "kept"), (0.45, "lost"), (0.95, "lost")])
def test_clear_cases_are_decided(rate, outcome):
    """At the level that a stream of 25 steps gives one update."""
    found = ends(np.full(CANARIES, rate), limits(32, CANARIES, 0.2, 0.05 / 25), 500, seed=2)
    assert found[outcome] > 0.99
