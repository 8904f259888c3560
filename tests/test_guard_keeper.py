"""The keeper with a scripted guard and a trainer of one number: which snapshot it goes back to, what stays on disk, when it stops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_guards import scored_from

from ttrl.errors import TtrlError
from ttrl.guards.base import Judgement, Level, Policy, Score
from ttrl.guards.keeper import Keeper
from ttrl.guards.snapshots import Snapshot, pick
from ttrl.metrics import MetricSet
from ttrl.types import StepStats


class Number:
    """A trainer whose weights are one number."""

    def __init__(self) -> None:
        self.version, self.value, self.lr = 0, 0.0, 1.0

    def step(self, step: int) -> StepStats:
        self.value += self.lr
        self.version = max(self.version, step) + 1
        return StepStats(metrics={}, tokens=1, grad_norm=1.0, lr=self.lr, updates=1)

    def score(self, ids: Any) -> Any:
        return np.zeros(len(ids) - 1, np.float32)

    def save(self, path: Path) -> None:
        (path / "number.json").write_text(json.dumps([self.value, self.lr]))

    def restore(self, path: Path, *, version: int) -> None:
        assert version > self.version
        self.value, self.lr = json.loads((path / "number.json").read_text())
        self.version = version

    def scale_lr(self, factor: float) -> None:
        self.lr *= factor


class Scripted:
    """Says what it was told to: `judged` and `inspected` per step, OK otherwise."""

    def __init__(self, policy: Policy, judged: Mapping[int, Judgement], inspected: Mapping[int, Judgement]) -> None:
        self.policy, self._judged, self._inspected = policy, judged, inspected
        self.back: list[int] = []

    def judge(self, view: Any) -> Judgement:
        return self._judged.get(view.step, Judgement(level=Level.OK))

    def inspect(self, view: Any) -> Judgement:
        return self._inspected.get(view.step, Judgement(level=Level.OK))

    def went_back(self, step: int) -> None:
        self.back.append(step)

    def state(self) -> Mapping[str, Any]:
        return {"back": list(self.back)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.back = list(state["back"])


class Memory:
    """A reward that remembers how many steps it scored."""

    needs, min_votes = frozenset[str](), 1

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, group: Any, ctx: Any) -> Any: ...

    def state(self) -> Mapping[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


GROUPS = [scored_from(name, ["1", "1", "2"]) for name in "abc"]
ALARM = Judgement(level=Level.ALARM, reason="planted", prompts=frozenset("ab"))
WARN = Judgement(level=Level.WARN, reason="planted")


class Run:
    """A loop as short as it can be."""

    def __init__(self, folder: Path, judged: Any = None, inspected: Any = None, **policy: Any) -> None:
        self.trainer, self.reward, self.folder = Number(), Memory(), folder
        self.guard = Scripted(Policy(**{"snapshot_every": 1, **policy}), judged or {}, inspected or {})
        self.keeper = Keeper({"scripted": self.guard}, self.trainer, {"reward": self.reward}, lambda ids: "", folder)
        self.events: list[tuple[int, str]] = []
        self.metrics: list[dict[str, float]] = []
        self.stopped = ""

    def go(self, first: int, last: int) -> Run:
        for step in range(first, last):
            metrics = MetricSet()
            self.reward.seen += 1
            ruling = self.keeper.rule(step, GROUPS, metrics)
            admitted = ruling.admitted(GROUPS, metrics)
            stats = self.trainer.step(step) if admitted else None
            verdict = self.keeper.inspect(step, GROUPS, stats, metrics)
            self.events += [(step, event) for event in (*ruling.events, *verdict.events)]
            self.metrics.append(metrics.values())
            self.stopped = ruling.stop or verdict.stop
            if self.stopped:
                break
        return self

    def on_disk(self) -> list[int]:
        return sorted(int(f.name.removeprefix("step-")) for f in (self.folder / "healthy").glob("step-*"))

    def checkpoint(self, step: int) -> Path:
        folder = self.folder / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"memory": {"guards": self.keeper.state()}}))
        return folder


def scores(*values: float) -> dict[int, Judgement]:
    return {step: Judgement(level=Level.OK, score=Score(value=v, error=0.01)) for step, v in enumerate(values)}


def test_a_bounded_number_of_snapshots_stays_and_what_checkpoints_need(tmp_path):
    run = Run(tmp_path, judged=scores(0.0, 0.3, 0.1, 0.1, 0.1, 0.1, 0.4, 0.1))
    run.go(0, 2)
    assert run.on_disk() == [1]  # best and latest at once
    run.go(2, 5)
    assert run.on_disk() == [1, 4]
    checkpoint = run.checkpoint(5)
    run.go(5, 8)
    assert run.on_disk() == [1, 4, 6, 7]  # 1 and 4 only because a resume from the checkpoint may ask for them
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    run.go(8, 9)
    assert run.on_disk() == [6, 8]


def test_suspected_weights_are_never_kept_as_healthy(tmp_path):
    run = Run(tmp_path, judged={0: scores(0.0)[0], 1: WARN, 2: WARN}, inspected={2: WARN}).go(0, 4)
    assert run.on_disk() == [0]  # the update of step 2 made the weights of step 3
    assert run.go(4, 5).on_disk() == [0, 4]
    assert [step for step, event in run.events if "warns: planted" in event] == [1, 2, 2]


def test_an_update_is_taken_back_to_what_drew_the_step(tmp_path):
    run = Run(tmp_path, inspected={2: ALARM}, lr_factor=0.5).go(0, 3)
    assert run.events == [
        (2, "scripted ALARM: planted; back to the weights of 2 completed steps, learning rate now x0.5")
    ]
    assert (run.trainer.value, run.trainer.lr) == (2.0, 0.5)
    assert run.trainer.version == 4  # three updates and a return
    assert run.guard.back == [2]
    assert run.reward.seen == 3
    run.go(3, 5)
    assert (run.trainer.value, run.trainer.version) == (3.0, 6)


def test_votes_that_alarm_go_back_further_and_the_reward_forgets_too(tmp_path):
    run = Run(tmp_path, judged={3: ALARM}, snapshot_every=2).go(0, 4)
    assert "back to the weights of 2 completed steps" in run.events[0][1]
    assert run.metrics[3]["dropped/guard"] == 3
    assert (run.trainer.value, run.reward.seen) == (2.0, 3)
    assert run.metrics[3]["guard/level"] == 2


def test_engines_must_move_only_when_they_have_other_weights(tmp_path):
    run = Run(tmp_path, snapshot_every=2).go(0, 4)
    metrics = MetricSet()
    run.keeper.rule(4, GROUPS, metrics)
    run.guard._inspected = {4: ALARM}
    verdict = run.keeper.inspect(4, GROUPS, run.trainer.step(4), metrics)
    assert (verdict.restored, verdict.moved) == (True, False)  # the engines drew step 4 from these weights
    run.go(5, 7)
    run.guard._judged = {7: ALARM}
    ruling = run.keeper.rule(7, GROUPS, metrics)
    assert (ruling.restored, ruling.moved) == (True, True)


def test_a_snapshot_that_fails_again_is_followed_by_the_best(tmp_path):
    judged = {**scores(0.0, 0.5, 0.1, 0.1), 4: ALARM, 5: ALARM, 6: ALARM}
    run = Run(tmp_path, judged=judged, limit=9).go(0, 7)
    assert [event.split("weights of ")[1][0] for _, event in run.events] == ["3", "1", "3"]


def test_damaged_snapshots_are_passed_over_and_none_left_is_an_error(tmp_path, caplog):
    judged = {**scores(0.0, 0.5, 0.1, 0.1), 4: ALARM, 5: ALARM}
    run = Run(tmp_path, judged=judged, limit=9).go(0, 4)
    (tmp_path / "healthy" / "step-000003" / "number.json").write_text("[9, 9]")
    run.go(4, 5)
    assert "weights of 1 completed" in run.events[0][1]
    assert "step-000003 is damaged" in caplog.text
    (tmp_path / "healthy" / "step-000001" / "number.json").unlink()
    with pytest.raises(TtrlError, match="no undamaged healthy snapshot"):
        run.go(5, 6)


def test_actions_are_counted_and_then_the_run_stops(tmp_path):
    run = Run(tmp_path / "a", inspected=dict.fromkeys(range(9), ALARM), limit=2, lr_factor=0.5).go(0, 9)
    assert run.stopped == "scripted ALARM: planted after 2 x rollback"
    assert [m["guard/actions"] for m in run.metrics] == [1, 2, 2]
    assert run.trainer.lr == 0.25
    run.keeper.settle(3)
    assert (run.trainer.value, run.keeper.summary()["model_after_steps"]) == (0.0, 0)
    lowered = Run(tmp_path / "b", inspected=dict.fromkeys(range(9), ALARM), action="lower_lr", limit=2, lr_factor=0.5)
    assert lowered.go(0, 9).stopped == "scripted ALARM: planted after 2 x lower_lr"
    assert (lowered.trainer.lr, lowered.trainer.value) == (0.25, 1 + 0.5 + 0.25)
    assert Run(tmp_path / "c", judged={2: ALARM}, action="stop").go(0, 9).stopped == "scripted ALARM: planted"
    warned = Run(tmp_path / "d", judged=dict.fromkeys(range(1, 9), ALARM), action="warn").go(0, 9)
    assert (warned.stopped, warned.trainer.value, (tmp_path / "d").exists()) == ("", 9.0, False)


def test_frozen_prompts_wait_until_nothing_is_said_against_the_weights(tmp_path):
    run = Run(tmp_path, judged={1: ALARM, 2: WARN}, action="abstain").go(0, 5)
    assert [m.get("dropped/frozen", 0) for m in run.metrics] == [0, 2, 2, 0, 0]
    assert [m["guard/frozen"] for m in run.metrics] == [0, 2, 2, 0, 0]


def test_a_resumed_keeper_goes_on_as_before_and_forgets_later_snapshots(tmp_path):
    judged = {**scores(0.0, 0.2, 0.1, 0.1, 0.1, 0.1), 6: ALARM}
    whole = Run(tmp_path, judged=judged, snapshot_every=2).go(0, 3)
    state, value = json.loads(json.dumps(whole.keeper.state())), whole.trainer.value
    whole.checkpoint(3)
    whole.go(3, 7)
    again = Run(tmp_path, judged=judged, snapshot_every=2)
    again.trainer.value, again.trainer.version, again.reward.seen = value, 3, 3
    again.keeper.load_state(state)
    again.keeper.forget_from(3)
    assert again.on_disk() == [2]
    again.go(3, 7)
    assert again.keeper.state() == whole.keeper.state()
    assert (again.trainer.value, again.trainer.version) == (whole.trainer.value, whole.trainer.version)
    again.keeper.forget_from(0)
    assert again.on_disk() == []


def snapshot(step: int, value: float | None, error: float = 0.01) -> Snapshot:
    score = None if value is None else Score(value=value, error=error)
    return Snapshot(step=step, weights=step, lr_factor=1.0, score=score)


def test_the_last_state_that_is_not_clearly_worse_is_handed_over():
    assert pick([snapshot(0, 0.0, 0.0), snapshot(4, 0.2), snapshot(8, 0.19)]).step == 8
    assert pick([snapshot(0, 0.0, 0.0), snapshot(4, 0.2), snapshot(8, 0.1)]).step == 4
    assert pick([snapshot(0, 0.0, 0.0), snapshot(4, 0.2, 0.06), snapshot(8, 0.1, 0.06)]).step == 8  # it may be chance
    assert pick([snapshot(0, 0.0, 0.0), snapshot(8, -0.2, 0.02)]).step == 0
    assert pick([snapshot(0, 0.0, 0.0), snapshot(8, None)]).step == 8  # nothing against it
    assert pick([snapshot(3, None), snapshot(7, None)]).step == 7


def test_settling_takes_the_current_weights_only_when_they_are_healthy(tmp_path):
    run = Run(tmp_path / "a", judged=scores(0.0, 0.1, 0.2)).go(0, 3)
    assert not run.keeper.settle(3).restored
    assert (run.trainer.value, run.keeper.summary()["model_after_steps"]) == (3.0, 3)
    worse = Run(tmp_path / "b", judged=scores(0.0, 0.3, 0.0), snapshot_every=1).go(0, 3)
    ruling = worse.keeper.settle(3)
    assert (ruling.restored, worse.trainer.value) == (True, 1.0)
    assert worse.on_disk() == [1]
    assert not worse.keeper.settle(3).restored  # once
    suspect = Run(tmp_path / "c", judged=scores(0.0, 0.1, 0.1), inspected={2: WARN}).go(0, 3)
    suspect.keeper.settle(3)
    assert suspect.trainer.value == 2.0
