"""GSPO (arXiv 2507.18071): one ratio per row, the geometric mean of its tokens' ratios, clipped as a whole.

    s_i    = exp(mean over the row of (l_t - m_t))           l: the trainer's log-probs now, m: the sampler's own
    s_it   = sg(s_i) * exp(l_t - sg(l_t))                    the same value; its gradient is s_i grad l_t
    loss   = sum_t w_t * max(-s_it A_t, -clip(s_it, 1 - low, 1 + high) A_t) / tokens_in_step

With `aggregate: sequence` (its default) a token gets s_i A_i / |y_i|, as published. The token-wise form lets advantages differ within
a row and keeps masked tokens free of gradient. A clipped row has no gradient at all. A geometric mean hardly moves, so the limits
are about a thousand times tighter than PPO's: the option is called geo_clip for that reason.
"""

from __future__ import annotations

from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.trainers.losses.rows import MAX_LOG_RATIO, log_ratios, ratio_metrics, row_means


class GSPOLoss:
    """`loss: {use: gspo, with: {geo_clip: [3.0e-4, 4.0e-4]}}`. All tensors are flat, [N]."""

    needs: frozenset[str] = frozenset()
    aggregate = "sequence"

    def __init__(self, *, geo_clip: tuple[float, float] = (3e-4, 4e-4)) -> None:
        low, high = geo_clip
        if not (0.0 < low < 1.0 and high > 0.0):
            raise ValueError(f"geo_clip needs 0 < low < 1 and high > 0, got {list(geo_clip)}")
        self._low, self._high = low, high

    def __call__(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        raw = log_ratios(out, batch)
        row = row_means(raw, batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        ratio = row * (out.logprobs - out.logprobs.detach()).exp()
        clipped = ratio.clamp(1.0 - self._low, 1.0 + self._high)
        loss = (-ratio * batch.advantages).maximum(-clipped * batch.advantages)
        outside = (row < 1.0 - self._low) | (row > 1.0 + self._high)
        return LossOut(
            loss=(loss * batch.weights).sum() / batch.tokens_in_step,
            metrics=ratio_metrics(raw, batch, ratio=row, clip_fraction=outside),
        )
