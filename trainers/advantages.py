"""Advantages of one group: rewards [R] of the trained rollouts -> advantages [R], in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rewards = npt.NDArray[np.floating]

EPS = 1e-6
"""Added to the standard deviation, as in verl and slime."""


def grpo(rewards: Rewards) -> npt.NDArray[np.float64]:
    """A_i = (r_i - mean) / (std + 1e-6) with the unbiased (n - 1) standard deviation (GRPO, arXiv 2402.03300; verl's form).

    Golden: [1, 1, 1, 0] -> [0.5, 0.5, 0.5, -1.5]. Equal rewards give exactly 0, and so does a group of one.
    """
    centred = dr_grpo(rewards)
    if not centred.any():
        return centred
    return np.asarray(centred / (np.std(np.asarray(rewards, np.float64), ddof=1) + EPS))


def dr_grpo(rewards: Rewards) -> npt.NDArray[np.float64]:
    """A_i = r_i - mean, without division by the spread (Dr. GRPO, arXiv 2503.20783). Equal rewards give exactly 0."""
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"advantages need a non-empty vector of finite rewards, got {rewards!r}")
    # Rounding of the mean must not invent an advantage where all rewards are equal
    if values.size == 1 or np.all(values == values[0]):
        return np.zeros_like(values)
    return np.asarray(values - values.mean())


def rloo(rewards: Rewards) -> npt.NDArray[np.float64]:
    """A_i = r_i - mean of the others = R / (R - 1) * (r_i - mean) (RLOO, arXiv 2402.14740): an unbiased baseline, no spread.

    Golden: six 1 and two 0 -> 0.2857, -0.8571. A group of one has nobody to compare with and gets 0 (in verl that depends on which of
    its two implementations is used).
    """
    centred = dr_grpo(rewards)
    return centred if centred.size == 1 else np.asarray(centred * (centred.size / (centred.size - 1)))
