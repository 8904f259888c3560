"""Rewards inside real Ray actors: built there from the recipe's plug, or sent there, they score as they do here."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.test_reward_contract import PACKAGE
from helpers import boxed, context, make_group
from test_sandbox import check as check_costs

from ttrl.authoring import new_reward
from ttrl.config import Plug, load_recipe
from ttrl.protocols import LabelledReward
from ttrl.registry import BUILT_IN, build
from ttrl.types import Group, Scored

ray = pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parent.parent
TRL = """
def paid_by_length(completions, **_):
    return [float(len(completion[0]["content"])) for completion in completions]
"""


@dataclass(frozen=True)
class Plugins:
    """A file plug-in and a package with an entry point, installed where only this test looks."""

    folder: Path
    site: Path


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Plugins:
    folder, site = tmp_path_factory.mktemp("plugins"), tmp_path_factory.mktemp("site")
    new_reward("my_reward", folder)
    (folder / "lengths.py").write_text(TRL)
    source = tmp_path_factory.mktemp("source")
    new_reward("throwaway_reward", source)
    (source / "pyproject.toml").write_text(PACKAGE)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(source)], check=True, capture_output=True, timeout=300)
    return Plugins(folder, site)


@pytest.fixture(scope="module")
def actor(plugins: Plugins) -> Iterator[Any]:
    """One actor of a worker whose working folder is not ours."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", plugins.site)))
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:  # Ray's sockets bear no long path
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20, _temp_dir=short,
                 runtime_env={"env_vars": {"PYTHONPATH": path}})  # fmt: skip
        try:

            @ray.remote
            class Worker:
                def __init__(self) -> None:
                    os.chdir("/")

                def score(self, plug: Plug, group: Group) -> Scored:
                    return labelled(build("reward", plug))(group, context())

                def score_with(self, reward: Any, group: Group) -> Scored:
                    scored: Scored = reward(group, context())
                    return scored

                def warm(self) -> None:
                    __import__("test_sandbox").warm()

                def costs(self) -> dict[str, float]:
                    measured: dict[str, float] = __import__("test_sandbox").costs()
                    return measured

            yield Worker.remote()
        finally:
            ray.shutdown()


def labelled(reward: Any) -> Any:
    if isinstance(reward, LabelledReward):
        reward.take_labels({"p": "5"})
    return reward


def everything_recorded() -> Group:
    """Answers that need the sandbox, silence, and all that rollouts can carry."""
    group = make_group(boxed([r"\sqrt{8}", r"2\sqrt{2}", "5", "5", r"2\sqrt2", "7", "", r"\ln 8"]))
    rng = np.random.default_rng(0)
    rollouts = []
    for rollout in group.rollouts:
        entropy, certainty = rng.random((2, len(rollout.token_ids))).astype(np.float32)
        rollouts.append(replace(rollout, entropy=entropy, self_certainty=certainty))
    prompt = replace(group.prompt, meta={"image_size": [100, 100]})
    return replace(group, prompt=prompt, rollouts=tuple(rollouts))


def assert_same(one: Scored, two: Scored) -> None:
    for name in ("rewards", "train", "classes"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    for name in ("answers", "label", "share", "margin", "metrics", "trace"):
        assert getattr(one, name) == getattr(two, name), name


def plug(use: str, **options: Any) -> Plug:
    return Plug.model_validate({"use": use, "with": options})


REWARDS = [name for name in BUILT_IN["reward"] if name != "region_consistency"]  # it reads other answers than these


@pytest.mark.parametrize("name", [*REWARDS, "self_certainty", "file", "package"])
def test_a_reward_built_or_sent_there_scores_as_here(
    name: str, actor: Any, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(plugins.site)
    monkeypatch.chdir(plugins.folder)
    if name == "file":  # as a recipe names it: relative, and made absolute when the recipe is read
        wanted = load_recipe("quickstart", ["reward=./my_reward.py:MyReward"]).reward
    elif name == "self_certainty":
        wanted = plug("majority_vote", weights="self_certainty")
    else:
        wanted = {"trl": plug("trl", function=f"{plugins.folder}/lengths.py:paid_by_length"), "package": plug("throwaway")}.get(
            name, plug(name)
        )  # fmt: skip
    group = everything_recorded()
    reward = labelled(build("reward", wanted))
    here = reward(group, context())
    assert here.label is not None or name in ("random", "trl", "selective", "incorrect", "region_consistency")
    assert len(set(here.rewards.tolist())) > 1
    fresh = labelled(build("reward", wanted))
    assert_same(
        ray.get(actor.score_with.remote(fresh, group), timeout=120), here
    )  # first: nothing of it is loaded there yet
    assert_same(ray.get(actor.score.remote(wanted, group), timeout=120), here)


def test_bombs_in_an_actor_are_cheap(actor: Any) -> None:
    ray.get(actor.warm.remote(), timeout=120)
    check_costs(ray.get(actor.costs.remote(), timeout=120))
