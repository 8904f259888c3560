"""TOPR, tapered off-policy REINFORCE (arXiv 2503.14286): a bad answer stops pushing once the policy has left it.

    rho_i  = prod over the row of exp(l_t - m_t)             l: the trainer's log-probs now, m: the sampler's own
    c_t    = clip(rho_i, *positive) if A_t >= 0 else clip(rho_i, *negative)
    loss   = - sum_t w_t * sg(c_t) * A_t * l_t / tokens_in_step

As published: positive [1, 1], negative [0, 1]. Positive answers are imitated whatever their age, negative ones with min(rho, 1), so
their force fades with their probability; that of plain REINFORCE never does, and pushes one stored answer towards 0 for ever. The
sign is that of the advantage: a majority reward is 0 or 1 and has none.

`level: sequence` takes the product over the row, as the paper does. `geometric` takes its |y|-th root, as some frameworks document it,
and is a different method: at a ratio of 0.9 per token and 100 tokens the product is 2.7e-5 and the root 0.9.
"""

from __future__ import annotations

from typing import Literal

from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.trainers.losses.rows import MAX_LOG_RATIO, log_ratios, ratio_metrics, row_means, row_sums

Limits = tuple[float, float]


def effective_positive_share(p: float, baseline: float) -> float:
    """p (1 - c) / (1 + c (1 - 2 p)): the share of positive weight when a share p of +1/-1 rewards meets a baseline c.

    Off-policy a baseline is a choice of the data mix, not only less variance; the paper finds 0.1 to 0.2 best. Golden:
    (0.1, -0.5) -> 0.25, (0.5, 0.5) -> 0.25, and c = -1 gives 1: negatives are ignored.
    """
    return p * (1.0 - baseline) / (1.0 + baseline * (1.0 - 2.0 * p))


class TOPRLoss:
    """`loss: {use: topr, with: {level: sequence}}`. All tensors are flat, [N]. `positive: [1, 1], negative: [1, 1]` is REINFORCE."""

    needs: frozenset[str] = frozenset()
    aggregate = "sequence"

    def __init__(
        self, *, level: Literal["sequence", "geometric"] = "sequence", positive: Limits = (1.0, 1.0), negative: Limits = (0.0, 1.0)
    ) -> None:  # fmt: skip
        for name, (low, high) in (("positive", positive), ("negative", negative)):
            if not 0.0 <= low <= high:
                raise ValueError(f"{name} needs 0 <= low <= high (limits of the ratio), got {[low, high]}")
        self._sums = row_sums if level == "sequence" else row_means
        self._positive, self._negative = positive, negative

    def __call__(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        raw = log_ratios(out, batch)
        ratio = self._sums(raw, batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        positive = batch.advantages >= 0
        weight = ratio.clamp(*self._positive).where(positive, ratio.clamp(*self._negative))
        loss = -(weight * batch.advantages * out.logprobs * batch.weights).sum() / batch.tokens_in_step
        metrics = ratio_metrics(raw, batch, is_weight=weight)
        faded = ~positive & (batch.weights > 0)
        tokens = float(faded.sum())
        if tokens:
            metrics.mean("train/negative_weight", float(weight[faded].mean()), tokens)
        return LossOut(loss=loss, metrics=metrics)
