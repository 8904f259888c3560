"""The length penalty: golden factors, what it leaves alone, and mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import boxed, context, make_group, make_rollout

from ttrl.config.schema import Plug
from ttrl.errors import ConfigError
from ttrl.registry import build
from ttrl.rewards.length import length_factors
from ttrl.rewards.majority import MajorityVote
from ttrl.types import Group


def test_factors_by_hand() -> None:
    sigmoid = np.asarray([0.2689414, 0.5, 0.7310586])
    np.testing.assert_allclose(length_factors([10, 20, 30], [True] * 3, 0.4), 1 - 0.4 * sigmoid, atol=1e-6)
    # mean 20 and std 10 are those of the paid rollouts; the fourth is measured by them but does not enter
    np.testing.assert_allclose(length_factors([10, 20, 30, 20], [True] * 3 + [False], 0.4)[3], 0.8, atol=1e-6)
    assert length_factors([10, 20], [False, False], 0.4).tolist() == [1, 1]
    assert length_factors([10, 10], [True, True], 0.4).tolist() == [0.8, 0.8]
    assert length_factors([17, 99999], [True, False], 0.4)[0] == 0.8
    assert np.isfinite(length_factors([1, 10**6], [True, False], 0.4)).all()


def group(lengths: list[int], answers: list[Any]) -> Group:
    base = make_group(boxed(answers))
    rollouts = tuple(
        make_rollout(r.text, i, tokens=n) for i, (r, n) in enumerate(zip(base.rollouts, lengths, strict=True))
    )
    return Group(prompt=base.prompt, rollouts=rollouts, trainable=base.trainable)


def reward(**options: Any) -> Any:
    return build("reward", Plug.model_validate({"use": "length_penalty", "with": options}))


def test_right_answers_are_scaled_and_the_vote_is_that_of_the_inner_reward() -> None:
    votes = group([10, 20, 30, 5], [5, 5, 5, 7])
    ours, plain = reward(coefficient=0.4)(votes, context()), MajorityVote()(votes, context())
    np.testing.assert_allclose(ours.rewards, [0.892423, 0.8, 0.707577, 0], atol=1e-5)
    assert (ours.label, ours.share, ours.margin) == (plain.label, plain.share, plain.margin)
    assert ours.classes.tolist() == plain.classes.tolist() and ours.train.tolist() == plain.train.tolist()
    assert ours.metrics["paid_length"] == 20.0
    tie = reward()(group([10, 20], [5, 7]), context())
    assert tie.rewards.tolist() == [0, 0] and tie.label is None and not tie.train.any()


def test_it_passes_on_state_labels_needs_and_options() -> None:
    frozen = reward(of="frozen")
    frozen(group([9, 9, 9], [5, 5, 7]), context())
    copy = reward(of="frozen")
    copy.load_state(frozen.state())
    assert copy(group([9, 9, 9], [7, 7, 5]), context()).label == "5"
    gold = reward(of="gold")
    assert gold.needs == {"labels"}
    gold.take_labels({"p": "7"})
    assert (gold(group([9, 9], [5, 7]), context()).rewards > 0).tolist() == [False, True]
    assert reward().state() == {} and reward().needs == frozenset()
    assert reward(of="majority_vote", options={"weights": "entropy"}).needs == {"entropy"}
    assert reward(options={"extractor": "number"}).reader.kind == "number"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": 1.0}, "coefficient must lie between 0 and 1"),
        ({"of": "majority"}, "unknown reward 'majority'"),
        ({"options": {"tie": "random"}}, "unknown option 'tie'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reward(**options)
