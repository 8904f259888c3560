"""KL anchor to the start model, as a loss term. Estimators: http://joschu.net/blog/kl-approx.html

    l, r, m: log-probs of a drawn token under the trainer now, the start model, and the sampler;  d = l - r
    loss = coefficient * sum_t w_t * k_t / tokens_in_step

| kind          | k_t                              | gradient on tokens of the policy                                       |
|---------------|----------------------------------|------------------------------------------------------------------------|
| k3            | exp(-d) - 1 + d                  | of KL(start || policy): covers what the start model does (forward KL)  |
| k2            | d^2 / 2                          | of KL(policy || start), the divergence meant, token by token           |
| k3_value_k2   | value of k3, gradient of k2      | as k2; the value is unbiased and never negative                        |
| k3_ratio      | exp(l - m) * k3                  | of KL(policy || start), also when the sampler is another policy        |
| k1_in_reward  | exp(l - m) * sg(sum_{s>=t} d_s)  | of KL(policy || start) of whole rows: a token answers for what follows |

All five pull towards the start model. k1 = d itself as a loss term does not: the mean of its gradient on tokens of the policy is
zero, so it is refused. k1_in_reward is what "a KL penalty in the reward" amounts to with an undiscounted return and no baseline; the
others see the divergence of each token's distribution only, not where the token leads. Its sums grow with the length of the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ttrl.metrics import MetricSet
from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.trainers.losses.rows import drawn

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["k3", "k2", "k3_value_k2", "k3_ratio", "k1_in_reward", "k1"]

MAX_LOG_RATIO = 20.0
"""exp(20) is already an absurd divergence; beyond it the gradient vanishes instead of overflowing."""


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[N] d^2 / 2: biased in value, right in gradient."""
    return 0.5 * (logprobs - ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[N] exp(-d) - 1 + d: unbiased in value and never negative. Its gradient with respect to l is 1 - exp(-d)."""
    difference = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - difference - 1.0


def k1_returns(logprobs: Tensor, ref_logprobs: Tensor, batch: TensorBatch) -> Tensor:
    """[N] sum of d over this and the later drawn tokens of the row, constant in the gradient."""
    k1 = ((logprobs - ref_logprobs).detach() * drawn(batch)).double()
    so_far = k1.cumsum(0)
    ends = batch.rows.bincount().cumsum(0) - 1  # rows lie one after the other
    return (so_far[ends][batch.rows] - so_far + k1).to(logprobs.dtype)


class KLAnchor:
    """`{use: kl, with: {coefficient: 0.001, kind: k3}}`, as a stabilizer or as a regularizer of the objective, not as both.

    Costs one more forward pass under the start model. train/kl is the mean of k3 whatever the kind.
    """

    needs: frozenset[str] = frozenset({"ref_logprobs"})

    def __init__(self, *, coefficient: float = 0.001, kind: Kind = "k3") -> None:
        if coefficient <= 0:
            raise ValueError(
                f"the kl coefficient must be positive, got {coefficient}; leave the stabilizer out instead"
            )
        if kind == "k1":
            raise ValueError(
                "kl kind k1 as a loss term has no force at all (its mean gradient is 0); use k1_in_reward or k2"
            )
        self._coefficient, self._kind = coefficient, kind

    def loss(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        assert out.ref_logprobs is not None
        estimate = k3(out.logprobs, out.ref_logprobs)
        term = estimate if self._kind == "k3" else self._term(estimate, out, batch)
        metrics = MetricSet()
        tokens = float(batch.weights.sum())
        metrics.mean("train/kl", float((estimate.detach() * batch.weights).sum()) / tokens if tokens else 0.0, tokens)
        return LossOut(loss=self._coefficient * (term * batch.weights).sum() / batch.tokens_in_step, metrics=metrics)

    def _term(self, estimate: Tensor, out: ForwardOut, batch: TensorBatch) -> Tensor:
        assert out.ref_logprobs is not None
        if self._kind in ("k2", "k3_value_k2"):
            square = k2(out.logprobs, out.ref_logprobs)
            return square if self._kind == "k2" else square + (estimate - square).detach()
        ratio = (out.logprobs - batch.sampler_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self._kind == "k3_ratio":
            return ratio * estimate
        return ratio * k1_returns(out.logprobs, out.ref_logprobs, batch)
