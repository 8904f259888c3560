"""The majority-vote reward, against hand-computed groups and each known defect of the reference implementation."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import boxed, context, make_group
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.contract import check_scored
from ttrl.rewards.equivalence import same
from ttrl.rewards.majority import MajorityVote
from ttrl.types import NO_ANSWER, Finish, Scored


def vote(answers: list[Any], seed: int = 0, **options: Any) -> Scored:
    return MajorityVote(**options)(make_group(boxed(answers)), context(seed))


def test_golden_group() -> None:
    scored = vote([5, 5, 5, 7])
    assert scored.label == "5"
    assert scored.rewards.tolist() == [1, 1, 1, 0]
    assert scored.rewards.dtype == np.float32
    assert scored.train.tolist() == [True] * 4
    assert scored.classes.tolist() == [0, 0, 0, 1]
    assert scored.answers == ("5", "5", "5", "7")
    assert (scored.share, scored.margin) == (0.75, 0.5)
    assert scored.trace == ("3 of 4 valid votes",)
    # with truth 7: the label is wrong, and so is every reward
    truth = np.asarray([same(a, "7", "math") for a in scored.answers])
    assert (scored.rewards == truth).mean() == 0.0
    assert (scored.rewards.mean(), truth.mean()) == (0.75, 0.25)


def test_lucky_hit_most_rewards_are_right_although_the_label_is_wrong() -> None:
    scored = vote([1, 1, 2, 3, 4, 9, 8, 6])
    truth = np.asarray([same(a, "9", "math") for a in scored.answers])
    assert scored.label == "1"
    assert scored.rewards.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert (scored.rewards == truth).mean() == 5 / 8


def test_votes_are_equivalence_classes_and_not_strings() -> None:
    # counted as strings, 7 wins with 4 of 10 and the six right answers are paid nothing
    scored = vote([r"\frac12"] * 3 + ["0.5"] * 3 + [7] * 4)
    assert scored.label == "1/2"
    assert scored.rewards.tolist() == [1] * 6 + [0] * 4
    assert scored.share == pytest.approx(0.6)


def test_missing_answers_never_win() -> None:
    # three empty strings outvote two fives in the reference, and "no answer" is then paid
    scored = vote(["", "", "", 5, 5])
    assert scored.label == "5"
    assert scored.rewards.tolist() == [0, 0, 0, 1, 1]
    assert scored.classes.tolist() == [NO_ANSWER] * 3 + [0] * 2
    assert scored.share == 1.0
    assert scored.train.all()  # they are trained on: not answering earns nothing


@pytest.mark.parametrize("nothing", ["", " ", "$", r"\text{}"])
def test_empty_boxes_are_missing_answers(nothing: str) -> None:
    texts = [rf"\boxed{{{nothing}}}"] * 3 + boxed([5, 5])
    assert MajorityVote()(make_group(texts), context()).label == "5"


def test_a_group_without_any_answer_abstains() -> None:
    scored = vote(["", "", "", ""])
    assert scored.label is None
    assert not scored.train.any()
    assert scored.rewards.tolist() == [0] * 4
    assert (scored.share, scored.margin, scored.trace) == (0.0, 0.0, ("nobody answered",))


@pytest.mark.parametrize("answers", [[5, 5, 7, 7], [1, 2, 3, 4], [5, "", "", ""]])
def test_ties_and_single_votes_abstain(answers: list[Any]) -> None:
    scored = vote(answers)
    assert scored.label is None
    assert not scored.train.any() and not scored.rewards.any()


@pytest.mark.parametrize("finish", [Finish.LENGTH, Finish.ABORT])
def test_unfinished_text_never_votes(finish: Finish) -> None:
    group = make_group(boxed([7, 7, 7, 5, 5]), finishes=[finish] * 3 + [Finish.STOP] * 2)
    scored = MajorityVote()(group, context())
    assert scored.label == "5"
    assert scored.rewards.tolist() == [0, 0, 0, 1, 1]
    assert MajorityVote(truncated_votes=True)(group, context()).label == "7"


def test_the_label_is_used_as_it_was_extracted() -> None:
    # the reference extracts from the label once more, which makes "2" of \frac{1}{2}
    scored = vote([r"\frac{1}{2}"] * 4)
    assert scored.label == "1/2" and scored.rewards.tolist() == [1] * 4
    assert same(scored.label, r"\frac{1}{2}", "math")


def test_a_confidence_floor_makes_a_weak_plurality_abstain() -> None:
    answers = [5, 5, 1, 2, 3, 4, 6, 7]
    assert vote(answers).label == "5"
    assert vote(answers, min_share=0.3).label is None
    assert vote(answers, min_margin=0.2).label is None


def test_all_votes_count_but_only_drawn_rollouts_train() -> None:
    group = make_group(boxed([7, 7, 5, 5, 5]), trainable=[True, True, False, False, False])
    scored = MajorityVote()(group, context())
    assert scored.label == "5"
    assert scored.rewards.tolist() == [0, 0, 1, 1, 1]
    assert scored.train.tolist() == group.trainable.tolist()


def test_the_article_a_is_not_choice_a() -> None:
    texts = ["It must be a cat, a dog or a cow."] * 3 + ["The answer is (B)."] * 2
    scored = MajorityVote(extractor="choice")(make_group(texts), context())
    assert scored.label == "B"
    assert scored.rewards.tolist() == [0, 0, 0, 1, 1]


def test_words_after_the_answer_do_not_become_part_of_it() -> None:
    texts = ["the answer is 12 apples because x", "the answer is 12 apples because y", "the answer is 13"]
    assert MajorityVote()(make_group(texts), context()).rewards.tolist() == [1, 1, 0]


def test_pairs_that_start_alike_are_different_answers() -> None:
    texts = [f"The answer is (1, {i})" for i in (2, 3, 4, 4)]
    assert MajorityVote()(make_group(texts), context()).rewards.tolist() == [0, 0, 1, 1]


def test_random_ties_pay_one_of_the_tied_classes_by_seed() -> None:
    labels = {vote([5, 5, 7, 7], seed, ties="random").label for seed in range(30)}
    assert labels == {"5", "7"}
    scored = vote([5, 5, 7, 7], 1, ties="random")
    assert scored.rewards.tolist() == [float(a == scored.label) for a in scored.answers]


@settings(derandomize=True, max_examples=150)
@given(
    st.lists(st.sampled_from(["", "5", "5.0", "7", "1/2", "0.5", "dog"]), min_size=2, max_size=12),
    st.randoms(use_true_random=False),
    st.sampled_from(["abstain", "random"]),
    st.integers(0, 5),
)
def test_the_order_of_the_rollouts_does_not_matter(
    answers: list[str], rng: random.Random, ties: str, seed: int
) -> None:
    order = list(range(len(answers)))
    rng.shuffle(order)
    scored = vote(answers, seed, ties=ties)
    shuffled = vote([answers[i] for i in order], seed, ties=ties)
    assert shuffled.label == scored.label
    assert (shuffled.share, shuffled.margin, shuffled.trace) == (scored.share, scored.margin, scored.trace)
    for field in ("rewards", "train", "classes"):
        assert getattr(shuffled, field).tolist() == [getattr(scored, field)[i] for i in order]


@settings(derandomize=True, max_examples=100)
@given(st.lists(st.text(alphabet="\\boxed{}5/ answeris.", max_size=20), min_size=2, max_size=6))
def test_any_text_gives_a_result_within_the_contract(texts: list[str]) -> None:
    group = make_group(texts)
    scored = MajorityVote()(group, context())
    check_scored(scored, group)
    assert set(scored.rewards.tolist()) <= {0.0, 1.0}
    assert not scored.rewards[scored.classes == NO_ANSWER].any()
    if scored.label is None:
        assert not scored.train.any() and not scored.rewards.any()


def test_wrong_options_are_errors_when_the_reward_is_built() -> None:
    with pytest.raises(ValueError, match="capital letters"):
        MajorityVote(extractor="choice", options={"letters": "ab"})
    with pytest.raises(ValueError, match="extractor 'math'"):
        MajorityVote(options={"nope": 1})


def test_three_empty_strings_do_not_outvote_an_answer() -> None:
    scored = vote(["", "", "", 42])
    assert scored.label is None  # one vote elects nobody
    assert scored.classes.tolist() == [NO_ANSWER] * 3 + [0]
    assert vote(["", "", "", 42, 42]).label == "42"


def test_answers_of_equal_value_vote_together() -> None:
    scored = vote([r"\sqrt{8}", r"2\sqrt{2}", r"\frac{4}{\sqrt 2}", 7, 7])
    assert scored.label == r"\sqrt{8}"
    assert scored.rewards.tolist() == [1, 1, 1, 0, 0]
    assert scored.metrics["grading_timeouts"] == scored.metrics["grading_gated"] == 0


def test_votes_that_the_cost_gate_kept_apart_are_counted() -> None:
    scored = vote(["9^{9^{9}}", "9^{9^{9}}", "9^{9^9}", 5, 5, 5])
    assert scored.label == "5"
    assert (scored.metrics["grading_timeouts"], scored.metrics["grading_gated"]) == (0, 3)


def test_ten_thousand_shuffles_of_random_groups_give_one_label() -> None:
    """From text to label: equal answers are spelled differently, some need the sandbox, some are silent, some were cut off."""
    rng = np.random.default_rng(1)
    rewards = [MajorityVote(ties="abstain"), MajorityVote(ties="random"), MajorityVote(ties="shortest")]
    spellings = ["1/2", "0.5", r"\frac12", "7", "7.0", "dog", "(1,2)", "2,1", r"\sqrt{8}", r"2\sqrt2", "9^{9^9}", ""]
    labels = set()
    for seed in range(100):
        size = int(rng.integers(2, 17))
        texts = boxed([spellings[i] for i in rng.integers(0, len(spellings), size)])
        cut = rng.random(size) < 0.2
        group = make_group(texts, finishes=[Finish.LENGTH if c else Finish.STOP for c in cut])
        outcomes = set()
        for _ in range(100):
            order = rng.permutation(size)
            scored = rewards[seed % 3](replace(group, rollouts=tuple(group.rollouts[i] for i in order)), context(seed))
            outcomes.add((scored.label, scored.share, scored.margin, tuple(scored.rewards[np.argsort(order)].tolist())))
        assert len(outcomes) == 1
        labels |= {label for label, *_ in outcomes}
    assert None in labels and len(labels) > 4


def test_code_in_a_box_is_text_and_leaves_no_trace(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for code in (
        f"__import__('os').system('touch {marker}')",
        f"eval(\"open('{marker}','w')\")",
        f"exec(\"open('{marker}','w')\")",
        f"open('{marker}','w').write('x')",
    ):
        scored = vote([code, rf"\text{{{code}}}", rf"\sqrt{{{code}}}", r"\sqrt{8}", r"2\sqrt2", r"\frac{4}{\sqrt2}"])
        assert scored.label == r"2\sqrt2"
        assert list(tmp_path.iterdir()) == []


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["1/2", "0.5", r"\sqrt{8}", r"2\sqrt2", "7", ""]), min_size=4, max_size=16),
    st.randoms(use_true_random=False),
)
def test_truncating_half_the_votes_leaves_the_label_of_the_others(answers: list[str], rng: random.Random) -> None:
    # the truncated half agrees on something else, half-way through a sum: the worst case for a vote
    texts = (
        boxed(answers)
        + ["so 17 cats and 3*"] * (len(answers) // 2)
        + boxed(["17"] * (len(answers) - len(answers) // 2))
    )
    finishes = [Finish.STOP] * len(answers) + [Finish.LENGTH] * len(answers)
    order = rng.sample(range(len(texts)), len(texts))
    mixed = make_group([texts[i] for i in order], finishes=[finishes[i] for i in order])
    alone = MajorityVote()(make_group(boxed(answers)), context())
    scored = MajorityVote()(mixed, context())
    assert (scored.label, scored.share, scored.margin) == (alone.label, alone.share, alone.margin)
