"""CISPO, GSPO, TOPR and the kinds of KL: golden numbers, gradients against independent references, and the split of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_group, make_scored
from helpers_torch import tensors

from ttrl.config.schema import Plug
from ttrl.loop import update
from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.registry import build
from ttrl.trainers.dealing import computed_tokens, deal
from ttrl.trainers.grpo import GRPO
from ttrl.trainers.losses.cispo import CISPOLoss
from ttrl.trainers.losses.clip import ClipLoss
from ttrl.trainers.losses.gspo import GSPOLoss
from ttrl.trainers.losses.kl import KLAnchor
from ttrl.trainers.losses.tis import TISLoss
from ttrl.trainers.losses.topr import TOPRLoss, effective_positive_share
from ttrl.trainers.packing import pack
from ttrl.types import PackedBatch, Sample, Scored

Loss = Callable[[ForwardOut, TensorBatch], LossOut]


def batch(
    sampler: Sequence[float], advantages: Sequence[float], rows: Sequence[int] | None = None, weights: Any = None,
    total: float = 1.0, **extras: Sequence[float],
) -> TensorBatch:  # fmt: skip
    def double(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    count = len(sampler)
    return TensorBatch(
        sampler_logprobs=double(sampler), advantages=double(advantages), weights=double(weights or [1.0] * count),
        tokens_in_step=total, rows=torch.tensor(list(range(count)) if rows is None else rows),
        extras={name: double(values) for name, values in extras.items()},
    )  # fmt: skip


def coefficients(loss: Loss, logprobs: Sequence[float] | torch.Tensor, of: TensorBatch, **out: Any) -> list[float]:
    """-d loss / d logp * tokens_in_step: what stands in front of each token's gradient."""
    leaf = torch.as_tensor(logprobs, dtype=torch.float64).clone().requires_grad_()
    fields = {"entropy": torch.zeros_like(leaf), "ref_logprobs": None, **out}
    loss(ForwardOut(logprobs=leaf, **fields), of).loss.backward()
    assert leaf.grad is not None
    return (-leaf.grad * of.tokens_in_step).tolist()


# Coefficient of one token at ratio r; clip (0.2, 0.28), dual clip 3, CISPO up to 5, or two-sided as verl's defaults make it
TABLE = [
    # A, r,   clip, dual, cispo, two-sided, topr, no bound
    (+1, 0.5, 0.5, 0.5, 0.5, 0.8, 1.0, 0.5),
    (+1, 1.25, 1.25, 1.25, 1.25, 1.25, 1.0, 1.25),
    (+1, 1.5, 0.0, 0.0, 1.5, 1.28, 1.0, 1.5),
    (+1, 8.0, 0.0, 0.0, 5.0, 1.28, 1.0, 8.0),
    (-1, 0.5, 0.0, 0.0, -0.5, -0.8, -0.5, -0.5),
    (-1, 0.9, -0.9, -0.9, -0.9, -0.9, -0.9, -0.9),
    (-1, 1.5, -1.5, -1.5, -1.5, -1.28, -1.0, -1.5),
    (-1, 4.0, -4.0, 0.0, -4.0, -1.28, -1.0, -4.0),
    (-1, 8.0, -8.0, 0.0, -5.0, -1.28, -1.0, -8.0),
]
COLUMNS: list[Loss] = [
    ClipLoss(clip=(0.2, 0.28)), ClipLoss(clip=(0.2, 0.28), dual_clip=3.0), CISPOLoss(is_max=5.0),
    CISPOLoss(is_max=1.28, is_min=0.8), TOPRLoss(), TISLoss(cap=1e9),
]  # fmt: skip


@pytest.mark.parametrize("column", range(len(COLUMNS)))
def test_one_token_under_every_loss(column: int) -> None:
    # The last column shows, at an advantage of 1, what a plain importance weight does
    of = batch([-1.0] * len(TABLE), [float(row[0]) for row in TABLE])
    found = coefficients(COLUMNS[column], [-1.0 + math.log(row[1]) for row in TABLE], of)
    assert found == pytest.approx([row[2 + column] for row in TABLE])


def test_cispo_with_ppos_rule_of_what_to_drop_is_ppo() -> None:
    of = batch([-1.0] * len(TABLE), [float(row[0]) for row in TABLE])
    logprobs = [-1.0 + math.log(row[1]) for row in TABLE]
    dropped = CISPOLoss(is_max=1.28, is_min=0.8, drop_outside=True)
    # Where PPO keeps a token beyond a limit it weighs it by the ratio, CISPO by the limit
    expected = [row[0] * min(max(abs(row[2]), 0.8), 1.28) if row[2] else 0.0 for row in TABLE]
    assert coefficients(dropped, logprobs, of) == pytest.approx(expected)


