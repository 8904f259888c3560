"""Policy loss and KL anchor against hand-computed numbers and an independent reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers_torch import forward_out

from ttrl.protocols import LossOut, TensorBatch
from ttrl.trainers.losses.clip import ClipLoss
from ttrl.trainers.losses.kl import KLAnchor


def batch(
    sampler: Sequence[float], advantages: Sequence[float], weights: Sequence[float] | None = None, total: float = 1.0
) -> TensorBatch:
    def double(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return TensorBatch(
        sampler_logprobs=double(sampler), advantages=double(advantages), weights=double(weights or [1.0] * len(sampler)),
        tokens_in_step=total, rows=torch.zeros(len(sampler), dtype=torch.int64),
    )  # fmt: skip


def policy(logprobs: Sequence[float], of: TensorBatch, **options: Any) -> tuple[float, list[float], LossOut]:
    """Loss, gradient with respect to the log-probs, and everything."""
    leaf = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    out = ClipLoss(**options)(forward_out(leaf), of)
    out.loss.backward()
    assert leaf.grad is not None
    return float(out.loss.detach()), leaf.grad.tolist(), out


def clip_reference(
    logprobs: np.ndarray, of: TensorBatch, low: float, high: float, dual: float | None
) -> tuple[float, np.ndarray]:
    """The formula case by case, in numpy; the derivative of -rho A with respect to the log-prob is -rho A."""
    total, grads = 0.0, np.zeros(len(logprobs))
    rows = zip(logprobs, of.sampler_logprobs.tolist(), of.advantages.tolist(), of.weights.tolist(), strict=True)
    for i, (logprob, sampler, advantage, weight) in enumerate(rows):
        ratio = math.exp(logprob - sampler)
        if advantage >= 0:
            value, active = (-(1 + high) * advantage, False) if ratio > 1 + high else (-ratio * advantage, True)
        else:
            value, active = (-(1 - low) * advantage, False) if ratio < 1 - low else (-ratio * advantage, True)
            if dual is not None and value > -dual * advantage:
                value, active = -dual * advantage, False
        total += weight * value / of.tokens_in_step
        grads[i] = weight * -ratio * advantage / of.tokens_in_step if active else 0.0
    return total, grads


def test_on_policy_the_loss_is_minus_the_weighted_mean_advantage() -> None:
    # Ratios are 1: (-(1 x 2) - (0.5 x -4)) / 3 = 0, and gradients are -w A / 3
    loss, grads, _ = policy([-1.0, -2.0], batch([-1.0, -2.0], [2.0, -4.0], [1.0, 0.5], total=3.0))
    assert loss == pytest.approx(0.0, abs=1e-15)
    assert grads == pytest.approx([-2 / 3, 2 / 3])


def test_clipping_golden_numbers() -> None:
    # Ratios 1.5, 1.5, 0.5, 0.5 with advantages +1, -1, +1, -1 and clip (0.2, 0.3):
    # -1.3 (clipped above), +1.5, -0.5, +0.8 (clipped below); sum 0.5, over 4 tokens 0.125
    ratios = np.log([1.5, 1.5, 0.5, 0.5])
    loss, grads, out = policy(list(ratios), batch([0.0] * 4, [1, -1, 1, -1], total=4.0), clip=(0.2, 0.3))
    assert loss == pytest.approx(0.125)
    assert grads == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])
    metrics = out.metrics.values()
    assert metrics["train/clip_fraction"] == 1.0
    assert metrics["train/ratio"] == pytest.approx(1.0)
    assert metrics["train/log_ratio_max"] == pytest.approx(math.log(2))


def test_dual_clip_bounds_only_negative_advantages() -> None:
    # Ratio 5: without it +5 and -1.2; with c = 3 the negative one is held at +3 and has no gradient
    of = batch([0.0, 0.0], [-1.0, 1.0])
    free = policy([math.log(5)] * 2, of)
    held = policy([math.log(5)] * 2, of, dual_clip=3.0)
    assert free[0] == pytest.approx(5 - 1.2) and free[1] == pytest.approx([5, 0])
    assert held[0] == pytest.approx(3 - 1.2) and held[1] == pytest.approx([0, 0])


@pytest.mark.parametrize("dual", [None, 1.5, 3.0])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28), (0.01, 0.5)])
def test_clip_loss_equals_the_reference(clip: tuple[float, float], dual: float | None) -> None:
    rng = np.random.default_rng(7)
    logprobs = rng.normal(-2, 1, size=400)
    of = batch(
        list(logprobs + rng.normal(0, 0.7, size=400)), list(rng.normal(size=400)),
        list(rng.choice([0.0, 0.5, 1.0], size=400)), total=123.0,
    )  # fmt: skip
    loss, grads, _ = policy(list(logprobs), of, clip=clip, dual_clip=dual)
    expected, expected_grads = clip_reference(logprobs, of, *clip, dual)
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-15)


def test_advantage_zero_has_exactly_no_gradient() -> None:
    loss, grads, _ = policy([-1.0, -5.0, -0.1], batch([-3.0, -1.0, -0.1], [0.0, 0.0, 0.0]))
    assert loss == 0.0 and grads == [0.0, 0.0, 0.0]


def test_tokens_of_weight_zero_count_nowhere() -> None:
    kept, left_out = batch([-1.0], [1.5], total=2.0), batch([-1.0, -9.0], [1.5, 7.0], [1.0, 0.0], total=2.0)
    one, both = policy([-1.1], kept), policy([-1.1, -0.5], left_out)
    assert both[0] == one[0] and both[1] == [one[1][0], 0.0]
    assert both[2].metrics.values() == one[2].metrics.values()
    nothing = policy([-1.0], batch([-1.0], [1.0], [0.0]))
    assert nothing[0] == 0.0 and nothing[2].metrics.values() == {}


def test_absurd_ratios_stay_finite_and_nan_is_not_hidden() -> None:
    loss, grads, out = policy([0.0, 0.0], batch([-500.0, 500.0], [-1.0, 1.0]))
    assert math.isfinite(loss) and np.isfinite(grads).all()
    assert out.metrics.values()["train/log_ratio_max"] == 500.0
    for spoiled in (batch([math.nan], [1.0]), batch([-1.0], [math.nan]), batch([-1.0], [1.0], [math.nan])):
        for dual in (None, 3.0):
            assert math.isnan(policy([-1.0], spoiled, dual_clip=dual)[0])


@pytest.mark.parametrize(
    "options", [{"clip": (0.0, 0.2)}, {"clip": (1.0, 0.2)}, {"clip": (0.2, 0.0)}, {"dual_clip": 1.0}]
)
def test_meaningless_clip_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="clip"):
        ClipLoss(**options)


def anchor(
    logprobs: Sequence[float], start: Sequence[float], weights: Sequence[float], total: float, coefficient: float
) -> tuple[float, list[float], dict[str, float]]:
    leaf = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(start, dtype=torch.float64)
    zeros = [0.0] * len(weights)
    out = KLAnchor(coefficient=coefficient).loss(forward_out(leaf, reference), batch(zeros, zeros, weights, total))
    out.loss.backward()
    assert leaf.grad is not None
    return float(out.loss.detach()), leaf.grad.tolist(), out.metrics.values()


def test_k3_golden_numbers() -> None:
    # d = ln 2: 2 - 0.6931472 - 1 = 0.3068528, gradient 1 - 2 = -1; d = -ln 2: 0.5 + 0.6931472 - 1 = 0.1931472, gradient 0.5
    loss, grads, metrics = anchor([-2.0, -1.0], [-2 + math.log(2), -1 - math.log(2)], [1, 1], 2.0, 0.1)
    assert loss == pytest.approx(0.1 * (0.3068528194 + 0.1931471806) / 2)
    assert grads == pytest.approx([0.1 * -1 / 2, 0.1 * 0.5 / 2])
    assert metrics == {"train/kl": pytest.approx(0.25)}


def test_k3_equals_the_reference() -> None:
    rng = np.random.default_rng(3)
    logprobs, start = rng.normal(-2, 1, 300), rng.normal(-2, 1, 300)
    weights = rng.choice([0.0, 1.0, 2.0], 300)
    loss, grads, metrics = anchor(list(logprobs), list(start), list(weights), 77.0, 0.003)
    d = start - logprobs
    k3 = np.expm1(d) - d
    assert loss == pytest.approx(0.003 * (weights * k3).sum() / 77, rel=1e-12)
    np.testing.assert_allclose(grads, 0.003 * weights * -np.expm1(d) / 77, rtol=1e-12, atol=1e-18)
    assert metrics["train/kl"] == pytest.approx((weights * k3).sum() / weights.sum())


def test_k3_is_zero_at_the_start_and_an_unbiased_estimate_of_the_divergence() -> None:
    assert anchor([-1.0, -2.0], [-1.0, -2.0], [1, 1], 1.0, 1.0)[:2] == (0.0, [0.0, 0.0])
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    # Expectation over tokens of p: weights are the probabilities
    expected = float((p * np.log(p / q)).sum())
    assert anchor(list(np.log(p)), list(np.log(q)), list(p), 1.0, 1.0)[0] == pytest.approx(expected)


def test_k3_is_finite_far_from_the_start() -> None:
    loss, grads, _ = anchor([-900.0, 0.0], [0.0, -900.0], [1, 1], 1.0, 1.0)
    assert math.isfinite(loss) and np.isfinite(grads).all()


@pytest.mark.parametrize("coefficient", [0.0, -1.0])
def test_a_kl_coefficient_must_be_positive(coefficient: float) -> None:
    with pytest.raises(ValueError, match="coefficient"):
        KLAnchor(coefficient=coefficient)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_the_split_into_micro_batches_changes_neither_loss_nor_gradients_nor_metrics(size: int) -> None:
    rng = np.random.default_rng(11)
    logprobs, sampler, start = (torch.from_numpy(rng.normal(-2, 0.6, 101)) for _ in range(3))
    whole = TensorBatch(
        sampler_logprobs=sampler, advantages=torch.from_numpy(rng.normal(size=101)),
        weights=torch.from_numpy(rng.choice([0.0, 0.5, 1.0], 101)), tokens_in_step=60.0,
        rows=torch.zeros(101, dtype=torch.int64),
    )  # fmt: skip

    def run(parts: list[slice]) -> tuple[float, torch.Tensor, dict[str, float]]:
        leaf = logprobs.clone().requires_grad_()
        loss, metrics = 0.0, None
        for part in parts:
            of = TensorBatch(
                sampler_logprobs=sampler[part], advantages=whole.advantages[part], weights=whole.weights[part],
                tokens_in_step=60.0, rows=whole.rows[part],
            )  # fmt: skip
            for term in (ClipLoss(dual_clip=2.0), KLAnchor(coefficient=0.1).loss):
                out = term(forward_out(leaf[part], start[part]), of)
                out.loss.backward()
                loss += float(out.loss.detach())
                metrics = out.metrics if metrics is None else metrics
                if metrics is not out.metrics:
                    metrics.merge(out.metrics)
        assert leaf.grad is not None and metrics is not None
        return loss, leaf.grad, metrics.values()

    one = run([slice(None)])
    many = run([slice(i, i + size) for i in range(0, 101, size)])
    assert many[0] == pytest.approx(one[0], rel=1e-12)
    torch.testing.assert_close(many[1], one[1], rtol=1e-12, atol=1e-15)
    assert many[2] == pytest.approx(one[2], rel=1e-6)
