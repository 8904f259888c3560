"""The modes on the bundled tiny model: restored byte for byte, killed and resumed bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_command import ENVIRONMENT, command
from rich.console import Console
from test_run import lines, model_hash, summary, timeless, wait_for

from ttrl.config import load_recipe
from ttrl.run import run

EPISODES = [
    "steps=1", "rollout.votes_per_prompt=6", "eval.k=[1]", "trainer.lr=0.001", "checkpoint.every=0",
]  # fmt: skip
ARRIVALS = [
    "steps=6", "data.prompts_per_step=2", "rollout.votes_per_prompt=4", "eval.k=[1]", "eval.limit=1", "eval.samples=1",
    "checkpoint.every=1", "gates=[]",
    "data.source={use: stream, with: {canaries: 2, canary_share: 0.3, canary_votes: 12, tolerance: 0.4, level: 0.9, replay: 1}}",
]  # fmt: skip


def go(recipe: str, folder: Path, *changes: str, resume: bool = False) -> Path:
    loaded = load_recipe(recipe, [*changes, f"output={json.dumps(str(folder))}"])
    assert run(loaded, resume=resume, console=Console(quiet=True)).status == "completed"
    return folder


def tensors(file: Path) -> Iterator[tuple[str, bytes]]:
    from safetensors.numpy import load_file

    for name, tensor in sorted(load_file(file).items()):
        yield name, tensor.tobytes()


@pytest.mark.parametrize(
    ("parameters", "prompts"), [("full", 20), ("{use: lora, with: {rank: 4}}", 4)], ids=["full", "lora"]
)
def test_after_adapting_to_prompts_the_model_is_the_start_model_byte_for_byte(tmp_path, parameters, prompts):
    from ttrl.model.load import resolve_path

    folder = go(
        "lab/per-prompt", tmp_path / "run", *EPISODES, f"trainer.parameters={parameters}", f"data.limit={prompts}"
    )
    rows = lines(folder / "answers.jsonl")
    assert len(rows) == prompts
    assert len({row["before"]["weights"] for row in rows}) == 1
    adapted = [row for row in rows if row["after"]["weights"] != row["before"]["weights"]]
    assert len(adapted) > prompts / 3
    start = Path(resolve_path("bundled:tiny-adder")) / "model.safetensors"
    assert dict(tensors(folder / "model" / "model.safetensors")) == dict(tensors(start))
    result = summary(folder)
    assert result["steps"] == prompts
    assert result["total_steps"] == prompts
    assert set(result["initial"]) == set(result["final"]) >= {"accuracy", "pass@1", "majority_share"}
    assert sum(result["ledger"].values()) == prompts
    assert [row["split"] for row in lines(folder / "eval.jsonl")] == ["adapted", "adapted"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go("lab/stream", tmp_path_factory.mktemp("stream") / "run", *ARRIVALS)


def without_costs(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in summary(folder).items() if key not in ("seconds", "peak_memory_mb")}


def test_a_stream_on_a_real_model_learns_and_is_judged(whole):
    rows = lines(whole / "metrics.jsonl")
    tried = [row["guard/committed"] for row in rows if "guard/committed" in row]
    assert len(tried) >= 2
    assert sum(tried) >= 1
    result = summary(whole)
    assert set(result["prequential"]) == {"all", "first_half", "second_half"}
    assert {"value", "low", "high"} == set(result["prequential"]["all"]["accuracy"])
    assert result["prequential"]["all"]["prompts"] == 12
    assert "stream" in {row["split"] for row in lines(whole / "eval.jsonl")}
    assert "answered before anything was learned" in (whole / "report.html").read_text()


def test_a_stream_killed_in_the_middle_resumes_bit_for_bit(whole, tmp_path):
    folder = tmp_path / "run"
    arguments = command("train", "lab/stream", *ARRIVALS, "--output", folder)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    wait_for(folder / "checkpoints" / "step-000003", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    go("lab/stream", folder, *ARRIVALS, resume=True)
    assert timeless(folder) == timeless(whole)
    for file in ("answers.jsonl", "eval.jsonl"):
        assert lines(folder / file) == lines(whole / file)
    assert model_hash(folder) == model_hash(whole)
    assert without_costs(folder) == without_costs(whole)
    last = [
        json.loads((f / "checkpoints" / "step-000006" / "state.json").read_text())["memory"] for f in (folder, whole)
    ]
    assert last[0] == last[1]