def test_the_weight_of_cispo_is_constant_in_the_gradient() -> None:
    # A = 1, l = -0.5, l_old = -0.6: exp(0.1); with the weight differentiated it would be exp(0.1) (1 + l) = 0.55259
    assert coefficients(CISPOLoss(), [-0.5], batch([-0.6], [1.0])) == pytest.approx([1.10517], abs=1e-5)


def test_gspo_golden_numbers() -> None:
    ratios = [0.1, -0.3, 0.5]
    of = batch([-1.0] * 3, [1.0] * 3, [0] * 3, [1 / 3] * 3)
    wide = GSPOLoss(geo_clip=(0.2, 0.2))
    assert coefficients(wide, [-1.0 + r for r in ratios], of) == pytest.approx([0.36839] * 3, abs=1e-5)
    assert np.exp(ratios).mean() == pytest.approx(1.16490, abs=1e-5)  # the mean of ratios is something else
    assert coefficients(GSPOLoss(), [-1.0 + r for r in ratios], of) == [0.0] * 3  # clipped: every token of the row
    negative = replace(of, advantages=-of.advantages)
    assert coefficients(GSPOLoss(), [-1.0 + r for r in ratios], negative) == pytest.approx([-0.36839] * 3, abs=1e-5)


def test_gspo_equals_its_formula_over_rows() -> None:
    rng = np.random.default_rng(5)
    rows = np.repeat(np.arange(6), [1, 2, 3, 5, 8, 4])
    counts, advantages = np.bincount(rows), rng.normal(size=6)
    sampler = torch.from_numpy(rng.normal(-2, 1, len(rows)))
    leaf = (sampler + torch.from_numpy(rng.normal(0, 0.1, len(rows)))).requires_grad_()
    of = batch(sampler.tolist(), advantages[rows].tolist(), rows.tolist(), (1 / counts)[rows].tolist(), total=6.0)
    out = GSPOLoss(geo_clip=(0.05, 0.07))(ForwardOut(logprobs=leaf, entropy=leaf, ref_logprobs=None), of)
    found = torch.autograd.grad(out.loss, leaf)[0]
    # The published form, where the gradient goes through the ratio of the row
    twin = torch.zeros((), dtype=torch.float64)
    for row, advantage in enumerate(advantages):
        s = ((leaf - sampler)[torch.from_numpy(rows == row)].mean()).exp()
        twin = twin - torch.minimum(s * advantage, s.clamp(0.95, 1.07) * advantage) / 6
    assert 0 < out.metrics.values()["train/clip_fraction"] < 1
    torch.testing.assert_close(out.loss, twin)
    torch.testing.assert_close(found, torch.autograd.grad(twin, leaf)[0])


def test_a_mask_takes_the_gradient_of_a_token_not_its_place_in_the_row() -> None:
    ratios = [0.1, -0.3, 0.5]
    logprobs = [-1.0 + r for r in ratios]
    masked = batch([-1.0] * 3, [-1.0] * 3, [0] * 3, [1.0, 0.0, 0.0], drawn=[1.0, 1.0, 1.0])
    forced = batch([-1.0] * 3, [-1.0] * 3, [0] * 3, [1.0, 0.0, 0.0])
    for loss, whole, one in (
        (GSPOLoss(), math.exp(0.1), math.exp(0.1)),
        (TOPRLoss(negative=(0.0, 9.0)), math.exp(0.3), math.exp(0.1)),
        (TISLoss(level="sequence", cap=9.0), math.exp(0.3), math.exp(0.1)),
    ):
        assert coefficients(loss, logprobs, masked) == pytest.approx([-whole, 0, 0])
        assert coefficients(loss, logprobs, forced) == pytest.approx([-one, 0, 0])


@pytest.mark.parametrize(("level", "weight"), [("sequence", 2.66e-5), ("geometric", 0.9)])
def test_the_two_readings_of_topr_are_opposites(level: Any, weight: float) -> None:
    of = batch([-1.0] * 100, [-1.0] * 100, [0] * 100)
    found = coefficients(TOPRLoss(level=level), [-1.0 + math.log(0.9)] * 100, of)
    assert found == pytest.approx([-weight] * 100, rel=2e-3)
    positive = replace(of, advantages=-of.advantages)
    assert coefficients(TOPRLoss(level=level), [-1.0 + math.log(0.9)] * 100, positive) == pytest.approx([1.0] * 100)


