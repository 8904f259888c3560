"""Whole runs under the sentinel: what a rollback brings back, what a resume repeats, how a run ends, and that labels play no part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import ttrl.loop
from ttrl.config import load_recipe
from ttrl.errors import ConfigError, StopRequested
from ttrl.run import run
from ttrl.setup import check_recipe

SMALL = [
    "steps=3", "data.limit=6", "data.prompts_per_step=6", "rollout.votes_per_prompt=6", "eval.samples=2", "eval.k=[1]",
    "eval.limit=2", "eval.heldout=null", "checkpoint.every=1", "checkpoint.keep=9", "log.groups_per_step=0", "seed=1",
]  # fmt: skip
HOT = "trainer.lr=0.001"
"""One update at this rate destroys the bundled model."""


def guard(**options: Any) -> str:
    return f"guards=[{{use: sentinel, with: {json.dumps({'snapshot_every': 1, 'lr_factor': 0.01, **options})}}}]"


def go(
    folder: Path, *changes: str, resume: bool = False, report: bool = False
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Status, summary without costs, rows of metrics without times. A report takes longer to draw than the run, so only one has it."""
    recipe = load_recipe("quickstart", [*SMALL, *changes, f"output={json.dumps(str(folder))}"])
    with nullcontext() if report else patch("ttrl.run.write_report"):
        outcome = run(recipe, resume=resume, console=Console(quiet=True))
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for cost in ("seconds", "peak_memory_mb"):
        del summary[cost]
    status = f"{outcome.status}{' by a guard' if outcome.guard else ''}"
    return status, summary, [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def tensors(*files: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}/{name}": t for file in files for name, t in load_file(file).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def events(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(row["step"], event) for row in rows for event in row.get("guard/events", ())]


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("guarded") / "run"
    return folder, *go(folder, guard(), HOT, report=True)


def test_a_destructive_update_is_taken_back_before_anybody_samples_from_it(rolled_back) -> None:
    folder, status, summary, rows = rolled_back
    assert status == "completed"
    (step, event), *_ = events(rows)
    assert step == 0
    assert "sentinel ALARM: update_drop" in event
    assert "back to the weights of 0 completed steps, learning rate now x0.01" in event
    assert rows[0]["guard/level"] == 2.0
    assert rows[0]["guard/update_drop"] >= rows[0]["guard_bound/update_drop"]
    assert (rows[0]["guard/actions"], rows[0]["guard/lr_factor"]) == (1.0, 0.01)
    assert rows[1]["train/lr"] == pytest.approx(1e-5)
    # Weights and moments of the healthy snapshot, byte for byte, are what the next step began with
    healthy, after = (folder / "checkpoints" / name for name in ("healthy/step-000000", "step-000001"))
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert same(tensors(healthy / file), tensors(after / file))
    assert tensors(healthy / "optimizer.safetensors") == {}
    assert [json.loads((healthy / "trainer.json").read_text())[k] for k in ("version", "lr_factor")] == [0, 1.0]
    assert [json.loads((after / "trainer.json").read_text())[k] for k in ("version", "lr_factor")] == [2, 0.01]
    assert summary["final"]["pass@1"]["value"] > 0
    assert summary["guards"]["actions"] == 1


def test_the_model_handed_over_is_the_one_that_was_evaluated(rolled_back) -> None:
    folder, _, summary, _ = rolled_back
    assert summary["guards"]["model_after_steps"] in range(4)
    assert summary["measured_after_steps"] == [0, 3]
    last = load_file(folder / "checkpoints" / "step-000003" / "trained.safetensors")
    model = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(model[name], last[name]) for name in last if name in model)
    report = (folder / "report.html").read_text()
    assert "back to the weights of 0 completed steps" in report
    assert "<td>update_drop</td>" in report


