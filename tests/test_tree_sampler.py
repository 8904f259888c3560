"""The tree sampler: where it forks, what leaves share, what they are drawn from, and what all of it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FakeTokenizer, boxed, make_prompt, make_rollout, make_scored
from helpers_torch import EOS, prompt, section
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from ttrl.config import load_recipe
from ttrl.errors import ConfigError, EngineError
from ttrl.journal import Progress
from ttrl.rollout.engines import hf
from ttrl.rollout.flat import FlatSampler
from ttrl.rollout.pool import LocalPool
from ttrl.rollout.scripted import Script, ScriptedEngine
from ttrl.rollout.tree import TreeSampler, fork_points
from ttrl.seeds import derive
from ttrl.setup import check_recipe
from ttrl.stepmetrics import reward_metrics, rollout_metrics
from ttrl.types import Finish, Fork, Group, Request, Rollout, SamplingSpec, WeightStamp, tree_roots

SPEC = SamplingSpec(max_new_tokens=24, temperature=0.9)
SHAPE = {"trees": 2, "forks": 2, "branches": 2, "min_gap": 2}
PROMPTS = [prompt("a", 5), prompt("b", 9)]


def classify(rollouts: Sequence[Rollout]) -> list[int]:
    raise AssertionError("the tree sampler has no business with answers")


def sampler(trained: int = 2, **options: Any) -> TreeSampler:
    shape = {**SHAPE, **options}
    leaves = shape["trees"] * (1 + shape.get("rounds", 1) * shape["forks"] * shape["branches"])
    return TreeSampler(leaves, trained, classify, **shape)


@pytest.fixture(scope="module")
def pool(tiny_model_dir: Path) -> LocalPool:
    return LocalPool(hf(section(tiny_model_dir), lambda: None))


def tokens(groups: Sequence[Group]) -> dict[tuple[str, int], list[int]]:
    return {(r.prompt_id, r.index): r.token_ids.tolist() for group in groups for r in group.rollouts}


def leaf(entropies: Sequence[float], index: int = 0, *, fork: Fork | None = None, stop: bool = False) -> Rollout:
    made = make_rollout("", index, tokens=len(entropies), finish=Finish.STOP if stop else Finish.LENGTH)
    return replace(made, entropy=np.asarray(entropies, np.float32), fork=fork)


def places(tree: Sequence[Rollout], count: int, gap: int = 1) -> list[tuple[int, int]]:
    return [(fork.parent, fork.at) for fork in fork_points(tree, count, gap)]


# where


def test_forks_are_at_the_highest_entropies() -> None:
    assert places([leaf([0.1, 0.9, 0.2, 0.8, 0.3])], 2) == [(0, 1), (0, 3)]
    assert places([leaf([0.5] * 6)], 2) == [(0, 1), (0, 2)]  # of equals the earlier one


def test_never_at_the_first_token_and_never_at_the_one_that_ends() -> None:
    assert places([leaf([0.9, 0.1, 0.2, 0.8])], 3) == [(0, 1), (0, 2), (0, 3)]
    assert places([leaf([0.9, 0.1, 0.2, 0.8], stop=True)], 3) == [(0, 1), (0, 2)]
    for short in ([], [0.7], [0.7, 0.9]):
        assert places([leaf(short, stop=True)], 2) == []


def test_forks_keep_their_distance() -> None:
    assert places([leaf([0.1, 0.2, 0.9, 0.8, 0.7, 0.6])], 2, gap=3) == [(0, 2), (0, 5)]
    assert places([leaf([0.1, 0.2, 0.9, 0.8, 0.7, 0.6])], 2, gap=4) == [(0, 2)]


def test_later_rounds_choose_among_all_leaves_and_keep_away_from_earlier_forks() -> None:
    trunk = leaf([0.1, 0.2, 0.9, 0.8, 0.3, 0.1])
    branch = leaf([0.1, 0.2, 0.7, 0.6, 0.5, 0.4, 0.2], 5, fork=Fork(parent=0, at=2))
    # the trunk may not fork at 2 again, nor the branch at 2: that is the same place. What it took over is the trunk's.
    assert places([trunk, branch], 3) == [(0, 3), (5, 3), (5, 4)]
    assert places([trunk, branch], 3, gap=2) == [(0, 4), (5, 4), (5, 6)]


def test_without_entropies_there_is_nothing_to_go_by() -> None:
    with pytest.raises(EngineError, match="no entropies"):
        fork_points([make_rollout("x", tokens=5)], 1, 1)


# how many


def test_the_leaves_must_be_the_votes() -> None:
    TreeSampler(60, 32, classify, trees=12, forks=2, branches=2)  # the published shape
    for change, words in [
        ("votes_per_prompt=64", r"12 \* \(1 \+ 1 \* 2 \* 2\) = 60 leaves vote; set votes_per_prompt: 60"),
        ("sampler.with.rounds=2", r"12 \* \(1 \+ 2 \* 2 \* 2\) = 108"),
        ("sampler.with.branches=0", "branches must be at least 1"),
        ("sampler.with.forks=-1", "forks must be at least 1"),
        ("sampler.with.rule=lossless", "unknown option 'rule'"),  # stopping rules count independent votes
        ("train_per_prompt=61", r"train_per_prompt \(61\) is larger"),
    ]:
        settings = [
            "rollout.sampler={use: tree, with: {trees: 12, forks: 2, branches: 2}}",
            "rollout.votes_per_prompt=60",
        ]
        with pytest.raises(ConfigError, match=words):
            check_recipe(load_recipe("quickstart", [*settings, f"rollout.{change}"]))
    with pytest.raises(ConfigError, match="option 'trees' is required"):
        check_recipe(load_recipe("quickstart", ["rollout.sampler=tree"]))


class Fixed:
    """A pool whose rollouts run to the limit; every entropy is 0 but those at `peaks`. It keeps the requests."""

    def __init__(self, *peaks: int) -> None:
        self.peaks, self.requests = peaks, list[Request]()

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        self.requests += requests
        made = []
        for item in requests:
            start, count = len(item.prefix), item.spec.max_new_tokens
            entropy = np.isin(np.arange(start, start + count), self.peaks).astype(np.float32)
            made.append(
                Rollout(
                    prompt_id=item.prompt.id, index=item.index, token_ids=np.full(count, item.index, np.int32),
                    logprobs=np.full(count, -item.index, np.float32), entropy=entropy, text="", finish=Finish.LENGTH,
                    weights=WeightStamp(version=0, fingerprint="x"),
                )
            )  # fmt: skip
        return made


def test_forks_around_the_middle_cost_three_fifths_of_the_tokens() -> None:
    # M = 12, N = 2, B = 2, L = 40: M (L + B ((L - 18) + (L - 22))) = 12 * 120 = 1440 of 60 * 40 = 2400 tokens
    pool = Fixed(18, 22)
    groups = TreeSampler(60, 32, classify, trees=12, forks=2, branches=2, min_gap=4)(
        PROMPTS, pool, replace(SPEC, max_new_tokens=40), 0
    )
    for group in groups:
        assert [r.index for r in group.rollouts] == list(range(60))
        assert {r.fork.at for r in group.rollouts if r.fork} == {18, 22}
        assert all(len(r.token_ids) == 40 for r in group.rollouts)
        assert sum(r.drawn for r in group.rollouts) == 1440
        assert group.trainable.shape == (60,) and group.trainable.sum() == 32
    assert all(item.spec.entropy for item in pool.requests)
    metrics = rollout_metrics(groups, 60).values()
    assert (metrics["rollout/tokens"], metrics["rollout/shared_tokens"]) == (2 * 1440, 2 * 960)
    assert metrics["rollout/token_ratio"] == pytest.approx(0.6)
    assert (metrics["rollout/length"], metrics["rollout/trees"]) == (40, 12)
    assert (metrics["rollout/fork_depth"], metrics["rollout/fork_entropy"]) == (pytest.approx(0.5), 1.0)
    scored = [make_scored([i % 3 for i in range(60)], group=group) for group in groups]
    assert reward_metrics(scored, []).values()["reward/answers_per_tree"] == 3  # leaves 0 | 12 to 15 of the first tree
    progress = Progress()
    progress.advance(scored, None, 0.0)
    assert progress.rollout_tokens == 2 * 1440


def test_seeds_are_addressed_by_prompt_and_index_whatever_else_is_in_the_step() -> None:
    both, alone = Fixed(9, 14), Fixed(9, 14)
    sampler()(PROMPTS, both, SPEC, 3)
    sampler()(PROMPTS[1:], alone, SPEC, 3)
    assert {(q.prompt.id, q.index): q.seed for q in both.requests} == {
        (p.id, i): derive(3, p.id, i) for p in PROMPTS for i in range(10)
    }
    assert all(q.seed == derive(3, "b", q.index) for q in alone.requests) and len(alone.requests) == 10


def test_a_tree_without_places_is_completed_by_independent_rollouts() -> None:
    script = Script({"a": {"7": 1.0}, "b": dict(zip(boxed([1, 2]), [0.5, 0.5], strict=True))})
    pool = LocalPool(ScriptedEngine(script, FakeTokenizer()))  # type: ignore[arg-type]
    items = [make_prompt("a", "a"), make_prompt("b", "b")]
    short, long = sampler()(items, pool, replace(SPEC, max_new_tokens=30), 0)
    assert len(short.rollouts) == len(long.rollouts) == 10
    assert tree_roots(short.rollouts) == list(range(10))  # "7" and its end leave no place for a fork
    assert tree_roots(long.rollouts) == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert {r.text for r in long.rollouts} <= set(boxed([1, 2]))
    assert "rollout/trees" not in rollout_metrics([short]).values()


# what is shared, and what is drawn


def check_leaves(folder: Path, groups: Sequence[Group], tokenizer: Any, temperature: float) -> None:
    """Every leaf against one forward pass over its whole text in double precision, and against its parent."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.as_tensor(np.concatenate([group.prompt.token_ids, rollout.token_ids]), dtype=torch.long)
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1]
            table = torch.log_softmax(logits / temperature, dim=-1).numpy()
            np.testing.assert_allclose(
                rollout.logprobs, table[np.arange(len(rollout.token_ids)), rollout.token_ids], atol=1e-5
            )
            assert rollout.entropy is not None
            np.testing.assert_allclose(rollout.entropy, -(np.exp(table) * table).sum(-1), atol=1e-5)
            assert rollout.text == tokenizer.decode(rollout.token_ids.tolist(), skip_special_tokens=True)
            assert len(rollout.token_ids) <= SPEC.max_new_tokens
            assert EOS not in rollout.token_ids[:-1]
            assert (rollout.finish is Finish.STOP) == (rollout.token_ids[-1] == EOS)
            if rollout.fork is not None:
                parent, at = group.rollouts[rollout.fork.parent], rollout.fork.at
                assert 1 <= at < len(parent.token_ids)
                assert rollout.token_ids[:at].tolist() == parent.token_ids[:at].tolist()
                assert rollout.logprobs[:at].tolist() == parent.logprobs[:at].tolist()


