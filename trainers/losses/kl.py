"""KL anchor to the start model, as a loss term.

    k3_t = exp(d_t) - d_t - 1  with  d_t = logp_start_t - logp_t      (http://joschu.net/blog/kl-approx.html)
    loss = coefficient * sum_t w_t * k3_t / tokens_in_step

k3 estimates KL(policy || start) from tokens of the policy: unbiased in value and never negative. Its gradient with respect
to logp_t is 1 - exp(d_t), which pulls towards the start model token by token.
"""

from __future__ import annotations

from ttrl.metrics import MetricSet
from ttrl.protocols import ForwardOut, LossOut, TensorBatch

MAX_LOG_RATIO = 20.0
"""exp(20) is already an absurd divergence; beyond it the gradient vanishes instead of overflowing."""


class KLAnchor:
    """`{use: kl, with: {coefficient: 0.001}}`. Costs one more forward pass under the start model."""

    needs: frozenset[str] = frozenset({"ref_logprobs"})

    def __init__(self, *, coefficient: float = 0.001) -> None:
        if coefficient <= 0:
            raise ValueError(
                f"the kl coefficient must be positive, got {coefficient}; leave the stabilizer out instead"
            )
        self._coefficient = coefficient

    def loss(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        assert out.ref_logprobs is not None
        difference = (out.ref_logprobs - out.logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        k3 = difference.exp() - difference - 1.0
        metrics = MetricSet()
        tokens = float(batch.weights.sum())
        metrics.mean("train/kl", float((k3.detach() * batch.weights).sum()) / tokens if tokens else 0.0, tokens)
        return LossOut(loss=self._coefficient * (k3 * batch.weights).sum() / batch.tokens_in_step, metrics=metrics)
