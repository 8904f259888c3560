"""Stochastic restore: after every update a few entries go back to the start model (CoTTA, arXiv 2203.13591).

    theta_j <- theta_j(start) with probability p, and the moments of entry j <- 0

A constant drift of d per update then ends at a mean displacement of d (1 - p) / p instead of growing without bound. The entries
are a function of (run seed, step, update, parameter name): the same after a resume and on any number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ttrl.hooks import START, Part, Trained, Update
from ttrl.metrics import MetricSet
from ttrl.seeds import derive

if TYPE_CHECKING:
    from torch import Tensor

Indices = npt.NDArray[np.int64]


class StochasticRestore:
    """`{use: restore, with: {p: 0.001}}`. Keeps the start weights: one more copy of what is trained, in float32.

    LoRA: the product of its factors would jump if one were restored without the other, so the unit is a component of the rank:
    its row of A and its column of B go back together. `forget: both` zeroes both moments of Adam: the entry then moves up to 6.6
    times as fast as `lr` (12 updates later), because the bias correction belongs to the whole tensor. `forget: first` keeps the
    scale of the gradient and avoids that.
    """

    needs: frozenset[str] = frozenset({START})

    def __init__(self, *, p: float = 0.001, forget: Literal["both", "first"] = "both") -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"restore needs a probability p in [0, 1], got {p}")
        self._p = p
        self._forget = None if forget == "both" else frozenset({"exp_avg"})

    def after_update(self, update: Update, trained: Trained, metrics: MetricSet) -> None:
        if self._p == 0.0 or update.grad_norm == 0.0:  # without a signal nothing drifted
            return
        for part in trained:
            if self._p == 1.0:
                part.restore(forget=self._forget)
            else:
                part.restore(_on(part.weights, drawn(part, self._p, update)), forget=self._forget)
            count = part.weights.numel()
            metrics.mean("train/restored", part.restored / count if count else 0.0, count)


def drawn(part: Part, p: float, update: Update) -> Indices:
    """Entries of the slice to put back, ascending."""
    address = (update.seed, "restore", update.step, update.number)
    rank_axis = lora_axis(part)
    if rank_axis is None:
        found = positions(derive(*address, part.name), p, part.first + part.weights.numel())
    else:
        pair = part.name.replace(".lora_A.", ".lora.").replace(".lora_B.", ".lora.")
        components = positions(derive(*address, pair), p, part.shape[rank_axis])
        width = part.shape[1]
        if rank_axis == 0:  # A [rank, in]
            found = (components[:, None] * width + np.arange(width)).reshape(-1)
        else:  # B [out, rank]
            found = (np.arange(part.shape[0])[:, None] * width + components).reshape(-1)
    inside = found[(found >= part.first) & (found < part.first + part.weights.numel())]
    return np.asarray(inside - part.first, np.int64)


def lora_axis(part: Part) -> int | None:
    """The axis that counts rank components, None for a parameter that is no LoRA factor."""
    if len(part.shape) != 2:
        return None
    return 0 if ".lora_A." in part.name else 1 if ".lora_B." in part.name else None


def positions(seed: int, p: float, total: int) -> Indices:
    """Ascending indices below `total`, each there with probability p, independently: 0 < p < 1.

    The distance to the next one is geometric, so this takes p * total random numbers and not `total`. A smaller `total` gives a
    prefix.
    """
    assert 0.0 < p < 1.0
    bits = np.random.Philox(key=seed)
    found: list[Indices] = []
    last = -1
    while last < total:
        count = int(1.1 * p * (total - last)) + 16
        uniform = ((bits.random_raw(count) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53  # in (0, 1]
        gaps = np.floor(np.log(uniform) / np.log1p(-p)).astype(np.int64)
        found.append(last + np.cumsum(gaps + 1))
        last = int(found[-1][-1])
    every = np.concatenate(found) if found else np.zeros(0, np.int64)
    return every[every < total]


def _on(like: Tensor, indices: Indices) -> Tensor:
    import torch

    return torch.as_tensor(indices, device=like.device)
