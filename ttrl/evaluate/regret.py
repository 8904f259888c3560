"""Normalised regret and token efficiency: how soon would the model have been right, had it been stopped? (MRT, arXiv 2503.07572.)

For each trace, forced answers at its cut points give accuracy against tokens: a curve from (0, 0), linear between points, flat
after the last. Regret at a budget is the area above it, divided by the budget: 0 for a model that is right at once, 1 for one
that is not right within it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ttrl.evaluate.estimators import CONFIDENCE

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """One trace: accuracy `y` in [0, 1] after `x` tokens, x increasing and above 0. (0, 0) is implied."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def at(self, tokens: npt.ArrayLike) -> Values:
        """Accuracy after so many tokens."""
        return np.asarray(np.interp(np.asarray(tokens, np.float64), [0.0, *self.x], [0.0, *self.y]))


def curve(tokens: Sequence[float], accuracies: Sequence[float]) -> Curve:
    """Points in any order; where two lie at one number of tokens their mean counts. Raises ValueError for impossible points."""
    if len(tokens) != len(accuracies) or not tokens:
        raise ValueError(f"{len(tokens)} token counts for {len(accuracies)} accuracies")
    points = np.asarray(tokens, np.float64), np.asarray(accuracies, np.float64)
    if not np.isfinite(points[0]).all() or points[0].min() <= 0 or points[1].min() < 0 or points[1].max() > 1:
        raise ValueError(f"points need tokens above 0 and accuracies in [0, 1], got {tokens} and {accuracies}")
    x, places = np.unique(points[0], return_inverse=True)
    y = np.bincount(places, weights=points[1]) / np.bincount(places)
    return Curve(tuple(x.tolist()), tuple(y.tolist()))


def normalised_regret(points: Curve, budget: float) -> float:
    """1 - area under the curve from 0 to `budget`, divided by `budget`.

    Golden: points (1000, .5), (2000, 1): budget 4000 -> .25; budget 1500 -> .625.
    """
    if budget <= 0:
        raise ValueError(f"the budget must be above 0 tokens, got {budget}")
    x = np.asarray([0.0, *(v for v in points.x if v < budget), budget])
    return 1.0 - float(np.trapezoid(points.at(x), x)) / budget


def tokens_to_reach(curves: Sequence[Sequence[Curve]], accuracy: float) -> float | None:
    """Smallest number of tokens at which the mean curve (over the traces of a prompt, then over prompts) has this accuracy.

    Exact: the mean of piecewise linear curves is one, with the breakpoints of all. None when it never does.
    Golden: curves through (10, 1) and through (30, 1): the mean has .75 at 15.
    """
    if not 0 < accuracy <= 1:
        raise ValueError(f"the accuracy must be above 0 and at most 1, got {accuracy}")
    grid, heights = mean_curve(curves)
    return first_reach(grid, heights.mean(axis=0), accuracy)


def mean_curve(curves: Sequence[Sequence[Curve]]) -> tuple[Values, Values]:
    """Breakpoints [G], from 0, and the accuracy of each prompt there [prompts, G]."""
    grid = np.unique([0.0, *(x for own in curves for c in own for x in c.x)])
    return grid, np.stack([np.mean([c.at(grid) for c in own], axis=0) for own in curves])


def first_reach(grid: Values, heights: Values, accuracy: float) -> float | None:
    """First crossing of a piecewise linear curve [G] that starts at 0; None without one."""
    above = np.flatnonzero(heights >= accuracy - 1e-12)
    if not above.size:
        return None
    i = int(above[0])  # i > 0, because the curve starts at 0
    rise = heights[i] - heights[i - 1]
    return float(grid[i - 1] + (accuracy - heights[i - 1]) / rise * (grid[i] - grid[i - 1]))


def reach_interval(
    curves: Sequence[Sequence[Curve]], accuracy: float, seed: int, resamples: int = 1000
) -> tuple[float, float] | None:
    """95 % percentile interval of `tokens_to_reach` over prompts; None when more than 2.5 % of the resamples never reach it."""
    if len(curves) < 2:
        return None
    grid, heights = mean_curve(curves)
    rng = np.random.Generator(np.random.Philox(key=seed))
    found = []
    for _ in range(resamples):
        chosen = rng.integers(len(curves), size=len(curves))
        reached = first_reach(grid, heights[chosen].mean(axis=0), accuracy)
        found.append(np.inf if reached is None else reached)
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="inverted_cdf")
    return (float(low), float(high)) if np.isfinite(high) else None
