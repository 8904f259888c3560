"""The contract kit: built-in rewards pass it, and each check catches the defect it is named after."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ttrl import kit
from ttrl.authoring import check_reward, new_reward
from ttrl.config.schema import Plug
from ttrl.errors import ConfigError
from ttrl.kit import examine
from ttrl.protocols import RewardContext
from ttrl.registry import BUILT_IN, build
from ttrl.rewards.majority import MajorityVote
from ttrl.types import Group, Scored

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "majority_vote": [
        {}, {"ties": "random"}, {"truncated_votes": True}, {"min_share": 0.5}, {"extractor": "number"},
        {"extractor": "choice"}, {"extractor": "label", "options": {"labels": ["red", "green", "blue"]}},
    ],
    "novelty": [{}, {"ngram": 1, "ties": "random"}],
    "restrain": [{}, {"least": 1, "prompt_weights": True}],
    "selective": [{}, {"shaping": "entropy", "rare_share": 0.3}],
    "views": [{}, {"label": "cross"}],
}  # fmt: skip
OTHER_CONTRACT = {"gold", "trl"}
"""gold asks for labels on purpose; trl is whatever function it is given (tests/test_trl_bridge.py)."""


def problems(make: Any) -> dict[str, str]:
    return {f.check: f.problem for f in examine(make) if f.problem is not None}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in BUILT_IN["reward"] if name not in OTHER_CONTRACT for options in OPTIONS.get(name, [{}])],
)  # fmt: skip
def test_every_built_in_reward_passes(name: str, options: dict[str, Any]) -> None:
    plug = Plug.model_validate({"use": name, "with": options})
    assert problems(lambda: build("reward", plug)) == {}


class Faulty(MajorityVote):
    """A majority vote with one defect."""

    def spoil(self, scored: Scored, ctx: RewardContext) -> Scored:
        raise NotImplementedError

    def __call__(self, group: Group, ctx: RewardContext) -> Scored:
        return self.spoil(super().__call__(group, ctx), ctx)


class Short(Faulty):
    def spoil(self, scored, ctx):
        return replace(scored, rewards=scored.rewards[:-1])


class Infinite(Faulty):
    def spoil(self, scored, ctx):
        return replace(
            scored, rewards=scored.rewards / scored.rewards.sum() if scored.label else scored.rewards + np.nan
        )


class Drawn(Faulty):
    def spoil(self, scored, ctx):
        return replace(scored, rewards=np.random.default_rng().random(len(scored.rewards)).astype(np.float32))


class FirstWins(Faulty):
    def spoil(self, scored, ctx):
        return replace(scored, rewards=np.arange(len(scored.rewards), dtype=np.float32))


class Scribbler(Faulty):
    def spoil(self, scored, ctx):
        scored.group.rollouts[0].logprobs[0] = 0.0
        return scored


class Empty(Faulty):
    def spoil(self, scored, ctx):
        return replace(scored, label=scored.label or "")


class Liar(Faulty):
    def spoil(self, scored, ctx):
        return replace(scored, label="0")


class Closure(MajorityVote):
    def __init__(self) -> None:
        super().__init__()
        self.secret = lambda: None


class Slow(Faulty):
    def spoil(self, scored, ctx):
        end = time.process_time() + 0.2
        while len(scored.rewards) == 64 and time.process_time() < end:
            pass
        return scored


class Hanging(Faulty):
    def spoil(self, scored, ctx):
        time.sleep(3600)
        return scored


class Peeker(Faulty):
    def spoil(self, scored, ctx):
        return replace(scored, rewards=scored.rewards * (2.0 if scored.group.prompt.meta.get("answer") else 1.0))


class Reader(Faulty):
    def spoil(self, scored, ctx):
        Path("labels.jsonl").read_text() if Path("labels.jsonl").exists() else None
        return scored


class Importer(Faulty):
    def spoil(self, scored, ctx):
        import ttrl.evaluate.labels  # noqa: F401

        sys.modules.pop("ttrl.evaluate.labels")
        return scored


class Undeclared(MajorityVote):
    def __init__(self):
        super().__init__()
        self.needs = None


class Wordy(Faulty):
    def spoil(self, scored, ctx):
        return {"rewards": scored.rewards}


@pytest.mark.parametrize(
    ("faulty", "check", "words"),
    [
        (Short, "right lengths, finite numbers", "rewards has 7 entries for 8 rollouts"),
        (Infinite, "right lengths, finite numbers", "is nan"),
        (Wordy, "right lengths, finite numbers", "not dict"),
        (Drawn, "deterministic", "draw from ctx.seed only"),
        (FirstWins, "independent of the order", "rewards changed when the rollouts were shuffled"),
        (Scribbler, "leaves the group alone", "changed the group"),
        (Empty, "nobody answered", "abstain with label None"),
        (Liar, "one answer", "the label is '0'"),
        (Liar, "all the same", "the label is '0'"),
        (Closure, "picklable", "pickle"),
        (Slow, "in time", "CPU time"),
        (Peeker, "never sees labels", "depends on prompt.meta['answer']"),
        (Reader, "never sees labels", "it opened labels.jsonl while scoring"),
        (Importer, "never sees labels", "where labels are read"),
        (Undeclared, "declares needs and min_votes", "needs must be a frozenset"),
    ],
)
def test_each_check_catches_its_defect(
    faulty: type, check: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.jsonl").write_text("{}")
    monkeypatch.setattr(kit, "CPU_SECONDS_PER_GROUP", 0.1 if faulty is Slow else 2.0)
    assert words in problems(faulty)[check]


def test_a_reward_that_hangs_is_reported_and_the_others_checks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "DEADLINE_SECONDS", 0.05)
    found = problems(Hanging)
    assert "not done after" in found["deterministic"]
    assert "declares needs and min_votes" not in found


def test_a_reward_that_cannot_be_built_is_a_table_full_of_reasons() -> None:
    class Broken:
        def __init__(self) -> None:
            raise RuntimeError("my own bug")

    assert set(problems(Broken).values()) == {"RuntimeError: my own bug"}


def ttrl(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ttrl.cli", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


def test_new_check_and_test_as_a_new_user_would(tmp_path: Path) -> None:
    made = ttrl("new", "reward", "MyReward", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "ttrl check ./my_reward.py" in made.stdout
    assert len((tmp_path / "my_reward.py").read_text().splitlines()) <= 30
    checked = ttrl("check", "./my_reward.py", "extractor=number", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("ok") == 13
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_reward.py"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert tested.returncode == 0 and "2 passed" in tested.stdout, tested.stdout

    again = ttrl("new", "reward", "my_reward", cwd=tmp_path)
    assert again.returncode == 2 and "exists" in again.stderr


def test_check_says_what_is_wrong_and_exits_1(tmp_path: Path) -> None:
    reward, _ = new_reward("bad", tmp_path)
    reward.write_text(reward.read_text().replace("label=label,", 'label=label or "",'))
    result = ttrl("check", "./bad.py:Bad", cwd=tmp_path)
    assert result.returncode == 1
    assert "FAIL  nobody answered" in result.stdout and "2 of 12 checks failed" in result.stdout


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    reward, _ = new_reward("fine", tmp_path)
    for target, options, words in [
        (tmp_path / "nowhere.py", [], "no such file"),
        (f"{reward}:Fin", [], "Did you mean 'Fine'"),
        (reward, ["extractr=math"], "Did you mean 'extractor'"),
        (reward, ["extractor=maths"], "maths"),
        ("reward:majority_vot", [], "Did you mean 'majority_vote'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            check_reward(str(target), options)
    (tmp_path / "none.py").write_text("class Nothing:\n    pass\n")
    with pytest.raises(ConfigError, match="no class with __call__"):
        check_reward(str(tmp_path / "none.py"), [])
    for name in ("1st", "my reward", "class", "../up"):
        with pytest.raises(ConfigError, match="cannot be a module name"):
            new_reward(name, tmp_path)


PACKAGE = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "throwaway-reward"
version = "1.0"
[project.entry-points."ttrl.rewards"]
throwaway = "throwaway_reward:ThrowawayReward"
[tool.setuptools]
py-modules = ["throwaway_reward"]
"""


def test_an_installed_package_adds_a_reward_by_entry_point(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    new_reward("throwaway_reward", source)
    (source / "pyproject.toml").write_text(PACKAGE)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--target", str(site), str(source)]  # fmt: skip
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    assert "throwaway_reward:ThrowawayReward" in ttrl("plugins", cwd=tmp_path, PYTHONPATH=path).stdout
    checked = ttrl("check", "reward:throwaway", cwd=tmp_path, PYTHONPATH=path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    recipe = ttrl("check", "quickstart", "reward=throwaway", cwd=tmp_path, PYTHONPATH=path)
    assert recipe.returncode == 0, recipe.stderr
    assert "throwaway" not in ttrl("plugins", cwd=tmp_path).stdout