@pytest.mark.parametrize("rounds", [1, 2])
def test_shared_numbers_are_those_of_a_full_recomputation(pool: LocalPool, tiny_model_dir: Path, rounds: int) -> None:
    groups = sampler(rounds=rounds)(PROMPTS, pool, replace(SPEC, self_certainty=True), 0)
    check_leaves(tiny_model_dir, groups, pool.tokenizer, SPEC.temperature)
    leaves = [r for group in groups for r in group.rollouts]
    assert sum(r.fork is not None for r in leaves) > len(leaves) // 2
    assert all(r.self_certainty is not None and len(r.self_certainty) == len(r.token_ids) for r in leaves)
    if rounds == 2:
        grown = [r for group in groups for r in group.rollouts if r.fork and group.rollouts[r.fork.parent].fork]
        assert grown  # branches of branches
        assert all(set(tree_roots(group.rollouts)) >= {0, 1} for group in groups)


def test_trunks_are_the_first_votes_of_the_flat_sampler(pool: LocalPool) -> None:
    flat = tokens(FlatSampler(10, 2, classify)(PROMPTS, pool, SPEC, 5))
    tree = tokens(sampler()(PROMPTS, pool, SPEC, 5))
    assert all(tree[p.id, i] == flat[p.id, i] for p in PROMPTS for i in range(2))
    assert any(tree[p.id, i] != flat[p.id, i] for p in PROMPTS for i in range(2, 10))


