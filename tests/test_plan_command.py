"""`ttrl plan`: what it prints, when it refuses, and that it stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_layout import light
from typer.testing import CliRunner

from ttrl.cli import app
from ttrl.config import load_recipe
from ttrl.errors import ConfigError
from ttrl.plan.command import PlanCall, make_plan
from ttrl.plan.report import to_json

GPU = [
    "model.path=Qwen/Qwen2.5-7B", "model.device=auto", "model.dtype=bfloat16", "rollout.engine=vllm", "rollout.max_new_tokens=2048",
    "trainer.backend=deepspeed", "trainer.zero=2", "trainer.tokens_per_microbatch=4096",
]  # fmt: skip


def plan(*overrides: str, **call):
    return make_plan(load_recipe("quickstart", overrides), PlanCall(**call))


def test_the_quickstart_fits_this_machine():
    result = CliRunner().invoke(app, ["plan", "quickstart"])
    assert result.exit_code == 0, result.output
    for part in ("804,480 parameters", "AdamW moments", "sampling, s", "assumptions", "fits (one process)"):
        assert part in result.output


def test_json_has_every_number():
    result = CliRunner().invoke(app, ["plan", "quickstart", *GPU, "--gpus", "8xH100", "--json", "--mean-length", "700"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["fits"] is True and found["gpus"] == "8xH100" and found["remedy"] is None
    assert [p["placement"] for p in found["placements"]] == ["colocated", "split", "split"]
    assert found["tokens"]["rollout"] == 20 * 32 * 16 * 700
    own = found["placements"][0]
    assert own["usd"] == pytest.approx(own["hours"] * 8 * 3.0)
    assert own["memory"][0]["peak_bytes"] == own["needed_bytes"] < own["available_bytes"]
    assert [row["devices"] for row in found["scaling"]] == [2**n for n in range(11)][-len(found["scaling"]) :]
    assert any("check yours" in note for note in found["assumptions"])


def test_what_does_not_fit_is_refused_with_the_reason_and_a_remedy_that_works():
    result = CliRunner().invoke(
        app, ["plan", "quickstart", *GPU, "trainer.tokens_per_microbatch=65536", "--gpus", "8xH100"]
    )
    assert result.exit_code == 1
    assert "does not fit" in result.output and "the largest part is activations" in result.output
    made = plan(*GPU, "trainer.tokens_per_microbatch=65536", gpus="8xH100")
    assert made.remedy is not None and made.remedy.changes[0].startswith("trainer.tokens_per_microbatch=")
    assert plan(*GPU, *made.remedy.changes, gpus="8xH100").fits


@pytest.mark.parametrize(
    ("overrides", "call", "knob"),
    [
        (["trainer.tokens_per_microbatch=100000", "rollout.votes_per_prompt=128"], {"memory_gib": 1.0}, "tokens_per_microbatch"),
        (["model.path=Qwen/Qwen2.5-0.5B"], {"memory_gib": 7.0}, "tokens_per_microbatch"),
        (["model.path=Qwen/Qwen2.5-0.5B", "trainer.tokens_per_microbatch=64"], {"memory_gib": 8.2}, "parameters=lora"),
        ([*GPU, "trainer.zero=0"], {"gpus": "8xH100"}, "trainer.zero="),
        ([*GPU, "model.path=Llama-3.1-70B"], {"gpus": "8xH100"}, "trainer.zero=3"),
        ([*GPU], {"gpus": "1xL4"}, "trainer.offload="),
        ([*GPU, "model.path=Llama-3.1-70B", "trainer.parameters=lora"], {"gpus": "1xA100"}, "--gpus"),
    ],
)  # fmt: skip
def test_the_knob_that_is_named_makes_it_fit(overrides, call, knob):
    made = plan(*overrides, **call)
    assert not made.fits and made.remedy is not None, made.verdict
    assert any(knob in change for change in made.remedy.changes), made.verdict
    fleets = [change.removeprefix("--gpus ") for change in made.remedy.changes if change.startswith("--gpus")]
    changes = [change for change in made.remedy.changes if not change.startswith("--gpus")]
    again = plan(*overrides, *changes, **{**call, **({"gpus": fleets[0]} if fleets else {})})
    assert again.fits, again.verdict


def test_a_model_that_no_setting_can_save_is_refused():
    made = plan("model.path=Llama-3.1-70B")
    assert not made.fits and made.remedy is None and "a smaller model" in made.verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8xH10"], "Did you mean 'H100'"),
        (["model.device=auto", "--gpus", "x"], "unknown device"),
        (["--gpus", "8xH100"], "model.device is cpu"),
        (["--params", "huge"], "--params"),
        (["model.path=./nowhere"], "--params 7B"),
        (["trainer.backend=depspeed"], "Did you mean 'deepspeed'"),
        (["rollout.engine=vlm"], "Did you mean 'vllm'"),
        (["--mean-length", "41"], "rollout.max_new_tokens"),
        (["rollout.max_new_tokens=600"], "512 positions"),
        ([*GPU, "rollout.engine={use: vllm, with: {tensor_parallel: 4}}", "--gpus", "2xH100"], "tensor_parallel is 4"),
        ([*GPU, "rollout.engine={use: vllm, with: {tensor_parallel: 0}}", "--gpus", "2xH100"], "whole number"),
    ],
)
def test_mistakes_end_with_status_2_and_the_remedy(arguments, message):
    code = "from ttrl.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "quickstart", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_prompts_that_are_not_here_are_assumed_and_said_to_be(tmp_path: Path):
    made = make_plan(load_recipe("quickstart", ["data.prompts=hub:org/name"]), PlanCall())
    assert any("assumed" in note and "hub:org/name" in note for note in made.notes)
    told = plan(prompt_tokens=99)
    assert told.work.prompt == 99 and not any("longest prompt" in note for note in told.notes)


def test_sampling_ahead_on_a_shared_device_is_called_useless():
    made = plan("rollout.ahead=1")
    assert any("no time is gained" in note for note in made.notes)
    assert made.options[0].needed > plan().options[0].needed


def test_the_back_end_of_one_process_uses_one_gpu():
    made = plan(*GPU[:-3], gpus="4xH100")
    assert made.options[0].layout.ranks == 1 and any("trains on one GPU" in note for note in made.notes)


def test_planning_imports_nothing_heavy():
    light("from ttrl.config import load_recipe\nfrom ttrl.plan.command import PlanCall, make_plan\n"
          f"make_plan(load_recipe('quickstart', {GPU!r}), PlanCall(gpus='8xH100'))\n"
          "make_plan(load_recipe('quickstart'), PlanCall())")  # fmt: skip


def test_the_json_of_a_plan_is_json():
    assert json.loads(json.dumps(to_json(plan())))["placements"][0]["memory"][0]["peak_phase"] == "train"


def test_a_broken_tokenizer_is_refused(tiny_model_dir: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        plan(f"model.path={tmp_path}")
