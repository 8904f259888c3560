"""Samples -> micro-batches of bounded size, each prompt once per segment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ttrl.types import PackedBatch, Sample, Segment


def pack(
    samples: Sequence[Sample],
    tokens_per_microbatch: int,
    tokens_in_step: float | None = None,
    *,
    shared_prompt: bool = True,
) -> list[PackedBatch]:
    """Micro-batches that hold at most `tokens_per_microbatch` computed tokens.

    A segment costs prompt + rows x longest completion; with `shared_prompt` false, rows x (prompt + longest completion).

    A group that is too large is split, its prompt computed once per part; one sample larger than the budget is a micro-batch of
    its own. Rows are sorted by length, so padding stays small. The denominator is the weight of all samples, unless given.
    """
    if tokens_in_step is None:
        tokens_in_step = float(sum(float(sample.weights.sum()) for sample in samples))
    batches: list[list[list[Sample]]] = []
    room = 0
    for rows in _segments(samples, tokens_per_microbatch, shared_prompt):
        cost = _cost(rows, shared_prompt)
        if not batches or cost > room:
            batches.append([])
            room = tokens_per_microbatch
        batches[-1].append(rows)
        room -= cost
    return [_batch(segments, tokens_in_step) for segments in batches]


def split_updates(samples: Sequence[Sample], updates: int) -> list[list[Sample]]:
    """Whole groups dealt to `updates` parts of nearly equal size, in order; empty parts are left out."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    parts = np.array_split(np.arange(len(groups)), updates)
    members = list(groups.values())
    return [[sample for index in part for sample in members[index]] for part in parts if len(part)]


def _segments(samples: Sequence[Sample], budget: int, shared_prompt: bool) -> list[list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    segments: list[list[Sample]] = []
    for rows in groups.values():
        current: list[Sample] = []
        for sample in sorted(rows, key=lambda s: -len(s.completion_ids)):
            if current and _cost([*current, sample], shared_prompt) > budget:
                segments.append(current)
                current = []
            current.append(sample)
        segments.append(current)
    return segments


def _cost(rows: Sequence[Sample], shared_prompt: bool) -> int:
    prompts = 1 if shared_prompt else len(rows)
    return prompts * len(rows[0].prompt_ids) + len(rows) * max(len(row.completion_ids) for row in rows)


def _batch(segments: Sequence[Sequence[Sample]], tokens_in_step: float) -> PackedBatch:
    rows = [sample for segment in segments for sample in segment]
    return PackedBatch(
        segments=tuple(
            Segment(
                prompt_ids=segment[0].prompt_ids,
                lengths=np.asarray([len(sample.completion_ids) for sample in segment], np.int32),
                images=segment[0].images,
            )
            for segment in segments
        ),
        completion_ids=np.concatenate([row.completion_ids for row in rows]),
        sampler_logprobs=np.concatenate([row.sampler_logprobs for row in rows]),
        advantages=np.concatenate([row.advantages for row in rows]),
        weights=np.concatenate([row.weights for row in rows]),
        tokens_in_step=tokens_in_step,
        extras={name: np.concatenate([row.extras[name] for row in rows]) for name in rows[0].extras},
    )


def row_index(batch: PackedBatch) -> npt.NDArray[np.int64]:
    """[N] the row a token belongs to, counted from 0 through all segments."""
    lengths = np.concatenate([segment.lengths for segment in batch.segments])
    return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
