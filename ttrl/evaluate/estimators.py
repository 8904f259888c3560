"""Unbiased estimators over n samples per prompt, and bootstrap intervals over prompts. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
CONFIDENCE = 0.95
Z95 = 1.959963984540054


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): chance that one of k samples, drawn without replacement, is right (arXiv 2107.03374).

    Golden: n = 50, c = 5, k = 10 -> 0.689437; n = 4, c = 1, k = 2 -> 0.5.
    """
    _check(n, k)
    return 1.0 - comb(n - correct, k) / comb(n, k)


def maj_at_k(counts: Sequence[int], correct_class: int | None, no_answer: int, k: int) -> float:
    """Chance that the plurality answer of k of the n samples, drawn without replacement, is right.

    counts: samples per answer class; `correct_class` indexes the right one (None: it was never given). Samples without an answer
    are drawn but do not vote. Ties are broken at random, so a tie of m classes counts 1/m. Exact, by counting the draws.
    """
    n = sum(counts) + no_answer
    _check(n, k)
    if correct_class is None:
        return 0.0
    others = [count for index, count in enumerate(counts) if index != correct_class]
    favourable = 0.0
    for votes in range(1, min(counts[correct_class], k) + 1):
        ways = _draws(others, no_answer, votes, k - votes)
        favourable += comb(counts[correct_class], votes) * sum(number / (1 + tied) for tied, number in enumerate(ways))
    return favourable / comb(n, k)


def _draws(others: Sequence[int], no_answer: int, votes: int, size: int) -> list[float]:
    """Ways to draw `size` samples from the other classes with at most `votes` of each, by how many classes reach `votes`."""
    table = np.zeros((size // votes + 1, size + 1))  # [tied, drawn] -> number of ways so far
    for drawn in range(min(no_answer, size) + 1):
        table[0, drawn] = comb(no_answer, drawn)
    for count in others:
        fewer = [float(comb(count, j)) for j in range(min(count, votes - 1, size) + 1)]
        new = np.zeros_like(table)
        for drawn, number in enumerate(fewer):
            new[:, drawn:] += number * table[:, : size + 1 - drawn]
        if count >= votes and size >= votes:
            new[1:, votes:] += comb(count, votes) * table[:-1, : size + 1 - votes]
        table = new
    return [float(number) for number in table[:, size]]


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the number of samples {n}, got {k}")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927). Golden: 3 of 10 -> 0.1078, 0.6032; 0 of 10 -> 0, 0.2775."""
    z2 = Z95 * Z95
    centre = (successes + z2 / 2) / (n + z2)
    half = Z95 / (n + z2) * sqrt(successes * (n - successes) / n + z2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: npt.NDArray[np.float64], seed: int) -> tuple[float, float] | None:
    """95 % percentile interval of the mean over prompts [n]; None for fewer than two prompts."""
    if len(values) < 2:
        return None
    rng = np.random.Generator(np.random.Philox(key=seed))
    # In blocks, because [resamples, n] would be large for many prompts
    blocks = [values[rng.integers(len(values), size=(500, len(values)))].mean(axis=1) for _ in range(RESAMPLES // 500)]
    means = np.concatenate(blocks)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
