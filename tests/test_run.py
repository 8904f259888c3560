"""Whole runs on the bundled tiny model: files, determinism, label-blindness, resume, stopping, failures."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers_command import ENVIRONMENT, cold, command, ttrl

SMALL = [
    "steps=3", "data.limit=6", "data.prompts_per_step=4", "rollout.votes_per_prompt=6", "rollout.train_per_prompt=4",
    "eval.samples=4", "eval.k=[1,4]", "eval.limit=4", "eval.heldout=null", "checkpoint.every=1", "log.groups_per_step=2",
]  # fmt: skip


def train(folder: Path, *changes: str, recipe: str = "quickstart") -> subprocess.CompletedProcess[str]:
    return ttrl("train", recipe, *SMALL, *changes, "--output", folder)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(folder: Path) -> list[str]:
    """metrics.jsonl without the keys under time/."""
    return [
        json.dumps({k: v for k, v in row.items() if not k.startswith("time/")})
        for row in lines(folder / "metrics.jsonl")
    ]


def model_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "a"
    result = cold("train", "quickstart", *SMALL, "--output", folder)
    assert result.returncode == 0, result.stderr
    assert "pass@1" in result.stdout
    assert "report.html" in result.stdout
    return folder


def test_a_run_leaves_everything_the_design_promises(finished):
    for name in ("recipe.yaml", "metrics.jsonl", "eval.jsonl", "groups.jsonl", "ledger.jsonl", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "checkpoints" / "LATEST").read_text().strip() == "step-000003"
    result = summary(finished)
    assert result["status"] == "completed"
    assert result["steps"] == 3
    assert {"value", "low", "high"} == set(result["initial"]["pass@1"])
    assert set(result["initial"]) == set(result["final"]) >= {"pass@1", "pass@4", "maj@4", "majority_share"}
    assert sum(result["ledger"].values()) == 4
    rows = lines(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for key in ("reward/majority_share", "reward/answered", "reward/mean", "rollout/tokens", "rollout/length",
                "time/rollout", "time/reward", "time/step"):  # fmt: skip
        assert key in rows[0], key
    trained = next(row for row in rows if "train/loss" in row)
    for key in ("train/loss", "train/kl", "train/entropy", "train/grad_norm", "time/train", "time/sync"):
        assert key in trained, key
    # six prompts, four per step: every prompt was seen by step 1, so labels could be compared in step 2 at the latest
    assert "reward/flip_rate" in rows[2]


def test_labels_and_rewards_are_compared_with_the_references_on_the_side(finished):
    rows = lines(finished / "luck.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert 1 <= row["groups"] <= 4 and row["labelled"] <= row["groups"]  # labels are known for four of six prompts
        assert 0 <= row["ground_truth_ratio"] <= row["any_right"] <= 1
        assert row["labelled"] == 0 or {"label_accuracy", "reward_accuracy"} <= row.keys()
    assert summary(finished)["luck"]["all"]["majority_ratio"] == pytest.approx(
        sum(r["majority_ratio"] for r in rows) / 3
    )
    assert not any("accuracy" in key for row in lines(finished / "metrics.jsonl") for key in row)
    assert "Against the references" in (finished / "report.html").read_text()


def test_a_run_with_trees_counts_every_token_once(tmp_path):
    tree = "rollout.sampler={use: tree, with: {trees: 2, forks: 1, branches: 2, min_gap: 2}}"
    result = train(tmp_path / "run", tree, "steps=1", "eval.samples=1", "eval.k=[1]", "eval.limit=1")
    assert result.returncode == 0, result.stderr
    row = lines(tmp_path / "run" / "metrics.jsonl")[0]
    leaves = row["rollout/length"] * 4 * 6
    assert row["rollout/tokens"] + row["rollout/shared_tokens"] == pytest.approx(leaves)
    assert row["rollout/token_ratio"] == pytest.approx(row["rollout/tokens"] / leaves)
    assert 0 < row["rollout/shared_tokens"] < leaves
    assert (row["rollout/votes"], row["rollout/trees"]) == (6, 2)
    assert summary(tmp_path / "run")["tokens"]["rollout"] == row["rollout/tokens"]
    assert sum("fork" in r for g in lines(tmp_path / "run" / "groups.jsonl") for r in g["rollouts"]) == 2 * 4


def test_evaluations_are_stamped_with_their_protocol(finished):
    rows = lines(finished / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 3]
    assert rows[0]["protocol"] == rows[1]["protocol"]
    assert rows[0]["protocol"]["samples"] == 4


def test_groups_are_readable_and_consistent(finished):
    for group in lines(finished / "groups.jsonl"):
        assert len(group["rollouts"]) == 6
        assert sum(r["trained"] for r in group["rollouts"]) == (4 if group["label"] is not None else 0)
        for rollout in group["rollouts"]:
            assert (rollout["reward"] == 1.0) == (group["label"] is not None and rollout["answer"] == group["label"])


def test_the_adapted_model_loads_with_transformers_and_has_moved(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ttrl.model.load import resolve_path

    start = AutoModelForCausalLM.from_pretrained(resolve_path("bundled:tiny-adder"))
    adapted = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert AutoTokenizer.from_pretrained(finished / "model").eos_token_id is not None
    assert start.state_dict().keys() == adapted.state_dict().keys()
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), adapted.parameters(), strict=True))


def test_the_resolved_recipe_is_a_recipe_and_gives_the_same_run(finished, tmp_path):
    result = ttrl("train", finished / "recipe.yaml", "--output", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    assert timeless(tmp_path / "again") == timeless(finished)
    assert model_hash(tmp_path / "again") == model_hash(finished)


def test_another_seed_gives_another_run(finished, tmp_path):
    assert train(tmp_path / "b", "seed=1").returncode == 0
    assert timeless(tmp_path / "b") != timeless(finished)


@pytest.mark.parametrize("labels", ["noise", "none"])
def test_labels_cannot_reach_the_weights(finished, tmp_path, labels):
    from ttrl.config.load import bundled

    noise = tmp_path / "noise.jsonl"
    real = lines(bundled("bundled:tiny-adder/train.labels.jsonl"))
    noise.write_text("".join(json.dumps({"id": row["id"], "answer": str(7 * i)}) + "\n" for i, row in enumerate(real)))
    result = train(tmp_path / "run", f"eval.labels={noise if labels == 'noise' else 'null'}")
    assert result.returncode == 0, result.stderr
    assert timeless(tmp_path / "run") == timeless(finished)
    assert model_hash(tmp_path / "run") == model_hash(finished)
    assert (tmp_path / "run" / "luck.jsonl").exists() == (labels == "noise")
    if labels == "none":
        assert set(summary(tmp_path / "run")["final"]) == {"majority_share", "answered", "length"}


FLAKY = """
from pathlib import Path
from ttrl.rewards.majority import MajorityVote

