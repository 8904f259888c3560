"""The per-prompt mode in a model of a model: nothing of one prompt reaches the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_modes import Lab, World, make_lab

from ttrl.answers import from_json
from ttrl.errors import ConfigError, EngineError, StopRequested
from ttrl.evaluate.ledger import ledger
from ttrl.modes import per_prompt
from ttrl.types import StepStats

QUESTIONS = [f"q{i}" for i in range(6)]
SETTINGS = ["steps=3", "data.prompts_per_step=1"]


def held_by(parts: Any) -> tuple[str, ...]:
    """The weights of the model of a model are a dictionary."""
    return (str(sorted(parts.trainer.trained.items())),)


@pytest.fixture(autouse=True)
def fingerprints_without_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_prompt, "fingerprints", held_by)


def lab(folder: Path, texts: list[str] = QUESTIONS, *changes: str, resume: bool = False) -> Lab:
    return make_lab(folder, texts, *SETTINGS, *changes, source="per_prompt", resume=resume)


def by_text(run: Lab, file: str = "answers.jsonl") -> dict[str, Any]:
    """Answers by question: ids and places differ between orders."""
    return {run.parts.prompts[row["prompt_id"]].text: (row["before"], row["after"]) for row in run.lines(file)}


def test_every_prompt_is_answered_by_the_start_model_and_by_its_own(tmp_path):
    run = lab(tmp_path).go()
    rows = run.lines("answers.jsonl")
    assert [row["prompt_id"] for row in rows] == [f"p{i:03d}" for i in range(6)]
    assert {row["before"]["weights"] for row in rows} == {"0-False"}
    assert {row["after"]["weights"] for row in rows} <= {"1-False", "2-False", "3-False"}
    assert run.world.trained == run.world.served == {"good": 0, "moments": 0, "poisoned": False}
    metrics = run.lines("metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(6))
    assert all(1 <= row["train/updates"] <= 3 for row in metrics)
    assert [folder.name for folder in sorted((tmp_path / "checkpoints").glob("step-*"))] == [
        "step-000005",
        "step-000006",
    ]


def test_the_order_of_the_prompts_changes_no_answer(tmp_path):
    forward = make(tmp_path / "forward", list(range(6)))
    backward = make(tmp_path / "backward", list(reversed(range(6))))
    assert by_text(forward) == by_text(backward)


def make(folder: Path, order: list[int]) -> Lab:
    """The same prompts with the same ids in another order."""
    folder.mkdir()
    run = lab(folder)
    run.parts.source._ids = tuple(f"p{i:03d}" for i in order)  # type: ignore[attr-defined]
    return run.go()


def test_a_trainer_that_does_not_come_back_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "restore", lambda self, path, *, version: None)
    with pytest.raises(EngineError, match="after prompt 'p000' the restored weights are not those of the start"):
        lab(tmp_path).go()


def test_an_engine_that_keeps_the_adapted_weights_ends_the_run(tmp_path, monkeypatch):
    original = World.sync

    def sync(self: World, stats: StepStats | None) -> None:
        if stats is not None:
            original(self, stats)

    monkeypatch.setattr(World, "sync", sync)
    with pytest.raises(EngineError, match="prompt 'p001' meets an engine that does not hold the start weights"):
        lab(tmp_path).go()


def test_what_a_reward_remembers_of_one_prompt_is_forgotten_at_the_next(tmp_path):
    run = lab(tmp_path, QUESTIONS, "reward.use=frozen")
    kept = []
    original = run.parts.source._one_prompt  # type: ignore[attr-defined]

    def watched(parts: Any, journal: Any, progress: Any) -> None:
        kept.append(dict(parts.reward.state()["labels"]))
        original(parts, journal, progress)
        assert parts.reward.state()["labels"]

    run.parts.source._one_prompt = watched  # type: ignore[attr-defined]
    run.go()
    assert kept == [{}] * 6


def test_a_prompt_without_anything_to_train_on_keeps_its_answer(tmp_path):
    run = lab(tmp_path, QUESTIONS, "reward.with.min_share=1.0", "rollout.votes_per_prompt=16").go()
    for row in run.lines("answers.jsonl"):
        assert row["before"] == row["after"]
    assert all("train/updates" not in row for row in run.lines("metrics.jsonl"))


@pytest.mark.parametrize("call", [1, 3, 5, 8, 13])
def test_a_stop_anywhere_leaves_the_start_weights_and_resumes_exactly(tmp_path, call):
    whole = lab(tmp_path / "whole").go()
    run = lab(tmp_path / "run")
    run.world.stop_at = call
    with pytest.raises(StopRequested):
        run.go()
    assert run.world.trained == {"good": 0, "moments": 0, "poisoned": False}
    run.journal.checkpoint(run.parts.trainer, run.parts.memory, run.progress)
    again = lab(tmp_path / "run", resume=True).go()
    for file in ("answers.jsonl", "metrics.jsonl"):
        assert again.lines(file) == whole.lines(file)


def test_the_evaluator_alone_says_what_the_answers_are_worth(tmp_path):
    run = lab(tmp_path).go()
    answered = [from_json(row) for row in run.lines("answers.jsonl")]
    before, after = run.judge().paired(answered, step=6)
    rows = run.lines("answers.jsonl")
    for evaluation, side in ((before, "before"), (after, "after")):
        right = [row[side]["answer"] == str(i) for i, row in enumerate(rows)]
        samples = [row[side]["answers"].get(str(i), 0) / 8 for i, row in enumerate(rows)]
        assert evaluation.estimates["accuracy"].value == pytest.approx(sum(right) / 6)
        assert evaluation.estimates["pass@1"].value == pytest.approx(sum(samples) / 6)
    assert (before.step, after.step) == (0, 6)
    assert before.protocol == after.protocol
    assert len(ledger(before, after)) == 6


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["data.prompts_per_step=2"], "set data.prompts_per_step: 1"),
        (["rollout.ahead=1"], "set rollout.ahead: 0"),
        (["eval.every=1"], "eval.every: 0"),
    ],
)
def test_mistakes_in_the_recipe_are_found_before_anything_runs(tmp_path, changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        lab(tmp_path, QUESTIONS, *changes)
