"""Clipped policy loss (PPO, arXiv 1707.06347; dual clip: arXiv 1912.09729).

    rho_t  = exp(logp_t - logp_sampler_t)
    loss   = sum_t w_t * max(-rho_t A_t, -clip(rho_t, 1 - low, 1 + high) A_t) / tokens_in_step
    with dual_clip = c and A_t < 0 the term is at most -c A_t

All tensors are flat, [N] completion tokens. The denominator counts the weighted tokens of the whole update, over all
micro-batches and ranks, so the split into micro-batches changes nothing.
"""

from __future__ import annotations

from ttrl.metrics import MetricSet
from ttrl.protocols import ForwardOut, LossOut, TensorBatch

MAX_LOG_RATIO = 20.0
"""Keeps exp finite when trainer and sampler disagree wildly; the metric shows the raw value."""


class ClipLoss:
    """clip = (low, high). Gradient is zero where the clipped branch is active, as usual."""

    needs: frozenset[str] = frozenset()
    aggregate = "token"

    def __init__(self, *, clip: tuple[float, float] = (0.2, 0.2), dual_clip: float | None = None) -> None:
        low, high = clip
        if not (0.0 < low < 1.0 and high > 0.0):
            raise ValueError(f"clip needs 0 < low < 1 and high > 0, got {list(clip)}")
        if dual_clip is not None and dual_clip <= 1.0:
            raise ValueError(f"dual_clip must be larger than 1, got {dual_clip}")
        self._low, self._high, self._dual = low, high, dual_clip

    def __call__(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        raw = out.logprobs - batch.sampler_logprobs
        ratio = raw.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(1.0 - self._low, 1.0 + self._high)
        loss = (-ratio * batch.advantages).maximum(-clipped * batch.advantages)
        if self._dual is not None:
            floor = -self._dual * batch.advantages
            loss = loss.minimum(floor).where(batch.advantages < 0, loss)
        metrics = MetricSet()
        counted = batch.weights > 0
        tokens = float(counted.sum())
        if tokens:
            outside = ((ratio - clipped).abs() > 0) & counted
            metrics.mean("train/clip_fraction", float(outside.sum()) / tokens, tokens)
            metrics.mean("train/ratio", float(ratio.detach()[counted].mean()), tokens)
            metrics.max("train/log_ratio_max", float(raw.detach()[counted].abs().max()))
        return LossOut(loss=(loss * batch.weights).sum() / batch.tokens_in_step, metrics=metrics)
