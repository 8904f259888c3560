"""Progress: how much nearer to the answer an episode brought a rollout. Pure numpy, float64; formulas of MRT (arXiv 2503.07572).

J [k + 1] holds the chance of a right answer when thinking is stopped after 0, 1, ..., k episodes. The last one is the rollout's
own reward; the others are estimated by forced answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


def progress(chances: Sequence[float] | Values) -> Values:
    """[k + 1] -> [k]: r_j = J_{j+1} - J_j. The sum telescopes to J_k - J_0.

    Golden: [.10, .25, .40, .35, .75] -> [.15, .15, -.05, .40], sum .65.
    """
    values = np.asarray(chances, np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise ValueError(f"progress needs at least two finite chances, got {chances!r}")
    return np.diff(values)


def beyond_termination(rewards: Sequence[float] | Values, terminated: Sequence[float] | Values) -> Values:
    """R - R_termination: rewards [R] of rollouts that went on after a prefix, less the mean reward [m] of those stopped there.

    Golden: rewards [1, 1, 0, 1], terminated [0, 1, 0, 0] -> [.75, .75, -.25, .75].
    """
    stopped = np.asarray(terminated, np.float64)
    if stopped.size == 0:
        raise ValueError("R - R_termination needs at least one terminated answer")
    return np.asarray(np.asarray(rewards, np.float64) - stopped.mean())


def on_tokens(bonus: Sequence[float] | Values, cuts: Sequence[int], tokens: int) -> Values:
    """[tokens]: bonus j stands on the tokens from cut j to cut j + 1, the last one up to the end; nothing before cut 0.

    Golden: bonus [.5, -1], cuts [1, 3], 4 tokens -> [0, .5, .5, -1].
    """
    if len(bonus) != len(cuts) or list(cuts) != sorted(cuts) or not all(0 <= cut <= tokens for cut in cuts):
        raise ValueError(f"{len(bonus)} bonuses for the cuts {list(cuts)} of {tokens} tokens")
    spread = np.zeros(tokens)
    for value, start, stop in zip(bonus, cuts, [*cuts[1:], tokens], strict=True):
        spread[start:stop] = value
    return spread
