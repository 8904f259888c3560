"""Shapers, advantages over a step, and the composition of the objective: golden numbers and wrong options. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import FakeTokenizer, make_group, make_scored

from ttrl.config.inner import has_reference, inner_plugs
from ttrl.config.schema import Plug
from ttrl.contract import check_samples
from ttrl.errors import ConfigError, PluginError
from ttrl.gates import ZeroVariance
from ttrl.metrics import MetricSet
from ttrl.registry import build
from ttrl.trainers.advantages import dr_grpo, grpo, rloo
from ttrl.trainers.grpo import GRPO
from ttrl.trainers.losses.entropy_band import band_edges
from ttrl.trainers.reinforce_pp import whiten
from ttrl.trainers.shapers.answer_span import answer_tokens
from ttrl.trainers.shapers.entropy_advantage import ear_factors
from ttrl.trainers.shapers.fork_tokens import fork_mask
from ttrl.trainers.shapers.limiting_confidence import limiting_factor
from ttrl.trainers.shapers.overlong import overlong_penalty
from ttrl.types import Finish, Sample, Scored

SIX_OF_EIGHT = np.array([1.0] * 6 + [0.0] * 2)


def objective(**options: Any) -> GRPO:
    made: GRPO = build("objective", Plug.model_validate({"use": "grpo", "with": options}))
    return made


def scored(
    rewards: list[float], lengths: list[int] | None = None, entropy: list[Any] | None = None, identifier: str = "p"
) -> Scored:
    """One group; rollout i has `lengths[i]` tokens (default 1) of these entropies."""
    lengths = lengths or [1] * len(rewards)
    group = make_group(["x" * (n - 1) for n in lengths], identifier=identifier)
    if entropy is not None:
        rollouts = [
            replace(r, entropy=np.broadcast_to(np.asarray(e, np.float32), len(r.token_ids)).copy())
            for r, e in zip(group.rollouts, entropy, strict=True)
        ]
        group = replace(group, rollouts=tuple(rollouts))
    return make_scored([0 if r > 0 else 1 for r in rewards], rewards, group=group)


def finished(made: GRPO, *groups: Scored, step: int = 0) -> tuple[list[Sample], dict[str, float]]:
    samples, metrics = made.finish([sample for group in groups for sample in made.samples(group)], step)
    check_samples(samples)
    return samples, metrics.values()


# --- advantages ---------------------------------------------------------------------------------------------------------


def test_advantages_of_six_hits_in_eight() -> None:
    for advantage, positive, negative in ((grpo, 0.5401, -1.6202), (dr_grpo, 0.25, -0.75), (rloo, 0.2857, -0.8571)):
        found = advantage(SIX_OF_EIGHT)
        np.testing.assert_allclose(found[:6], positive, atol=1e-4)
        np.testing.assert_allclose(found[6:], negative, atol=1e-4)


def test_rloo_compares_with_the_others() -> None:
    rewards = np.random.default_rng(0).normal(size=7)
    others = [rewards[np.arange(7) != i].mean() for i in range(7)]
    np.testing.assert_allclose(rloo(rewards), rewards - others, rtol=1e-12)
    assert rloo(np.array([1.0])).tolist() == [0.0]
    assert (rloo(np.full(5, 0.1)) == 0).all()


def test_reinforce_pp_normalises_over_the_step() -> None:
    groups = scored([1, 1, 0, 0], identifier="a"), scored([1, 1, 1, 0], identifier="b")
    samples, metrics = finished(objective(advantage="reinforce_pp_baseline"), *groups)
    expected = [1, 1, -1, -1, 0.5, 0.5, 0.5, -1.5]
    np.testing.assert_allclose([float(s.advantages[0]) for s in samples], expected, atol=1e-4)
    assert metrics["train/advantage_std"] == pytest.approx(0.5)
    samples, metrics = finished(objective(advantage="reinforce_pp"), *groups)
    values = [float(s.advantages[0]) for s in samples]
    np.testing.assert_allclose(values[:4], [0.7246, 0.7246, -1.2076, -1.2076], atol=1e-4)
    assert metrics["train/advantage_mean"] == pytest.approx(5 / 8)


def test_whitening_weighs_by_tokens_and_is_exact_where_nothing_differs() -> None:
    # Rewards 1 and 0 on answers of 3 and 1 tokens: mean 3/4, unbiased variance (3/16 + 9/16) / 3 = 1/4
    samples, _ = finished(objective(advantage="reinforce_pp"), scored([1, 0], [3, 1]))
    assert [s.advantages.tolist() for s in samples] == [
        pytest.approx([0.5] * 3, abs=1e-6),
        pytest.approx([-1.5], abs=1e-6),
    ]
    assert whiten(np.full(9, 0.1)).tolist() == [0.0] * 9
    assert whiten(np.array([3.0])).tolist() == [0.0]


# --- shapers ------------------------------------------------------------------------------------------------------------


def test_ear_golden_numbers() -> None:
    np.testing.assert_allclose(ear_factors([0.2, 0.4, 0.6]), [1.5, 1.0, 0.5])
    np.testing.assert_allclose(ear_factors([0.1, 0.1, 1.0], None), [1.75, 1.75, -0.5])
    np.testing.assert_allclose(ear_factors([0.1, 0.1, 1.0]), [1.75, 1.75, 0.0])
    assert ear_factors([0.0, 0.0]).tolist() == [1.0, 1.0]
    assert ear_factors(np.random.default_rng(0).uniform(0.3, 0.5, 9)).mean() == pytest.approx(1.0)


def test_ear_reshapes_the_advantages_of_a_group() -> None:
    # dr_grpo of [2, .5, .5] is [1, -.5, -.5]; a response's entropy is the mean of its tokens
    group = scored([2, 0.5, 0.5], [2, 3, 1], [[0.1, 0.3], [0.4, 0.3, 0.5], [0.6]])
    samples, metrics = finished(objective(advantage="dr_grpo", shape=["ear"]), group)
    assert [s.advantages.tolist() for s in samples] == [
        pytest.approx([1.5] * 2), pytest.approx([-0.5] * 3), pytest.approx([-0.25])
    ]  # fmt: skip
    assert metrics["train/response_entropy"] == pytest.approx(0.4)


def test_the_published_ear_can_punish_a_right_answer_and_the_default_cannot() -> None:
    group = scored([0, 0, 1], entropy=[0.1, 0.1, 1.0])
    published, _ = finished(objective(shape=[{"use": "ear", "with": {"clamp": None}}]), group)
    assert published[2].advantages[0] < 0
    clamped, _ = finished(objective(shape=["ear"]), group)
    assert clamped[2].advantages[0] == 0


def test_adv_clip_tames_rare_hits() -> None:
    rewards = [1.0] * 3 + [0.0] * 29
    plain, _ = finished(objective(), scored(rewards))
    clipped, _ = finished(objective(shape=["adv_clip"]), scored(rewards))
    assert plain[0].advantages[0] == pytest.approx(3.06016, abs=1e-5)
    assert clipped[0].advantages[0] == 2.0
    assert clipped[-1].advantages[0] == plain[-1].advantages[0] == pytest.approx(-0.31657, abs=1e-5)


def test_limiting_confidence_golden_numbers() -> None:
    for budget, p, factor in (
        (4, 0.05, 0.92442), (4, 0.25, 0.61714), (4, 0.5, 0.26667), (16, 0.25, 0.05400), (64, 0.05, 0.13132)
    ):  # fmt: skip
        assert limiting_factor(budget, p) == pytest.approx(factor, abs=1e-5)
        h = 1e-6  # it is d ln(1 - (1 - p)^N) / d ln p
        slope = (math.log(1 - (1 - p * (1 + h)) ** budget) - math.log(1 - (1 - p * (1 - h)) ** budget)) / (2 * h)
        assert limiting_factor(budget, p) == pytest.approx(slope, rel=1e-6)
    assert {limiting_factor(1, p) for p in (0.0, 0.3, 1.0)} == {1.0}
    assert (limiting_factor(8, 0.0), limiting_factor(8, 1.0)) == (1.0, 0.0)


def test_limiting_confidence_is_exact_for_tiny_p() -> None:
    # F = 1 - (N - 1) p / 2 + O(p^2)
    for budget in (4, 64):
        for p in (1e-12, 1e-9):
            assert limiting_factor(budget, p) == pytest.approx(1 - (budget - 1) * p / 2, abs=1e-15)


def test_limiting_confidence_multiplies_by_the_factor_of_the_share() -> None:
    group = scored([1, 1, 1, 0])
    assert group.share == 0.75
    plain, _ = finished(objective(), group)
    limited, _ = finished(objective(shape=[{"use": "limiting_confidence", "with": {"budget": 4}}]), group)
    for a, b in zip(plain, limited, strict=True):
        np.testing.assert_allclose(b.advantages, limiting_factor(4, 0.75) * a.advantages, rtol=1e-6)


def test_overlong_golden_numbers() -> None:
    assert [overlong_penalty(n, 20480, 4096) for n in (1, 16384, 18432, 20480, 30000)] == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_overlong_is_a_part_of_the_reward() -> None:
    # Rewards 1, 1, 0 with penalties 0, -0.5, 0 -> 1, 0.5, 0
    options = {"max_tokens": 6, "cache": 4}
    group = scored([1, 1, 0], [2, 4, 1])
    samples, _ = finished(objective(advantage="dr_grpo", shape=[{"use": "overlong", "with": options}]), group)
    assert [float(s.advantages[0]) for s in samples] == pytest.approx([0.5, 0.0, -0.5])


def test_overlong_filtering_drops_truncated_rollouts_but_not_from_the_baseline() -> None:
    group = make_group(["a", "b", "c"], finishes=[Finish.STOP, Finish.LENGTH, Finish.STOP])
    made = objective(
        advantage="dr_grpo", shape=[{"use": "overlong", "with": {"max_tokens": 99, "cache": 9, "filter": True}}]
    )
    samples, metrics = finished(made, make_scored([0, 0, 1], [1, 1, 0], group=group))
    assert [float(s.advantages[0]) for s in samples] == pytest.approx([1 / 3, -2 / 3])
    assert metrics["dropped/masked_rows"] == 1.0


def test_dynamic_sampling_keeps_only_groups_that_disagree() -> None:
    groups = [scored(rewards) for rewards in ([1, 1], [0, 1], [0, 0])]
    assert [ZeroVariance()(group) for group in groups] == ["zero_variance", None, "zero_variance"]


# --- masks --------------------------------------------------------------------------------------------------------------


def test_fork_mask_golden_numbers() -> None:
    entropy = np.arange(1, 11) / 10
    assert np.flatnonzero(fork_mask(entropy)).tolist() == [8, 9]
    assert np.quantile(entropy, 0.8) == pytest.approx(0.82)
    assert band_edges(entropy[8:]) == pytest.approx((0.91, 0.95))


def test_ties_still_select_the_stated_share() -> None:
    for size in range(1, 40):
        assert fork_mask(np.zeros(size)).sum() == math.ceil(size / 5)
    assert fork_mask(np.array([0.0, 1.0, 1.0, 1.0]), 0.5).tolist() == [False, True, True, False]
    assert fork_mask(np.zeros(100), 0.07).sum() == 7


@pytest.mark.parametrize(
    ("over", "kept"), [("response", [[4], [4], [4]]), ("group", [[], [3, 4], [4]]), ("step", [[], [2, 3, 4], []])]
)
def test_forks_are_chosen_within_their_scope(over: str, kept: list[list[int]]) -> None:
    # Groups a (two answers) and b (one), five tokens each, entropies rising; answer 1 is the most uncertain
    ramp = np.arange(5) / 10
    groups = scored([1, 0], [5, 5], [ramp, ramp + 2], "a"), scored([1], [5], [ramp + 1], "b")
    made = objective(shape=[{"use": "fork_tokens", "with": {"over": over}}])
    raw = made.samples(groups[0]) + made.samples(groups[1])
    masks = made._shapers[0].on_step(raw, 0, MetricSet())
    assert [np.flatnonzero(s.weights).tolist() for s in masks] == kept
    samples, metrics = finished(made, *groups)
    assert made.denominator(samples) == 3.0  # forks only: the step does not shrink with the share of forks
    assert metrics["train/token_share"] == pytest.approx(0.2)
    assert metrics["train/fork_entropy"] > metrics["train/follower_entropy"]


def test_masks_compose_and_remember_what_was_drawn() -> None:
    # The answer "42" stands at tokens 3 and 4 and has the highest entropies; forks are looked for among the others
    text = "so 42."
    ids = np.asarray(FakeTokenizer().encode(text, add_special_tokens=False), np.int32)
    group = make_group([text])
    rollout = replace(group.rollouts[0], token_ids=ids, logprobs=np.zeros(6, np.float32),
                      entropy=np.asarray([0.1, 0.2, 0.3, 5, 4, 0.1], np.float32))  # fmt: skip
    item = make_scored([0], [1], group=replace(group, rollouts=(rollout,)), answers=("42",))
    made = objective(shape=["answer_span", {"use": "fork_tokens", "with": {"fraction": 0.5}}])
    made.take_tokenizer(FakeTokenizer())
    samples, metrics = finished(made, item)
    assert samples[0].weights.tolist() == [0, 1, 1, 0, 0, 0]
    assert samples[0].extras["drawn"].tolist() == [1] * 6
    assert "answer_span" not in samples[0].extras
    assert metrics["train/answer_masked"] == 1.0


class Syllables:
    """Tokens of several characters, one special token, and one that decodes to nothing on its own."""

    words = ("", "the ", "ans", "wer ", "is ", "\\boxed{", "4", "27", "27}", ".")

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return "".join(self.words[int(i)] for i in token_ids)


@pytest.mark.parametrize(
    ("ids", "answer", "span"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 9], "427", (5, 7)),
        ([7, 9, 5, 6, 8, 9, 0], "427", (3, 5)),
        ([7, 9, 5, 7, 9, 0], "27", (3, 4)),
        ([7, 9, 5, 6, 8], "27", (4, 5)),
        ([1, 2, 3], "27", None),
        ([1, 2, 3], "", None),
        ([1, 2, 3], "THE", (0, 1)),
    ],
)
def test_the_span_is_the_last_occurrence(ids: list[int], answer: str, span: tuple[int, int] | None) -> None:
    assert answer_tokens(np.asarray(ids, np.int32), answer, Syllables().decode) == span


@pytest.mark.parametrize("to_end", [False, True])
def test_the_answer_has_no_weight_and_silence_keeps_its_own(to_end: bool) -> None:
    tokenizer = FakeTokenizer()
    texts = ["so \\boxed{7}", "I give up"]
    group = make_group(texts)
    rollouts = [
        replace(r, token_ids=np.asarray([*tokenizer.encode(t, add_special_tokens=False), 1], np.int32))
        for r, t in zip(group.rollouts, texts, strict=True)
    ]
    item = make_scored([0, -1], [1, 0], group=replace(group, rollouts=tuple(rollouts)), answers=("7", None))
    made = objective(shape=[{"use": "answer_span", "with": {"to_end": to_end}}])
    made.take_tokenizer(tokenizer)
    samples, metrics = finished(made, item)
    assert np.flatnonzero(samples[0].weights == 0).tolist() == ([10, 11, 12] if to_end else [10])
    assert samples[1].weights.all()
    assert metrics["train/answer_masked"] == 0.5


def test_a_row_without_anything_to_train_leaves_no_hole() -> None:
    # Both answers consist of nothing but the answer
    group = make_group(["7", "8"])
    rollouts = [replace(r, token_ids=np.asarray([ord(t) + 2], np.int32), logprobs=np.zeros(1, np.float32))
                for r, t in zip(group.rollouts, "78", strict=True)]  # fmt: skip
    made = objective(shape=["answer_span"])
    made.take_tokenizer(FakeTokenizer())
    item = make_scored([0, 1], [1, 0], group=replace(group, rollouts=tuple(rollouts)), answers=("7", "8"))
    samples, metrics = finished(made, item)
    assert samples == [] and metrics["dropped/masked_rows"] == 2.0


def test_an_engine_without_entropies_is_named() -> None:
    with pytest.raises(PluginError, match="recorded none"):
        finished(objective(shape=["ear"]), scored([1, 0]))


# --- aggregation --------------------------------------------------------------------------------------------------------


def test_aggregation_golden_numbers() -> None:
    # Two answers of 2 and 4 tokens: what one token's loss counts for
    group = scored([1, 0], [2, 4])
    for options, first, second in (
        ({"aggregate": "sequence"}, 0.25, 0.125),
        ({"aggregate": "token"}, 1 / 6, 1 / 6),
        ({}, 1 / 6, 1 / 6),
        ({"aggregate": "fixed", "fixed_length": 8}, 1 / 16, 1 / 16),
        ({"loss": "gspo"}, 0.25, 0.125),
        ({"loss": "gspo", "aggregate": "token"}, 1 / 6, 1 / 6),
    ):
        made = objective(**options)
        samples, _ = finished(made, group)
        counts = [float(s.weights[0]) / made.denominator(samples) for s in samples]
        assert counts == pytest.approx([first, second]), options


# --- what the recipe says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"advantage": "grop"}, "unknown advantage 'grop'.*grpo"),
        ({"advantage": {"use": "rloo", "with": {"x": 1}}}, "unknown option 'x'"),
        ({"shape": ["fork_token"]}, "unknown shaper 'fork_token'.*fork_tokens"),
        ({"shape": "ear"}, "option 'shape'"),
        ({"shape": [{"use": "ear", "with": {"clamp": [1.5, 2.0]}}]}, "around 1"),
        ({"shape": [{"use": "adv_clip", "with": {"beta": 0.0}}]}, "beta must be positive"),
        ({"shape": ["overlong"]}, "option 'max_tokens' is required"),
        ({"shape": [{"use": "overlong", "with": {"max_tokens": 8, "cache": 9}}]}, "cache must be in"),
        ({"shape": [{"use": "overlong", "with": {"max_tokens": 8, "cache": 2, "factor": -1.0}}]}, "pay for length"),
        ({"shape": [{"use": "fork_tokens", "with": {"fraction": 0.0}}]}, "fraction must be"),
        ({"shape": [{"use": "fork_tokens", "with": {"over": "batch"}}]}, "option 'over'"),
        ({"shape": ["limiting_confidence"]}, "option 'budget' is required"),
        ({"shape": [{"use": "limiting_confidence", "with": {"budget": 0}}]}, "at least 1"),
        ({"shape": [{"use": "ttrl.gates:ZeroVariance"}]}, "must be a sub-class"),
        ({"loss": {"use": "cispo", "with": {"is_max": 0.28}}}, "are ratios"),
        ({"loss": {"use": "gspo", "with": {"clip": [0.2, 0.2]}}}, "unknown option 'clip'.*geo_clip"),
        ({"loss": {"use": "gspo", "with": {"geo_clip": [0.0, 0.2]}}}, "geo_clip needs"),
        ({"loss": {"use": "topr", "with": {"level": "token"}}}, "option 'level'"),
        ({"loss": {"use": "topr", "with": {"negative": [1.0, 0.5]}}}, "negative needs"),
        ({"loss": "gspo", "clip": [0.1, 0.2]}, "belong to the clip loss"),
        ({"loss": {"use": "clip", "with": {"clip": [0.1, 0.1]}}, "dual_clip": 3.0}, "keep one of the two"),
        ({"aggregate": "mean"}, "option 'aggregate'"),
        ({"aggregate": "fixed"}, "give fixed_length"),
        ({"aggregate": "fixed", "fixed_length": 0}, "give fixed_length"),
        ({"fixed_length": 8}, "belongs to aggregate: fixed"),
        ({"regularizers": ["entropy_band"]}, "option 'coefficient' is required"),
        ({"regularizers": [{"use": "entropy_band", "with": {"coefficient": 0.0}}]}, "must be positive"),
        ({"regularizers": [{"use": "entropy_band", "with": {"coefficient": 1.0, "quantiles": [0.6, 0.5]}}]}, "quantiles"),
        ({"regularizers": [{"use": "entropy_band", "with": {"coefficient": 1.0, "edges": [2.0, 1.0]}}]}, "edges must"),
        ({"regularizers": [{"use": "entropy_band", "with": {"coefficient": 1.0, "hold": 0}}]}, "over: step"),
        ({"regularizers": [{"use": "kl", "with": {"kind": "k1"}}]}, "no force at all"),
        ({"regularizers": [{"use": "kl", "with": {"kind": "k4"}}]}, "option 'kind'"),
        ({"advantage": "reinforce_pp", "shape": ["ear"]}, "normalised over the step"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_a_mistake_of_the_recipe(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        objective(**options)


def test_needs_are_those_of_all_parts() -> None:
    assert objective().needs == frozenset()
    assert objective(shape=["ear", "answer_span"]).needs == {"entropy", "tokenizer"}
    band = {"use": "entropy_band", "with": {"coefficient": 0.1}}
    assert objective(regularizers=["kl", band]).needs == {"ref_logprobs", "entropy", "entropy_grad"}


def test_parts_among_the_options_are_found() -> None:
    plug = Plug.model_validate(
        {"use": "grpo", "with": {"loss": "./l.py:L", "shape": ["ear", {"use": "./s.py:S"}], "regularizers": ["kl"]}}
    )
    assert [(slot, part.use) for slot, part in inner_plugs(plug)] == [
        ("shaper", "ear"), ("shaper", "./s.py:S"), ("loss", "./l.py:L"), ("regularizer", "kl"),
    ]  # fmt: skip
    assert has_reference((), plug) and not has_reference((), Plug(use="grpo"))
    assert has_reference((Plug(use="kl"),), Plug(use="grpo"))


def test_samples_of_a_step_must_carry_the_same_extras() -> None:
    samples = objective().samples(scored([1, 0]))
    with pytest.raises(PluginError, match="same extras"):
        check_samples([replace(samples[0], extras={"x": np.zeros(1, np.float32)}), samples[1]])
    with pytest.raises(PluginError, match="x must be 1 finite numbers"):
        check_samples([replace(samples[0], extras={"x": np.full(1, np.nan, np.float32)})])


# --- the band's memory --------------------------------------------------------------------------------------------------


def band(**options: Any) -> GRPO:
    return objective(regularizers=[{"use": "entropy_band", "with": {"coefficient": 0.1, **options}}])


def edges(made: GRPO, level: float, step: int) -> tuple[float, float]:
    """Of a step whose entropies are level + (0, 0.1, ..., 1)."""
    samples, metrics = finished(made, scored([1], [11], [level + np.arange(11) / 10]), step=step)
    low, high = samples[0].extras["band_low"], samples[0].extras["band_high"]
    assert len(set(low.tolist())) == len(set(high.tolist())) == 1
    assert metrics["train/band_low"] == pytest.approx(float(low[0]))
    return float(low[0]) - 0.1, float(high[0]) - 0.5


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, [1, 2, 3, 4]),
        ({"over": "group"}, [1, 2, 3, 4]),
        ({"over": "step"}, [1, 2, 3, 4]),
        ({"over": "step", "hold": 2}, [1, 1, 3, 3]),
        ({"over": "step", "hold": 0}, [1, 1, 1, 1]),
        ({"edges": [5.1, 5.5]}, [5, 5, 5, 5]),
    ],
)
def test_edges_stay_as_long_as_the_recipe_says(options: dict[str, Any], levels: list[int]) -> None:
    made = band(**options)
    found = [edges(made, step + 1, step) for step in range(4)]
    assert found == [pytest.approx((level, level), abs=1e-6) for level in levels]


@pytest.mark.parametrize("hold", [0, 2, 3])
def test_edges_survive_a_checkpoint(hold: int) -> None:
    whole = band(over="step", hold=hold)
    expected = [edges(whole, step + 1, step) for step in range(5)]
    for cut in range(5):
        first, second = band(over="step", hold=hold), band(over="step", hold=hold)
        found = [edges(first, step + 1, step) for step in range(cut)]
        second.load_state(json.loads(json.dumps(first.state())))
        assert found + [edges(second, step + 1, step) for step in range(cut, 5)] == expected
    whole.load_state({})
    assert edges(whole, 9, 9) == pytest.approx((9, 9), abs=1e-6)  # forgotten, as after a failed first step


def test_a_band_over_selected_tokens_sees_only_them() -> None:
    made = objective(
        shape=["fork_tokens"], regularizers=[{"use": "entropy_band", "with": {"coefficient": 1.0}}],
    )  # fmt: skip
    samples, _ = finished(made, scored([1], [10], [np.arange(1, 11) / 10]))
    assert samples[0].extras["band_low"][0] == pytest.approx(0.91)
    assert samples[0].extras["band_high"][0] == pytest.approx(0.95)
