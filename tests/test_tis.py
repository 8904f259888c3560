"""Truncated importance sampling and the mismatch metrics: golden numbers by hand, gradients against a float64 reference."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ttrl.config.schema import Plug
from ttrl.errors import ConfigError
from ttrl.protocols import ForwardOut, TensorBatch
from ttrl.registry import build
from ttrl.trainers.losses.clip import ClipLoss
from ttrl.trainers.losses.tis import TISLoss
from ttrl.trainers.mismatch import mismatch


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(sampler: torch.Tensor, advantages: torch.Tensor, rows: list[int], total: float) -> TensorBatch:
    return TensorBatch(
        sampler_logprobs=sampler, advantages=advantages, weights=torch.ones_like(sampler), tokens_in_step=total,
        rows=torch.tensor(rows),
    )  # fmt: skip


def coefficients(
    loss: TISLoss | ClipLoss, logprobs: torch.Tensor, of: TensorBatch
) -> tuple[list[float], dict[str, float]]:
    """-d loss / d logp * tokens_in_step: what stands in front of each token's gradient."""
    leaf = logprobs.clone().requires_grad_()
    out = loss(ForwardOut(logprobs=leaf, entropy=torch.zeros_like(leaf), ref_logprobs=None), of)
    out.loss.backward()
    assert leaf.grad is not None
    return (-leaf.grad * of.tokens_in_step).tolist(), out.metrics.values()


def test_token_weights_are_cut_at_the_cap() -> None:
    # ratios 3, 1, 0.5 against a cap of 2; advantages 1, -1, 2
    sampler = tensor(-2.0, -1.0, -0.5)
    of = batch(sampler, tensor(1.0, -1.0, 2.0), [0, 0, 1], 4.0)
    found, metrics = coefficients(TISLoss(cap=2.0), sampler + tensor(3.0, 1.0, 0.5).log(), of)
    assert found == pytest.approx([2.0 * 1.0, 1.0 * -1.0, 0.5 * 2.0])
    assert metrics["train/tis_weight"] == pytest.approx((2.0 + 1.0 + 0.5) / 3)
    assert metrics["train/tis_truncated"] == pytest.approx(1 / 3)


def test_sequence_weights_are_the_product_over_the_row() -> None:
    # row 0: 1.1 * 1.1 = 1.21; row 1: 0.5 * 3 * 2 = 3, cut to 2
    sampler = tensor(-1.0, -1.0, -1.0, -1.0, -1.0)
    ratios = tensor(1.1, 1.1, 0.5, 3.0, 2.0)
    of = batch(sampler, torch.ones(5, dtype=torch.float64), [0, 0, 1, 1, 1], 1.0)
    found, _ = coefficients(TISLoss(level="sequence", cap=2.0), sampler + ratios.log(), of)
    assert found == pytest.approx([1.21, 1.21, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(("length", "product"), [(10, 2.594), (100, 13780.6)])
def test_the_length_trap_of_sequence_weights(length: int, product: float) -> None:
    sampler = torch.full((length,), -1.0, dtype=torch.float64)
    of = batch(sampler, torch.ones(length, dtype=torch.float64), [0] * length, 1.0)
    found, _ = coefficients(TISLoss(level="sequence", cap=1e9), sampler + math.log(1.1), of)
    assert found[0] == pytest.approx(product, rel=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_it_is_the_clipped_loss(level: str) -> None:
    rng = np.random.default_rng(3)
    logprobs, advantages = torch.from_numpy(rng.normal(-2, 1, 12)), torch.from_numpy(rng.normal(size=12))
    of = batch(logprobs, advantages, [0] * 5 + [1] * 7, 12.0)
    found, _ = coefficients(TISLoss(level=level), logprobs, of)  # type: ignore[arg-type]
    clipped, _ = coefficients(ClipLoss(), logprobs, of)
    assert found == pytest.approx(clipped)


def test_tokens_of_weight_zero_have_no_gradient() -> None:
    sampler = tensor(-1.0, -1.0)
    of = replace(batch(sampler, tensor(1.0, 1.0), [0, 0], 1.0), weights=tensor(0.0, 1.0))
    found, metrics = coefficients(TISLoss(), sampler + tensor(9.0, 1.5).log(), of)
    assert found == pytest.approx([0.0, 1.5])
    assert metrics["train/tis_truncated"] == 0.0


def test_the_objective_passes_its_options_on() -> None:
    def grpo(**options: object) -> object:
        return build("objective", Plug.model_validate({"use": "grpo", "with": options}))

    grpo(loss="tis", tis={"level": "sequence", "cap": 5.0})
    for options, words in (
        ({"loss": "tis", "tis": {"cap": 0.5}}, "cap must be at least 1"),
        ({"loss": "tis", "clip": [0.1, 0.1]}, "belong to the clip loss"),
        ({"tis": {}}, "belongs to the loss tis"),
        ({"loss": "tis", "tis": {"levle": "token"}}, "unknown option 'levle'"),
    ):
        with pytest.raises(ConfigError, match=words):
            grpo(**options)


def test_mismatch_by_hand() -> None:
    # ratios 2, 1, 0.5: |log| = ln 2, 0, ln 2; shared mass (1 + 1 + 0.5) / 3
    found = mismatch(tensor(2.0, 1.0, 0.5).log() - 1.0, tensor(-1.0, -1.0, -1.0)).values()
    assert found["train/sampler_mismatch"] == pytest.approx(2 * math.log(2) / 3)
    assert found["train/sampler_mismatch_max"] == pytest.approx(math.log(2))
    assert found["train/kept_mass"] == pytest.approx(2.5 / 3)


def test_kept_mass_is_the_mass_that_top_p_left() -> None:
    """A sampler that renormalises the top 0.896 of the mass, drawn from exactly: the estimate has no variance here."""
    probabilities = np.array([0.5, 0.396, 0.064, 0.04])
    kept = probabilities[:2] / 0.896
    drawn = np.random.default_rng(0).choice(2, size=50, p=kept)
    found = mismatch(torch.from_numpy(np.log(probabilities[drawn])), torch.from_numpy(np.log(kept[drawn]))).values()
    assert found["train/kept_mass"] == pytest.approx(0.896, abs=1e-6)


def test_kept_mass_estimates_the_overlap_of_two_distributions() -> None:
    rng = np.random.default_rng(1)
    policy, sampler = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    drawn = rng.choice(6, size=200_000, p=sampler)
    found = mismatch(torch.from_numpy(np.log(policy[drawn])), torch.from_numpy(np.log(sampler[drawn]))).values()
    assert found["train/kept_mass"] == pytest.approx(np.minimum(policy, sampler).sum(), abs=5e-3)
