"""What a resumed run may change, and that it says so; switches for signals. No model is loaded here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ttrl.config import Recipe, load_recipe, recipe_to_yaml
from ttrl.errors import ConfigError, StopRequested
from ttrl.failures import describe, remedy
from ttrl.resume import continuation, note_resume, same_inputs
from ttrl.rundir import RECIPE, RunDir
from ttrl.stamp import from_comments, to_comments
from ttrl.stopping import StopSwitch

STAMP = {"ttrl": "0.1.0", "torch": "2.13.0", "prompts": "sha256 aa", "plug-in r.py": "sha256 bb"}


def recipe(*changes: str) -> Recipe:
    return load_recipe("quickstart", changes)


@pytest.fixture
def started(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "run")
    run.write(RECIPE, to_comments(STAMP) + recipe_to_yaml(recipe()))
    return run


def test_the_same_recipe_continues_without_a_word(started: RunDir) -> None:
    run, changes = continuation(recipe("output=elsewhere"), started.path)
    assert (run.path, changes) == (started.path, [])
    assert same_inputs(started, STAMP) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("checkpoint.keep=5", "checkpoint.keep: was 2, is 5"),
        ("checkpoint.every=1", "checkpoint.every: was 20, is 1"),
        ("log.tensorboard=true", "log.tensorboard: was False, is True"),
        ("cluster.call_seconds=60", "cluster.call_seconds: was 3600, is 60"),
        ("trainer.tokens_per_microbatch=4096", "trainer.tokens_per_microbatch: was 8192, is 4096 (rounds differently from here on)"),
        ("trainer.gradient_checkpointing=true", "trainer.gradient_checkpointing: was False, is True (rounds differently from here on)"),
    ],
)  # fmt: skip
def test_what_may_change_is_said(started: RunDir, change: str, said: str) -> None:
    assert continuation(recipe(change), started.path)[1] == [said]


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "steps=40",
        "rollout.votes_per_prompt=8",
        "trainer.lr=0.1",
        "reward=soft_vote",
        "eval.samples=32",
        "eval.k=[1]",
    ],
)
def test_what_cannot_change_is_refused_with_old_and_new_value(started: RunDir, change: str) -> None:
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"cannot resume with another recipe:\n  {key}[.\w]*: was .*, is .*"):
        continuation(recipe(change, "checkpoint.keep=5"), started.path)


def test_sampling_ahead_waits_at_checkpoints_so_they_cannot_move(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    run.write(RECIPE, recipe_to_yaml(recipe("rollout.ahead=1")))
    with pytest.raises(ConfigError, match=r"checkpoint\.every: was 20, is 1"):
        continuation(recipe("rollout.ahead=1", "checkpoint.every=1"), run.path)
    assert continuation(recipe("rollout.ahead=1", "checkpoint.keep=1"), run.path)[1] == ["checkpoint.keep: was 2, is 1"]


def test_other_versions_are_said_and_other_prompts_or_plugins_refused(started: RunDir) -> None:
    assert same_inputs(started, {**STAMP, "torch": "2.14.0"}) == ["torch: was 2.13.0, is 2.14.0"]
    for key in ("prompts", "plug-in r.py"):
        with pytest.raises(ConfigError, match=f"{key}: was sha256"):
            same_inputs(started, {**STAMP, key: "sha256 cc"})
    with pytest.raises(ConfigError, match=r"plug-in new\.py: was None"):
        same_inputs(started, {**STAMP, "plug-in new.py": "sha256 dd"})


def test_a_resume_is_noted_once_at_the_head_of_the_recipe(started: RunDir) -> None:
    note_resume(started, 6, [])
    for _ in range(2):
        note_resume(started, 6, ["step-000008 was damaged and not used", "checkpoint.keep: was 2, is 5"])
    text = (started.path / RECIPE).read_text()
    noted = from_comments(text)
    assert noted["resumed after step 6"] == "step-000008 was damaged and not used; checkpoint.keep: was 2, is 5"
    assert {key: noted[key] for key in STAMP} == STAMP
    assert text.count("resumed after") == 1
    assert load_recipe(started.path / RECIPE) == recipe()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_and_is_remembered(number: signal.Signals) -> None:
    with StopSwitch() as switch:
        switch.check()
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequested, match=f"stopped by {number.name}") as raised:
            switch.check()
    assert raised.value.signal == number


@pytest.fixture
def at_a_terminal() -> Iterator[None]:
    """The handler of Ctrl-C as it is at a terminal; what is started in the background begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_scheduler_may_repeat_itself_and_a_second_ctrl_c_insists(at_a_terminal: None) -> None:
    with StopSwitch() as switch:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        with pytest.raises(StopRequested, match="SIGUSR1"):
            switch.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "make room"),
        (OSError(122, "Disk quota exceeded"), "raise the quota"),
        (MemoryError(), "tokens_per_microbatch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "gradient_checkpointing"),
        (FloatingPointError("step 3: not finite: train/loss=nan"), "lower trainer.lr"),
        (OSError(2, "No such file"), None),
        (RuntimeError("shapes do not fit"), None),
    ],
)  # fmt: skip
def test_failures_that_are_no_bug_come_with_a_remedy(error: BaseException, said: str | None) -> None:
    found = remedy(error)
    assert (found is None) if said is None else said in str(found)
    assert describe(error).startswith(type(error).__name__)
