"""Votes under the EMA teacher: labels follow the teacher, gradients the policy; whole runs repeat and resume exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import boxed, context, make_group, make_scored
from helpers_torch import batch_of, prompt, samples, section, token_scores, trainer, weights_of
from rich.console import Console
from transformers import AutoModelForCausalLM

from ttrl.config import load_recipe
from ttrl.errors import ConfigError, EngineError
from ttrl.flow import Taught, joined
from ttrl.lint import lint_recipe
from ttrl.rewards.majority import MajorityVote
from ttrl.rollout.flat import FlatSampler
from ttrl.rollout.hf import HFEngine
from ttrl.rollout.pool import LocalPool
from ttrl.run import run
from ttrl.setup import check_recipe
from ttrl.stepmetrics import agreement
from ttrl.sync import WeightLink, canary_text
from ttrl.trainers.packing import pack
from ttrl.trainers.stabilizers.ema import EMATeacher
from ttrl.trainers.stabilizers.restore import StochasticRestore
from ttrl.trainers.torch_backend import TorchTrainer
from ttrl.types import Fork, Rollout, Sample, SamplingSpec

SPEC = SamplingSpec(max_new_tokens=8)
UNTRAINED = "reward.with={extractor: math, electorate: untrained}"


# --- the label ------------------------------------------------------------------------------------------------------------


def test_only_rollouts_that_are_not_trained_elect_the_label() -> None:
    group = make_group(boxed([7, 7, 7, 7, 5, 5, 3]), trainable=[True] * 4 + [False] * 3)
    scored = MajorityVote(electorate="untrained")(group, context())
    assert scored.label == "5" and scored.share == pytest.approx(2 / 3) and scored.margin == pytest.approx(1 / 3)
    assert scored.rewards.tolist() == [0, 0, 0, 0, 1, 1, 0] and scored.train.tolist() == [True] * 4 + [False] * 3
    assert MajorityVote()(group, context()).label == "7"
    assert agreement([scored]).values() == {"reward/agreement": 0.0}
    some = make_scored([0, 0, 1, -1, 0], [1, 1, 0, 0, 1], group=make_group([""] * 5, trainable=[1, 1, 1, 1, 0]))
    assert agreement([some]).values()["reward/agreement"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("votes", [[5, 7], ["", ""], [5]])
def test_an_electorate_without_a_majority_abstains_however_sure_the_policy_is(votes: list[object]) -> None:
    group = make_group(boxed([7, 7, 7, *votes]), trainable=[True] * 3 + [False] * len(votes))
    scored = MajorityVote(electorate="untrained")(group, context())
    assert scored.label is None and not scored.train.any()


def test_the_teachers_votes_stand_behind_the_policys_rollouts() -> None:
    own, votes = make_group(boxed([1, 2])), make_group(boxed([3, 4, 5]))
    forked = replace(votes.rollouts[2], fork=Fork(parent=1, at=4))
    group = joined(own, replace(votes, rollouts=(*votes.rollouts[:2], forked)))
    assert [r.index for r in group.rollouts] == [0, 1, 2, 3, 4] and group.rollouts[:2] == own.rollouts
    assert group.rollouts[4].fork == Fork(parent=3, at=4) and group.trainable.tolist() == [True] * 2 + [False] * 3


# --- the weights behind it ------------------------------------------------------------------------------------------------


class World:
    """A trainer whose teacher is the start model to seven digits, and whose policy is somewhere else."""

    def __init__(self, folder: Path) -> None:
        self.trainer = trainer(folder, settings={"lr": 0.02}, stabilizers=(EMATeacher(decay=1 - 1e-7),), steps=9)
        self.pool = LocalPool(HFEngine(section(folder), lambda: None, rows_at_once=8, shared_prefix=True))
        prompts = [prompt("a", 20), prompt("b", 9)]
        self.link = WeightLink(self.trainer, self.pool, canary_text(prompts, None), exact=True)
        for step in range(3):
            self.stats = self.trainer.step(step, [pack(samples(seed=step), 1000)])
        own, votes = FlatSampler(2, 2, lambda _: []), FlatSampler(3, 3, lambda _: [])
        self.flow = Taught(
            lambda step: own(prompts, self.pool, SPEC, step), lambda step: votes(prompts, self.pool, SPEC, 100 + step),
            self.link, self.trainer,
        )  # fmt: skip
        self.link.sync(self.stats)

    def samples(self, *, trainable: bool) -> list[Sample]:
        groups = self.flow.groups(3).groups
        chosen = [(g, r) for g in groups for r, t in zip(g.rollouts, g.trainable, strict=True) if t == trainable]
        return [
            Sample(
                prompt_ids=group.prompt.token_ids, completion_ids=r.token_ids, sampler_logprobs=r.logprobs,
                advantages=np.ones_like(r.logprobs), weights=np.ones_like(r.logprobs), group=group.prompt.id,
            )
            for group, r in chosen
        ]  # fmt: skip


def off(model: Any, prompt_ids: Any, rollout: Rollout) -> float:
    """Mean difference of a rollout's log-probs from a model's."""
    with torch.no_grad():
        scores = token_scores(model, batch_of([(prompt_ids, [rollout.token_ids])]), 1.0)[0].numpy()
    return float(np.abs(scores - rollout.logprobs).mean())


def test_votes_come_from_the_teacher_and_trained_rollouts_from_the_policy(tiny_model_dir: Path) -> None:
    world = World(tiny_model_dir)
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(weights_of(world.trainer)[name])
    for group in world.flow.groups(3).groups:
        assert group.trainable.tolist() == [True, True, False, False, False]
        for rollout, own in zip(group.rollouts, group.trainable, strict=True):
            right, wrong = (policy, start) if own else (start, policy)
            assert off(right, group.prompt.token_ids, rollout) < 1e-4
            assert off(wrong, group.prompt.token_ids, rollout) > 0.1


def test_training_is_on_policy_and_training_on_the_teachers_votes_would_be_noticed(tiny_model_dir: Path) -> None:
    world = World(tiny_model_dir)
    stats = world.trainer.step(3, [pack(world.samples(trainable=True), 1000)])
    assert stats.metrics["train/sampler_mismatch"] < 1e-4
    world.flow.publish(4, stats)
    text = np.arange(3, 20, dtype=np.int32)
    np.testing.assert_allclose(world.pool.score(text)[0], world.trainer.score(text), atol=1e-4)
    world.flow.groups(4)
    assert np.abs(world.pool.score(text)[0] - world.trainer.score(text)).mean() > 0.1  # the teacher is in the engine
    world.flow.publish(5, None)  # a step without training takes it out again
    np.testing.assert_allclose(world.pool.score(text)[0], world.trainer.score(text), atol=1e-4)
    wrong = World(tiny_model_dir)
    stats = wrong.trainer.step(3, [pack(wrong.samples(trainable=False), 1000)])
    with pytest.raises(EngineError, match="do not hold the same weights"):
        wrong.flow.publish(4, stats)


def test_weights_that_were_put_back_on_purpose_are_no_failed_sync(tiny_model_dir: Path) -> None:
    ours = trainer(tiny_model_dir, settings={"lr": 0.02}, stabilizers=(StochasticRestore(p=1.0),))
    pool = LocalPool(HFEngine(section(tiny_model_dir), lambda: None, rows_at_once=8, shared_prefix=True))
    link = WeightLink(ours, pool, canary_text([prompt("a", 20)], None), exact=True)
    link.sync(None)
    stats = ours.step(0, [pack(samples(), 1000)])
    assert stats.grad_norm > 0
    link.sync(stats)
    with pytest.raises(EngineError, match="identical to the one before"):
        link.sync(replace(stats, may_stand=False))


# --- whole runs -----------------------------------------------------------------------------------------------------------

SMALL = [
    "steps=4", "data.limit=4", "data.prompts_per_step=2", "rollout.votes_per_prompt=6", "rollout.train_per_prompt=4",
    "eval.samples=2", "eval.k=[1,2]", "eval.limit=2", "eval.heldout=null", "checkpoint.every=2", "log.groups_per_step=2",
    "trainer.lr=0.001", UNTRAINED,
    "stabilizers=[{use: fisher, with: {coefficient: 100.0, rollouts: 4}}, {use: ema, with: {decay: 0.5}}, "
    "{use: restore, with: {p: 0.01}}, {use: grad_norm, with: {warmup: 1, factor: 0.9}}, {use: reset, with: {below: 0.01}}]",
]  # fmt: skip


def go(folder: Path, *changes: str, resume: bool = False) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times."""
    recipe = load_recipe("quickstart", [*SMALL, *changes, f"output={json.dumps(str(folder))}"])
    assert run(recipe, resume=resume, console=Console(quiet=True)).status == "completed"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_a_killed_run_resumes_bit_for_bit_with_teacher_fisher_and_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(tmp_path / "whole")
    assert all(row["rollout/votes"] == 10 and row["rollout/saved_votes"] == 0 for row in whole)
    assert any("reward/agreement" in row for row in whole)
    assert whole[-1]["train/teacher_gap"] > 0 and whole[-1]["train/fisher"] > 0
    for group in map(json.loads, (tmp_path / "whole" / "groups.jsonl").read_text().splitlines()):
        assert [r["trained"] for r in group["rollouts"]] == [group["label"] is not None] * 4 + [False] * 6
    original = TorchTrainer.step

    def failing(self: TorchTrainer, step: int, updates: Any) -> Any:
        if step == 3:
            raise RuntimeError("power cut")
        return original(self, step, updates)

    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainer, "step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            go(tmp_path / "run")
    assert go(tmp_path / "run", resume=True) == whole
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    files = {f.name for f in (tmp_path / "run" / "checkpoints" / "step-000004").iterdir()}
    assert {"stabilizers.safetensors", "stabilizers.json"} <= files and not any(".p" in Path(f).suffix for f in files)


