"""Correlated votes: what the leaves of a tree are worth. Golden numbers by hand, calibration by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers import boxed, context, make_group

from ttrl.contract import check_scored
from ttrl.rewards.majority import MajorityVote
from ttrl.rewards.mode import mode_probability
from ttrl.rewards.soft import SoftVote
from ttrl.rewards.trees import agreement, kish, tree_worth
from ttrl.rewards.vote import decide
from ttrl.types import NO_ANSWER, Fork, Group, tree_roots

A, B, C = 0, 1, 2


def grove(*trees: Sequence[object]) -> Group:
    """Trees given as the answers of their leaves; the trunks come first, as the sampler numbers them."""
    group = make_group(boxed([tree[0] for tree in trees] + [answer for tree in trees for answer in tree[1:]]))
    forks = [None] * len(trees) + [Fork(parent=i, at=1) for i, tree in enumerate(trees) for _ in tree[1:]]
    return replace(group, rollouts=tuple(replace(r, fork=fork) for r, fork in zip(group.rollouts, forks, strict=True)))


def reward(group: Group, **options: object):
    scored = MajorityVote(**options)(group, context())  # type: ignore[arg-type]
    check_scored(scored, group)
    return scored


@pytest.mark.parametrize(
    ("roots", "classes", "rho"),
    [
        ([0, 0, 0, 1, 1, 1], [A, A, A, B, B, B], 1.0),  # P_in 1, P_out 0
        ([0, 0, 0, 1, 1, 1], [A, A, B, A, B, A], 0.0),  # P_in 1/3, P_out 5/9: below chance counts as none
        ([0, 0, 0, 1, 1, 1], [A, A, B, A, A, A], 0.0),  # P_in = P_out = 2/3
        ([0, 0, 1, 1], [A, A, A, B], 0.0),  # P_in 1/2, P_out 1/2
        ([0, 0, 1, 1, 2, 2], [A, A, B, B, A, B], 0.5),  # P_in 2/3, P_out 4/12: (1/3) / (2/3)
        ([0, 0, 0], [A, B, B], 1.0),  # one tree: cannot be told
        ([0, 0, 1, 1], [A, A, A, A], 1.0),  # one answer: cannot be told
        ([0, 1, 2], [A, B, B], 0.0),  # no trees of two
        ([0, 0, 1, 1], [A, NO_ANSWER, B, NO_ANSWER], 0.0),
        ([0, 0], [NO_ANSWER, NO_ANSWER], 0.0),
    ],
)
def test_agreement_within_trees(roots: list[int], classes: list[int], rho: float) -> None:
    assert agreement(roots, classes) == pytest.approx(rho)
    assert agreement(roots[::-1], classes[::-1]) == agreement(roots, classes)


def test_leaf_is_the_published_vote() -> None:
    group = grove([5, 5, 5, 5], [7], [7], [7])
    assert tree_worth("leaf", group.rollouts, [0] * 7, None) == (None, None)
    scored = reward(group)
    assert (scored.label, scored.share) == ("5", pytest.approx(4 / 7))
    assert scored.metrics["vote_confidence"] == mode_probability((4, 3))


def test_the_leaves_of_a_tree_share_one_vote() -> None:
    group = grove([5, 5, 5, 5], [7], [7], [7])
    scored = reward(group, tree_votes="tree")
    assert (scored.label, scored.share, scored.margin) == ("7", pytest.approx(3 / 4), pytest.approx(1 / 2))
    assert scored.rewards.tolist() == [0, 1, 1, 1, 0, 0, 0]  # every leaf is paid by its answer
    assert scored.metrics["vote_confidence"] == pytest.approx(mode_probability((1, 3)))  # four trees, four votes
    split = reward(grove([5, 5, 7, 7], [7], [5], [7]), tree_votes="tree")
    assert split.share == pytest.approx(2.5 / 4)  # half of the first tree, and two more


def test_leaves_without_an_answer_do_not_weaken_their_tree() -> None:
    scored = reward(grove([5, "", "", ""], [5, "", "", ""], [7, 7, 7, 7]), tree_votes="tree")
    assert (scored.label, scored.share) == ("5", pytest.approx(2 / 3))
    assert reward(grove([5, "", "", ""], [5, "", "", ""], [7, 7, 7, 7])).label == "7"
    nobody = reward(grove(["", ""], ["", ""]), tree_votes="tree")
    assert nobody.label is None and not nobody.train.any()


def test_effective_votes_change_the_confidence_and_not_the_label() -> None:
    group = grove([5, 5, 5], [5, 5, 5], [7, 7, 7])  # rho 1: three votes, not nine
    plain, effective = reward(group), reward(group, tree_votes="effective")
    assert (plain.label, plain.share, plain.margin) == (effective.label, effective.share, effective.margin)
    assert plain.rewards.tolist() == effective.rewards.tolist()
    assert plain.metrics["vote_confidence"] == mode_probability((6, 3))
    assert effective.metrics["vote_confidence"] == pytest.approx(mode_probability((2, 1)))
    assert reward(group, tree_votes="effective", min_confidence=0.75).label is None
    assert reward(group, min_confidence=0.75).label == "5"
    mixed = grove([5, 5], [7, 7], [5, 7])  # rho 1/2: 6 leaves are worth 6 / 1.5 = 4 votes, two for each
    _, worth = tree_worth("effective", mixed.rollouts, [A, B, A, A, B, B], None)
    assert worth is not None and worth.tolist() == pytest.approx([2 / 3] * 6)


def test_weights_and_trees_multiply() -> None:
    group = grove([5, 5], [7])
    weights, worth = tree_worth("tree", group.rollouts, [A, B, A], np.asarray([0.1, 0.4, 0.3]))
    assert weights is not None and worth is not None
    assert weights.tolist() == pytest.approx([0.25, 1.0, 0.75]) and worth.tolist() == [0.5, 1.0, 0.5]
    same, worth = tree_worth(
        "effective", grove([5, 5], [7, 7]).rollouts, [A, B, A, B], np.asarray([1.0, 1.0, 3.0, 3.0])
    )
    # Kish: 64 / (4 * 20) = .8 votes per vote, and rho 1 halves them
    assert same is not None and worth is not None and worth.tolist() == pytest.approx([0.4] * 4)
    assert kish([0.0, 0.0]) == 1.0 and kish([1e300, 1e300]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="tree_votes must be"):
        tree_worth("leaves", group.rollouts, [A, B, A], None)


def test_without_forks_all_kinds_are_one_and_the_order_never_matters() -> None:
    flat = make_group(boxed([5, 5, 7, 5, ""]))
    assert (
        len({reward(flat, tree_votes=kind).metrics["vote_confidence"] for kind in ("leaf", "tree", "effective")}) == 1
    )
    group = grove([5, 5, 7], [7, 7, ""], [5, 9, 9])
    for kind in ("tree", "effective"):
        straight = reward(group, tree_votes=kind)
        turned = reward(replace(group, rollouts=group.rollouts[::-1]), tree_votes=kind)
        assert (straight.label, straight.share, straight.margin) == (turned.label, turned.share, turned.margin)
        assert straight.metrics == turned.metrics
        assert straight.rewards.tolist() == turned.rewards[::-1].tolist()


def test_soft_votes_pay_shares_of_trees() -> None:
    group = grove([5, 5, 5, 5], [7], [7], [5])
    assert SoftVote()(group, context()).rewards[0] == pytest.approx(5 / 7)
    assert SoftVote(tree_votes="tree")(group, context()).rewards[0] == pytest.approx(2 / 4)


def test_electorates_keep_their_worth() -> None:
    group = grove([5, 5, 5], [5, 5, 5], [7, 7, 7])
    for electorate in ("leave_one_out", "split"):
        scored = reward(group, tree_votes="effective", electorate=electorate)
        assert scored.rewards.shape == (9,)
    assert decide([0, 0, 1], worth=[0.5, 0.5, 0.5]).ballots == pytest.approx((1.0, 0.5))


def test_confidence_is_calibrated_only_when_correlation_is_counted() -> None:
    """12 trees of 5 leaves that copy their trunk with probability .7; the mode leads .5 to .4. Is it elected as often as claimed?"""
    rng, law, rounds, (trees, leaves) = np.random.default_rng(0), [0.5, 0.4, 0.1], 400, (12, 5)
    hits, claims = {"leaf": 0, "effective": 0}, {"leaf": 0.0, "effective": 0.0}
    rollouts = sorted(grove(*[[5] * leaves] * trees).rollouts, key=lambda r: r.fork.parent if r.fork else r.index)
    roots = tree_roots(rollouts)  # tree by tree
    for _ in range(rounds):
        trunks = rng.choice(3, size=trees, p=law)
        classes = [int(trunks[r]) if rng.random() < 0.7 else int(rng.choice(3, p=law)) for r in roots]
        for kind in hits:
            _, worth = tree_worth(kind, rollouts, classes, None)
            made = decide(classes, ties="random", worth=None if worth is None else worth.tolist())
            hits[kind] += made.winner == 0
            claims[kind] += made.confidence
    over = {kind: claims[kind] / rounds - hits[kind] / rounds for kind in hits}
    assert over["leaf"] > 0.1  # it believes in 60 independent votes
    assert abs(over["effective"]) < 0.08
