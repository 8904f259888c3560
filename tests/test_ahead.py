"""Whole runs with `rollout.ahead`: how old the rollouts are, that runs repeat, and that a crash is made up for exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ttrl.config import load_recipe
from ttrl.errors import ConfigError
from ttrl.run import run
from ttrl.trainers.torch_backend import TorchTrainer

SMALL = [
    "steps=5", "data.limit=4", "data.prompts_per_step=2", "rollout.votes_per_prompt=6",
    "eval.samples=2", "eval.k=[1,2]", "eval.limit=2", "eval.heldout=null",
    "checkpoint.every=3", "log.groups_per_step=0", "trainer.lr=0.001",
]  # fmt: skip


def go(folder: Path, *changes: str, resume: bool = False) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times."""
    recipe = load_recipe("quickstart", [*SMALL, *changes, f"output={json.dumps(str(folder))}"])
    assert run(recipe, resume=resume, console=Console(quiet=True)).status == "completed"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ahead") / "run"
    return folder, go(folder, "rollout.ahead=1", "objective.with.loss=tis")


def test_rollouts_are_one_step_old_except_after_a_boundary(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [row["rollout/staleness"] for row in whole[1]] == [0, 1, 1, 0, 1]


def test_the_mismatch_of_old_rollouts_is_seen_and_corrected(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    for row in whole[1]:
        fresh = row["rollout/staleness"] == 0
        assert (row["train/sampler_mismatch"] < 1e-4) == fresh
        assert (row["train/kept_mass"] > 0.9999) == fresh
        assert row["train/tis_weight"] == pytest.approx(1.0, abs=1e-4 if fresh else 0.5)


def test_a_crash_is_made_up_for_exactly(
    whole: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TorchTrainer.step

    def failing(self: TorchTrainer, step: int, updates: Any) -> Any:
        if step == 4:
            raise RuntimeError("power cut")
        return original(self, step, updates)

    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainer, "step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            go(tmp_path / "run", "rollout.ahead=1", "objective.with.loss=tis")
    assert go(tmp_path / "run", "rollout.ahead=1", "objective.with.loss=tis", resume=True) == whole[1]
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (whole[0] / model).read_bytes()


def test_other_checkpoints_would_be_another_run(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.every: was 3, is 2"):
        go(whole[0], "rollout.ahead=1", "objective.with.loss=tis", "checkpoint.every=2", resume=True)


def test_ahead_over_ray_needs_engines_of_their_own() -> None:
    with pytest.raises(ConfigError, match="placement: split"):
        load_recipe("quickstart", ["rollout.ahead=1", "cluster.backend=ray"])
