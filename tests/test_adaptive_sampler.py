"""The adaptive sampler: the first votes of the flat sampler, as many as the rule wants, and a trained subset of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from helpers import FakeTokenizer, boxed, context, make_prompt

from ttrl.config import load_recipe
from ttrl.errors import ConfigError
from ttrl.parts import assemble
from ttrl.rewards.majority import MajorityVote
from ttrl.rollout.adaptive import AdaptiveSampler
from ttrl.rollout.flat import FlatSampler
from ttrl.rollout.pool import LocalPool
from ttrl.rollout.scripted import Script, ScriptedEngine
from ttrl.setup import build_sampler, check_recipe
from ttrl.types import Group, Rollout, SamplingSpec

SPEC = SamplingSpec(max_new_tokens=30)
LAWS = {"sure": [1.0], "clear": [0.8, 0.1, 0.1], "contested": [0.45, 0.4, 0.15], "tie": [0.5, 0.5]}
SCRIPT = Script({name: dict(zip(boxed(range(len(p))), p, strict=True)) for name, p in LAWS.items()})
PROMPTS = [make_prompt(name, name) for name in LAWS]
REWARD = MajorityVote()


def classify(rollouts: Sequence[Rollout]) -> list[int]:
    return REWARD.reader.classes(REWARD.reader.read(rollouts))[0]


def pool() -> LocalPool:
    return LocalPool(ScriptedEngine(SCRIPT, FakeTokenizer()))  # type: ignore[arg-type]


def adaptive(votes: int = 32, trained: int = 4, seed: int = 0, **options: object) -> list[Group]:
    return AdaptiveSampler(votes, trained, classify, **options)(PROMPTS, pool(), SPEC, seed)  # type: ignore[arg-type]


def flat(votes: int = 32, trained: int = 4, seed: int = 0) -> list[Group]:
    return FlatSampler(votes, trained, classify)(PROMPTS, pool(), SPEC, seed)


def texts(group: Group) -> list[str]:
    return [rollout.text for rollout in group.rollouts]


@pytest.mark.parametrize("rule", ["lossless", "certified", "esc", "adaptive_consistency"])
@pytest.mark.parametrize("seed", range(5))
def test_the_votes_are_the_first_ones_of_the_flat_sampler(rule: str, seed: int) -> None:
    for few, all_ in zip(adaptive(rule=rule, seed=seed), flat(seed=seed), strict=True):
        assert few.prompt is all_.prompt
        assert texts(few) == texts(all_)[: len(few.rollouts)]
        assert [rollout.index for rollout in few.rollouts] == list(range(len(few.rollouts)))
        assert few.trainable.shape == (len(few.rollouts),) and few.trainable.sum() == 4


@pytest.mark.parametrize("seed", range(20))
def test_lossless_keeps_every_label_and_every_abstention(seed: int) -> None:
    saved = 0
    for few, all_ in zip(adaptive(seed=seed, wave=2), flat(seed=seed), strict=True):
        assert REWARD(few, context()).label == REWARD(all_, context()).label
        saved += len(all_.rollouts) - len(few.rollouts)
    assert saved > 0


def test_waves_are_shared_by_the_open_prompts_only() -> None:
    class Counting(LocalPool):
        waves: list[list[str]] = []  # noqa: RUF012

        def generate(self, requests):
            self.waves.append([request.prompt.id for request in requests])
            return super().generate(requests)

    counting = Counting(ScriptedEngine(SCRIPT, FakeTokenizer()))  # type: ignore[arg-type]
    AdaptiveSampler(32, 4, classify, wave=3)(PROMPTS, counting, SPEC, 0)
    first, *later = counting.waves
    assert [first.count(name) for name in LAWS] == [17] * 4  # before 17 of 32 votes nothing can be decided
    assert all("sure" not in wave for wave in later)
    assert sum(wave.count("tie") for wave in counting.waves) <= 32


def test_never_fewer_votes_than_are_trained_on_and_never_more_than_the_budget() -> None:
    assert len(adaptive(trained=30, rule="adaptive_consistency")[0].rollouts) == 30
    assert all(len(group.rollouts) == 32 and group.trainable.all() for group in adaptive(trained=32))


def test_the_trained_subset_is_that_of_the_flat_sampler_as_far_as_it_was_drawn() -> None:
    for seed in range(30):
        for few, all_ in zip(adaptive(seed=seed), flat(seed=seed), strict=True):
            drawn = len(few.rollouts)
            assert not (all_.trainable[:drawn] & ~few.trainable).any()


def test_every_index_is_trained_on_equally_often() -> None:
    hits = np.sum([adaptive(seed=seed)[0].trainable[:17] for seed in range(300)], axis=0)
    assert np.all(np.abs(hits - 300 * 4 / 17) < 4 * np.sqrt(300 * 4 / 17))


def test_options_are_checked_before_a_model_is_loaded() -> None:
    for change, words in [
        ("{use: adaptive, with: {rule: losless}}", "lossless"),
        ("{use: adaptive, with: {wave: 0}}", "wave must be at least 1"),
        ("{use: adaptive, with: {rule: certified, epsilon: 2.0}}", "epsilon must lie between 0 and 1"),
        ("{use: adaptive, with: {waves: 8}}", "Did you mean 'wave'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            check_recipe(load_recipe("quickstart", [f"rollout.sampler={change}"]))


def test_thresholds_of_the_reward_reach_the_sampler() -> None:
    recipe = load_recipe(
        "quickstart", ["rollout.sampler=adaptive", "reward.with.min_share=0.9", "rollout.train_per_prompt=2"]
    )
    checked = check_recipe(recipe)
    sampler = build_sampler(recipe, checked.reward, checked.reader)
    plain = AdaptiveSampler(16, 2, classify)
    eleven = [0] * 11
    assert plain.more(eleven) == 0
    assert sampler.more(eleven) > 0  # type: ignore[attr-defined]  # five other votes would end below 0.9


@pytest.mark.slow
def test_on_the_quickstart_lossless_changes_no_label_and_uses_fewer_tokens() -> None:
    """The real tiny model: same seeds, 24 prompts of the quickstart, 16 votes of which 8 are trained on."""
    changes = ["rollout.train_per_prompt=8", "data.limit=24", "data.prompts_per_step=24", "eval.labels=null",
               "eval.heldout=null", "eval.limit=null"]  # fmt: skip
    samplers = {"flat": "flat", "adaptive": "{use: adaptive, with: {wave: 2}}"}
    parts = {
        use: assemble(check_recipe(load_recipe("quickstart", [*changes, f"rollout.sampler={sampler}"])), lambda: None)
        for use, sampler in samplers.items()
    }
    labels, tokens = {}, {}
    for use, part in parts.items():
        prompts = [part.prompts[identifier] for identifier in part.source.batch(0)]
        groups = part.sampler(prompts, part.pool, part.spec, 7)
        labels[use] = [part.reward(group, context()).label for group in groups]
        tokens[use] = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    assert labels["adaptive"] == labels["flat"]
    assert len(set(labels["flat"])) > 10
    assert tokens["adaptive"] < 0.95 * tokens["flat"]


def test_the_shipped_recipe_is_valid() -> None:
    assert load_recipe("lab/adaptive").rollout.sampler.use == "adaptive"
    check_recipe(load_recipe("lab/adaptive"))
