"""The line to beat, and how sure the totals of a ledger are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, fisher_exact, hypergeom
from test_compare import evaluation
from test_ledger import evaluation as ledger_evaluation
from test_ledger import result

from ttrl.evaluate.book import EvaluationBook
from ttrl.evaluate.digest import digest, largest_vote, line_to_beat
from ttrl.evaluate.estimators import wilson
from ttrl.evaluate.ledger import by_chance, ledger, shares, totals


def test_wilson_intervals_against_numbers_by_hand() -> None:
    # 3 of 10: (0.3 + z2/20 -+ z sqrt(0.021 + z2/400)) / (1 + z2/10) with z = 1.96
    assert wilson(3, 10) == pytest.approx((0.10779, 0.60322), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    low, high = wilson(10, 10)
    assert (low, high) == pytest.approx((1 - 0.27753, 1.0), abs=1e-5)


@pytest.mark.parametrize("n", [30, 100, 400])
def test_intervals_of_the_totals_cover_95_percent(n: int) -> None:
    """Exact coverage by summing over all outcomes, on average over shares from 2 to 98 %."""
    outcomes = [wilson(k, n) for k in range(n + 1)]
    shares = np.linspace(0.02, 0.98, 97)
    covered = [
        sum(p for (a, b), p in zip(outcomes, binom.pmf(range(n + 1), n, s), strict=True) if a <= s <= b) for s in shares
    ]
    assert 0.94 <= np.mean(covered) <= 0.96


def test_shares_of_a_ledger_with_known_answers() -> None:
    pairs = [(2, 14)] * 3 + [(9, 16)] + [(14, 2)] * 2 + [(8, 8)] * 4
    before = ledger_evaluation([result(b, identifier=str(i)) for i, (b, _) in enumerate(pairs)])
    after = ledger_evaluation([result(a, identifier=str(i)) for i, (_, a) in enumerate(pairs)])
    found = shares(ledger(before, after))
    assert {name: share.value for name, share in found.items()} == {
        "learned": 0.3,
        "sharpened": 0.1,
        "corrupted": 0.2,
        "unchanged": 0.4,
    }
    assert (found["learned"].low, found["learned"].high) == wilson(3, 10)


def test_verdicts_by_chance_are_as_many_as_the_test_makes_by_itself() -> None:
    """Slow twin from the definition, and ledgers in which nothing has changed."""
    entry = ledger(ledger_evaluation([result(10)]), ledger_evaluation([result(6)]))
    twin = sum(
        hypergeom.pmf(x, 32, 16, 16) for x in range(17) if fisher_exact([[x, 16 - x], [16 - x, x]]).pvalue < 0.05
    )
    assert by_chance(entry) == pytest.approx(twin, rel=1e-9)
    rng = np.random.default_rng(0)
    rates, expected, seen = rng.uniform(0.2, 0.8, 400), 0.0, 0
    for _ in range(5):
        sides = [
            ledger_evaluation([result(int(rng.binomial(16, p)), identifier=str(i)) for i, p in enumerate(rates)])
            for _ in "ab"
        ]
        entries = ledger(*sides)
        expected += by_chance(entries)
        seen += len(entries) - totals(entries)["unchanged"]
    assert 10 < expected < 100
    assert abs(seen - expected) < 4 * np.sqrt(expected)


def test_the_line_to_beat_is_the_largest_vote_of_the_start_model() -> None:
    before, after = evaluation([4, 1, 0], 0), evaluation([4, 2, 0], 9)
    line = line_to_beat(before, after, seed=0)
    assert line is not None
    assert (line.metric, line.start.value) == ("maj@4", pytest.approx(1 / 3))
    # pass@1 after minus maj@4 before: 1 - 1, 1/2 - 0, 0 - 0
    assert line.final_pass1_above_it is not None
    assert line.final_pass1_above_it.value == pytest.approx(1 / 6)
    assert line.verdict == "open"
    beaten = line_to_beat(evaluation([2, 2, 2], 0), evaluation([4, 3, 4], 9), 0)
    missed = line_to_beat(evaluation([3, 3, 4], 0), evaluation([1, 1, 2], 9), 0)
    assert beaten is not None and beaten.verdict == "beaten"
    assert missed is not None and missed.verdict == "missed"
    waiting = line_to_beat(before, None, 0)
    assert waiting is not None and waiting.final_pass1_above_it is None and waiting.verdict == "open"
    assert line_to_beat(None, None, 0) is None


def test_votes_of_parts_of_the_prompts_are_no_line_to_beat() -> None:
    before = evaluation([4, 1, 0], 0)
    parts = {f"{name} [web/text]": value for name, value in before.estimates.items()}
    with_parts = replace(before, estimates=dict(before.estimates) | parts)
    line, plain = line_to_beat(with_parts, None, 0), line_to_beat(before, None, 0)
    assert plain is not None and line == plain and line.metric == "maj@4"
    assert largest_vote(["maj@8", "maj@16", "maj@32 [web]", "pass@64", "maj@"]) == "maj@16"
    assert largest_vote(["maj@8 [web]", "pass@1"]) is None


def test_the_digest_carries_the_protocol_and_says_none_for_what_is_missing() -> None:
    book = EvaluationBook()
    assert all(value in (None, []) for value in digest(book, "adapted", 0).values())
    book.record(evaluation([2, 2, 2], 0))
    assert digest(book, "adapted", 0)["protocol"]["labels"] == "bb"
    assert digest(book, "adapted", 0)["ledger"] is None
    book.record(evaluation([4, 3, 4], 9))
    found = digest(book, "adapted", 0)
    assert sum(found["ledger"].values()) == 3
    assert found["line_to_beat"]["verdict"] == "beaten"
    assert found["ledger_shares"].keys() == found["ledger"].keys()
