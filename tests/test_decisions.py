"""Decision rules beyond the plain vote: golden numbers computed by hand or from the papers, calibration by simulation, properties."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.rewards.mode import mode_probability
from ttrl.rewards.rules import harmonic_mean, lower_bound
from ttrl.rewards.vote import decide, leave_one_out, split_vote
from ttrl.rewards.weights import perplexity_consistency, prune
from ttrl.types import NO_ANSWER

ballots = st.lists(st.integers(-1, 4), min_size=1, max_size=16)


def test_weighted_votes() -> None:
    # three modest votes for A, one proud one for B
    assert decide([0, 0, 1], weights=[0.2, 0.3, 0.9], min_votes=1).winner == 1
    assert (
        decide([0, 0, 1], weights=[0.2, 0.3, 0.9]).winner is None
    )  # one vote is nobody's majority, whatever it weighs
    decision = decide([0, 0, 0, 1], weights=[0.4, 0.4, 0.4, 0.9])
    assert decision.winner == 0
    assert decision.scores == (pytest.approx(1.2), pytest.approx(0.9))
    assert decision.share == pytest.approx(1.2 / 2.1)
    assert decision.margin == pytest.approx(0.3 / 2.1)


def test_equal_weights_are_a_plain_vote() -> None:
    plain, weighted = decide([0, 0, 1, -1]), decide([0, 0, 1, -1], weights=[0.3] * 4)
    assert (plain.winner, plain.share, plain.counts) == (
        weighted.winner,
        pytest.approx(weighted.share),
        weighted.counts,
    )
    assert weighted.confidence == pytest.approx(plain.confidence)


@pytest.mark.parametrize("bad", [[-0.2, 1, 1], [float("nan"), 1, 1], [float("inf"), 1, 1], [1, 1]])
def test_bad_weights_are_errors(bad: list[float]) -> None:
    # sums of raw logits elect whoever has fewest votes: -0.2 three times is less than -0.3 once
    with pytest.raises(ValueError, match="weights"):
        decide([0, 0, 1], weights=bad)


def test_weights_of_votes_without_an_answer_are_not_read() -> None:
    assert decide([0, 0, -1], weights=[1, 1, float("nan")]).winner == 0


def test_nothing_weighs_anything() -> None:
    decision = decide([0, 0, 1], weights=[0, 0, 0])
    assert (decision.winner, decision.share, decision.confidence) == (None, 0.0, 0.0)


def test_length_breaks_ties_and_never_overrules_votes() -> None:
    assert decide([0, 0, 1, 1], ties="shortest", lengths=[9, 9, 3, 4]).winner == 1
    assert decide([0, 0, 1, 1], ties="shortest", lengths=[3, 4, 4, 3]).winner is None
    # the length-scaled rule of arXiv 2502.12215 would elect the three votes of 200 tokens here
    assert decide([0] * 4 + [1] * 3, ties="shortest", lengths=[16000] * 4 + [200] * 3).winner == 0
    with pytest.raises(ValueError, match="one length per vote"):
        decide([0, 0, 1, 1], ties="shortest")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((1, 0), 0.75), ((3, 0), 0.9375), ((4, 0), 0.96875), ((4, 1), 0.890625), ((6, 1), 0.964844), ((8, 2), 0.967285)],
)
def test_mode_probability_is_the_closed_form_for_two_classes(counts: tuple[int, int], expected: float) -> None:
    assert mode_probability(counts, unseen=0) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("counts", [(5, 3, 2), (2, 2, 1, 1), (40, 20, 4), (1, 1, 1, 1, 1)])
def test_mode_probability_agrees_with_dirichlet_draws(counts: tuple[int, ...]) -> None:
    draws = np.random.default_rng(0).dirichlet(np.asarray([*counts, 0]) + 1.0, size=100_000)
    # the standard error of 1e5 draws is at most 0.0016
    assert mode_probability(counts) == pytest.approx(float((draws.argmax(1) == 0).mean()), abs=0.007)


def test_mode_probability_edges() -> None:
    assert mode_probability([]) == 0.0
    assert mode_probability([0, 0]) == 0.0
    assert mode_probability([1, 1, 1], unseen=0) == pytest.approx(1 / 3, abs=1e-5)
    assert mode_probability([1, 5, 2]) == mode_probability([5, 2, 1])
    for bad in ([-1.0], [float("nan")]):
        with pytest.raises(ValueError, match="counts"):
            mode_probability(bad)


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("votes", [8, 32])
def test_confidence_is_calibrated(classes: int, votes: int) -> None:
    """Populations drawn from the prior, their number of classes known: claimed and observed frequencies agree in every bin."""
    rng = np.random.default_rng(classes * 100 + votes)
    population = rng.dirichlet(np.ones(classes), size=6000)
    counts = np.stack([rng.multinomial(votes, p) for p in population])
    claimed = np.asarray([mode_probability(c.tolist(), unseen=0) for c in counts])
    # a tied leader is any of the tied classes, by seed
    right = (counts + 1e-6 * rng.random(counts.shape)).argmax(1) == population.argmax(1)
    for low in np.arange(0.2, 1.0, 0.1):
        inside = (claimed >= low) & (claimed < low + 0.1)
        if (n := int(inside.sum())) >= 150:
            assert abs(claimed[inside].mean() - right[inside].mean()) < 4 * 0.5 / n**0.5


@pytest.mark.parametrize("classes", [2, 4, 8])
def test_confidence_does_not_boast_when_the_number_of_classes_is_unknown(classes: int) -> None:
    rng = np.random.default_rng(classes)
    population = rng.dirichlet(np.ones(classes), size=6000)
    counts = np.stack([rng.multinomial(16, p) for p in population])
    claimed = np.asarray([mode_probability(c[c > 0].tolist()) for c in counts])
    right = counts.argmax(1) == population.argmax(1)
    sure = claimed >= 0.9
    assert sure.sum() > 500
    assert right[sure].mean() >= claimed[sure].mean() - 0.02


def test_low_confidence_abstains() -> None:
    assert decide([0, 0, 0, 1]).winner == 0
    held = decide([0, 0, 0, 1], min_confidence=0.9)
    assert held.winner is None
    assert held.reason == "the leader is the mode with probability 0.78, less than 0.90"
    assert decide([0] * 9 + [1], min_confidence=0.9).winner == 0


def test_nobody_elects_its_own_label() -> None:
    # A A B: without an A it is one against one; without B it is A
    assert [d.winner for d in leave_one_out([0, 0, 1])] == [None, None, 0]
    assert [d.winner for d in leave_one_out([0, 0, 0, 1])] == [0, 0, 0, 0]
    assert [d.winner for d in leave_one_out([0, -1, 0])] == [None, 0, None]


def test_halves_judge_each_other() -> None:
    decisions = split_vote([0, 0, 1, 1, 1, 0], [False, False, False, True, True, True])
    assert [d.winner for d in decisions] == [1, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="marks"):
        split_vote([0, 0], [True])


def test_perplexity_consistency_counts_distinct_paths_once() -> None:
    logs = np.log([0.02, 0.01, 0.025])
    weights = perplexity_consistency(logs, [0, 0, 1], [b"a", b"b", b"c"]) * 0.025
    assert weights == pytest.approx([0.02, 0.01, 0.025])
    assert decide([0, 0, 1], weights=weights, min_votes=1).share == pytest.approx(0.5455, abs=1e-4)
    # three copies of an unlikely path lose against a likely one
    copied = perplexity_consistency(np.log([0.002, 0.002, 0.002, 0.025]), [0, 0, 0, 1], [b"a", b"a", b"a", b"b"])
    assert decide([0, 0, 0, 1], weights=copied, min_votes=1).winner == 1
    assert decide([0, 0, 0, 1]).winner == 0
    assert perplexity_consistency([-1e5, -1e5 - 1], [0, 1], [b"a", b"b"]) == pytest.approx([1.0, np.exp(-1)])


def test_pruning_drops_the_low_component() -> None:
    paths = [0.62, 0.60, 0.58, 0.55, 0.53, 0.51, 0.12, 0.10, 0.08, 0.05]
    assert prune(paths) == [True] * 6 + [False] * 4
    assert prune([p * 1e-9 for p in paths]) == prune(paths)
    assert prune(paths[::-1]) == prune(paths)[::-1]
    assert prune([0.5] * 8) == [True] * 8
    assert prune([]) == []


@settings(max_examples=150)
@given(st.lists(st.floats(0, 1), max_size=20))
def test_pruning_keeps_everything_above_the_mean(paths: list[float]) -> None:
    kept = prune(paths)
    assert all(keep for keep, p in zip(kept, paths, strict=True) if p >= np.mean(paths))


@pytest.mark.parametrize(
    ("alpha", "winner", "bounds"),
    [(0.0, 1, (0.7, 1.0)), (0.1, 1, (0.6703, 0.8960)), (0.5, 0, (0.5515, 0.4801)), (1.0, 0, (0.4029, -0.0397))],
)  # fmt: skip
def test_lower_bound_moves_from_best_of_n_to_the_plurality(
    alpha: float, winner: int, bounds: tuple[float, ...]
) -> None:
    decision = lower_bound([0] * 6 + [1, 2], [[0.7]] * 6 + [[1.0], [0.1]], alpha=alpha)
    assert decision.winner == winner
    assert decision.scores[:2] == pytest.approx(bounds, abs=1e-4)
    assert decision.share == (0.75 if winner == 0 else 0.125)


def test_lower_bound_abstains_and_refuses() -> None:
    assert lower_bound([0, 1], [[0.5], [0.5]]).winner is None
    assert lower_bound([0, 1], [[0.9], [0.5]], min_votes=2).winner is None
    assert lower_bound([-1], [[0.5]]).reason == "nobody answered"
    # four verdicts per vote: ln(3 * 4) / (2 * 4 + 1)
    assert lower_bound([0, 0, 1], [[1, 1, 0, 0]] * 3, alpha=0.1).scores[0] == pytest.approx(0.5 - 0.1 * np.log(12) / 9)
    for bad in ([[0.5], [0.5, 0.6]], [[], []], [[0.5], [float("nan")]], [[0.5]]):
        with pytest.raises(ValueError, match="verdicts"):
            lower_bound([0, 1], bad)


def test_harmonic_mean_wants_both_views() -> None:
    decision = harmonic_mean([0, 0, 0, 1, 1], [0, 1, 1, 1, 1])
    assert decision.scores == (pytest.approx(0.3), pytest.approx(8 / 15))
    assert decision.winner == 1
    assert decision.share == pytest.approx((8 / 15) / (0.3 + 8 / 15))
    # a wrong answer that only one wording produces has score 0, however popular
    assert harmonic_mean([0, 0, 0, 0, 1], [1, 1, 2, 2, 2]).winner == 1
    assert harmonic_mean([0, 0], [1, 1]).winner is None
    assert harmonic_mean([0, 1], [1, 0]).winner is None
    assert harmonic_mean([-1], [0]).winner is None


@settings(max_examples=150)
@given(
    ballots,
    st.randoms(use_true_random=False),
    st.sampled_from(["abstain", "shortest"]),
    st.sampled_from([0.0, 0.5, 0.9]),
)
def test_no_rule_depends_on_the_order(classes: list[int], rng: random.Random, ties: str, confidence: float) -> None:
    order = list(range(len(classes)))
    rng.shuffle(order)
    weights = [rng.choice([0.1, 0.2, 0.3, 0.7]) for _ in classes]
    lengths = [rng.randrange(1, 4) for _ in classes]
    verdicts = [[w, 1 - w] for w in weights]

    def pick(values: list) -> list:
        return [values[i] for i in order]

    options = {"ties": ties, "min_confidence": confidence}
    before = decide(classes, weights=weights, lengths=lengths, **options)
    assert decide(pick(classes), weights=pick(weights), lengths=pick(lengths), **options) == before
    assert pick(leave_one_out(classes, lengths=lengths, **options)) == leave_one_out(
        pick(classes), lengths=pick(lengths), **options
    )
    assert lower_bound(pick(classes), pick(verdicts)) == lower_bound(classes, verdicts)
    paths = [str(i % 5).encode() for i in range(len(classes))]
    logs = [float(-(i % 5) - 1) for i in range(len(classes))]
    rpc = perplexity_consistency(logs, classes, paths)
    assert perplexity_consistency(pick(logs), pick(classes), pick(paths)).tolist() == pick(rpc.tolist())


@settings(max_examples=150)
@given(ballots, st.floats(0, 1), st.floats(0, 1))
def test_a_winner_passes_its_own_bounds(classes: list[int], share: float, confidence: float) -> None:
    decision = decide(classes, min_share=share, min_confidence=confidence)
    if decision.winner is not None:
        assert decision.share >= share
        assert decision.confidence >= confidence
        assert decision.winner != NO_ANSWER and decision.counts[decision.winner] == max(decision.counts)


def test_ten_thousand_shuffles_of_random_votes_give_one_decision() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        classes = rng.integers(-1, 6, size=int(rng.integers(2, 33)))
        weights = rng.random(classes.size)
        outcomes = set()
        for _ in range(50):
            order = rng.permutation(classes.size)
            plain = decide(classes[order].tolist())
            weighted = decide(classes[order].tolist(), weights=weights[order].tolist())
            outcomes.add((plain.winner, plain.share, weighted.winner, weighted.share))
        assert len(outcomes) == 1


@pytest.mark.parametrize("size", [2, 5, 64])
def test_all_different_groups_abstain(size: int) -> None:
    everyone = list(range(size))
    assert decide(everyone).winner is None
    assert decide(everyone, ties="random").winner is None
    assert {d.winner for d in leave_one_out(everyone)} == {None}
    assert decide(everyone, weights=[1.0 + i for i in range(size)]).winner is None
