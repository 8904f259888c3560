"""How far the trainer's log-probs are from the sampler's on the same tokens, before anything is clipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttrl.metrics import MetricSet

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Keeps exp finite in the mean; the largest difference is reported raw."""


def mismatch(logprobs: Tensor, sampler_logprobs: Tensor) -> MetricSet:
    """[N] log-probs of the trainer (l) and of the sampler (m) on tokens drawn by the sampler.

    train/sampler_mismatch      mean |l - m|
    train/sampler_mismatch_max  max |l - m|
    train/kept_mass             mean min(1, exp(l - m)): an estimate of sum_v min(pi(v), mu(v)), the probability mass the two
                                distributions share. 1 when they are equal; 0.896 when mu is pi renormalised to 0.896 of its mass.
    """
    difference = (logprobs - sampler_logprobs).detach().float()
    metrics = MetricSet()
    tokens = len(difference)
    metrics.mean("train/sampler_mismatch", float(difference.abs().mean()), tokens)
    metrics.max("train/sampler_mismatch_max", float(difference.abs().max()))
    shared = difference.clamp(-MAX_LOG_RATIO, 0.0).exp()
    metrics.mean("train/kept_mass", float(shared.mean()), tokens)
    return metrics
