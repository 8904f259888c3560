"""TTRV (arXiv 2510.06783): the limits of its reward, when the entropy term acts, and which way the frequency term pushes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import boxed, context, make_group
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrl.rewards.soft import FrequencyEntropy, SoftVote
from ttrl.trainers.advantages import dr_grpo, grpo
from ttrl.trainers.reinforce_pp import whiten

answer_lists = st.lists(st.sampled_from("ABCD"), min_size=4, max_size=16)


def rewards(answers: list[str], **options: object) -> np.ndarray:
    return FrequencyEntropy(**options)(make_group(boxed(answers)), context()).rewards  # type: ignore[arg-type]


@pytest.mark.parametrize("normalised", [False, True])
def test_one_answer_is_paid_one_and_different_answers_what_the_formula_says(normalised: bool) -> None:
    assert rewards(["A"] * 6, normalised=normalised).tolist() == [1.0] * 6
    assert not grpo(rewards(["A"] * 6, normalised=normalised)).any()
    for n in (2, 4, 8):
        expected = 1 / n - 0.75 * (1.0 if normalised else math.log(n))
        scored = FrequencyEntropy(normalised=normalised)(make_group(boxed(list(range(n)))), context())
        assert scored.rewards.tolist() == pytest.approx([expected] * n, abs=1e-6)
        assert not scored.train.any()  # no two agree


@settings(max_examples=60)
@given(answer_lists, st.sampled_from([0.25, 0.75, 3.0]), st.booleans())
def test_within_a_group_the_published_entropy_term_changes_nothing(
    answers: list[str], alpha: float, normalised: bool
) -> None:
    with_term, without = rewards(answers, alpha=alpha, normalised=normalised), rewards(answers, alpha=0.0)
    assert np.abs(dr_grpo(with_term) - dr_grpo(without)).max() < 1e-6
    assert np.abs(grpo(with_term) - grpo(without)).max() < 1e-4  # rewards are float32, and the spread divides them


def test_over_a_batch_the_same_term_acts() -> None:
    """Two groups under whitening over the step: the term pushes the group that agrees up and the other down."""
    agreed, split = ["A", "A", "A", "B"], ["A", "A", "B", "C"]

    def advantages(alpha: float) -> np.ndarray:
        return whiten(np.concatenate([rewards(agreed, alpha=alpha), rewards(split, alpha=alpha)]))

    shift = advantages(0.75) - advantages(0.0)
    assert np.abs(shift).max() > 0.1
    assert shift[:4].sum() > 0.1 and shift[4:].sum() < -0.1
    expected = np.array([0.75] * 3 + [0.25] + [0.5, 0.5, 0.25, 0.25])
    h = [-(3 * math.log(0.75) + math.log(0.25)) / 4 / math.log(2), 1.039721 / math.log(3)]
    expected -= 0.75 * np.repeat(h, 4)
    assert advantages(0.75) == pytest.approx((expected - expected.mean()) / expected.std(ddof=1), abs=1e-5)


@settings(max_examples=60)
@given(st.lists(answer_lists, min_size=2, max_size=5))
def test_under_the_mean_of_the_batch_every_group_moves_by_its_own_entropy(groups: list[list[str]]) -> None:
    """Whitening also divides, which can undo that: AAAA and AABB differ in entropy, but term and frequency are in line."""
    with_term = dr_grpo(np.concatenate([rewards(g, alpha=0.75) for g in groups]))
    without = dr_grpo(np.concatenate([rewards(g, alpha=0.0) for g in groups]))
    counts = [np.unique(g, return_counts=True)[1] for g in groups]
    h = [0.0 if len(n) == 1 else float(-(n / n.sum() * np.log(n / n.sum())).sum() / np.log(len(n))) for n in counts]
    terms = np.repeat(h, [len(g) for g in groups])
    assert with_term - without == pytest.approx(-0.75 * (terms - terms.mean()), abs=1e-6)


def policy_gradient(reward: object, logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Gradient of mean(A_i log pi(a_i)) on one group with so many of each answer."""
    answers = [a for a, n in enumerate(counts) for _ in range(n)]
    paid = reward(make_group(boxed(answers)), context()).rewards  # type: ignore[operator]
    chosen = torch.log_softmax(logits, 0)[torch.tensor(answers)]
    (gradient,) = torch.autograd.grad((torch.from_numpy(dr_grpo(paid)) * chosen).mean(), logits)
    return gradient


@pytest.mark.parametrize("counts", [[5, 3, 2], [7, 1, 1, 1], [4, 4, 2], [2, 2, 2, 2]])
def test_on_a_bandit_frequency_climbs_half_the_sum_of_squared_probabilities(counts: list[int]) -> None:
    """When the group has the policy's own shares: sum_a p_a (p_a - sum p^2) grad log p_a = grad sum p^2 / 2, exactly."""
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    logits = shares.log().requires_grad_()
    (expected,) = torch.autograd.grad(torch.softmax(logits, 0).square().sum() / 2, logits)
    for reward in (SoftVote(), FrequencyEntropy(alpha=0.75)):
        assert policy_gradient(reward, logits, counts).numpy() == pytest.approx(expected.numpy(), abs=1e-7)


def test_with_sampled_groups_the_mean_update_points_the_same_way() -> None:
    """400 groups of 32: leave-one-out shares estimate p without bias, so the mean gradient is grad sum p^2 / 2 up to (n - 1) / n."""
    rng = np.random.default_rng(0)
    logits = torch.tensor([1.0, 0.4, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    p = torch.softmax(logits, 0)
    (expected,) = torch.autograd.grad(p.square().sum() / 2, logits)
    drawn = rng.multinomial(32, p.detach().numpy(), size=400)
    reward = SoftVote(leave_one_out=True)
    mean = torch.stack([policy_gradient(reward, logits, counts.tolist()) for counts in drawn]).mean(0)
    assert torch.cosine_similarity(mean, expected, dim=0) > 0.99
    assert float(mean.norm() / expected.norm()) == pytest.approx(31 / 32, abs=0.1)
