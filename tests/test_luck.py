"""TTRL's own numbers: labels and rewards against the truth, computed outside of training. Golden numbers by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers import boxed, context, make_group, make_scored

from ttrl.errors import ConfigError
from ttrl.evaluate.luck import LuckMeter, judge, summarise
from ttrl.rewards.majority import MajorityVote
from ttrl.rewards.soft import SoftVote
from ttrl.types import Scored

REWARD = MajorityVote()


def scored(answers: list[object], **fields: object) -> Scored:
    return REWARD(make_group(boxed(answers), **fields), context())  # type: ignore[arg-type]


def luck(answers: list[object], truth: str, **fields: object) -> dict[str, float | None]:
    return asdict(judge(scored(answers, **fields), truth, REWARD.reader))


def test_a_wrong_label_for_the_wrong_answers() -> None:
    found = luck([5, 5, 5, 7], "7")
    assert scored([5, 5, 5, 7]).label == "5"
    assert scored([5, 5, 5, 7]).rewards.tolist() == [1, 1, 1, 0]
    assert found["label_accuracy"] == 0.0
    assert found["reward_accuracy"] == 0.0
    assert found["majority_ratio"] == 0.75
    assert found["ground_truth_ratio"] == 0.25
    assert found["majority_voting_reward"] == 0.75
    assert found["any_right"] == 1.0


def test_lucky_hits() -> None:
    group = scored([1, 1, 2, 3, 4, 9, 8, 6])
    assert (group.label, group.rewards.tolist()) == ("1", [1, 1, 0, 0, 0, 0, 0, 0])
    found = luck([1, 1, 2, 3, 4, 9, 8, 6], "9")
    assert (found["label_accuracy"], found["reward_accuracy"]) == (0.0, 0.625)
    assert found["reward_accuracy_label_wrong"] == 0.625
    assert luck([1, 1, 2, 3], "1")["reward_accuracy_label_wrong"] is None


def test_equal_values_are_one_answer() -> None:
    answers = ["\\frac{1}{2}"] * 3 + ["0.5"] * 3 + ["7"] * 4
    group = scored(answers)
    assert group.rewards.tolist() == [1] * 6 + [0] * 4
    for truth in ("1/2", "0.5", "\\dfrac12"):  # the reference code grades 2 against 1/2 here, and gets 0
        found = luck(answers, truth)
        assert (found["label_accuracy"], found["reward_accuracy"]) == (1.0, 1.0)
        assert (found["majority_ratio"], found["ground_truth_ratio"]) == (0.6, 0.6)


def test_no_answer_never_becomes_a_label() -> None:
    group = scored(["", "", "", 5, 5])
    assert (group.label, group.rewards.tolist(), group.share) == ("5", [0, 0, 0, 1, 1], 1.0)
    found = luck(["", "", "", 5, 5], "5")
    assert (found["label_accuracy"], found["reward_accuracy"], found["majority_ratio"]) == (1.0, 1.0, 0.4)
    silent = scored(["", "", ""])
    assert silent.label is None and not silent.train.any()
    found = luck(["", "", ""], "5")
    assert (found["label_accuracy"], found["reward_accuracy"]) == (None, None)
    assert (found["ground_truth_ratio"], found["any_right"], found["post_any_right"]) == (0.0, 0.0, None)


def test_the_kept_rollouts_have_numbers_of_their_own() -> None:
    # the label is right; kept are one right answer and one wrong one, each paid as it should be
    found = luck([5, 5, 5, 7], "5", trainable=[True, False, False, True])
    assert (found["post_reward_accuracy"], found["post_ground_truth_ratio"], found["post_any_right"]) == (1.0, 0.5, 1.0)
    found = luck([5, 5, 5, 7], "7", trainable=[True, True, False, False])
    assert (found["post_reward_accuracy"], found["post_ground_truth_ratio"], found["post_any_right"]) == (0.0, 0.0, 0.0)


def test_rewards_that_are_no_verdicts_have_no_accuracy() -> None:
    soft = SoftVote()(make_group(boxed([5, 5, 7])), context())
    found = judge(soft, "5", REWARD.reader)
    assert found.label_accuracy == 1.0 and found.reward_accuracy is None and found.post_reward_accuracy is None
    assert found.majority_voting_reward == pytest.approx(5 / 9)


# over groups and steps


@pytest.fixture
def labels(tmp_path: Path) -> str:
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps({"id": i, "answer": a}) + "\n" for i, a in (("a", "5"), ("b", "7"))))
    return str(file)


def test_a_line_holds_means_over_the_groups_where_a_number_is_defined(labels: str) -> None:
    meter = LuckMeter(labels, ["a", "b"], REWARD.reader)
    step = [
        scored([5, 5, 5, 7], identifier="a"),  # right: reward accuracy 1
        scored([5, 5, 7, 8], identifier="b"),  # wrong: 1 of 4 rewards is right
        scored(["", ""], identifier="b"),  # no label
        scored([1, 1], identifier="nobody knows"),
    ]
    line = meter(3, step)
    assert line is not None
    assert (line["step"], line["groups"], line["labelled"]) == (3, 3, 2)
    assert (line["label_accuracy"], line["reward_accuracy"]) == (0.5, 0.625)
    assert line["reward_accuracy_label_wrong"] == 0.25
    assert line["ground_truth_ratio"] == pytest.approx((0.75 + 0.25 + 0) / 3, abs=1e-6)
    assert json.loads(json.dumps(line)) == line
    assert meter(0, step[3:]) is None
    with pytest.raises(ConfigError, match="no label for 1 of 1 prompts"):
        LuckMeter(labels, ["c"], REWARD.reader)


def test_a_summary_compares_the_first_steps_with_the_last() -> None:
    lines = [{"step": i, "groups": 2, "labelled": 2, "label_accuracy": i / 8} for i in range(8)]
    del lines[7]["label_accuracy"]
    assert summarise(lines) == {
        "first_quarter": {"label_accuracy": pytest.approx(1 / 16)},
        "last_quarter": {"label_accuracy": 6 / 8},
        "all": {"label_accuracy": pytest.approx(3 / 8)},
    }
    assert summarise([]) is None


def test_a_class_of_the_reward_is_not_taken_on_trust() -> None:
    group = make_group(boxed([5, 7, 7]))
    lied = make_scored([0, 0, 1], [1, 1, 0], group=group, label="5", answers=("5", "7", "7"))
    found = judge(lied, "5", REWARD.reader)
    assert (found.ground_truth_ratio, found.majority_ratio) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found.reward_accuracy == pytest.approx(2 / 3)
    assert np.isclose(found.majority_voting_reward, 2 / 3)
