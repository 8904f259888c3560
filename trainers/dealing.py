"""Which rank gets which micro-batch. A pure function of the micro-batches and the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ttrl.types import PackedBatch, Segment

Cost = Callable[[PackedBatch], int]


def computed_tokens(batch: PackedBatch, *, shared_prompt: bool) -> int:
    """What a micro-batch costs: tokens that go through the model."""
    return sum(
        (1 if shared_prompt else len(segment.lengths)) * len(segment.prompt_ids) + int(segment.lengths.sum())
        for segment in batch.segments
    )


def deal(batches: Sequence[PackedBatch], ranks: int, cost: Cost) -> list[list[PackedBatch]]:
    """[ranks] lists of nearly equal cost and length.

    Ranks meet after each micro-batch, so micro-batches of one turn should cost the same: they are dealt largest first, and within
    a turn the largest goes to the rank with the least so far. When there are fewer than ranks, the largest ones are split.
    """
    pieces = list(batches)
    while 0 < len(pieces) < ranks:
        at = max(
            range(len(pieces)), key=lambda i: (sum(len(s.lengths) for s in pieces[i].segments) > 1, cost(pieces[i]))
        )
        halves = split(pieces[at])
        if len(halves) == 1:
            break
        pieces[at : at + 1] = halves
    order = sorted(range(len(pieces)), key=lambda i: (-cost(pieces[i]), i))
    dealt: list[list[PackedBatch]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for start in range(0, len(order), ranks):
        least = sorted(range(ranks), key=lambda rank: (load[rank], rank))
        for rank, index in zip(least, order[start : start + ranks], strict=False):
            dealt[rank].append(pieces[index])
            load[rank] += cost(pieces[index])
    return dealt


def split(batch: PackedBatch) -> list[PackedBatch]:
    """Two micro-batches with the same rows in the same order; the one that was given when it has a single row."""
    rows = [(i, int(length)) for i, segment in enumerate(batch.segments) for length in segment.lengths]
    if len(rows) == 1:
        return [batch]
    if len(batch.segments) > 1:
        cut = sum(len(segment.lengths) for segment in batch.segments[: len(batch.segments) // 2])
    else:
        cut = len(rows) // 2
    return [_rows(batch, rows, 0, cut), _rows(batch, rows, cut, len(rows))]


def _rows(batch: PackedBatch, rows: Sequence[tuple[int, int]], first: int, last: int) -> PackedBatch:
    start, count = (sum(length for _, length in part) for part in (rows[:first], rows[first:last]))
    kept = rows[first:last]
    segments = tuple(
        Segment(
            prompt_ids=batch.segments[i].prompt_ids,
            lengths=np.asarray([length for owner, length in kept if owner == i], np.int32),
            images=batch.segments[i].images,
        )
        for i in dict.fromkeys(owner for owner, _ in kept)
    )
    part = slice(start, start + count)
    return replace(
        batch, segments=segments, completion_ids=batch.completion_ids[part], sampler_logprobs=batch.sampler_logprobs[part],
        advantages=batch.advantages[part], weights=batch.weights[part],
        extras={name: values[part] for name, values in batch.extras.items()},
    )  # fmt: skip
