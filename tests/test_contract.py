from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import make_group, make_scored

from ttrl.contract import Blame, check_samples, check_scored
from ttrl.errors import PluginError
from ttrl.types import Sample, Scored


def scored(**fields: Any) -> Scored:
    group = make_group(["12", "3", "4", ""], trainable=[True, True, True, False])
    return replace(make_scored([0, 0, 1, -1], [1, 1, 0, 0], group=group), **fields)


def sample(tokens: int = 3, **fields: Any) -> Sample:
    ones = np.ones(tokens, np.float32)
    defaults: dict[str, Any] = {
        "prompt_ids": np.ones(2, np.int32), "completion_ids": np.ones(tokens, np.int32), "sampler_logprobs": -ones,
        "advantages": ones, "weights": ones, "group": "p",
    }  # fmt: skip
    return Sample(**{**defaults, **fields})


def test_a_good_result_passes() -> None:
    good = scored()
    check_scored(good, good.group)
    lengths = [len(rollout.token_ids) for rollout in good.group.rollouts]
    assert lengths == [3, 2, 2, 1]
    with_tokens = replace(good, token_rewards=tuple(np.zeros(n, np.float32) for n in lengths))
    check_scored(with_tokens, good.group)
    nothing_trained = replace(good, train=np.zeros(4, np.bool_), label=None)
    check_scored(nothing_trained, good.group)


ROWS = tuple(np.zeros(n, np.float32) for n in (3, 2, 2, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": np.zeros(3, np.float32)}, "rewards has 3 entries for 4 rollouts"),
        ({"train": np.zeros(5, np.bool_)}, "train has 5 entries for 4 rollouts"),
        ({"classes": np.zeros(0, np.int32)}, "classes has 0 entries for 4 rollouts"),
        ({"answers": ("5",)}, "answers has 1 entries for 4 rollouts"),
        ({"rewards": np.asarray([0, 1, np.nan, np.inf], np.float32)}, "the reward of rollout 2 is nan; abstain"),
        ({"rewards": np.asarray([0, -np.inf, 0, 0], np.float32)}, "the reward of rollout 1 is -inf; abstain"),
        ({"train": np.ones(4, np.bool_)}, "train marks rollouts that were not drawn for training"),
        ({"token_rewards": ROWS[:3]}, "token_rewards has 3 entries for 4 rollouts"),
        ({"token_rewards": (*ROWS, ROWS[0])}, "token_rewards has 5 entries for 4 rollouts"),
        ({"token_rewards": (ROWS[0], ROWS[0], *ROWS[2:])}, "token_rewards of rollout 1 do not fit"),
        ({"token_rewards": (*ROWS[:3], np.asarray([np.nan], np.float32))}, "token_rewards of rollout 3 do not fit"),
    ],
)
def test_a_reward_that_breaks_its_contract_is_an_error(fields: dict[str, Any], message: str) -> None:
    bad = scored(**fields)
    with pytest.raises(PluginError, match=message):
        check_scored(bad, bad.group)


def test_a_reward_must_return_the_group_it_was_given() -> None:
    with pytest.raises(PluginError, match="must return the group it was given"):
        check_scored(scored(), make_group(["12", "3", "4", ""]))


def test_good_samples_pass() -> None:
    check_samples([])
    check_samples([sample(1), sample(5)])


@pytest.mark.parametrize("name", ["sampler_logprobs", "advantages", "weights"])
@pytest.mark.parametrize("values", [[1.0, 1.0], [1.0, np.nan, 1.0], [1.0, 1.0, np.inf], []])
def test_per_token_arrays_must_fit_and_be_finite(name: str, values: list[float]) -> None:
    with pytest.raises(PluginError, match=f"{name} must be 3 finite numbers, one per completion token"):
        check_samples([sample(), sample(3, **{name: np.asarray(values, np.float32)})])


def test_a_sample_without_tokens_is_an_error() -> None:
    with pytest.raises(PluginError, match="without completion tokens"):
        check_samples([sample(0)])


def test_blame_adds_a_note_and_lets_the_error_pass() -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError) as raised, Blame("reward", "./plug.py:R", "p7"):
        raise error
    assert raised.value is error
    assert error.__notes__ == ["in reward './plug.py:R', prompt 'p7'"]


def test_blame_is_silent_when_nothing_happens() -> None:
    with Blame("reward", "x", "p"):
        passed = True
    assert passed
