"""MRT on the bundled tiny model: alpha 0 is GRPO to the last bit, probes change the weights; regret; the STaR script with TRL."""

from __future__ import annotations

import hashlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ttrl.config import load_recipe
from ttrl.evaluate.command import evaluate_regret
from ttrl.run import run

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "steps=2", "data.limit=4", "data.prompts_per_step=2", "rollout.votes_per_prompt=6",
    "rollout.train_per_prompt=4", "eval.samples=2", "eval.k=[1]",
    "eval.limit=1", "eval.heldout=null", "checkpoint.every=0", "trainer.lr=1e-3",
]  # fmt: skip


def train(folder: Path, recipe: str, *changes: str) -> Path:
    loaded = load_recipe(recipe, [*SMALL, *changes, f"output={json.dumps(str(folder))}"])
    assert run(loaded, resume=False, console=Console(file=io.StringIO())).status == "completed"
    return folder


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("grpo") / "run", "quickstart")


def test_alpha_0_ends_with_the_weights_of_grpo(plain: Path, tmp_path: Path) -> None:
    off = train(tmp_path / "off", "lab/mrt", "objective.with.alpha=0")
    assert weights(off) == weights(plain)
    assert "rollout/probes" not in metrics(off)[0]


def test_progress_changes_the_weights_and_its_cost_is_counted(plain: Path, tmp_path: Path) -> None:
    on = train(tmp_path / "on", "lab/mrt", "objective.with.probes=2")
    assert weights(on) != weights(plain)
    rows = metrics(on)
    assert (
        rows[0]["rollout/tokens"] == metrics(plain)[0]["rollout/tokens"]
    )  # the votes are the same, probes come on top
    for row in rows:
        assert row["rollout/probe_tokens"] >= row["rollout/probes"] > 0
        assert 0 <= row["reward/probe_mean"] <= row["reward/probe_answered"] <= 1
    tokens = json.loads((on / "summary.json").read_text())["tokens"]["rollout"]
    assert tokens == sum(row["rollout/tokens"] + row["rollout/probe_tokens"] for row in rows)
    again = train(tmp_path / "again", "lab/mrt", "objective.with.probes=2")
    assert weights(again) == weights(on)


def test_regret_of_the_bundled_model() -> None:
    from test_regret import call, goals

    found = evaluate_regret(call(), goals(budgets=(10, 40), reach=(0.01,)))
    values = {name: estimate.value for name, estimate in found.estimates.items()}
    assert 0 <= values["regret@40"] <= values["regret@10"] <= 1  # forced answers get better with every column
    assert values["episodes"] == pytest.approx(4, abs=0.5)
    assert 0 < values["pass@1"] < 1 and values["probe_answered"] > 0.8
    assert found.record()["protocol"]["termination"] == "\\boxed{"


def test_the_star_script_imitates_what_made_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    arguments = ["lab/mrt-star", "data.limit=6", "data.prompts_per_step=6", "rollout.votes_per_prompt=6", "rollout.train_per_prompt=6",
                 "objective.with.probes=2", "--rounds", "2",
                 "--output", str(tmp_path / "star"), "--most", "2", "--lr", "1e-3"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["mrt_star.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "mrt_star.py"), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "star" / "star.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1]
    assert all(row["kept"] > 0 and row["gain"] > 0 and row["loss"] > 0 and row["probe_tokens"] > 0 for row in rows)
    models = [(tmp_path / "star" / f"round-{n}" / "model" / "model.safetensors").read_bytes() for n in (0, 1)]
    assert models[0] != models[1]
