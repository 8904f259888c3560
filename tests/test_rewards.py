"""Every built-in reward: golden numbers, the rules all of them keep, and the controls."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import boxed, context, make_group
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.config import Plug
from ttrl.contract import check_scored
from ttrl.registry import BUILT_IN, build
from ttrl.rewards.controls import Frozen, Gold, Incorrect, Random
from ttrl.rewards.majority import MajorityVote
from ttrl.rewards.selective import Selective
from ttrl.rewards.soft import FrequencyEntropy, SoftVote, entropy
from ttrl.rewards.weights import vote_weights
from ttrl.trainers.advantages import dr_grpo, grpo
from ttrl.types import Group

answer_lists = st.lists(st.sampled_from(["", "5", "5.0", "7", "1/2", "0.5", "dog"]), min_size=4, max_size=12)

VARIANTS: list[dict[str, Any]] = [
    {"use": "majority_vote"},
    {"use": "majority_vote", "with": {"weights": "logprob", "ties": "shortest"}},
    {"use": "majority_vote", "with": {"weights": "entropy", "min_confidence": 0.5}},
    {"use": "majority_vote", "with": {"weights": "self_certainty"}},
    {"use": "majority_vote", "with": {"weights": "rpc"}},
    {"use": "majority_vote", "with": {"electorate": "leave_one_out"}},
    {"use": "majority_vote", "with": {"electorate": "split"}},
    {"use": "soft_vote"},
    {"use": "soft_vote", "with": {"leave_one_out": True, "weights": "entropy"}},
    {"use": "frequency_entropy"},
    {"use": "frequency_entropy", "with": {"leave_one_out": True, "normalised": False}},
    {"use": "selective"},
    {"use": "selective", "with": {"shaping": "entropy", "rare_share": 0.3}},
    {"use": "novelty", "with": {"ngram": 1}},
    {"use": "restrain"},
    {"use": "restrain", "with": {"least": 1, "prompt_weights": True}},
    {"use": "distribution"},
    {"use": "views"},
    {"use": "random"},
    {"use": "incorrect"},
    {"use": "frozen"},
    {"use": "gold"},
    {"use": "length_penalty"},
]  # fmt: skip


def make(variant: dict[str, Any]) -> Any:
    reward = build("reward", Plug.model_validate(variant))
    if isinstance(reward, Gold):
        reward.take_labels({"p": "5"})
    return reward


def group_of(answers: list[str], seed: int = 0) -> Group:
    """Every rollout with its own tokens, log-probs and entropies."""
    rng = np.random.default_rng(seed)
    group = make_group(boxed(answers), entropies=rng.uniform(0.1, 3, len(answers)).tolist())
    rollouts = [
        replace(r, token_ids=rng.integers(0, 9, n).astype(np.int32), logprobs=-rng.random(n).astype(np.float32),
                entropy=rng.random(n).astype(np.float32) + r.index % 3, self_certainty=rng.random(n).astype(np.float32))
        for r in group.rollouts
        for n in [int(rng.integers(1, 6))]
    ]  # fmt: skip
    return replace(group, rollouts=tuple(rollouts))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=40)
@given(answers=answer_lists, seed=st.integers(0, 3))
def test_every_reward_keeps_the_rules(variant: dict[str, Any], answers: list[str], seed: int) -> None:
    """Contract, order, determinism, picklability; silence is never paid best, and nobody learns where nobody agrees."""
    group = group_of(answers, seed)
    scored = make(variant)(group, context(seed))
    check_scored(scored, group)
    order = np.random.default_rng(seed).permutation(len(answers))
    shuffled = replace(group, rollouts=tuple(group.rollouts[i] for i in order), trainable=group.trainable[order])
    again = pickle.loads(pickle.dumps(make(variant)))(shuffled, context(seed))
    assert again.label == scored.label
    assert (again.share, again.margin, again.trace) == (scored.share, scored.margin, scored.trace)
    for name in ("rewards", "train", "classes"):
        assert np.array_equal(getattr(again, name), getattr(scored, name)[order]), name
    if variant["use"] != "random":
        silent = scored.classes == -1
        assert not silent.any() or scored.rewards[silent].max() <= scored.rewards.min() + 1e-6
        if silent.all():
            assert not scored.train.any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nobody_trains_where_no_two_agree(variant: dict[str, Any]) -> None:
    if variant["use"] in ("random", "gold", "restrain"):
        pytest.skip("does not need agreement; restrain pushes such groups down, see test_beyond")
    scored = make(variant)(group_of(["1", "2", "3", "4", "5", "6", "7", "8"]), context())
    assert scored.label is None
    assert not scored.train.any()


def test_the_variants_cover_every_built_in() -> None:
    assert {v["use"] for v in VARIANTS} == set(BUILT_IN["reward"]) - {"trl", "region_consistency"}  # other answers


def test_only_drawn_rollouts_train() -> None:
    for variant in VARIANTS:
        group = replace(group_of(["5"] * 4 + ["7"] * 2 + ["8"]), trainable=np.arange(7) % 2 == 0)
        assert not make(variant)(group, context()).train[1::2].any(), variant


def test_majority_vote_by_the_others() -> None:
    scored = MajorityVote(electorate="leave_one_out")(make_group(boxed([5, 5, 7])), context())
    # without a 5 it is one against one: both fives have no label; the seven is judged by two fives
    assert scored.train.tolist() == [False, False, True]
    assert scored.rewards.tolist() == [0, 0, 0]
    assert scored.label == "5"
    halves = MajorityVote(electorate="split")(make_group(boxed([5] * 6 + [7, 7])), context(1))
    assert set(halves.rewards[:6][halves.train[:6]].tolist()) == {1.0}


def test_weighted_majority_can_overrule_numbers() -> None:
    group = make_group(boxed([7, 7, 7, 5, 5]), entropies=[3, 3, 3, 0.1, 0.1])
    assert MajorityVote()(group, context()).label == "7"
    reward = MajorityVote(weights="entropy")
    assert reward.needs == {"entropy"}
    assert reward(group, context()).label == "5"
    with pytest.raises(ValueError, match="entropies were not recorded"):
        reward(make_group(boxed([7, 7])), context())


def test_self_certainty_weighs_votes() -> None:
    """Means by hand: 3 and 5 for the 7s (tokens 2, 4 and 5), 9 for the 5; 8 against 9 of weight, and 8 of 17 is the share."""
    certainties = [[2.0, 4.0], [5.0], [9.0, 8.0, 10.0], [100.0]]
    group = make_group(boxed([7, 7, 5, ""]))
    rollouts = [
        replace(r, self_certainty=np.asarray(c, np.float32)) for r, c in zip(group.rollouts, certainties, strict=True)
    ]
    group = replace(group, rollouts=tuple(rollouts))
    assert vote_weights("self_certainty", group.rollouts, [1, 1, 0, -1]).tolist() == [3.0, 5.0, 9.0, 100.0]
    soft = SoftVote(weights="self_certainty")
    assert soft.needs == MajorityVote(weights="self_certainty").needs == {"self_certainty"}
    assert soft(group, context()).rewards.tolist() == pytest.approx([8 / 17, 8 / 17, 9 / 17, 0])
    # one vote is nobody's majority, whatever it weighs; with a second one it overrules three hesitant ones
    assert MajorityVote(weights="self_certainty")(group, context()).label is None
    sure = [replace(r, self_certainty=np.full(3, c, np.float32)) for r, c in zip(make_group(boxed([7, 7, 7, 5, 5])).rollouts,
                                                                                 [1, 1, 1, 2, 2], strict=True)]  # fmt: skip
    assert (
        MajorityVote(weights="self_certainty")(
            replace(make_group(boxed([7, 7, 7, 5, 5])), rollouts=tuple(sure)), context()
        ).label
        == "5"
    )
    with pytest.raises(ValueError, match="self-certainties were not recorded"):
        soft(make_group(boxed([7, 7])), context())


def test_soft_vote() -> None:
    scored = SoftVote()(make_group(boxed([5, 5, 7, ""])), context())
    assert scored.rewards.tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0])
    assert (scored.label, scored.train.all()) == ("5", True)
    own = SoftVote(leave_one_out=True)(make_group(boxed([5, 5, 7, ""])), context())
    assert own.rewards.tolist() == [0.5, 0.5, 0, 0]
    tied = SoftVote()(make_group(boxed([5, 5, 7, 7])), context())
    assert tied.label is None and tied.train.all()
    assert not SoftVote(min_share=0.6)(make_group(boxed([5, 5, 7, 7])), context()).train.any()


@pytest.mark.parametrize(
    ("normalised", "expected"), [(False, [-0.27979, -0.27979, -0.52979, -0.52979]), (True, [-0.2098, -0.2098, -0.4598, -0.4598])]
)  # fmt: skip
def test_ttrv_as_published(normalised: bool, expected: list[float]) -> None:
    scored = FrequencyEntropy(normalised=normalised)(make_group(boxed(["A", "A", "B", "C"])), context())
    assert scored.rewards.tolist() == pytest.approx(expected, abs=1e-5)
    assert grpo(scored.rewards) == pytest.approx([0.8660, 0.8660, -0.8660, -0.8660], abs=1e-4)
    assert scored.metrics["answer_entropy"] == pytest.approx(1.03972, abs=1e-5)


def test_ttrv_leave_one_out_acts() -> None:
    scored = FrequencyEntropy(normalised=False, leave_one_out=True)(make_group(boxed(["A", "A", "B", "C"])), context())
    # without an A three different answers are left (ln 3); without a B two against one (.63651)
    up, down = 0.75 * (np.log(3) - 1.03972), 0.75 * (0.63651 - 1.03972)
    assert scored.rewards.tolist() == pytest.approx([0.5 + up, 0.5 + up, 0.25 + down, 0.25 + down], abs=1e-5)


@settings(max_examples=100)
@given(answer_lists)
def test_the_published_entropy_term_cancels_and_the_leave_one_out_form_does_not(answers: list[str]) -> None:
    group = make_group(boxed(answers))
    plain = dr_grpo(FrequencyEntropy(alpha=0.0)(group, context()).rewards)
    assert dr_grpo(FrequencyEntropy(alpha=0.75)(group, context()).rewards) == pytest.approx(plain, abs=1e-6)
    terms = FrequencyEntropy(leave_one_out=True, normalised=False).terms(group, context())
    counts = np.unique(np.asarray([a for a in SoftVote()(group, context()).classes if a >= 0]), return_counts=True)[1]
    if len(set(counts.tolist())) > 1:
        assert np.ptp(terms["entropy"]) > 1e-6


def test_entropy_of_counts() -> None:
    assert entropy([2, 1, 1]) == pytest.approx(1.03972, abs=1e-5)
    assert entropy([2, 1, 1], normalised=True) == pytest.approx(0.94639, abs=1e-5)
    assert entropy([4, 2, 2]) == pytest.approx(1.0397, abs=1e-4)
    assert (entropy([8]), entropy([8], normalised=True), entropy([]), entropy([0, 3])) == (0, 0, 0, 0)


def test_selective_pays_clear_votes_and_fines_rare_uncertain_answers() -> None:
    answers, unsure = [5, 5, 5, 5, 7, 7, 8, 9], [1, 1, 1, 1, 1, 1, 1, 3]
    scored = Selective(rare_share=0.15)(make_group(boxed(answers), entropies=unsure), context())
    assert scored.rewards.tolist() == [1, 1, 1, 1, 0, 0, 0, -1]
    assert (scored.label, scored.share, scored.margin) == ("5", 0.5, 0.25)
    # the vote is not clear, but what is rare and uncertain can still be told to go
    weak = Selective(min_share=0.6, rare_share=0.15)(make_group(boxed(answers), entropies=unsure), context())
    assert (weak.label, weak.rewards.tolist(), weak.train.all()) == (None, [0] * 7 + [-1], True)
    neither = Selective(min_share=0.6, rare_share=0.15)(make_group(boxed(answers), entropies=[1] * 8), context())
    assert neither.label is None and not neither.train.any()
    silent = Selective(rare_share=0.15)(make_group(boxed([*answers[:7], 9, ""]), entropies=[*unsure, 0]), context())
    assert silent.rewards.tolist() == [1, 1, 1, 1, 0, 0, 0, -1, -1]


def test_random_ignores_the_answers() -> None:
    rewards = [Random(p=0.25)(make_group(boxed([5] * 8)), context(seed)).rewards for seed in range(200)]
    assert np.mean(rewards) == pytest.approx(0.25, abs=0.05)
    first = Random()(make_group(boxed([5] * 8)), context(3)).rewards
    assert np.array_equal(first, Random()(make_group(boxed([1, 2, 3, 4, 5, 6, 7, ""])), context(3)).rewards)


def test_incorrect_pays_the_runner_up() -> None:
    scored = Incorrect()(make_group(boxed([5, 5, 5, 7, 7, 9])), context())
    assert (scored.label, scored.rewards.tolist()) == ("7", [0, 0, 0, 1, 1, 0])
    assert (scored.share, scored.margin) == (pytest.approx(1 / 3), pytest.approx(-1 / 6))
    for unclear in ([5, 5, 7, 7], [5, 5, 5, 7, 9], [5, 5, 5], ["", ""]):
        assert Incorrect()(make_group(boxed(unclear)), context()).label is None


def test_frozen_labels_stay_and_travel() -> None:
    reward = Frozen()
    assert reward(make_group(boxed([5, 5, 7])), context()).label == "5"
    later = make_group(boxed([7, 7, 7, 5]))
    scored = reward(later, context())
    assert (scored.label, scored.rewards.tolist(), scored.share, scored.margin) == ("5", [0, 0, 0, 1], 0.25, -0.5)
    assert reward(make_group(boxed([5, 7]), identifier="q"), context()).label is None
    assert not reward(make_group(boxed([5, 5]), identifier="q"), context()).train.any()
    state = copy.deepcopy(reward.state())
    assert state == {"labels": {"p": "5", "q": None}}
    other = Frozen()
    other.load_state(state)
    assert other(later, context()).label == "5"
    other(make_group(boxed([1, 1]), identifier="r"), context())
    assert reward.state() == state


def test_gold_pays_the_reference_and_runs_only_when_given_labels() -> None:
    reward = Gold()
    with pytest.raises(RuntimeError, match="allow_labels"):
        reward(make_group(boxed([5])), context())
    reward.take_labels({"p": "10/2"})
    scored = reward(make_group(boxed([7, 7, 5, ""])), context())
    assert (scored.label, scored.rewards.tolist()) == ("5", [0, 0, 1, 0])
    assert (scored.share, scored.margin) == (pytest.approx(1 / 3), pytest.approx(-1 / 3))


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("majority_vote", {"min_share": 1.5}, "min_share must lie in"),
        ("selective", {"rare_share": 1.0}, "rare_share"),
        ("random", {"p": 0.0}, "p must lie between"),
        ("soft_vote", {"weights": "nope"}, "weights"),
        ("frozen", {"extractor": "nope"}, "nope"),
    ],
)
def test_wrong_options_are_errors(use: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("reward", Plug.model_validate({"use": use, "with": options}))


def test_labels_of_another_visit_are_matched_by_value_not_by_spelling() -> None:
    first = make_group(boxed([r"\sqrt{8}", r"\sqrt{8}", "1"]))
    later = make_group(boxed([r"2\sqrt{2}", "1", r"2\sqrt{2}"]))
    frozen = Frozen()
    assert frozen(first, context()).rewards.tolist() == [1, 1, 0]
    assert frozen(later, context()).rewards.tolist() == [1, 0, 1]
    gold = Gold()
    gold.take_labels({first.prompt.id: r"\sqrt{8}"})
    assert gold(later, context()).rewards.tolist() == [1, 0, 1]
