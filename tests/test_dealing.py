"""Micro-batches dealt to ranks, padded to a common shape, and buckets that several ranks make together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_torch import samples, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from ttrl.model.buckets import follow_buckets, pack_buckets
from ttrl.trainers.dealing import computed_tokens, deal, split
from ttrl.trainers.forward import CompletionScorer
from ttrl.trainers.lockstep import PADDING_TOKENS, common, padded, shapes
from ttrl.trainers.packing import pack
from ttrl.types import PackedBatch

GROUPS = ((5, 3, 1, 4), (2, 6, 6), (1, 1), (8,))


def cost(batch: PackedBatch) -> int:
    return computed_tokens(batch, shared_prompt=True)


def rows(batches: list[PackedBatch]) -> list[tuple[bytes, ...]]:
    """Every completion with its prompt and its numbers, sorted: what must neither be lost nor changed."""
    found = []
    for batch in batches:
        at = 0
        for segment in batch.segments:
            for length in segment.lengths:
                part = slice(at, at + int(length))
                at += int(length)
                flat = (batch.completion_ids, batch.sampler_logprobs, batch.advantages, batch.weights)
                found.append((segment.prompt_ids.tobytes(), *(array[part].tobytes() for array in flat)))
        assert at == len(batch.completion_ids)
    return sorted(found)


@given(st.integers(1, 5), st.sampled_from([1, 20, 30, 10_000]), st.integers(0, 3))
def test_dealing_loses_nothing_and_keeps_turns_full(ranks: int, budget: int, seed: int) -> None:
    batches = pack(samples(GROUPS, seed=seed), budget)
    dealt = deal(batches, ranks, cost)
    assert rows([b for part in dealt for b in part]) == rows(batches)
    again = deal(batches, ranks, cost)
    assert [list(map(cost, part)) for part in again] == [list(map(cost, part)) for part in dealt]
    counts = [len(part) for part in dealt]
    assert max(counts) - min(counts) <= 1 and min(counts) >= 1
    assert all(b.tokens_in_step == batches[0].tokens_in_step for part in dealt for b in part)


def test_dealing_balances_cost() -> None:
    batches = pack(samples([(n,) for n in range(1, 25)]), 1)
    load = [sum(map(cost, part)) for part in deal(batches, 4, cost)]
    assert max(load) <= 1.1 * min(load)
    assert deal([], 3, cost) == [[], [], []]


def test_splitting_keeps_order_and_stops_at_one_row() -> None:
    whole = pack(samples(GROUPS), 10_000)[0]
    one, two = split(whole)
    assert np.array_equal(np.concatenate([one.completion_ids, two.completion_ids]), whole.completion_ids)
    assert [len(s.lengths) for s in (*one.segments, *two.segments)] == [len(s.lengths) for s in whole.segments]
    group = pack(samples([(4, 3, 2)]), 10_000)[0]
    first, second = split(group)
    assert [list(p.segments[0].lengths) for p in (first, second)] == [[4], [3, 2]]
    (alone,) = split(first)
    assert alone is first
    assert [len(part) for part in deal([first], 3, cost)] == [1, 0, 0]


def test_cost_counts_prompts_as_often_as_they_are_computed() -> None:
    batch = pack(samples(((5, 3), (2,))), 10_000)[0]  # prompts of 4 and 7 tokens
    assert computed_tokens(batch, shared_prompt=True) == 4 + 8 + 7 + 2
    assert computed_tokens(batch, shared_prompt=False) == 2 * 4 + 8 + 7 + 2


def test_padding_gives_every_rank_the_same_shape() -> None:
    batches = pack(samples(GROUPS), 25)
    mine, other = shapes(batches[:3], 3), shapes(batches[3:], 3)
    assert other[1:].tolist() == [[0, 0, 0], [0, 0, 0]]
    for turn, shape in enumerate(common(np.maximum(mine, other))):
        for part in (batches[:3], batches[3:]):
            held = part[turn] if turn < len(part) else None
            whole = padded(held, shape.segments)
            assert len(whole.segments) == shape.segments
            assert len(whole.completion_ids) <= shape.tokens
            own = 0 if held is None else len(held.completion_ids)
            assert held is None or np.array_equal(whole.completion_ids[:own], held.completion_ids)
            assert not whole.weights[own:].any() and not whole.advantages[own:].any()
            assert len(whole.completion_ids) == len(whole.weights) == sum(int(s.lengths.sum()) for s in whole.segments)


@pytest.mark.parametrize("shared", [True, False])
def test_modules_run_equally_often_for_equal_shapes(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one token has no second phase, and few tokens few chunks of logits: both must run all the same."""
    from ttrl.trainers import forward

    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 45 * 4)
    model = tiny_llama()
    scorer = CompletionScorer(model, 1.0, shared_prefix=shared)
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
    batches = [pack(samples(groups), 10_000)[0] for groups in (((1,), (1,)), ((9, 3, 2), (4,)), ((2,),))]
    shape = common(np.max([shapes([b], 1) for b in batches], axis=0))[0]
    seen = []
    for batch in batches:
        calls.clear()
        plain = scorer(batch).logprobs
        alone = dict(calls)
        calls.clear()
        same = scorer(padded(batch, shape.segments), shape).logprobs[: len(plain)]
        torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-5)
        assert shape.tokens > PADDING_TOKENS
        seen.append(dict(calls))
        assert all(calls[name] >= count for name, count in alone.items())
    assert seen[0] == seen[1] == seen[2]


@given(st.lists(st.integers(0, 70), max_size=30), st.integers(1, 300))
def test_following_ends_a_bucket_where_packing_does(sizes: list[int], bucket_bytes: int) -> None:
    tensors = [
        (str(i), torch.zeros(size, dtype=torch.bfloat16 if i % 3 else torch.float32)) for i, size in enumerate(sizes)
    ]
    taken = {"pack": [], "follow": []}

    def counted(who: str):
        for i, item in enumerate(tensors):
            taken[who].append(i)
            yield item

    ends = {
        who: [len(taken[who]) for _ in function(counted(who), bucket_bytes)]
        for who, function in (("pack", pack_buckets), ("follow", follow_buckets))
    }
    assert ends["pack"] == ends["follow"]
