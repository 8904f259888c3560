"""Stops and failures at awkward moments: in the middle of evaluations, exports and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ttrl.config import load_recipe
from ttrl.errors import ConfigError, StopRequested
from ttrl.evaluate.evaluator import Evaluator
from ttrl.run import run
from ttrl.trainers.torch_backend import TorchTrainer

SMALL = [
    "steps=2", "data.limit=4", "data.prompts_per_step=2", "rollout.votes_per_prompt=4", "eval.samples=2", "eval.k=[1,2]",
    "eval.limit=2", "eval.every=1", "checkpoint.every=1", "log.groups_per_step=0",
]  # fmt: skip


def slow(*cases: tuple[str, int]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def go(folder: Path, *, resume: bool = False, changes: tuple[str, ...] = ()) -> str:
    recipe = load_recipe("quickstart", [*SMALL, *changes, f"output={json.dumps(str(folder))}"])
    return run(recipe, resume=resume, console=Console(quiet=True)).status


def results(folder: Path) -> tuple[dict, list[str], str]:
    """What must not depend on interruptions: the summary without its costs, evaluations, ledger."""
    summary = json.loads((folder / "summary.json").read_text())
    for cost in ("seconds", "peak_memory_mb"):
        del summary[cost]
    return summary, (folder / "eval.jsonl").read_text().splitlines(), (folder / "ledger.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert go(folder) == "completed"
    return folder


@pytest.mark.parametrize(
    ("split", "step"), [("heldout", 0), ("heldout", 2), *slow(("adapted", 0), ("heldout", 1), ("adapted", 2))]
)
def test_a_stop_inside_an_evaluation_is_made_up_for_on_resume(whole, tmp_path, monkeypatch, split, step):
    original = Evaluator.__call__

    def interrupted(self, at, pool):
        if (self.split, at) == (split, step):
            raise StopRequested("stopped by SIGINT")
        return original(self, at, pool)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", interrupted)
        assert go(tmp_path / "run") == "stopped"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    assert go(tmp_path / "run", resume=True) == "completed"
    assert results(tmp_path / "run") == results(whole)


@pytest.mark.parametrize("what", ["export", pytest.param("save", marks=pytest.mark.slow)])
def test_a_failing_disk_leaves_a_summary_a_report_and_a_way_on(whole, tmp_path, monkeypatch, what):
    def full(self, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainer, what, full)
        with pytest.raises(OSError, match="No space"):
            go(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "No space" in summary["reason"]
    assert (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "model").exists()
    assert go(tmp_path / "run", resume=True) == "completed"
    assert results(tmp_path / "run") == results(whole)


def test_resuming_a_completed_run_changes_nothing(whole):
    before = results(whole)
    assert go(whole, resume=True) == "completed"
    assert results(whole) == before


def test_resuming_with_other_prompts_is_refused(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": i, "prompt": f"10{i}+20{i}="}) + "\n" for i in range(4)))
    changes = (f"data.prompts={prompts}", "eval.labels=null", "eval.heldout=null", "steps=1")
    assert go(tmp_path / "run", changes=changes) == "completed"
    prompts.write_text(prompts.read_text().replace("101+201", "111+211"))
    with pytest.raises(ConfigError, match="prompts: was sha256"):
        go(tmp_path / "run", resume=True, changes=changes)


def test_prompts_that_do_not_fit_the_model_are_refused_before_the_first_step(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "fits", "prompt": "1+1="}, {"id": "long", "prompt": "1" * 480}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = (f"data.prompts={prompts}", "eval.labels=null", "eval.heldout=null")
    with pytest.raises(ConfigError, match=r"'long'.*480 tokens.*512 positions"):
        go(tmp_path / "run", changes=changes)
    assert not (tmp_path / "run").exists()


def test_held_out_prompts_must_not_be_trained_on(tmp_path):
    with pytest.raises(ConfigError, match="2 prompts are trained on"):
        go(tmp_path / "run", changes=("eval.heldout.prompts=bundled:tiny-adder/train.prompts.jsonl",
                                      "eval.heldout.labels=null"))  # fmt: skip
