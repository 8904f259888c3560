"""The command line as a user meets it: bad input ends in one clear message and exit status 2, before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = {"id": "a", "prompt": "1+1="}
RECIPE = """\
name: test
steps: 1
model: {path: "bundled:tiny-adder"}
data: {prompts: prompts.jsonl, template: raw, prompts_per_step: 1}
"""


def ttrl(*arguments: object, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process that reports, on its last line of stderr, whether torch was imported."""
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else 'LIGHT', file=sys.stderr))\n"
        "from ttrl.cli import main\n"
        f"sys.argv = ['ttrl', *{[str(a) for a in arguments]!r}]\nmain()"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, timeout=120, env=environment
    )


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, no traceback, torch not even imported, and the message holds these words."""
    message, _, weight = result.stderr.strip().rpartition("\n")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert weight == "LIGHT"
    for word in words:
        assert word in message, message


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.prompts=nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
        ("rollout.votes_per_promt=4", ["votes_per_promt", "Did you mean 'votes_per_prompt'"]),
        ("steps=many", ["steps", "integer", "'many'"]),
        ("rollout={votes_per_prompt: 4, train_per_prompt: 8}", ["train_per_prompt (8)", "votes_per_prompt (4)"]),
        ("model.path=./nowhere", ["model.path", "./nowhere", "no such folder"]),
        ("model.path=bundled:nothing", ["bundled:tiny-adder"]),
        ("model.path=no-such/model", ["no-such/model", "cache"]),
        ("reward=majority_vot", ["majority_vot", "Did you mean 'majority_vote'"]),
        ("reward={use: majority_vote, with: {tie: x}}", ["unknown option 'tie'", "Did you mean 'ties'"]),
        ("objective={use: grpo, with: {loss: clipp}}", ["clipp", "Did you mean 'clip'"]),
        ("rollout.top_p=0.9", ["allow_truncated_sampling"]),
        ("data.prompts_per_step=7", ["prompts_per_step is 7", "1 prompts"]),
        ("data.template=chatt", ["chatt", "Did you mean 'chat'"]),
        ("trainer.backend=deepsped", ["backend", "deepsped"]),
        ("eval.labels=prompts.jsonl", ["'answer'"]),
        ("nonsense", ["key.path=value"]),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_before_anything_is_loaded(folder, change, words):
    refused(ttrl("train", "recipe.yaml", change, "--output", "out", cwd=folder), *words)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(GOOD) + "\n{broken\n", ["prompts.jsonl:2", "not valid JSON"]),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n", ["prompts.jsonl:2", "duplicate id 'a'", "prompts.jsonl:1"]),
        (json.dumps({"id": "a", "prompt": "  "}) + "\n", ["prompts.jsonl:1", "empty"]),
        (json.dumps({"id": "a", "question": "x"}) + "\n", ["prompts.jsonl:1", "'prompt'"]),
        ("", ["no prompts"]),
        ("[1, 2]\n", ["prompts.jsonl:1", "object"]),
    ],
)
def test_a_broken_prompts_file_is_refused_with_its_line(folder, content, words):
    (folder / "prompts.jsonl").write_text(content)
    refused(ttrl("train", "recipe.yaml", cwd=folder), *words)


def test_all_mistakes_are_named_at_once_with_their_places(folder):
    (folder / "recipe.yaml").write_text(RECIPE + "stepz: 3\ntrainer: {lr: fast}\n")
    refused(ttrl("check", "recipe.yaml", cwd=folder), "recipe.yaml:5:1: stepz", "recipe.yaml:6:11: trainer.lr")


def test_an_output_folder_with_a_run_is_not_touched(folder):
    (folder / "out").mkdir()
    (folder / "out" / "recipe.yaml").write_text("a run")
    refused(ttrl("train", "recipe.yaml", "--output", "out", cwd=folder), "already holds a run", "--resume")
    assert (folder / "out" / "recipe.yaml").read_text() == "a run"


def test_resuming_what_is_not_there_or_not_the_same_is_refused(folder):
    refused(ttrl("train", "recipe.yaml", "--output", "out", "--resume", cwd=folder), "holds no run")
    (folder / "out" / "checkpoints").mkdir(parents=True)
    (folder / "out" / "recipe.yaml").write_text(RECIPE.replace("prompts.jsonl", str(folder / "prompts.jsonl")))
    result = ttrl("train", "recipe.yaml", "steps=2", "--output", "out", "--resume", cwd=folder)
    refused(result, "steps: was 1, is 2")


def test_broken_yaml_names_its_place(folder):
    (folder / "recipe.yaml").write_text("name: x\nmodel: {path: [}\n")
    refused(ttrl("check", "recipe.yaml", cwd=folder), "recipe.yaml:2:")


def test_missing_recipe_lists_the_shipped_ones(folder):
    refused(ttrl("train", "nowhere.yaml", cwd=folder), "nowhere.yaml", "quickstart")


def test_check_accepts_every_shipped_recipe_that_needs_no_download(folder):
    for name in ("quickstart", "lab/collapse"):
        result = ttrl("check", name, cwd=folder)
        assert result.returncode == 0, result.stderr
        assert "ok" in result.stdout


def test_lists_and_schema(folder):
    assert "quickstart" in ttrl("recipes", "list", cwd=folder).stdout
    assert "votes_per_prompt: 16" in ttrl("recipes", "show", "quickstart", cwd=folder).stdout
    schema = json.loads(ttrl("recipes", "schema", cwd=folder).stdout)
    assert {"model", "data", "rollout", "reward", "trainer", "eval"} <= schema["properties"].keys()
    listed = ttrl("plugins", cwd=folder).stdout
    assert "majority_vote" in listed
    assert "ttrl.rewards.majority:MajorityVote" in listed


def test_doctor_prints_versions_devices_and_what_is_missing(folder):
    result = ttrl("doctor", cwd=folder)
    assert result.returncode == 0, result.stderr
    for word in ("ttrl", "python", "torch", "transformers", "gpu", "cpu cores", "memory", "vllm", "ray"):
        assert word in result.stdout, word


def test_report_of_a_folder_without_a_run_is_refused(folder):
    refused(ttrl("report", ".", cwd=folder), "holds no run")


def test_eval_refuses_mistakes_before_loading(folder):
    result = ttrl("eval", "./nowhere", "--prompts", "prompts.jsonl", cwd=folder)
    refused(result, "no such folder")
    result = ttrl("eval", "bundled:tiny-adder", "--prompts", "prompts.jsonl", "--k", "99", cwd=folder)
    refused(result, "--samples")


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_loaded(folder):
    big = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }  # fmt: skip
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(big))
    result = ttrl("train", "recipe.yaml", "model.path=model", "model.device=cpu", cwd=folder)
    refused(result, "does not fit", "GiB of this machine", "the largest part is", "ttrl plan")
    assert not (folder / "runs").exists()
