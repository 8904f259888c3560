"""Micro-batches: every sample once, bounded size, one denominator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from helpers_torch import prompt, sample, samples
from hypothesis import given
from hypothesis import strategies as st

from ttrl.trainers.packing import pack, split_updates
from ttrl.types import PackedBatch, Sample, Segment

GROUPS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=5)
BUDGETS = st.integers(1, 200)


def fingerprint(prompt_ids: np.ndarray, *arrays: np.ndarray) -> tuple[bytes, ...]:
    return (prompt_ids.tobytes(), *(array.tobytes() for array in arrays))


def rows_of(batch: PackedBatch) -> list[tuple[Segment, slice]]:
    rows, start = [], 0
    for segment in batch.segments:
        for length in segment.lengths.tolist():
            rows.append((segment, slice(start, start + length)))
            start += length
    assert start == len(batch.completion_ids)
    return rows


def contents(batches: Sequence[PackedBatch]) -> Counter[tuple[bytes, ...]]:
    return Counter(
        fingerprint(
            segment.prompt_ids, batch.completion_ids[part], batch.sampler_logprobs[part], batch.advantages[part],
            batch.weights[part],
        )
        for batch in batches
        for segment, part in rows_of(batch)
    )  # fmt: skip


def expected(of: Sequence[Sample]) -> Counter[tuple[bytes, ...]]:
    return Counter(fingerprint(s.prompt_ids, s.completion_ids, s.sampler_logprobs, s.advantages, s.weights) for s in of)


def cost(batch: PackedBatch) -> int:
    """Tokens that go through the model, padding included."""
    return sum(len(s.prompt_ids) + len(s.lengths) * int(s.lengths.max()) for s in batch.segments)


@given(GROUPS, BUDGETS)
def test_every_sample_is_packed_exactly_once_with_all_its_numbers(groups: list[list[int]], budget: int) -> None:
    items = samples(groups)
    assert contents(pack(items, budget)) == expected(items)


@given(GROUPS, BUDGETS)
def test_micro_batches_stay_within_the_budget_unless_one_sample_is_larger(groups: list[list[int]], budget: int) -> None:
    for batch in pack(samples(groups), budget):
        assert cost(batch) <= budget or sum(len(s.lengths) for s in batch.segments) == 1


@given(GROUPS, BUDGETS)
def test_all_micro_batches_share_one_denominator(groups: list[list[int]], budget: int) -> None:
    items = samples(groups)
    total = sum(float(item.weights.sum()) for item in items)
    batches = pack(items, budget)
    assert {batch.tokens_in_step for batch in batches} == {total}
    assert sum(float(batch.weights.sum()) for batch in batches) == pytest.approx(total)
    assert {batch.tokens_in_step for batch in pack(items, budget, tokens_in_step=123.0)} == {123.0}


@given(GROUPS)
def test_with_room_each_prompt_is_computed_once(groups: list[list[int]]) -> None:
    batches = pack(samples(groups), 100_000)
    assert len(batches) == 1
    assert len(batches[0].segments) == len(groups)


@given(GROUPS, BUDGETS)
def test_two_neighbouring_segments_of_one_group_would_not_have_fitted_together(
    groups: list[list[int]], budget: int
) -> None:
    segments = [segment for batch in pack(samples(groups), budget) for segment in batch.segments]
    for first, second in pairwise(segments):
        if first.prompt_ids.tobytes() == second.prompt_ids.tobytes():
            longest = int(max(first.lengths.max(), second.lengths.max()))
            assert len(first.prompt_ids) + (len(first.lengths) + 1) * longest > budget


def test_golden_layout() -> None:
    # Prompt of 4, completions of 5, 3, 1: 4 + 3 x 5 = 19 fits into 20, so with the next group (7 + 2) it needs a second batch
    items = samples(((3, 5, 1), (2,)))
    batches = pack(items, 20)
    assert [[segment.lengths.tolist() for segment in batch.segments] for batch in batches] == [[[5, 3, 1]], [[2]]]
    # In 14 only two rows fit beside the prompt (4 + 2 x 5), and the third goes with the next group (4 + 1 + 7 + 2)
    batches = pack(items, 14)
    assert [[segment.lengths.tolist() for segment in batch.segments] for batch in batches] == [[[5, 3]], [[1], [2]]]


def test_nothing_gives_nothing() -> None:
    assert pack([], 100) == []
    assert split_updates([], 3) == []


def test_samples_of_a_group_need_not_be_neighbours() -> None:
    a, b = prompt("a", 4), prompt("b", 4)
    items = [sample(a, 3, 1), sample(b, 3, 2), sample(a, 2, 3), sample(b, 2, 4)]
    (batch,) = pack(items, 1000)
    assert [segment.lengths.tolist() for segment in batch.segments] == [[3, 2], [3, 2]]


@given(GROUPS, st.integers(1, 8))
def test_updates_keep_groups_whole_and_in_order(groups: list[list[int]], updates: int) -> None:
    items = samples(groups)
    parts = split_updates(items, updates)
    assert [id(item) for part in parts for item in part] == [id(item) for item in items]
    assert len(parts) == min(updates, len(groups))
    names = [{item.group for item in part} for part in parts]
    assert sum(len(part) for part in names) == len(set().union(*names)) == len(groups)
    assert max(len(part) for part in names) - min(len(part) for part in names) <= 1
