"""Runs of twelve steps that are killed, told to stop, or fail, and then resumed: nothing may show it but the time they took.

The work is done by helpers_kill.py in a process of its own; the tests here read what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_kill import SECRETS

HELPER = Path(__file__).with_name("helpers_kill.py")
Found = list[dict[str, Any]]


def work(folder: Path, *arguments: object) -> Found:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HELPER), str(folder), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return work(folder, 5, 2)


def case(found: Found, name: str) -> dict[str, Any]:
    return next(item for item in found if item["case"] == name)


def check_kills(found: Found, count: int) -> None:
    kills = [item for item in found if item["case"].startswith("kill")]
    assert len(kills) == count
    for item in kills:
        assert (item["status"], item["different"]) == (0, []), (item["case"], item["log"])


def test_a_run_killed_at_any_instant_resumes_bit_for_bit(found: Found, folder: Path) -> None:
    check_kills(found, 5)
    names = json.loads((folder / "names.json").read_text())
    # The instants to choose from are what the docstring promises: every phase, and halves of everything that is written
    for name in ("score", "update", "step", "sync", "check", "half of save_file trained.safetensors", "append metrics.jsonl",
                 "half of save_file optimizer.safetensors", "os.rename .step-000006.part", "os.rmdir step-000002"):  # fmt: skip
        assert name in names, name


def test_what_was_compared_depends_on_what_was_learned(folder: Path) -> None:
    """Twelve trained steps in which labels changed: a lost optimizer or a lost history of votes would show."""
    rows = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
    assert sum("train/loss" in row for row in rows) >= 8
    assert any(row.get("reward/flip_rate") for row in rows)


def test_a_damaged_checkpoint_is_passed_over_loudly_and_the_one_before_it_used(found: Found) -> None:
    item = case(found, "damaged")
    assert (item["status"], item["different"]) == (0, []), item["log"]
    assert (
        "checkpoint step-000004 is damaged (checksum of trained.safetensors); trying the one before it" in item["log"]
    )
    assert "resuming after step 2" in item["log"]
    assert item["head"] == "# resumed after step 2: step-000004 was damaged and not used"


def test_a_scheduler_gets_a_checkpoint_and_a_status_it_knows(found: Found) -> None:
    item = case(found, "signals")
    steps = [0]
    for stop, (name, number) in zip(item["stops"], [("SIGTERM", 15), ("SIGUSR1", 10)], strict=True):
        summary = stop["summary"]
        assert stop["status"] == 128 + number
        assert (summary["status"], summary["reason"]) == ("stopped", f"stopped by {name}")
        assert steps[-1] < summary["steps"] == stop["lines"] <= 12
        steps.append(summary["steps"])
    assert (item["status"], item["different"]) == (0, []), item["log"]


def test_a_full_disk_is_said_without_a_traceback_and_harms_no_checkpoint(found: Found) -> None:
    item = case(found, "full-disk")
    assert item["failed"] == 1
    assert "Traceback" not in item["said"]
    assert "File too large" in item["said"]
    assert "make room on that disk" in item["said"]
    assert "checkpoint step-000006 could not be written; those before it are intact" in item["said"]
    assert item["left"] == ["LATEST", "step-000002", "step-000004"]  # and nothing half written takes up room
    assert item["summary"]["status"] == "failed"


def test_a_loss_that_is_not_a_number_ends_the_run_before_the_weights_move(found: Found) -> None:
    item = case(found, "nan")
    assert item["failed"] == 1
    assert "Traceback" not in item["said"]
    assert "not finite: train/loss=nan" in item["said"]
    assert "lower trainer.lr" in item["said"]
    assert "not finite" in item["summary"]["reason"]
    assert (item["status"], item["different"]) == (0, []), item["log"]


def test_out_of_memory_names_what_may_be_changed_and_the_change_is_said(found: Found) -> None:
    item = case(found, "memory")
    assert item["failed"] == 1
    assert "Traceback" not in item["said"]
    assert "lower trainer.tokens_per_microbatch" in item["said"]
    assert item["status"] == 0
    change = "trainer.tokens_per_microbatch: was 8192, is 4096 (rounds differently from here on)"
    assert change in item["log"]
    assert item["head"] == f"# resumed after step 4: {change}"
    assert item["different"] == []  # these batches fit into one micro-batch either way


def test_no_secret_of_the_environment_is_written_down(found: Found, folder: Path) -> None:
    """The helper ran with tokens in its environment; no file of the run and no line it said holds one."""
    assert case(found, "whole")["status"] == 0
    files = [path for path in [*folder.rglob("*")] if path.is_file()]
    assert {"recipe.yaml", "report.html", "whole.log", "state.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


@pytest.mark.slow
def test_thirty_instants(tmp_path: Path) -> None:
    check_kills(work(tmp_path, 30, 3, "kills-only"), 30)
