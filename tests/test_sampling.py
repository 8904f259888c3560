"""From logits to tokens: what is drawn, how often, and with which log-prob."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ttrl.model.sampling import draw, truncated
from ttrl.seeds import uniforms
from ttrl.types import SamplingSpec


def spec(**fields: float | int | bool) -> SamplingSpec:
    return SamplingSpec(max_new_tokens=1, **fields)  # type: ignore[arg-type]


def counts(logits: torch.Tensor, sampling: SamplingSpec, rows: int = 20_000, seed: int = 5) -> np.ndarray:
    uniform = torch.from_numpy(uniforms(seed, rows))
    drawn = draw(logits.expand(rows, -1), uniform, sampling)
    return np.bincount(drawn.tokens.numpy(), minlength=logits.shape[-1])


def random_logits(rows: int, width: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=spread, size=(rows, width)).astype(np.float32))


def support(probs: list[float], **fields: float) -> list[int]:
    kept = truncated(torch.tensor([probs]), spec(**fields))[0]
    return kept.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draw_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = random_logits(1, 12, seed=1, spread=1.0)
    expected = torch.softmax(logits[0].double() / temperature, dim=-1).numpy()
    seen = counts(logits, spec(temperature=temperature))
    assert chisquare(seen, expected / expected.sum() * seen.sum()).pvalue > 1e-3
    other = torch.softmax(logits[0].double() / (temperature * 1.2), dim=-1).numpy()
    assert chisquare(seen, other / other.sum() * seen.sum()).pvalue < 1e-6  # the sample is large enough to notice


def test_truncated_draws_follow_the_renormalised_softmax() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    seen = counts(logits, spec(top_k=3))
    assert seen[3] == 0
    assert chisquare(seen[:3], np.array([4, 3, 2]) / 9 * seen.sum()).pvalue > 1e-3


def test_inverse_cdf_golden_numbers() -> None:
    # Cumulative masses 0.25, 0.75, 1: a number on an edge belongs to the token above the edge
    logits = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log().float().expand(6, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-24], dtype=torch.float64)
    assert draw(logits, uniform, spec()).tokens.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.5}, {"top_k": 2}])
def test_tokens_of_probability_zero_are_never_drawn(fields: dict[str, float]) -> None:
    impossible = -torch.inf
    logits = torch.tensor([[impossible, 0.0, -200.0, 1.0, impossible]])
    edges = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1 - 2.0**-23], dtype=torch.float64)
    drawn = draw(logits.expand(5, -1), edges, spec(entropy=True, **fields))
    assert set(drawn.tokens.tolist()) <= {1, 3}
    assert torch.isfinite(drawn.logprobs).all()
    assert drawn.entropy is not None and torch.isfinite(drawn.entropy).all()


def test_the_largest_uniform_never_leaves_a_wide_vocabulary() -> None:
    # 150,000 small masses: the rounding of their sum is what could push the target past the last token
    logits = random_logits(4, 150_000, seed=3, spread=1.0)
    uniform = torch.full((4,), 1 - 2.0**-24, dtype=torch.float64)
    drawn = draw(logits, uniform, spec())
    assert (drawn.tokens < 150_000).all() and torch.isfinite(drawn.logprobs).all()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_and_entropy_equal_double_precision(temperature: float) -> None:
    logits = random_logits(64, 50, seed=2, spread=3.0)
    drawn = draw(logits, torch.from_numpy(uniforms(9, 64)), spec(temperature=temperature, entropy=True))
    table = torch.log_softmax(logits.double() / temperature, dim=-1)
    torch.testing.assert_close(
        drawn.logprobs.double(), table.gather(1, drawn.tokens[:, None])[:, 0], rtol=1e-6, atol=2e-6
    )
    torch.testing.assert_close(drawn.entropy.double(), -(table.exp() * table).sum(-1), rtol=1e-5, atol=1e-5)
    assert drawn.logprobs.dtype == torch.float32


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = random_logits(8, 20, seed=4).bfloat16()
    drawn = draw(logits, torch.from_numpy(uniforms(1, 8)), spec(temperature=0.7))
    expected = torch.log_softmax(logits.double() / 0.7, dim=-1).gather(1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs.double(), expected, rtol=1e-6, atol=2e-6)


def test_logprobs_of_truncated_draws_are_those_of_the_full_softmax() -> None:
    logits = random_logits(32, 10, seed=6)
    drawn = draw(logits, torch.from_numpy(uniforms(2, 32)), spec(top_k=2, temperature=0.8))
    expected = torch.log_softmax(logits / 0.8, dim=-1).gather(1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs, expected)


def test_entropy_golden_numbers() -> None:
    # Uniform over 4 is ln 4; two equal tokens among impossible ones is ln 2; one certain token is 0
    gone = -torch.inf
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, gone, 1.0, gone], [0.0, gone, gone, gone]])
    entropy = draw(logits, torch.zeros(3, dtype=torch.float64), spec(entropy=True)).entropy
    torch.testing.assert_close(entropy, torch.tensor([math.log(4), math.log(2), 0.0]))


def test_self_certainty_golden_numbers() -> None:
    # KL(U || p) by hand. 1/2 1/4 1/8 1/8: -(ln 2 + 0 - ln 2 - ln 2) / 4. A masked token does not count: 1/2 1/4 1/4 of three is
    # -(ln 1.5 + 2 ln .75) / 3. Uniform, and the only possible token, are 0.
    gone = -torch.inf
    masses = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.25, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    drawn = draw(masses.log() + 3.0, torch.zeros(4, dtype=torch.float64), spec(self_certainty=True))
    torch.testing.assert_close(drawn.self_certainty, torch.tensor([math.log(2) / 4, 0.0566330, 0.0, 0.0]))
    assert masses.log()[1, 3] == gone


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_self_certainty_equals_the_divergence_in_double_precision(temperature: float) -> None:
    logits = random_logits(64, 5000, seed=12, spread=4.0)
    logits[::2, 4000:] = -torch.inf  # a padded vocabulary
    drawn = draw(logits, torch.from_numpy(uniforms(9, 64)), spec(temperature=temperature, self_certainty=True))
    assert drawn.self_certainty is not None and drawn.self_certainty.dtype == torch.float32
    for row, value in zip(logits.double() / (temperature or 1.0), drawn.self_certainty.tolist(), strict=True):
        possible = torch.log_softmax(row[row > -torch.inf], dim=-1)
        uniform = torch.full_like(possible, 1 / len(possible))
        twin = torch.nn.functional.kl_div(possible, uniform, reduction="sum").item()
        assert value == pytest.approx(twin, rel=1e-5)


def test_self_certainty_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[0.0, -1e30, 50.0], [1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]])
    certainty = draw(
        logits, torch.zeros(3, dtype=torch.float64), spec(self_certainty=True, temperature=0.7)
    ).self_certainty
    assert certainty is not None and torch.isfinite(certainty).all() and (certainty >= 0).all()


def test_entropy_and_self_certainty_are_only_computed_on_request() -> None:
    drawn = draw(torch.zeros(2, 3), torch.zeros(2, dtype=torch.float64), spec())
    assert drawn.entropy is None and drawn.self_certainty is None


def test_greedy_takes_the_first_of_the_largest_and_scores_at_temperature_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    for uniform in (0.0, 0.999):
        drawn = draw(logits, torch.tensor([uniform], dtype=torch.float64), spec(temperature=0.0))
        assert drawn.tokens.tolist() == [1]
        torch.testing.assert_close(drawn.logprobs, torch.log_softmax(logits, -1)[:, 1])


def test_top_k_support() -> None:
    assert support([0.1, 0.4, 0.2, 0.3], top_k=2) == [1, 3]
    assert support([0.25, 0.25, 0.25, 0.25], top_k=2) == [0, 1]  # exactly k, the first of equals
    assert support([0.1, 0.9], top_k=5) == [0, 1]


def test_top_p_support() -> None:
    # Kept while the mass before a token is below p: 0, 0.5, 0.8, 0.95
    probs = [0.05, 0.5, 0.15, 0.3]
    assert support(probs, top_p=0.45) == [1]
    assert support(probs, top_p=0.55) == [1, 3]
    assert support(probs, top_p=0.85) == [1, 2, 3]
    assert support(probs, top_p=0.97) == [0, 1, 2, 3]


def test_min_p_support() -> None:
    # Threshold is min_p times the largest, 0.5: 0.15 and 0.35
    probs = [0.05, 0.5, 0.2, 0.25]
    assert support(probs, min_p=0.3) == [1, 2, 3]
    assert support(probs, min_p=0.7) == [1]


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    # Of 0.4, 0.3, 0.2 that remain, the first two hold 7/9 = 0.78 >= 0.75, although they hold only 0.7 of everything
    assert support([0.4, 0.3, 0.2, 0.1], top_k=3, top_p=0.75) == [0, 1]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1}, {"top_k": 7}, {"top_p": 0.1}, {"top_p": 0.9}, {"min_p": 0.05}, {"min_p": 0.5},
        {"top_k": 6, "top_p": 0.8}, {"top_k": 20, "top_p": 0.95, "min_p": 0.02}, {"top_k": 3, "min_p": 0.3},
    ],
)  # fmt: skip
def test_supports_equal_those_of_transformers(fields: dict[str, float]) -> None:
    logits, temperature = random_logits(200, 40, seed=8), 0.7
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if "top_k" in fields:
        scores = TopKLogitsWarper(int(fields["top_k"]))(None, scores)
    if "top_p" in fields:
        scores = TopPLogitsWarper(fields["top_p"])(None, scores)
    if "min_p" in fields:
        scores = MinPLogitsWarper(fields["min_p"])(None, scores)
    ours = truncated(torch.softmax(logits / temperature, dim=-1), spec(**fields)) > 0
    assert torch.equal(ours, scores > -torch.inf)


def test_truncation_keeps_the_probabilities_of_what_stays() -> None:
    probs = torch.softmax(random_logits(20, 15, seed=10), dim=-1)
    cut = truncated(probs, spec(top_k=4, top_p=0.9))
    assert torch.equal(cut[cut > 0], probs[cut > 0])
    assert ((cut > 0).sum(-1) >= 1).all() and ((cut > 0).sum(-1) <= 4).all()
