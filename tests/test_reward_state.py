"""Rewards that remember, and the one reward that sees labels: whole runs on the bundled tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import boxed, context, make_group
from helpers_command import ttrl
from test_run import lines, model_hash, summary, timeless, train

from ttrl.config import load_recipe
from ttrl.errors import ConfigError
from ttrl.loop import remembered
from ttrl.rewards.controls import Frozen
from ttrl.setup import check_recipe

# Every prompt in every step, and steps large enough for votes to change: a lost memory shows
RESTLESS = ["data.limit=4", "steps=3", "trainer.lr=0.002", "log.groups_per_step=4"]

FLAKY = """
from pathlib import Path
from ttrl.rewards.controls import Frozen

class Flaky(Frozen):
    def __call__(self, group, ctx):
        if ctx.step == 2 and not Path(__file__).with_name("healed").exists():
            raise RuntimeError("planted failure")
        return super().__call__(group, ctx)

class Forgetful(Flaky):
    state = None
"""


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen") / "run"
    result = train(folder, *RESTLESS, "reward.use=frozen")
    assert result.returncode == 0, result.stderr
    return folder


def test_frozen_labels_never_change_and_are_in_the_checkpoint(frozen: Path) -> None:
    labels: dict[str, set[Any]] = {}
    for group in lines(frozen / "groups.jsonl"):
        labels.setdefault(group["prompt_id"], set()).add(group["label"])
    assert len(labels) == 4
    assert all(len(seen) == 1 for seen in labels.values())
    state = json.loads((frozen / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["memory"]["reward"]["labels"] == {identifier: next(iter(seen)) for identifier, seen in labels.items()}
    assert not summary(frozen)["labels_in_training"]


@pytest.mark.parametrize("name", ["Flaky", "Forgetful"])
def test_a_resumed_run_remembers(frozen: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "flaky.py").write_text(FLAKY)
    changes = [*RESTLESS, f"reward.use={tmp_path / 'flaky.py'}:{name}"]
    assert train(tmp_path / "run", *changes).returncode == 1
    (tmp_path / "healed").touch()
    resumed = train(tmp_path / "run", *changes, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    same = timeless(tmp_path / "run") == timeless(frozen) and model_hash(tmp_path / "run") == model_hash(frozen)
    assert same is (name == "Flaky")


def test_a_step_that_fails_leaves_no_memory() -> None:
    reward = Frozen()

    def fail() -> None:
        with remembered({"reward": reward}):
            reward(make_group(boxed([5, 5])), context())
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert reward.state() == {"labels": {}}
    with remembered({"reward": reward}):
        reward(make_group(boxed([5, 5])), context())
    assert reward.state() == {"labels": {"p": "5"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "set allow_labels: true at the top level"),
        (["allow_labels=true", "eval.labels=null"], "name their file in eval.labels"),
    ],
)
def test_gold_refuses_to_run_by_accident(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_recipe(load_recipe("quickstart", ["reward.use=gold", *changes]))


def test_labels_reach_only_a_reward_that_asks() -> None:
    assert not check_recipe(load_recipe("quickstart", ["allow_labels=true"])).labels_in_training
    checked = check_recipe(load_recipe("quickstart", ["allow_labels=true", "reward.use=gold"]))
    assert checked.labels_in_training


def test_gold_without_permission_ends_with_status_2(tmp_path: Path) -> None:
    result = ttrl("train", "quickstart", "reward.use=gold", "--output", tmp_path / "run")
    assert result.returncode == 2
    assert "allow_labels" in result.stderr and "Traceback" not in result.stderr


def test_a_gold_run_is_marked(tmp_path: Path) -> None:
    result = train(tmp_path / "run", "reward.use=gold", "allow_labels=true", "steps=1")
    assert result.returncode == 0, result.stderr
    assert summary(tmp_path / "run")["labels_in_training"] is True
    assert "LABELS IN TRAINING" in (tmp_path / "run" / "report.html").read_text()
