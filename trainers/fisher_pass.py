"""Squared gradients of the log-prob of single rollouts: what a Fisher diagonal is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ttrl.trainers.packing import row_index
from ttrl.types import PackedBatch


def squared_gradients(
    logprobs: Callable[[PackedBatch], Tensor], batches: Sequence[PackedBatch], trained: Mapping[str, Tensor], rollouts: int
) -> tuple[dict[str, Tensor], int]:  # fmt: skip
    """Per parameter [n] the sum over rollouts of (gradient of the sum of log-probs)^2, and their tokens; `.grad` stays as it is.

    `logprobs` maps a batch to its [N] log-probs. Rollouts are taken in the order of the batches, at most `rollouts` of them.
    """
    squares = {name: torch.zeros(p.numel(), dtype=torch.float32, device=p.device) for name, p in trained.items()}
    tokens = 0
    for row in islice(rows(batches), rollouts):
        total = logprobs(row).sum()
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        for square, gradient in zip(squares.values(), gradients, strict=True):
            if gradient is not None:
                square.addcmul_(gradient.reshape(-1), gradient.reshape(-1))
        tokens += len(row.completion_ids)
    return squares, tokens


def rows(batches: Sequence[PackedBatch]) -> Iterator[PackedBatch]:
    """Every rollout as a batch of its own."""
    for batch in batches:
        index = row_index(batch)
        owners = [segment for segment in batch.segments for _ in segment.lengths]
        for row, owner in enumerate(owners):
            inside = np.flatnonzero(index == row)
            segment = replace(owner, lengths=np.asarray([len(inside)], np.int32))
            yield PackedBatch(
                segments=(segment,), completion_ids=batch.completion_ids[inside],
                sampler_logprobs=batch.sampler_logprobs[inside], advantages=batch.advantages[inside],
                weights=batch.weights[inside], tokens_in_step=batch.tokens_in_step,
            )  # fmt: skip
