from __future__ import annotations

import numpy as np
import pytest
from helpers import make_group, make_scored

from ttrl.gates import Answered, VoteShare, ZeroVariance


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        ([0, 0, 1, 2], None),  # share 0.5
        ([0, 1, 2, 3], "share_low"),  # 0.25
        ([0, 0, 0, 1], None),  # 0.75, the upper bound itself is kept
        ([0, 0, 0, 0], "share_high"),
        ([0, 0, 0, -1], "share_high"),  # rollouts without an answer do not dilute the share
        ([-1, -1, -1, -1], "share_low"),
    ],
)
def test_vote_share_keeps_a_closed_band(classes: list[int], reason: str | None) -> None:
    assert VoteShare(low=0.5, high=0.75)(make_scored(classes)) == reason


@pytest.mark.parametrize(("low", "high"), [(0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_vote_share_refuses_an_impossible_band(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="0 <= low <= high <= 1"):
        VoteShare(low=low, high=high)


@pytest.mark.parametrize(
    ("classes", "reason"),
    [([0, 0, 1, -1], None), ([0, 1, -1, -1], None), ([0, -1, -1, -1], "answered_low"), ([-1] * 4, "answered_low")],
)
def test_answered_looks_at_all_rollouts(classes: list[int], reason: str | None) -> None:
    assert Answered(low=0.5)(make_scored(classes)) == reason


@pytest.mark.parametrize("low", [-0.1, 1.1, float("nan")])
def test_answered_refuses_an_impossible_bound(low: float) -> None:
    with pytest.raises(ValueError, match="0 <= low <= 1"):
        Answered(low=low)


@pytest.mark.parametrize(
    ("rewards", "trainable", "reason"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1], "zero_variance"),
        ([0, 0, 0, 0], [1, 1, 1, 1], "zero_variance"),
        ([1, 1, 1, 0], [1, 1, 1, 1], None),
        # the one rollout that differs was not drawn for training, so the trained ones teach nothing
        ([1, 1, 1, 0], [1, 1, 1, 0], "zero_variance"),
        ([1, 0, 0, 0], [0, 0, 0, 0], None),  # nothing trained: that group is counted as abstained, not here
    ],
)
def test_zero_variance_looks_at_trained_rollouts_only(
    rewards: list[float], trainable: list[bool], reason: str | None
) -> None:
    group = make_group([""] * 4, trainable=[bool(t) for t in trainable])
    scored = make_scored([0, 0, 0, 1], rewards, group=group, train=np.asarray(trainable, dtype=np.bool_))
    assert ZeroVariance()(scored) == reason


def test_vote_gates_ignore_rewards() -> None:
    # a shaped reward has variance even when every answer is the same
    shaped = make_scored([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4])
    assert VoteShare(high=0.9)(shaped) == "share_high"