def test_leaves_do_not_depend_on_workers_or_on_the_order_of_prompts(pool: LocalPool) -> None:
    class OneByOne(LocalPool):
        """As many workers as requests, the last one first."""

        def generate(self, requests: Sequence[Request]) -> list[Rollout]:
            return [pool.generate([request])[0] for request in reversed(requests)][::-1]

    expected = tokens(sampler(rounds=2)(PROMPTS, pool, SPEC, 1))
    assert len({tuple(t) for t in expected.values()}) > 20
    assert tokens(sampler(rounds=2)(PROMPTS[::-1], pool, SPEC, 1)) == expected
    assert tokens(sampler(rounds=2)(PROMPTS, OneByOne(pool._engine), SPEC, 1)) == expected
    assert tokens(sampler(rounds=2)(PROMPTS, pool, SPEC, 2)) != expected


def test_the_token_at_a_fork_is_drawn_from_the_policy(pool: LocalPool, tiny_model_dir: Path) -> None:
    group = sampler(trees=1, forks=1, branches=600)(PROMPTS[:1], pool, replace(SPEC, max_new_tokens=8), 0)[0]
    trunk, *branches = group.rollouts
    fork = branches[0].fork
    assert fork is not None and all(b.fork == fork for b in branches)
    context = np.concatenate([group.prompt.token_ids, trunk.token_ids[: fork.at]])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(context, dtype=torch.long)[None]).logits[0, -1]
    p = torch.softmax(logits / SPEC.temperature, dim=-1).numpy()
    seen = np.bincount([b.token_ids[fork.at] for b in branches], minlength=len(p))
    common = p * len(branches) >= 5
    observed = np.append(seen[common], seen[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * len(branches)
    assert common.sum() >= 3
    assert seen[trunk.token_ids[fork.at]] > 0  # the trunk's own token may come again
    assert chisquare(observed, expected).pvalue > 1e-3


def test_a_scripted_engine_continues_a_prefix_by_what_begins_with_it() -> None:
    engine = ScriptedEngine(Script({"q": {"abc": 0.5, "abd": 0.25, "x": 0.25}}), FakeTokenizer())  # type: ignore[arg-type]
    ids = [ord(c) + 2 for c in "ab"]
    items = [
        Request(prompt=make_prompt("q", "q"), index=i, seed=i, spec=SPEC, prefix=np.asarray(ids, np.int32))
        for i in range(300)
    ]
    made = engine.generate(items)
    assert {r.text for r in made} == {"abc", "abd"} and all(len(r.token_ids) == 2 for r in made)
    assert {round(float(np.exp(r.logprobs[0])), 4) for r in made} == {0.6667, 0.3333}
    assert 0.58 < np.mean([r.text == "abc" for r in made]) < 0.75
    ended = np.asarray([ord("x") + 2, 1], np.int32)
    for prefix in (ended, np.asarray([7], np.int32)):
        with pytest.raises(EngineError, match="begins with the given prefix"):
            engine.generate([replace(items[0], prefix=prefix)])