class Flaky(MajorityVote):
    def __call__(self, group, ctx):
        if ctx.step == 2 and not Path(__file__).with_name("healed").exists():
            raise RuntimeError("planted failure")
        return super().__call__(group, ctx)
"""


def test_a_failing_plugin_is_named_and_the_run_resumes_exactly(finished, tmp_path):
    (tmp_path / "flaky.py").write_text(FLAKY)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((finished / "recipe.yaml").read_text().replace("use: majority_vote", "use: ./flaky.py:Flaky"))
    failed = ttrl("train", recipe, "--output", tmp_path / "run")
    assert failed.returncode == 1
    assert "planted failure" in failed.stderr
    assert "flaky.py:Flaky" in failed.stderr
    assert "prompt 'train-" in failed.stderr
    assert summary(tmp_path / "run")["status"] == "failed"
    assert "planted failure" in summary(tmp_path / "run")["reason"]

    (tmp_path / "healed").touch()
    resumed = ttrl("train", recipe, "--output", tmp_path / "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert summary(tmp_path / "run")["status"] == "completed"
    assert timeless(tmp_path / "run") == timeless(finished)
    assert model_hash(tmp_path / "run") == model_hash(finished)
    assert lines(tmp_path / "run" / "eval.jsonl") == lines(finished / "eval.jsonl")
    assert (tmp_path / "run" / "ledger.jsonl").read_text() == (finished / "ledger.jsonl").read_text()


@pytest.mark.slow  # tests/test_kill.py kills at five instants
def test_a_killed_run_resumes_exactly(finished, tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(folder / "checkpoints" / "step-000001", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert summary(folder)["status"] == "failed"
    assert "killed" in summary(folder)["reason"]
    resumed = ttrl("train", "quickstart", *SMALL, "--output", folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert timeless(folder) == timeless(finished)
    assert model_hash(folder) == model_hash(finished)


def start(folder: Path, *changes: str) -> subprocess.Popen[str]:
    arguments = command("train", "quickstart", *SMALL, *changes, "--output", folder)
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_leaves_a_checkpoint_a_report_and_status_stopped(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "steps=500", "checkpoint.every=0")
    wait_for(folder / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    result = summary(folder)
    assert result["status"] == "stopped"
    assert "SIGINT" in result["reason"]
    assert "stopped" in output
    assert result["initial"]["pass@1"]["value"] >= 0
    assert (folder / "report.html").stat().st_size > 0
    assert (folder / "model" / "model.safetensors").exists()
    steps = len(lines(folder / "metrics.jsonl"))
    assert result["steps"] == steps
    assert (folder / "checkpoints" / f"step-{steps:06d}" / "trained.safetensors").exists()


def test_a_run_that_never_has_a_label_is_stopped_with_status_3(tmp_path):
    result = train(tmp_path / "run", "reward.with.min_share=1.0", "reward.with.min_margin=1.0", "max_empty_steps=2",
                   "rollout.temperature=10", "steps=9")  # fmt: skip
    assert result.returncode == 3, result.stderr
    assert summary(tmp_path / "run")["status"] == "stopped"
    assert "2 steps in a row" in summary(tmp_path / "run")["reason"]
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["dropped/abstained"] == 4


def test_lora_and_gates_and_two_updates_per_step(tmp_path):
    result = train(
        tmp_path / "run", "trainer.parameters={use: lora, with: {rank: 4, alpha: 8}}", "trainer.updates_per_step=2",
        "gates=[{use: vote_share, with: {low: 0.2}}, zero_variance]", "trainer.lr=0.001", "log.tensorboard=true",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    trained = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "train/updates" in row]
    assert trained
    assert all(row["train/updates"] <= 2 for row in trained)


def test_the_report_can_be_written_again(finished):
    before = (finished / "report.html").read_text()
    result = ttrl("report", finished)
    assert result.returncode == 0, result.stderr
    assert (finished / "report.html").read_text() == before


def test_eval_command_measures_any_model_with_and_without_labels(finished, tmp_path):
    """Labelled and unlabelled evaluation of a bundled and of an adapted model."""
    from ttrl.config.load import bundled

    prompts = tmp_path / "four.jsonl"
    folder = bundled("bundled:tiny-adder")
    prompts.write_text("".join((folder / "train.prompts.jsonl").read_text().splitlines(keepends=True)[:4]))
    result = ttrl("eval", "bundled:tiny-adder", "--prompts", prompts, "--labels", folder / "train.labels.jsonl",
                  "--template", "raw", "--samples", 4, "--k", "1,4", "--max-new-tokens", 48,
                  "--output", tmp_path / "e.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "pass@1" in result.stdout
    measured = json.loads((tmp_path / "e.json").read_text())
    again = ttrl("eval", finished / "model", "--prompts", prompts, "--template", "raw", "--samples", 4, "--k", "1,4",
                 "--max-new-tokens", 48, "--output", tmp_path / "f.json")  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "pass@1" not in again.stdout
    assert "majority_share" in again.stdout
    assert 0 <= measured["pass@1"]["value"] <= 1