def test_effective_positive_share() -> None:
    assert effective_positive_share(0.1, -0.5) == pytest.approx(0.25)
    assert effective_positive_share(0.5, 0.5) == pytest.approx(0.25)
    assert [effective_positive_share(p, -1.0) for p in (0.1, 0.5, 0.9)] == pytest.approx([1.0] * 3)
    for p, c in ((0.1, -0.5), (0.3, 0.4)):  # by its meaning: weights 1 - c of positives, 1 + c of negatives
        assert effective_positive_share(p, c) == pytest.approx(p * (1 - c) / (p * (1 - c) + (1 - p) * (1 + c)))


def test_topr_comes_to_rest_where_reinforce_runs_away() -> None:
    """Three arms, drawn uniformly once and for all, paid +1, -1, 0; a rate of 0.5.

    REINFORCE moves by the same amount in every step: 4000 of them would end at 666.67.
    """
    of = batch([-math.log(3)] * 3, [1.0, -1.0, 0.0], total=3.0)

    def run(loss: TOPRLoss, steps: int) -> tuple[list[float], float]:
        logits = torch.zeros(3, dtype=torch.float64)
        for _ in range(steps):
            # d l_a / d logits = e_a - softmax, so only the loss itself needs autograd
            probabilities = logits.softmax(0)
            pull = torch.tensor(coefficients(loss, logits.log_softmax(0), of), dtype=torch.float64) / 3
            step = pull - pull.sum() * probabilities
            logits += 0.5 * step
        return logits.tolist(), float(step.norm())

    naive, norm = run(TOPRLoss(negative=(1.0, 1.0)), 200)
    assert naive == pytest.approx([666.67 / 20, -666.67 / 20, 0.0], abs=1e-3) and norm == pytest.approx(
        0.4714, abs=1e-4
    )
    tapered, norm = run(TOPRLoss(), 4000)
    assert tapered == pytest.approx([5.53, -3.43, -2.10], abs=0.01) and norm == pytest.approx(4.1e-4, rel=0.05)


@pytest.mark.parametrize("loss", [*COLUMNS, GSPOLoss(), TOPRLoss(level="geometric"), TISLoss(level="sequence")])
def test_absurd_ratios_stay_finite_and_advantage_zero_has_no_gradient(loss: Loss) -> None:
    of = batch([-500.0, 500.0, -1.0], [-1.0, 1.0, 0.0], [0, 1, 1])
    found = coefficients(loss, [0.0, 0.0, -3.0], of)
    assert np.isfinite(found).all() and found[2] == 0.0


# --- kinds of KL --------------------------------------------------------------------------------------------------------

THETA = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
START = torch.tensor([0.0, 0.5, -0.4], dtype=torch.float64)
REVERSE, FORWARD = [0.0753, -0.2044, 0.1292], [0.1110, -0.2467, 0.1356]


def over_tokens(kind: Any, sampler: torch.Tensor = THETA) -> tuple[float, torch.Tensor]:
    """Expectation of the term over tokens of the sampler, and its gradient with respect to the policy's logits."""
    logits = THETA.clone().requires_grad_()
    mu = sampler.softmax(0)
    of = replace(batch([0.0] * 3, [0.0] * 3), weights=mu, sampler_logprobs=mu.log())
    out = ForwardOut(logprobs=logits.log_softmax(0), entropy=logits, ref_logprobs=START.log_softmax(0))
    loss = KLAnchor(coefficient=1.0, kind=kind).loss(out, of).loss
    loss.backward()
    assert logits.grad is not None
    return float(loss.detach()), logits.grad


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k2", 0.123732, REVERSE), ("k3", 0.131165, FORWARD), ("k3_value_k2", 0.131165, REVERSE),
        ("k3_ratio", 0.131165, REVERSE), ("k1_in_reward", 0.131165, REVERSE),
    ],
)  # fmt: skip
def test_what_each_kind_of_kl_pulls_towards(kind: str, value: float, gradient: list[float]) -> None:
    found, pull = over_tokens(kind)
    assert found == pytest.approx(value, abs=1e-6)
    assert pull.tolist() == pytest.approx(gradient, abs=1e-4)


