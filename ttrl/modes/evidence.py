"""How much votes say about a rate: two e-processes, one against "the rate is at least b", one against "it is at most b".

Of n votes, s disagree. With the likelihood ratio of a rate q against the bound b

    L(q) = (q / b)^s * ((1 - q) / (1 - b))^(n - s)

the evidence that the rate is below b is the mean of L over a grid of q < b, and that it is above b the mean over q > b: bets on
a bounded variable with a mixture over the stakes (arXiv 2010.09686, section 4; the mixture is Robbins' of 1970). Each mean starts
at 1 and, while its hypothesis holds, is a nonnegative supermartingale from one look to the next, so by Ville's inequality it ever
reaches 1 / a with probability at most a, however often one looks and whenever one stops.

The votes need not share one rate. A look takes equally many votes of every canary, canary k disagreeing with rate d_k and mean
rate d. With t = q (1 - b) / (b (1 - q)) the factor of one vote is t^z (1 - q) / (1 - b), and independent votes give

    E[prod t^z_k] = prod (1 - d_k + d_k t) <= (1 - d + d t)^K

by the inequality of the means, which is at most (1 - b + b t)^K = ((1 - b) / (1 - q))^K when d >= b and t < 1 (q < b), and
likewise when d <= b and t > 1: the expectation of the whole factor is at most 1. So the bound is about the mean of the canaries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

GRID = 64
"""Alternatives on each side of the bound, evenly spaced. Any number is valid; more only sharpens the bet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Natural logarithms of the two e-values."""

    below: float
    """That the rate is below the bound."""
    above: float
    """That the rate is above it."""


def weigh(disagreeing: int, votes: int, bound: float) -> Evidence:
    """Golden: 0 of 10 against 0.5 -> below log(mean over the grid of (2 (1 - q))^10) = 5.22; no votes -> both 0."""
    assert 0 <= disagreeing <= votes and 0.0 < bound < 1.0
    middles = (np.arange(GRID) + 0.5) / GRID
    return Evidence(
        below=_mixture(disagreeing, votes, bound, bound * middles),
        above=_mixture(disagreeing, votes, bound, bound + (1.0 - bound) * middles),
    )


def _mixture(disagreeing: int, votes: int, bound: float, rates: np.ndarray) -> float:
    """log of the mean over `rates` [GRID] of the likelihood ratio, without overflow."""
    logs = disagreeing * np.log(rates / bound) + (votes - disagreeing) * np.log((1.0 - rates) / (1.0 - bound))
    highest = float(logs.max())
    return highest + math.log(float(np.exp(logs - highest).mean()))
