"""Ranks that run the same modules the same number of times, although their micro-batches differ.

Under ZeRO-3 every module call of every rank is a collective: one prompt more, or one chunk of the vocabulary projection more, and
the ranks wait for each other for ever. So each micro-batch is padded to the largest one of its turn. Where one of a turn has pictures,
every prompt of the turn goes through the vision tower, also under the other stages: gradients of all ranks meet in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ttrl.types import IntArray, PackedBatch, Segment

PADDING_TOKENS = 2
"""Completion length of a segment of padding: enough for both phases of the shared prefix."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a micro-batch decides how often modules run."""

    segments: int
    tokens: int
    """Completion tokens, padding included."""
    pictures: bool = False
    """Prompts without a picture run the vision tower too, to no effect."""


def shapes(batches: Sequence[PackedBatch], turns: int) -> IntArray:
    """[turns, 3] segments, completion tokens and segments with pictures of this rank's micro-batches; zeros where it has none."""
    found = np.zeros((turns, 3), np.int32)
    for turn, batch in enumerate(batches):
        shown = sum(bool(segment.images) for segment in batch.segments)
        found[turn] = len(batch.segments), len(batch.completion_ids), shown
    return found


def common(largest: IntArray) -> list[Shape]:
    """The shape of each turn, from the element-wise maximum over the ranks.

    The rank with the most segments may have the fewest tokens, so what padding could add is added to the tokens.
    """
    return [
        Shape(int(segments), int(tokens) + PADDING_TOKENS * int(segments), bool(shown))
        for segments, tokens, shown in largest
    ]


def padded(batch: PackedBatch | None, segments: int) -> PackedBatch:
    """The batch with segments of padding behind its own; their weight is zero."""
    held = () if batch is None else batch.segments
    extra = segments - len(held)
    if batch is not None and extra <= 0:
        return batch
    filler = Segment(prompt_ids=np.zeros(1, np.int32), lengths=np.full(1, PADDING_TOKENS, np.int32))
    zeros = np.zeros(extra * PADDING_TOKENS, np.float32)
    fillers, ids = (filler,) * extra, zeros.astype(np.int32)
    if batch is None:
        return PackedBatch(
            segments=fillers, completion_ids=ids, sampler_logprobs=zeros, advantages=zeros, weights=zeros, tokens_in_step=1.0
        )  # fmt: skip
    return replace(
        batch,
        segments=(*held, *fillers),
        completion_ids=np.concatenate([batch.completion_ids, ids]),
        sampler_logprobs=np.concatenate([batch.sampler_logprobs, zeros]),
        advantages=np.concatenate([batch.advantages, zeros]),
        weights=np.concatenate([batch.weights, zeros]),
        extras={name: np.concatenate([values, zeros]) for name, values in batch.extras.items()},
    )