def test_the_named_gradients_are_those_of_the_divergences() -> None:
    logits = THETA.clone().requires_grad_()
    policy, start = logits.log_softmax(0), START.log_softmax(0)
    reverse = (policy.exp() * (policy - start)).sum()
    forward = (start.exp() * (start - policy)).sum()
    assert (float(reverse.detach()), float(forward.detach())) == pytest.approx((0.131165, 0.142617), abs=1e-6)
    assert torch.autograd.grad(reverse, logits, retain_graph=True)[0].tolist() == pytest.approx(REVERSE, abs=1e-4)
    assert torch.autograd.grad(forward, logits)[0].tolist() == pytest.approx(FORWARD, abs=1e-4)
    # k1 as a loss: the mean over tokens of the gradient of l - r is that of the total probability, which is none
    again = THETA.clone().requires_grad_()
    pulled = torch.autograd.grad((THETA.softmax(0) * again.log_softmax(0)).sum(), again)[0]
    assert pulled.abs().max() < 1e-15


@pytest.mark.parametrize("kind", ["k3_ratio", "k1_in_reward"])
def test_ratios_keep_the_gradient_right_under_another_sampler(kind: str) -> None:
    _, pull = over_tokens(kind, torch.tensor([0.9, -0.5, 0.4], dtype=torch.float64))
    assert pull.tolist() == pytest.approx(REVERSE, abs=1e-4)
    _, biased = over_tokens("k2", torch.tensor([0.9, -0.5, 0.4], dtype=torch.float64))
    assert max(abs(a - b) for a, b in zip(biased.tolist(), REVERSE, strict=True)) > 0.01


def test_only_k1_in_the_reward_sees_where_a_token_leads() -> None:
    """Two tokens; the first decides how far the second is from the start model. All sequences are enumerated."""
    rng = np.random.default_rng(2)
    first, second = (torch.from_numpy(rng.normal(size=shape)) for shape in ((2,), (2, 2)))
    start_first, start_second = (torch.from_numpy(rng.normal(size=shape)) for shape in ((2,), (2, 2)))
    pairs = [(a, b) for a in range(2) for b in range(2)]

    def logprobs(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        """[8]: of both tokens of the four sequences, one after the other."""
        return torch.stack([x for a, b in pairs for x in (one.log_softmax(0)[a], two[a].log_softmax(0)[b])])

    leaf = first.clone().requires_grad_()
    flat, start = logprobs(leaf, second), logprobs(start_first, start_second)
    total = flat.reshape(4, 2).sum(1)
    divergence = (total.exp() * (total - start.reshape(4, 2).sum(1))).sum()
    expected = torch.autograd.grad(divergence, leaf, retain_graph=True)[0]
    weights = total.detach().exp().repeat_interleave(2)
    of = replace(batch([0.0] * 8, [0.0] * 8, np.repeat(np.arange(4), 2).tolist()), weights=weights,
                 sampler_logprobs=flat.detach())  # fmt: skip
    found = {}
    for kind in ("k1_in_reward", "k3_ratio"):
        out = ForwardOut(logprobs=flat, entropy=flat, ref_logprobs=start)
        loss = KLAnchor(coefficient=1.0, kind=kind).loss(out, of).loss  # type: ignore[arg-type]
        found[kind] = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    torch.testing.assert_close(found["k1_in_reward"], expected)
    assert (found["k3_ratio"] - expected).abs().max() > 0.01


# --- one denominator ----------------------------------------------------------------------------------------------------

VOCABULARY = 40
BAND = {"use": "entropy_band", "with": {"coefficient": 0.3, "over": "group"}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"aggregate": "sequence", "dual_clip": 3.0},
    "dr_grpo": {"advantage": "dr_grpo", "aggregate": "fixed", "fixed_length": 20},
    "rloo": {"advantage": "rloo", "loss": "tis", "regularizers": [{"use": "kl", "with": {"kind": "k1_in_reward"}}]},
    "tis sequence": {"loss": {"use": "tis", "with": {"level": "sequence"}}},
    "reinforce_pp": {"advantage": "reinforce_pp", "regularizers": [{"use": "kl", "with": {"kind": "k2"}}]},
    "dapo": {"clip": [0.2, 0.28], "shape": [{"use": "overlong", "with": {"max_tokens": 9, "cache": 5}}]},
    "gspo": {"loss": {"use": "gspo", "with": {"geo_clip": [0.1, 0.1]}}},
    "cispo": {"loss": {"use": "cispo", "with": {"is_max": 1.5}}},
    "topr": {"loss": "topr"},
    "spine": {"shape": ["fork_tokens"], "regularizers": [BAND, {"use": "kl", "with": {"kind": "k3_ratio"}}]},
    "forks, gspo": {"shape": [{"use": "fork_tokens", "with": {"over": "step"}}], "loss": "gspo"},
    "ear, limited": {"shape": ["ear", {"use": "limiting_confidence", "with": {"budget": 4}}, "adv_clip"]},
}


