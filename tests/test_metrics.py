from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import make_group, make_scored

from ttrl.metrics import MetricSet, fraction, require_finite
from ttrl.stepmetrics import reward_metrics, rollout_metrics, share_histogram
from ttrl.types import Finish


def test_means_are_weighted() -> None:
    metrics = MetricSet()
    metrics.mean("train/kl", 0.2, weight=10)
    metrics.mean("train/kl", 0.4, weight=30)
    assert metrics.values() == {"train/kl": pytest.approx(0.35)}  # (0.2 * 10 + 0.4 * 30) / 40


def test_weight_zero_leaves_no_trace_not_even_of_a_nan() -> None:
    metrics = MetricSet()
    metrics.mean("x", math.nan, weight=0.0)
    assert metrics.values() == {}
    metrics.mean("x", 2.0)
    metrics.mean("x", math.nan, weight=0.0)
    assert metrics.values() == {"x": 2.0}


def test_each_rule_reduces_in_its_own_way_and_names_are_sorted() -> None:
    metrics = MetricSet()
    for value in (3.0, 1.0, 2.0):
        metrics.sum("d", value)
        metrics.max("c", value)
        metrics.min("b", value)
        metrics.mean("a", value)
    assert metrics.values() == {"a": 2.0, "b": 1.0, "c": 3.0, "d": 6.0}
    assert list(metrics.values()) == ["a", "b", "c", "d"]


def test_a_name_keeps_its_reduction() -> None:
    metrics = MetricSet()
    metrics.sum("x", 1.0)
    with pytest.raises(ValueError, match="'x' was recorded as sum and now as mean"):
        metrics.mean("x", 1.0)


def test_merging_equals_recording_in_one_set() -> None:
    left, right, whole = MetricSet(), MetricSet(), MetricSet()
    for target, values in ((left, [(1.0, 1.0), (5.0, 3.0)]), (right, [(2.0, 8.0)])):
        for value, weight in values:
            for each in (target, whole):
                each.mean("mean", value, weight)
                each.sum("sum", value)
                each.max("max", value)
                each.min("min", value)
    right.sum("only right", 4.0)
    whole.sum("only right", 4.0)
    left.merge(right)
    assert left.values() == whole.values()
    # not the mean of the two means, which would be 3
    assert left.values()["mean"] == pytest.approx((1 + 15 + 16) / 12)


@pytest.mark.parametrize("rule", ["max", "min", "sum", "mean"])
@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
def test_a_nan_survives_every_rule_in_any_order(rule: str, values: tuple[float, float]) -> None:
    metrics = MetricSet()
    for value in values:
        getattr(metrics, rule)("x", value)
    assert math.isnan(metrics.values()["x"])


def test_require_finite_names_every_bad_metric() -> None:
    require_finite({"a": 1.0}, "step 3")
    with pytest.raises(FloatingPointError, match=r"step 3: not finite: b=nan, c=inf$"):
        require_finite({"a": 1.0, "b": math.nan, "c": math.inf}, "step 3")


def test_fraction_of_nothing_is_zero() -> None:
    assert fraction([]) == 0.0
    assert fraction(x > 1 for x in (1, 2, 3, 4)) == 0.75


def test_rollout_metrics_sum_tokens_and_average_over_rollouts() -> None:
    groups = [make_group(["12345", "1"], finishes=[Finish.LENGTH, Finish.STOP]), make_group(["1", "1"])]
    values = rollout_metrics(groups).values()
    # lengths are characters + 1: 6, 2, 2, 2
    assert values == {
        "rollout/tokens": 12.0, "rollout/length": 3.0, "rollout/truncated": 0.25, "rollout/logprob": -0.5, "rollout/votes": 2.0,
    }  # fmt: skip


def test_saved_votes_are_the_share_of_the_budget_that_was_not_drawn() -> None:
    values = rollout_metrics([make_group(["a"] * 3), make_group(["a"] * 8)], votes_per_prompt=8).values()
    assert values["rollout/votes"] == 5.5 and values["rollout/saved_votes"] == 0.3125  # 5 of 16


def test_reward_metrics_average_over_groups() -> None:
    scored = [
        make_scored([0, 0, 0, 1], [1, 1, 1, 0], metrics={"extra": 2.0}),
        make_scored([-1, -1, -1, -1], label=None),
    ]
    values = reward_metrics(scored, [True, False, False, False]).values()
    assert values == {
        "reward/majority_share": pytest.approx(0.375), "reward/margin": pytest.approx(0.25), "reward/answered": 0.5,
        "reward/labelled": 0.5, "reward/unique_answers": 1.0, "reward/mean": 0.375, "reward/extra": 2.0,
        "reward/flip_rate": 0.25,
    }  # fmt: skip


def test_the_last_bin_of_the_histogram_includes_one() -> None:
    scored = [make_scored([0], share=share) for share in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert share_histogram(scored) == [2, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert np.sum(share_histogram([])) == 0