@pytest.mark.parametrize("kill", [pytest.param("inspect", marks=pytest.mark.slow), "snapshot"])
def test_a_crash_around_a_rollback_is_made_up_for_bit_for_bit(rolled_back, tmp_path, monkeypatch, kill) -> None:
    folder, *whole = rolled_back

    def crash(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    from ttrl.guards.keeper import Keeper
    from ttrl.guards.snapshots import SnapshotStore

    with monkeypatch.context() as planted:
        if kill == "inspect":  # after the alarm, before the step was written down
            original = Keeper.inspect
            planted.setattr(Keeper, "inspect", lambda *a: (original(*a), crash())[1])
        else:
            saved = SnapshotStore.save
            planted.setattr(
                SnapshotStore, "save", lambda self, step, *a: crash() if step == 2 else saved(self, step, *a)
            )
        with pytest.raises(OSError, match="No space"):
            go(tmp_path / "run", guard(), HOT)
    assert go(tmp_path / "run", guard(), HOT, resume=True) == tuple(whole)
    for file in ("model/model.safetensors", "checkpoints/step-000003/optimizer.safetensors"):
        assert same(tensors(tmp_path / "run" / file), tensors(folder / file))
    states = [
        json.loads((f / "checkpoints" / "step-000003" / "state.json").read_text()) for f in (folder, tmp_path / "run")
    ]
    for state in states:
        del state["progress"]["seconds"]
    assert states[0] == states[1]


def test_resuming_a_guarded_run_that_is_complete_changes_nothing(rolled_back) -> None:
    folder, *whole = rolled_back
    before = tensors(folder / "model" / "model.safetensors")
    assert go(folder, guard(), HOT, resume=True) == tuple(whole)
    assert same(tensors(folder / "model" / "model.safetensors"), before)


def test_when_rollbacks_are_used_up_the_run_stops_with_the_start_model(tmp_path, capsys) -> None:
    from ttrl.cli import EXIT_GUARD, app

    changes = [guard(lr_factor=1.0, limit=2), HOT]
    arguments = ["train", "quickstart", *SMALL, *changes, "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    assert ended.value.code == EXIT_GUARD == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("stopped", 3)
    assert "after 2 x rollback" in summary["reason"]
    assert summary["guards"] == {
        "model_after_steps": 0, "score": {"value": 0.0, "error": 0.0}, "actions": 2, "lr_factor": 1.0, "frozen": 0,
    }  # fmt: skip
    assert summary["measured_after_steps"] == [0, 3]
    assert summary["final"] == summary["initial"]  # the same weights under the same random numbers
    from ttrl.model.load import resolve_path

    start = load_file(Path(resolve_path("bundled:tiny-adder")) / "model.safetensors")
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(model[name], start[name]) for name in model)
    assert "back to the weights of 0 completed steps" in capsys.readouterr().out
    status, again, _ = go(tmp_path / "run", *changes, resume=True)  # it stops again, and is the same
    assert status == "stopped by a guard"
    assert again == {k: v for k, v in summary.items() if k in again}


def test_a_guard_that_only_warns_changes_nothing_and_labels_play_no_part(tmp_path) -> None:
    changes = ("steps=2", HOT, "checkpoint.every=0")
    plain = go(tmp_path / "plain", *changes)
    warned = go(tmp_path / "warned", guard(action="warn"), *changes, "eval.labels=null")
    assert any("ALARM" in event for _, event in events(warned[2]))
    assert [{k: v for k, v in row.items() if not k.startswith("guard")} for row in warned[2]] == plain[2]
    assert same(*(tensors(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "warned")))
    assert warned[1]["guards"]["model_after_steps"] is None
    assert plain[1]["guards"] is None
    assert not (tmp_path / "warned" / "checkpoints" / "healthy").exists()


def test_lower_lr_keeps_the_weights_and_abstain_freezes_prompts(tmp_path) -> None:
    changes = ("steps=2", "checkpoint.every=0")
    _, _, rows = go(tmp_path / "lower", guard(action="lower_lr", lr_factor=0.5, limit=9), HOT, *changes)
    assert rows[0]["train/lr"] == pytest.approx(1e-3)
    assert rows[1]["train/lr"] == pytest.approx(1e-3 * 0.5 ** rows[0]["guard/actions"])
    assert "the learning rate is now x0.5" in events(rows)[0][1]
    _, summary, rows = go(tmp_path / "abstain", guard(action="abstain"), HOT, *changes)
    assert rows[0]["guard/frozen"] > 0
    assert rows[1]["dropped/frozen"] >= rows[0]["guard/frozen"]  # all prompts come in every step
    assert summary["guards"]["actions"] >= 1


def test_stop_ends_the_run_at_the_first_alarm(tmp_path) -> None:
    status, summary, rows = go(tmp_path / "run", guard(action="stop"), HOT)
    assert status == "stopped by a guard"
    assert len(rows) == 1
    assert summary["guards"]["model_after_steps"] == 0
    assert summary["final"] == summary["initial"]


def test_a_stop_by_the_user_exports_what_can_be_trusted_and_goes_on_where_it_was(
    rolled_back, tmp_path, monkeypatch
) -> None:
    folder, *whole = rolled_back
    original = ttrl.loop.one_step

    def stopping(parts, flow, journal, progress):
        if progress.step == 2:
            raise StopRequested("stopped by SIGINT")
        original(parts, flow, journal, progress)

    with monkeypatch.context() as planted:
        planted.setattr(ttrl.loop, "one_step", stopping)
        assert go(tmp_path / "run", guard(), HOT)[0] == "stopped"
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert go(tmp_path / "run", guard(), HOT, resume=True) == tuple(whole)
    assert same(*(tensors(f / "model" / "model.safetensors") for f in (folder, tmp_path / "run")))


def test_rollback_with_sampling_ahead_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"rollback needs rollout.ahead: 0, because groups that were drawn ahead"):
        check_recipe(load_recipe("quickstart", [guard(), "rollout.ahead=1"]))
    check_recipe(load_recipe("quickstart", [guard(action="lower_lr"), "rollout.ahead=1"]))


def test_a_guard_is_checked_like_any_part() -> None:
    for text, message in (
        ("guards=[sentinell]", "Did you mean 'sentinel'"),
        ("guards=[{use: sentinel, with: {action: roll}}]", "action"),
        ("guards=[sentinel, sentinel]", "named twice"),
        ("guards=['ttrl.gates:ZeroVariance']", "must have policy, judge, inspect"),
        ("guards=[{use: sentinel, with: {lr_factor: 2.0}}]", "lr_factor must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_recipe(load_recipe("quickstart", [text]))
