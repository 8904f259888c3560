"""CISPO (MiniMax-M1, arXiv 2506.13585): the importance weight is bounded, the token keeps its gradient.

    rho_t = exp(l_t - m_t)                          l: the trainer's log-probs now, m: the sampler's own
    loss  = - sum_t w_t * sg(clip(rho_t, is_min, is_max)) * A_t * l_t / tokens_in_step

Where PPO's clip silences a token that moved too far, CISPO goes on with a bounded weight, which keeps rare tokens at forks of the
reasoning in the gradient. The limits are ratios. Others give 1 + epsilon (verl, where PPO's 0.2 then makes a tight two-sided
clip) or call the ratio itself epsilon_high (TRL).
"""

from __future__ import annotations

from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.trainers.losses.rows import MAX_LOG_RATIO, log_ratios, ratio_metrics


class CISPOLoss:
    """`loss: {use: cispo, with: {is_max: 5.0}}`. All tensors are flat, [N].

    With `drop_outside`, tokens on the side where PPO would clip (A > 0 above is_max, A < 0 below is_min) are dropped.
    """

    needs: frozenset[str] = frozenset()
    aggregate = "token"

    def __init__(self, *, is_max: float = 5.0, is_min: float = 0.0, drop_outside: bool = False) -> None:
        if not 0.0 <= is_min < 1.0 <= is_max:
            raise ValueError(f"is_min and is_max are ratios with 0 <= is_min < 1 <= is_max, got {is_min} and {is_max}")
        self._min, self._max, self._drop = is_min, is_max, drop_outside

    def __call__(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        raw = log_ratios(out, batch)
        ratio = raw.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        weight = ratio.clamp(self._min, self._max)
        above, below = ratio > self._max, ratio < self._min
        if self._drop:
            dropped = (above & (batch.advantages > 0)) | (below & (batch.advantages < 0))
            weight = weight * ~dropped
        loss = -(weight * batch.advantages * out.logprobs * batch.weights).sum() / batch.tokens_in_step
        return LossOut(loss=loss, metrics=ratio_metrics(raw, batch, is_weight=weight, clip_fraction=above | below))
