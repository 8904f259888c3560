"""Policy gradient with truncated importance sampling (verl's and TRL's rollout correction; TIS: Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training").

    rho_t = exp(l_t - m_t)                       l: the trainer's log-probs now, m: the sampler's own
    token     w_t = min(rho_t, cap)
    sequence  w_t = min(prod over the row of rho, cap), the same for all tokens of a row
    loss      = - sum_t weight_t * sg(w_t) * A_t * l_t / tokens_in_step

The coefficient in front of the gradient of l_t is weight_t w_t A_t: at w = 1 (on-policy) this is GRPO without a clip. Token-level
weights are biased but tame; sequence-level ones are unbiased up to the cap, and their variance grows with the length.

The clipped loss (`clip`) also takes its ratio against the sampler's log-probs, so it carries a correction of its own: one or the
other, never both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ttrl.metrics import MetricSet
from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.trainers.losses.rows import row_sums

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Keeps exp finite; with the usual caps nothing near it survives."""


class TISLoss:
    """`objective: {use: grpo, with: {loss: tis, tis: {level: token, cap: 2.0}}}`. All tensors are flat, [N]."""

    needs: frozenset[str] = frozenset()
    aggregate = "token"

    def __init__(self, *, level: Literal["token", "sequence"] = "token", cap: float = 2.0) -> None:
        if cap < 1.0:
            raise ValueError(f"cap must be at least 1, got {cap}: a lower one would weaken on-policy tokens too")
        self._level, self._cap = level, cap

    def __call__(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        ratio = self._log_ratio(out, batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        kept = ratio.clamp(max=self._cap)
        loss = -(kept * batch.advantages * out.logprobs * batch.weights).sum() / batch.tokens_in_step
        metrics = MetricSet()
        counted = batch.weights > 0
        tokens = float(counted.sum())
        if tokens:
            metrics.mean("train/tis_weight", float(kept[counted].mean()), tokens)
            metrics.mean("train/tis_truncated", float((ratio > self._cap)[counted].float().mean()), tokens)
            metrics.max(
                "train/log_ratio_max", float((out.logprobs.detach() - batch.sampler_logprobs)[counted].abs().max())
            )
        return LossOut(loss=loss, metrics=metrics)

    def _log_ratio(self, out: ForwardOut, batch: TensorBatch) -> Tensor:
        """[N] of the token, or of the whole row; constant in the gradient."""
        raw = out.logprobs.detach() - batch.sampler_logprobs
        if self._level == "token":
            return raw
        return row_sums(raw, batch)  # tokens that nobody sampled are no part of the sequence's probability
