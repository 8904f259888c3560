"""Two wordings of one question: the source that keeps them together, the reward that sees both, and a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import boxed, context, make_group
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import lines, train

from ttrl.config import Plug, load_recipe
from ttrl.contract import check_scored
from ttrl.errors import ConfigError, PluginError
from ttrl.registry import build
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.trl import reward_func
from ttrl.rewards.views import Views
from ttrl.scoring import score_all
from ttrl.setup import check_recipe
from ttrl.sources import ViewSource, partners, question_of
from ttrl.types import Scored

answer_lists = st.lists(st.sampled_from(["", "5", "5.0", "7", "1/2", "0.5", "dog"]), min_size=2, max_size=8)


def paired(first: list[Any], second: list[Any], **options: Any) -> list[Scored]:
    groups = [make_group(boxed(first), identifier="q@1"), make_group(boxed(second), identifier="q@2")]
    return Views(**options).score_step(groups, [context(1), context(2)])


def test_an_answer_must_be_common_in_both_wordings() -> None:
    """p (.6, .4), q (.2, .8): scores .3 and .5333 (Self-Harmony); crossed, each view is labelled by the other."""
    one, two = paired([5, 5, 5, 7, 7], [5, 7, 7, 7, 7])
    assert (one.label, two.label) == ("7", "7")
    assert one.rewards.tolist() == [0, 0, 0, 1, 1] and two.rewards.tolist() == [0, 1, 1, 1, 1]
    assert (one.share, one.margin) == (pytest.approx(0.4), pytest.approx(-0.2))
    one, two = paired([5, 5, 5, 7, 7], [5, 7, 7, 7, 7], label="cross")
    assert (one.label, two.label) == ("7", "5")
    assert one.rewards.tolist() == [0, 0, 0, 1, 1] and two.rewards.tolist() == [1, 0, 0, 0, 0]


def test_views_abstain_each_in_its_way() -> None:
    for scored in paired([5, 5, 5], [7, 7, 7]):
        assert scored.label is None and not scored.train.any()
    strange, other = paired([5, 5, 5], [7, 7, 7], label="cross")  # nobody here gave the label: nobody is paid
    assert (strange.label, other.label, strange.rewards.any(), strange.train.all()) == ("7", "5", False, True)
    for scored in paired(["", ""], [5, 5]):
        assert scored.label is None
    tied, labelled = paired([5, 5, 7, 7], [5, 5, 5, 7], label="cross")
    assert (tied.label, labelled.label) == ("5", None) and not labelled.train.any()
    assert all(s.label is None for s in paired([5, 5, 7], [5, 5, 7], min_share=0.9))


def test_one_value_in_two_spellings_is_one_answer() -> None:
    one, two = paired(["1/2", "1/2", "7"], ["0.5", "7", ".5"])
    assert one.rewards.tolist() == [1, 1, 0] and two.rewards.tolist() == [1, 0, 1]
    one, two = paired([r"\sqrt{8}", r"\sqrt{8}", "1"], [r"2\sqrt{2}", r"2\sqrt{2}", "1"], label="cross")
    assert one.rewards.tolist() == [1, 1, 0] and two.rewards.tolist() == [1, 1, 0]


@settings(max_examples=60)
@given(answer_lists, answer_lists, st.sampled_from(["harmonic", "cross"]), st.integers(0, 5))
def test_neither_order_matters(first: list[str], second: list[str], label: Any, seed: int) -> None:
    """Of the rollouts in a view, of the views, and of the groups in the step."""
    scored = paired(first, second, label=label)
    order = np.random.default_rng(seed).permutation(len(first))
    shuffled = paired([first[i] for i in order], second, label=label)
    assert shuffled[0].rewards.tolist() == scored[0].rewards[order].tolist()
    assert [s.label for s in shuffled] == [s.label for s in scored]
    swapped = paired(second, first, label=label)
    assert [s.rewards.tolist() for s in swapped] == [s.rewards.tolist() for s in reversed(scored)]
    groups = [
        make_group(boxed(a), identifier=i)
        for i, a in (("r@1", ["7", "7"]), ("q@2", second), ("q@1", first), ("r@2", ["7"]))
    ]
    step = Views(label=label).score_step(groups, [context()] * 4)
    assert step[2].rewards.tolist() == scored[0].rewards.tolist() and step[1].label == scored[1].label
    for item, group in zip(step, groups, strict=True):
        check_scored(item, group)
        silent = item.classes == -1
        assert not item.rewards[silent].any()


def test_a_prompt_alone_votes_for_itself() -> None:
    scored = Views()(make_group(boxed([5, 5, 7])), context())
    assert (scored.label, scored.rewards.tolist()) == ("5", [1, 1, 0])
    with pytest.raises(ConfigError, match=r"question 'q' has 1 view"):
        Views().score_step([make_group(boxed([5, 5]), identifier="q@1")], [context()])
    with pytest.raises(ValueError, match="one group at a time"):
        reward_func(Views(), eos_token_id=None)


# the source


@settings(max_examples=40)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 3))
def test_steps_hold_both_views_or_neither(questions: int, per_step: int, seed: int) -> None:
    per_step = min(per_step, questions)
    ids = [f"q@x{k}@{view}" for view in (2, 1) for k in range(questions)]
    source = ViewSource(ids, 2 * per_step, seed)
    steps = [source.batch(step) for step in range(questions)]
    for batch in steps:
        assert len(set(batch)) == len(batch) == 2 * per_step
        assert partners(batch) == [i ^ 1 for i in range(len(batch))]
    assert {i: sum(batch.count(i) for batch in steps) for i in ids} == dict.fromkeys(ids, per_step)  # whole epochs
    assert steps == [ViewSource(ids[::-1], 2 * per_step, seed).batch(step) for step in range(questions)]


def test_ids_say_which_question_a_prompt_words() -> None:
    assert question_of("a@b@1") == "a@b"
    assert partners(["a@1", "b@1", "b@2", "a@2"]) == [3, 2, 1, 0]
    for ids, message in (
        (["a@1", "a2"], "'a2' does not say which question"),
        (["a@1", "a@2", "a@3", "b@1"], r"question 'a' has 3 view\(s\)"),
        (["a@1", "a@2", "b@1"], r"question 'b' has 1 view\(s\) here \('b@1'\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            ViewSource(ids, 2, 0)
    with pytest.raises(ConfigError, match="must be even"):
        ViewSource(["a@1", "a@2"], 1, 0)
    with pytest.raises(ConfigError, match="only 2 prompts"):
        ViewSource(["a@1", "a@2"], 4, 0)


# the loop


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source=epoch"], "data.source: views keeps views together"),
        (["data.limit=33"], r"question 'sum-016' has 1 view"),
        (["data.prompts_per_step=7"], "must be even"),
        (["data.source=stream"], "which source 'stream' does not offer"),
    ],
)
def test_a_recipe_that_would_part_views_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_recipe(load_recipe("lab/views", changes))


def test_the_loop_checks_what_a_step_reward_returns() -> None:
    class Forgets(Views):
        def score_step(self, groups: Any, contexts: Any) -> list[Scored]:
            return super().score_step(groups, contexts)[:1]

    class Swaps(Views):
        def score_step(self, groups: Any, contexts: Any) -> list[Scored]:
            return super().score_step(groups, contexts)[::-1]

    recipe = SimpleNamespace(reward=Plug(use="views"), seed=0)
    groups = [make_group(boxed([5, 5, 7]), identifier=f"q@{view}") for view in (1, 2)]

    def scored(reward: Any) -> list[Scored]:
        parts: Any = SimpleNamespace(reward=reward, recipe=recipe, reader=AnswerReader("math", {}))
        return score_all(parts, groups, 0)

    assert [s.label for s in scored(Views())] == ["5", "5"]
    assert [s.label for s in scored(build("reward", Plug(use="soft_vote")))] == ["5", "5"]
    with pytest.raises(PluginError, match="1 results for 2 groups"):
        scored(Forgets())
    with pytest.raises(PluginError, match="must return the group it was given"):
        scored(Swaps())


def test_a_run_labels_both_wordings_alike(tmp_path: Path) -> None:
    changes = ["data.limit=8", "data.prompts_per_step=8", "steps=1", "log.groups_per_step=8"]
    result = train(tmp_path / "run", *changes, recipe="lab/views")
    assert result.returncode == 0, result.stderr
    labels: dict[str, set[str | None]] = {}
    for group in lines(tmp_path / "run" / "groups.jsonl"):
        labels.setdefault(question_of(group["prompt_id"]), set()).add(group["label"])
    assert len(labels) == 4
    assert all(len(found) == 1 for found in labels.values())
    assert any(found != {None} for found in labels.values())
