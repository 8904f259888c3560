"""Sums over rows (whole completions) of flat per-token tensors, and the numbers every ratio-based loss reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttrl.metrics import MetricSet
from ttrl.protocols import ForwardOut, TensorBatch
from ttrl.trainers.shapers.base import DRAWN

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Keeps exp finite when trainer and sampler disagree wildly; metrics show the raw value."""


def log_ratios(out: ForwardOut, batch: TensorBatch) -> Tensor:
    """[N] trainer minus sampler, constant in the gradient."""
    return out.logprobs.detach() - batch.sampler_logprobs


def drawn(batch: TensorBatch) -> Tensor:
    """[N] bool: tokens that the sampler drew. A mask takes the weight of a token, not its place in the probability of the row."""
    remembered = batch.extras.get(DRAWN)
    return (batch.weights if remembered is None else remembered) > 0


def row_sums(values: Tensor, batch: TensorBatch) -> Tensor:
    """[N] -> [N]: to every token the sum over the drawn tokens of its row."""
    kept = values * drawn(batch)
    sums = kept.new_zeros(int(batch.rows.max()) + 1).index_add(0, batch.rows, kept)
    return sums[batch.rows]


def row_means(values: Tensor, batch: TensorBatch) -> Tensor:
    """[N] -> [N]: to every token the mean over the drawn tokens of its row."""
    return row_sums(values, batch) / row_sums(values.new_ones(values.shape), batch).clamp(min=1.0)


def ratio_metrics(raw: Tensor, batch: TensorBatch, **means: Tensor) -> MetricSet:
    """train/log_ratio_max (max, raw) and train/NAME (mean over tokens with a weight) of each [N] tensor given."""
    metrics, counted = MetricSet(), batch.weights > 0
    tokens = float(counted.sum())
    if tokens:
        metrics.max("train/log_ratio_max", float(raw[counted].abs().max()))
        for name, values in means.items():
            metrics.mean(f"train/{name}", float(values.detach()[counted].float().mean()), tokens)
    return metrics
