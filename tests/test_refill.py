"""Dynamic sampling: a step draws prompts until it is full of groups that may train, and no prompt is drawn more than others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import make_prompt, make_scored
from helpers_modes import Lab, make_lab
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.config import load_recipe
from ttrl.errors import ConfigError, StopRequested
from ttrl.journal import Progress
from ttrl.loop import train
from ttrl.setup import check_recipe
from ttrl.sources import RefillSource
from ttrl.types import Group, Scored, StepStats

HONEST = [f"q{i}" for i in range(30)]
STEPS, PER_STEP = 6, 4

cases = st.integers(1, 25).flatmap(
    lambda n: st.tuples(
        st.just(n), st.integers(1, n), st.integers(0, 3), st.lists(st.lists(st.integers(0, n), max_size=3), max_size=12)
    )
)


def ids(count: int) -> list[str]:
    return [f"p{i:02d}" for i in range(count)]


def one_step(source: RefillSource, step: int, missing: list[int]) -> list[str]:
    drawn = source.batch(step)
    for wanted in missing:
        drawn = [*drawn, *source.more(wanted, drawn)]
    return drawn


@settings(derandomize=True, max_examples=300, deadline=None)
@given(cases)
def test_no_step_draws_a_prompt_twice_and_all_prompts_are_drawn_alike(case: Any) -> None:
    count, per_step, seed, steps = case
    source, total = RefillSource(ids(count), per_step, seed), Counter(ids(count))
    for step, missing in enumerate(steps):
        before = total.copy()
        drawn = one_step(source, step, missing)
        assert len(drawn) == len(set(drawn)) == min(count, per_step + sum(missing))
        total = before + Counter(drawn)
        assert max(total.values()) - min(total.values()) <= 2  # 1, and 1 more for a prompt that waits for the next step


@settings(derandomize=True, max_examples=100, deadline=None)
@given(cases, st.integers(0, 11))
def test_a_source_goes_on_from_its_state(case: Any, stop: int) -> None:
    count, per_step, seed, steps = case
    whole = RefillSource(ids(count), per_step, seed)
    expected = [one_step(whole, step, missing) for step, missing in enumerate(steps)]
    first, second = (RefillSource(list(reversed(ids(count))), per_step, seed) for _ in range(2))
    for step, missing in enumerate(steps[:stop]):
        one_step(first, step, missing)
    second.load_state(first.state())
    assert [one_step(second, step, missing) for step, missing in enumerate(steps[stop:])] == expected[stop:]


def test_draws_are_pinned() -> None:
    # a run that is resumed under a newer version must meet the same prompts
    # epochs: dceab dbcea dabec cdeba; b comes twice within step 1, so its second visit waits for step 2
    source = RefillSource(list("abcde"), 3, 0)
    assert ["".join(one_step(source, step, [1])) for step in range(4)] == ["dcea", "bdce", "bade", "abcd"]


def lab(folder: Path, *changes: str, rounds: int = 10, resume: bool = False) -> Lab:
    fixed = [f"steps={STEPS}", f"data.prompts_per_step={PER_STEP}", "rollout.votes_per_prompt=4", "checkpoint.keep=99"]
    source = f"{{use: refill, with: {{rounds: {rounds}}}}}"
    return make_lab(folder, HONEST, *fixed, *changes, source=source, resume=resume)


def go(run: Lab) -> Lab:
    train(run.parts, run.journal, run.progress)
    return run


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return go(lab(tmp_path_factory.mktemp("full") / "run"))


def test_every_group_that_was_turned_away_is_replaced(full: Lab) -> None:
    rows = full.lines("metrics.jsonl")
    turned_away = [row.get("dropped/zero_variance", 0) for row in rows]
    assert sum(turned_away) > STEPS  # the four votes of this world often agree
    assert [row["rollout/refilled"] for row in rows] == turned_away
    assert max(row["rollout/refill_rounds"] for row in rows) > 1
    assert sum(full.progress.trained.values()) == STEPS * PER_STEP
    assert sum(full.progress.drawn.values()) == STEPS * PER_STEP + sum(turned_away)
    assert all(full.progress.trained[name] <= full.progress.drawn[name] for name in full.progress.trained)
    assert full.progress.rollout_tokens == sum(full.progress.drawn.values()) * 4 * 3  # votes, tokens each


def test_votes_of_a_prompt_do_not_depend_on_the_round_that_drew_them(full: Lab, tmp_path: Path) -> None:
    # the first step of a source that brings all these prompts at once
    drawn = [row["prompt_id"] for row in full.lines("groups.jsonl") if row["step"] == 0]
    wide = go(lab(tmp_path / "run", "data.prompts_per_step=30", "steps=1", "log.groups_per_step=30"))
    votes = {row["prompt_id"]: [r["text"] for r in row["rollouts"]] for row in wide.lines("groups.jsonl")}
    ours = {r["prompt_id"]: [x["text"] for x in r["rollouts"]] for r in full.lines("groups.jsonl") if r["step"] == 0}
    assert drawn and ours == {name: votes[name] for name in drawn}


def test_rounds_bound_how_often_a_step_draws_again(full: Lab, tmp_path: Path) -> None:
    once = go(lab(tmp_path / "run", rounds=1))
    rows = once.lines("metrics.jsonl")
    assert max(row["rollout/refill_rounds"] for row in rows) == 1
    short = sum(row.get("dropped/zero_variance", 0) - row["rollout/refilled"] for row in rows)
    assert short > 0
    assert sum(once.progress.trained.values()) == STEPS * PER_STEP - short


def test_a_step_ends_when_every_prompt_was_drawn(tmp_path: Path) -> None:
    alike = go(lab(tmp_path / "run", "gates=[{use: vote_share, with: {low: 1.0}}, zero_variance]", "max_empty_steps=9"))
    rows = alike.lines("metrics.jsonl")  # a unanimous group has no variance: no group passes both gates
    assert [row["rollout/refilled"] for row in rows] == [len(HONEST) - PER_STEP] * STEPS
    assert not alike.progress.trained and alike.progress.empty_steps == STEPS
    assert set(alike.progress.drawn.values()) == {STEPS}


@pytest.mark.parametrize("checkpoint", [1, 3, 5])
def test_a_resumed_run_is_the_same(full: Lab, tmp_path: Path, checkpoint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = lab(tmp_path / "run")
    with monkeypatch.context() as patched:
        original = broken.world.step

        def stopping(step: int, updates: Any) -> StepStats:
            if step == checkpoint:  # after this step drew, and drew again
                raise StopRequested("planted")
            return original(step, updates)

        patched.setattr(broken.world, "step", stopping)
        with pytest.raises(StopRequested):
            go(broken)
    broken.journal.checkpoint(broken.parts.trainer, broken.parts.memory, broken.progress)
    again = go(lab(tmp_path / "run", resume=True))
    assert again.lines("metrics.jsonl") == full.lines("metrics.jsonl")
    assert again.world.trained == full.world.trained
    assert again.progress.coverage(ids(3)) == full.progress.coverage(ids(3))
    assert (again.progress.drawn, again.progress.trained) == (full.progress.drawn, full.progress.trained)


def test_coverage_counts_prompts_by_steps() -> None:
    def scored(name: str) -> Scored:
        made = make_scored([0, 0, 1])
        group = Group(prompt=make_prompt(name), rollouts=made.group.rollouts, trainable=made.group.trainable)
        return Scored(**{**{f: getattr(made, f) for f in made.__dataclass_fields__}, "group": group})

    progress = Progress()
    progress.advance([scored("a")], None, 0.0, [scored("a")])
    progress.advance([scored("a")], None, 0.0)
    assert progress.coverage(["a", "b", "c"]) == {"drawn": {"0": 2, "2": 1}, "trained": {"0": 2, "1": 1}}
    assert Progress.from_json(progress.to_json()) == progress


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["data.source={use: refill, with: {rounds: 0}}"], "rounds >= 1"),
        (["data.source=refill", "data.prompts_per_step=97"], "there are only 96 prompts"),
        (["data.source=refill", "rollout.ahead=1"], "rollout.ahead"),
        (["data.source=refill", "reward={use: views}"], "one round after the other"),
        (["data.source=refill", "stabilizers=[{use: ema}]"], "EMA teacher"),
    ],
)
def test_what_cannot_be_refilled_is_refused(changes: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_recipe(load_recipe("quickstart", changes))