# --- recipes that cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stabilizers=[ema]"], "only they may elect the label"),
        (["stabilizers=[ema]", UNTRAINED, "rollout.ahead=1"], "set rollout.ahead: 0"),
        (["stabilizers=[ema, ema]", UNTRAINED], "a run has one teacher"),
        ([UNTRAINED], "of 16 votes 16 are trained on, which leaves 0 to elect and 2 are needed"),
        (["stabilizers=['ttrl.metrics:MetricSet']"], "must have needs and a method of ttrl.hooks"),
        (["trainer.backend=deepspeed", "stabilizers=[{use: restore}]", "trainer.zero=3"], "set trainer.zero: 2"),
        (["trainer.backend=deepspeed", "stabilizers=[{use: fisher}]"], r"trainer\.zero: 0 and model\.dtype: float32"),
        (["trainer.backend=deepspeed", "stabilizers=[{use: grad_norm}]", "trainer.zero=0", "model.dtype=bfloat16"],
         "must see the gradients before an update"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_recipe(load_recipe("quickstart", changes))


@pytest.mark.parametrize(
    "changes",
    [
        ["stabilizers=[{use: ema, with: {votes: false}}, restore, {use: kl}]"],
        ["stabilizers=[ema]", UNTRAINED],
        [UNTRAINED, "rollout.train_per_prompt=8"],
        ["trainer.backend=deepspeed", "trainer.zero=0", "stabilizers=[fisher, grad_norm, restore]"],
        ["trainer.backend=deepspeed", "trainer.zero=2", "stabilizers=[{use: ema, with: {votes: false}}, restore]"],
        ["trainer.backend=deepspeed", "trainer.zero=3", "stabilizers=[kl]"],
    ],
)
def test_recipes_that_can_be_pass_without_a_finding(changes: list[str]) -> None:
    recipe = load_recipe("quickstart", changes)
    assert lint_recipe(recipe, check_recipe(recipe).reward) == []
