"""The reward linter flags what cannot work, and is silent on what can."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_command import cold as command

from ttrl.config import Plug, load_recipe
from ttrl.config.load import shipped_recipes
from ttrl.lint import answer_writer, lint, lint_recipe
from ttrl.registry import BUILT_IN, build
from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.soft import FrequencyEntropy, SoftVote
from ttrl.setup import check_recipe


def findings(use: str, votes: int = 16, trained: int | None = None, advantage: str = "grpo", **options: Any) -> list[str]:  # fmt: skip
    reward = build("reward", Plug.model_validate({"use": use, "with": options}))
    return codes(reward, votes, trained, advantage)


def codes(reward: Any, votes: int = 16, trained: int | None = None, advantage: str = "grpo") -> list[str]:
    objective = build("objective", Plug.model_validate({"use": "grpo", "with": {"advantage": advantage}}))
    return [finding.code for finding in lint(reward, objective, votes=votes, trained=trained)]


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_entropy_term_of_ttrv_cancels(advantage: str, normalised: bool) -> None:
    assert findings("frequency_entropy", advantage=advantage, normalised=normalised) == ["cancels"]
    assert findings("frequency_entropy", advantage=advantage, normalised=normalised, leave_one_out=True) == []
    assert findings("frequency_entropy", alpha=0.0) == []


def test_the_message_names_the_reward_and_the_term() -> None:
    found = lint_recipe(load_recipe("quickstart"), FrequencyEntropy())
    assert [f.code for f in found] == ["cancels"]
    assert "majority_vote: the term 'entropy' is the same for all rollouts" in found[0].message


@pytest.mark.parametrize(("votes", "trained"), [(64, 32), (16, None), (8, 4), (4, None)])
@pytest.mark.parametrize("use", ["majority_vote", "soft_vote", "selective", "incorrect", "frozen", "gold"])
def test_what_works_is_not_complained_about(use: str, votes: int, trained: int | None) -> None:
    assert findings(use, votes, trained) == []


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "logprob"},
        {"weights": "rpc"},
        {"weights": "self_certainty"},
        {"weights": "entropy", "ties": "shortest"},
        {"electorate": "leave_one_out"},
        {"electorate": "split"},
        {"ties": "random"},
        {"min_confidence": 0.9},
    ],
)
def test_no_variant_of_the_vote_is_complained_about(options: dict[str, Any]) -> None:
    assert findings("majority_vote", **options) == []


def test_other_kinds_of_answers_are_imitated() -> None:
    assert findings("majority_vote", extractor="choice") == []
    assert findings("soft_vote", extractor="label", options={"labels": ["red", "green", "blue"]}) == []
    assert findings("soft_vote", extractor="number") == []
    assert len(answer_writer(AnswerReader("math", {})) or ()) == 12
    assert answer_writer(AnswerReader("label", {"labels": ["red"]})) is None


def test_random_pays_something_other_than_answers() -> None:
    assert set(findings("random")) == {"phantom"}


def test_thresholds_that_ask_for_more_votes() -> None:
    assert findings("majority_vote", votes=2) == ["votes"]  # two votes agree, or tie: nothing to learn from either
    assert findings("majority_vote", votes=4, min_confidence=0.95) == ["votes"]
    assert findings("selective", votes=3) == ["votes"]


class Shaped(SoftVote):
    """Adds something to every reward."""

    def extra(self, group: Any) -> Any:
        raise NotImplementedError

    def __call__(self, group: Any, ctx: Any) -> Any:
        from dataclasses import replace

        scored = super().__call__(group, ctx)
        extra = np.asarray(self.extra(group), np.float32)
        return replace(scored, rewards=scored.rewards + extra, train=group.trainable)


class Rounding(Shaped):
    def extra(self, group: Any) -> Any:
        return [1e-6 * len(r.token_ids) for r in group.rollouts]


class Length(Shaped):
    def extra(self, group: Any) -> Any:
        return [0.01 * len(r.token_ids) for r in group.rollouts]


class FirstComesFirst(Shaped):
    def extra(self, group: Any) -> Any:
        return [0.5] + [0.0] * (len(group.rollouts) - 1)


class Constant(Shaped):
    def __call__(self, group: Any, ctx: Any) -> Any:
        from dataclasses import replace

        return replace(super(Shaped, self).__call__(group, ctx), rewards=np.ones(len(group.rollouts), np.float32))


class Broken(Shaped):
    def extra(self, group: Any) -> Any:
        raise KeyError("meta")


@pytest.mark.parametrize(
    ("reward", "code"),
    [
        (Rounding(), "phantom"),
        (Length(), "phantom"),
        (FirstComesFirst(), "order"),
        (Constant(), "no-signal"),
        (Broken(), "failed"),
    ],
)
def test_planted_faults_are_found(reward: Any, code: str) -> None:
    assert code in codes(reward)


def test_rounding_is_told_from_shaping() -> None:
    messages = [f.message for f in lint(Rounding(), build("objective", Plug(use="grpo")), votes=16)]
    assert any("round them" in message for message in messages)


def test_the_linter_leaves_the_reward_alone() -> None:
    reward = build("reward", Plug(use="frozen"))
    codes(reward)
    assert reward.state() == {"labels": {}}


LAB = sorted(name for name in shipped_recipes() if name.startswith("lab/"))


@pytest.mark.parametrize("name", LAB)
def test_the_lab_recipes_warn_where_they_should(name: str) -> None:
    recipe = load_recipe(name)
    expected = {"lab/ttrv-published": {"cancels"}, "lab/control-random": {"phantom"}, "lab/length-penalty": {"phantom"}}
    assert {f.code for f in lint_recipe(recipe, check_recipe(recipe).reward)} == expected.get(name, set())


def test_every_reward_has_a_lab_recipe() -> None:
    shown = {load_recipe(name).reward.use for name in LAB}
    assert shown == set(BUILT_IN["reward"]) - {"trl"}  # which wraps a function of the user


def test_check_prints_warnings_and_still_says_ok() -> None:
    result = command("check", "quickstart", "reward.use=frequency_entropy", "reward.with={}")
    assert result.returncode == 0, result.stderr
    assert "quickstart: ok" in result.stdout
    assert "warning (cancels): frequency_entropy: the term 'entropy'" in result.stderr
    assert command("check", "quickstart").stderr == ""