def step_of_groups(seed: int = 0) -> list[Scored]:
    """Three groups of four answers of 1 to 9 tokens."""
    rng, found = np.random.default_rng(seed), []
    for number in range(3):
        group = make_group(["x"] * 4, identifier=f"p{number}")
        rollouts = []
        for rollout in group.rollouts:
            count = int(rng.integers(1, 10))
            rollouts.append(
                replace(
                    rollout, token_ids=rng.integers(0, VOCABULARY, count).astype(np.int32),
                    logprobs=rng.normal(-1.5, 0.3, count).astype(np.float32),
                    entropy=rng.exponential(0.7, count).astype(np.float32),
                )
            )  # fmt: skip
        group = replace(group, rollouts=tuple(rollouts))
        found.append(make_scored([0, 0, 1, 1], [1.0, float(number), 0.0, 0.5], group=group))
    return found


def gradient(made: GRPO, batches: Sequence[PackedBatch]) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Sum of the losses under a model that gives every token id a log-prob and an entropy, and its gradient."""
    rng = np.random.default_rng(1)
    table = torch.from_numpy(np.stack([rng.normal(-1.5, 0.3, VOCABULARY), rng.exponential(0.7, VOCABULARY)]))
    table.requires_grad_()
    start = torch.from_numpy(rng.normal(-1.5, 0.3, VOCABULARY))
    total, metrics = 0.0, None
    for one in batches:
        ids = torch.as_tensor(one.completion_ids, dtype=torch.long)
        out = made.loss(
            ForwardOut(logprobs=table[0][ids], entropy=table[1][ids], ref_logprobs=start[ids]),
            tensors(one, torch.float64),
        )
        out.loss.backward()
        total += float(out.loss.detach())
        if metrics is None:
            metrics = out.metrics
        else:
            metrics.merge(out.metrics)
    assert table.grad is not None and metrics is not None
    return total, table.grad, metrics.values()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_and_ranks_change_neither_loss_nor_gradient(name: str) -> None:
    made: GRPO = build("objective", Plug.model_validate({"use": "grpo", "with": OBJECTIVES[name]}))
    samples, _ = made.finish([s for group in step_of_groups() for s in made.samples(group)], 0)
    whole = pack(samples, 10_000, made.denominator(samples))
    assert len(whole) == 1
    loss, expected, metrics = gradient(made, whole)
    assert expected.abs().max() > 1e-4
    for budget in (10_000, 40, 1):
        for ranks in (1, 2, 5):
            parts = pack(samples, budget, made.denominator(samples))
            dealt = deal(parts, ranks, lambda b: computed_tokens(b, shared_prompt=True))
            assert len(parts) > 1 or budget == 10_000
            found = gradient(made, [one for rank in dealt for one in rank])
            assert found[0] == pytest.approx(loss, rel=1e-9, abs=1e-12)
            torch.testing.assert_close(found[1], expected, rtol=1e-9, atol=1e-12)
            assert found[2] == pytest.approx(metrics, rel=1e-5, abs=1e-7)


def test_every_update_of_a_step_has_its_own_denominator() -> None:
    made: GRPO = build("objective", Plug.model_validate({"use": "grpo", "with": OBJECTIVES["dr_grpo"]}))
    samples, _ = made.finish([s for group in step_of_groups() for s in made.samples(group)], 0)
    seen: list[list[float]] = []

    def step(number: int, updates: Sequence[Sequence[PackedBatch]]) -> None:
        seen.extend([one.tokens_in_step for one in batches] for batches in updates)

    settings = SimpleNamespace(updates_per_step=2, tokens_per_microbatch=20)
    parts: Any = SimpleNamespace(
        recipe=SimpleNamespace(trainer=settings),
        objective=made,
        trainer=SimpleNamespace(step=step, shares_prompts=True),
    )
    update(parts, 0, samples)
    assert [set(share) for share in seen] == [{8 * 20.0}, {4 * 20.0}]
    assert all(len(share) > 1 for share in seen)


def test_samples_of_the_default_objective_are_untouched() -> None:
    made: GRPO = build("objective", Plug(use="grpo"))
    before: list[Sample] = made.samples(step_of_groups()[0])
    after, metrics = made.finish(before, 0)
    assert metrics.values() == {}
    for a, b in zip(before, after, strict=True):
        assert a.weights is b.weights and a.advantages is b.advantages and not b.extras
    assert made.denominator(after) == sum(len(s.weights) for s in before)
